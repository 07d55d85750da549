"""common/report.py: pages from run folders, whose texts are data; numbers in the README that come from files."""

import json
import xml.etree.ElementTree
from html.parser import HTMLParser

import pytest

from common import report


class Strict(HTMLParser):
    """Collects tags and refuses scripts and anything fetched from elsewhere."""

    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert tag != "script" and all(not k.startswith("on") for k, _ in attributes)
        assert all(v is None or "//" not in v for k, v in attributes if k in ("src", "href"))


def run_folder(path, script, seed=0, **result):
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps({"script": script, "seed": seed, "test": {"auc": 0.5 + seed / 10}, "valid": {"auc": 0.5}} | result))
    (path / "header.json").write_text(json.dumps({"command": "lcft.py --data <x>", "device": "cpu"}))
    (path / "args.json").write_text(json.dumps({"seed": seed}))
    (path / "metrics.jsonl").write_text("".join(json.dumps({"phase": "p", "step": s, "valid_auc": 0.5 + s / 10 + seed / 10}) + "\n" for s in (1, 2, 3)))
    return path


EVIL = "</summary><script>alert(1)</script>"


@pytest.mark.parametrize("script", ["lcft", "curec", "sllmr", "coco", "else"])
def test_every_methods_page_holds_its_numbers_and_no_markup_of_others(tmp_path, script):
    folder = run_folder(tmp_path / "r", script, test_without_llm={"auc": 0.4}, gate_map={"history": ["1–2"], "popularity": ["0–9"], "alpha": [[0.25]]})
    lines = {"contradictions": {"user": EVIL, "title": EVIL, "truth": "like", "liked": [EVIL], "disliked": [], "asked": {EVIL: EVIL}},
             "codes": {"code": 0, "texts": 3, "nearest_tokens": [EVIL], "typical_users": [{"user": "u", "titles": [EVIL]}]},
             "examples": {"user": EVIL, "history": [EVIL], "pattern": EVIL, "top": [{"title": EVIL, "score": 1.0, "reasons": [{"weight": 0.5, "text": EVIL}]}]}}
    for name, line in lines.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    report.main([str(folder)])
    page = (folder / "report.html").read_text()
    parser = Strict()
    parser.feed(page)
    assert "svg" in parser.tags and ">0.5000<" in page and "<x>" not in page
    if script in ("lcft", "curec", "coco"):
        assert "&lt;script&gt;" in page
    if script == "sllmr":
        assert ">0.25</td>" in page


def test_a_comparison_has_a_row_per_setting_and_a_band_over_seeds(tmp_path):
    folders = [run_folder(tmp_path / f"s{s}" / name, "lcft", s) for s in (0, 1) for name in ("a", "b")]
    page = report.compare(folders)
    assert page.count("0.550 ± 0.071") == 2 and "<polygon" in page and "What differs" not in page
    Strict().feed(page)


def test_a_comparison_shows_the_flags_that_differ_and_no_pictures_of_other_runs(tmp_path):
    folders = [run_folder(tmp_path / name / "s0", "lcft") for name in ("a", "b", "other")]
    for folder, lam in zip(folders, (1, 2, 3)):
        (folder / "args.json").write_text(json.dumps({"seed": 0, "kl_vocab": "all", "lam": lam}))
        (folder.parent / "own.png").write_bytes(folder.parent.name.encode())
    page = report.compare(folders[:2])
    assert "--lam" in page and "--kl-vocab" not in page and page.count("<img") == 2


def test_keys_are_in_the_order_of_their_numbers():
    assert report.in_order(["ndcg@10", "tail", "ndcg@5", "overall"]) == ["overall", "ndcg@5", "ndcg@10", "tail"]


def test_a_chart_is_well_formed_and_leaves_out_what_is_not_finite():
    svg = report.chart({"a": [(0, 1.0), (1, float("nan")), (2, 3.0)]}, "x & y").removeprefix("<figure>").split("<figcaption>")[0]
    points = xml.etree.ElementTree.fromstring(svg).find("polyline").get("points")
    assert len(points.split()) == 2 and report.chart({"a": [(0, float("inf"))]}, "t") == ""


def test_a_folder_without_a_result_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert stop.value.code == 1 and "no finished run there" in capsys.readouterr().err
