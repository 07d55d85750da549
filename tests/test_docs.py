"""The README's commands, flags, files and log keys exist."""

import importlib
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {p.stem: p.read_text() for p in ROOT.glob("*.py")}


def flags_of(script):
    return {"--" + f.name.replace("_", "-") for f in fields(importlib.import_module(script).Args)}


def test_every_command_in_the_readme_names_a_script_and_flags_that_exist():
    commands = re.findall(r"python (\w+)\.py([^\n`]*)", README + "".join(SCRIPTS.values()))
    assert commands
    for script, rest in commands:
        known = flags_of(script)
        for flag in re.findall(r"--[a-z][\w-]*", rest):
            assert flag in known or "--" + flag.removeprefix("--no-") in known, f"{script}.py has no {flag}"


def test_every_flag_in_the_readme_belongs_to_a_script():
    known = {"--help"}.union(*(flags_of(s) for s in SCRIPTS))
    for flag in re.findall(r"`(--[a-z][\w-]*)", README):
        assert flag in known or "--" + flag.removeprefix("--no-") in known, flag


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make (\w+)`", README)) | {"demo", "test"} <= targets


def test_every_script_has_a_row_in_the_readme():
    assert all(f"`{name}.py`" in README for name in SCRIPTS)


def test_no_placeholder_is_left():
    assert "<!--" not in README and "TODO" not in README + "".join(SCRIPTS.values())


def test_every_equation_names_a_function_and_a_test_that_exist():
    code = "".join(p.read_text() for p in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")])
    tests = "".join(p.read_text() for p in ROOT.glob("tests/test_*.py"))
    for name in SCRIPTS:
        doc = importlib.import_module(name).__doc__
        equations, checked = doc.split("EQUATIONS")[1].split("CHECKED BY")
        checked = checked.split("\n\n")[0]
        numbers = re.findall(r"^  \[(\d+)\]", equations, re.M)
        assert numbers == [str(k + 1) for k in range(len(numbers))] == re.findall(r"^  \[(\d+)\]", checked, re.M), name
        for function in re.findall(r"-> ([A-Za-z_.]+)", equations):
            assert re.search(rf"(def|class) {function.split('.')[-1]}\b", code), (name, function)
        assert len(re.findall(r"-> ", equations)) >= len(numbers)
        for test in re.findall(r"(test_\w+)", checked):
            assert f"def {test}(" in tests, (name, test)


def test_every_table_of_make_results_stands_in_the_readme_below_its_command():
    from common import results
    for method, data, flags, picture in results.COMMANDS:
        assert results.put(README, results.command(method, flags), ["| x |"]).count("\n| x |\n") == 1, (method, flags)
        assert not picture or f"](figures/{method}-{data}.png)" in README, (method, data)


def test_every_picture_in_the_readme_is_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / p).is_file() for p in pictures)


def test_the_gain_over_a_row_is_the_mean_of_the_differences_seed_by_seed():
    from common import metrics, results
    rows = {"din, none 0": {"AUC": metrics.summary([0.5, 0.7]), "cold": metrics.summary([0.1, 0.1])},
            "din, gate 0.1": {"AUC": metrics.summary([0.6, 0.9]), "gate AUC": metrics.summary([1, 1])},
            "dcn, none 0": {"AUC": metrics.summary([0.5, 0.5])}, "dcn, gate 0.3": {"AUC": metrics.summary([0.5, 0.6])}}
    gains = results.against(rows, "none")
    assert list(gains) == ["din, gate 0.1", "dcn, gate 0.3", "mean, gate"] and list(gains["din, gate 0.1"]) == ["AUC"]
    assert [g["AUC"]["values"] for g in gains.values()] == [[0.1, 0.2], [0.0, 0.1], [0.05, 0.15]]
    assert gains["din, gate 0.1"]["AUC"]["mean"] == 0.15 and gains["din, gate 0.1"]["AUC"]["std"] == pytest.approx(0.1 / 2**0.5, abs=1e-6)
    plain = {"no LLM": rows["din, none 0"], "judge all": rows["dcn, none 0"], "judge": rows["din, gate 0.1"]}
    assert list(results.against(plain, "no LLM")) == ["judge all", "judge"] and list(results.against(plain, "judge")) == ["no LLM", "judge all"]
    with pytest.raises(ValueError, match="no row twos"):
        results.against(rows, "twos")


def test_gains_are_printed_for_finished_tables_and_what_is_missing_is_said(tmp_path, capsys):
    from common import metrics, results
    rows = {"off 0": {"AUC": metrics.summary([0.5, 0.7])}, "swap 1": {"AUC": metrics.summary([0.4, 0.5])}}
    table, gains = tmp_path / "a.json", lambda base: results.print_gains(["a", "b"], base, tmp_path)
    with pytest.raises(SystemExit, match="no table a or b; run make results"):
        gains("off")
    table.write_text(json.dumps({"ablations": rows}))
    gains("off")
    assert "| swap 1 | -0.150 ± 0.071 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="a: no row on"):
        gains("on")
    table.write_text(json.dumps({"ablations": {name: {"AUC": {"mean": 0.5, "std": None}} for name in rows}}))
    with pytest.raises(SystemExit, match="earlier version"):
        gains("off")


def test_the_table_of_make_bench_is_that_of_its_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    bench = importlib.import_module("bench")
    results = json.loads((ROOT / "tests" / "bench" / "results.json").read_text())
    assert "\n".join(bench.table(results)) in README and len(results["rows"]) == len(bench.ROWS)


def test_the_tables_of_the_readme_are_those_of_figures(tmp_path):
    from common import results
    shutil.copytree(ROOT / "figures", tmp_path / "figures")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    done = results.render(tmp_path / "README.md", base=tmp_path)
    assert len(done) >= 7 and (tmp_path / "README.md").read_text(encoding="utf-8") == README


def test_the_overview_shows_the_values_of_the_tables_by_seed(tmp_path):
    from common import results
    kept = ROOT / "figures"
    found, rows = results.panels(kept), lambda name: json.loads((kept / f"{name}.json").read_text())["ablations"]
    assert len(found) == len(results.PANELS) and all(len(values) == 3 for panel in found.values() for values in panel.values())
    assert found["CoCo, toy world: AUC"]["no LLM"] == rows("coco-toy")["no LLM"]["overall"]["values"]
    models = ("deepfm", "dcnv2", "autoint", "dcn", "din", "xdeepfm")
    gain = [[rows("sllmr-toy")[f"{m}, {v}"]["cold"]["values"] for v in ("ones 0.1", "none 0")] for m in models]
    assert found["S-LLMR, toy world, cold users:\nAUC over no LLM"]["no gate"] == pytest.approx([sum(o[s] - n[s] for o, n in gain) / 6 for s in range(3)], abs=1e-5)
    pytest.importorskip("matplotlib")
    results.overview(dict(list(found.items())[:5]), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_tables_are_written_from_files_and_writing_them_again_changes_nothing(tmp_path):
    from common import results
    method, data, flags, _ = results.COMMANDS[0]
    folder = tmp_path / results.folder(method, data)
    folder.mkdir(parents=True)
    (folder / "table.json").write_text('{"ablations": {"full": {"NDCG@10": {"mean": 0.12345, "std": 0.01}}, "none": {"AUC": {"mean": 44, "std": null}}},'
                                     '"seeds": [0, 1], "runs": 4, "minutes": 12, "commits": ["abc"]}')
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert results.render(readme, results.COMMANDS, tmp_path) == [f"{method}-{data}"] and (tmp_path / "figures" / f"{method}-{data}.json").exists()
    first = readme.read_text()
    assert "| full | 0.123 ± 0.010 |  |" in first and "| none |  | 44.0 |\n\nSeeds 0, 1; 4 runs, 12 minutes in all; commit abc.\n\n" in first
    results.render(readme, results.COMMANDS, tmp_path)
    assert readme.read_text() == first
