"""common/run.py and common/cuda.py: command line, run folder, checkpoints."""

import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from common import cuda
from common.run import Run, UserError, command_line, folder_of, main, parse, variant, write_atomically

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    # -- run
    data: str = "toy"  # a name
    backbone: str = "tiny"  # another
    run: str | None = None  # run folder
    resume: bool = False  # go on
    overwrite: bool = False  # start anew
    device: str = "cpu"  # where
    seed: int = 0  # of everything
    # -- method
    lr: float = 1e-3  # rate, 5 % more or less
    mode: Literal["a", "b"] = "a"  # a choice
    weights: tuple[float, ...] = (1.0, 2.0)  # several
    limit: int | None = None  # none by default

    def check(self):
        # not a flag's help
        if self.seed < 0:
            raise ValueError("--seed must not be negative")


@pytest.mark.parametrize("p,dtype", [(0.05, torch.float32), (0.5, torch.float64), (0.9, torch.bfloat16)])
def test_dropout_zeroes_its_share_anywhere_scales_the_rest_and_masks_the_gradient_alike(p, dtype):
    drop, x = cuda.Dropout(p), torch.ones(301, 333, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    y = drop(x)
    y.sum().backward()
    assert torch.equal(x.grad, y) and y.dtype == dtype and set(y.unique().tolist()) == {0, torch.tensor(1 / (1 - p), dtype=dtype).item()}
    gone = (y == 0).float()
    assert abs(gone.mean() - p) < 0.005                                              # 5 std: 0.005 at p = 0.5 is 3
    assert (gone.mean(0) - p).abs().max() < 0.15 and (gone.mean(1) - p).abs().max() < 0.15
    assert abs((gone[:, 1:] * gone[:, :-1]).mean() - p * p) < 0.01                   # neighbours share no bits
    torch.manual_seed(1)
    assert torch.equal(drop(x), y) and not torch.equal(drop(x), y)                   # a function of the generator
    assert drop.eval()(x) is x and torch.equal(cuda.Dropout(0.0)(x), x)


def test_flags_become_fields_with_their_types():
    args = parse(Args, "", ["--lr", "2e-3", "--mode", "b", "--weights", "0.1,3", "--limit", "7", "--no-resume"])
    assert (args.lr, args.mode, args.weights, args.limit, args.resume) == (0.002, "b", (0.1, 3.0), 7, False)
    assert parse(Args, "", []) == Args()


@pytest.mark.parametrize("argv, words", [
    (["--sede", "1"], "did you mean --seed"), (["--see", "1"], "unknown flag"), (["--seed", "1.5"], "invalid"),
    (["--lr", "nan"], "invalid"), (["--mode", "c"], "invalid choice"), (["--seed", "-1"], "must not be negative"),
    (["--weights", "1,x"], "invalid"), (["stray"], "stray"), (["--seed", str(2**63)], "below 2**63"),
    (["--limit", str(2**31)], "--limit 2.14748e+09 is out of range"), (["--weights", "1,1e300"], "--weights 1e+300 is out of range"), (["--lr", "inf"], "invalid"), (["--resume", "--overwrite"], "leave one of them out")])
def test_a_usage_error_is_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Args, "", argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


def test_help_shows_groups_comments_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Args, "First paragraph.\n\nSecond.", ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "method:" in out and "rate, 5 % more or less [0.001]" in out
    assert "First paragraph." in out and "Second" not in out and "not a flag's help" not in out
    assert "--limit N " in out and "--lr X " in out and "--weights X,... " in out and "[False]" not in out


def test_overwriting_spares_what_is_not_ours_and_what_cannot_be_replaced(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "args.json").write_text('{"lr": 1}')
    with pytest.raises(UserError, match="not of a run of ours"):
        start(tmp_path / "mine", overwrite=True)
    start(tmp_path / "r").save("c", {"a": torch.ones(1)}, {})

    def fails(args):
        Run(args, "t", "abc").header(device="cpu")
        raise UserError("no such backbone")
    with pytest.raises(SystemExit):
        main(Args, fails, "", ["--run", str(tmp_path / "r"), "--overwrite"])
    assert (tmp_path / "r" / "c.safetensors").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["mine", "r"]
    start(tmp_path / "r", overwrite=True).finish("first", {})
    assert not (tmp_path / "r" / "c.safetensors").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["mine", "r"]


@pytest.mark.parametrize("data, reads, told", [("ml1m", True, True), ("ml1m", False, False), ("toy", True, False)])
def test_who_has_the_bundled_llm_read_other_data_than_its_own_is_told(tmp_path, capsys, data, reads, told):
    Run(Args(data=data, run=str(tmp_path / "r")), "t", "abc").header(reads, device="cpu")
    assert ("--backbone takes a real one" in capsys.readouterr().out) == told


@pytest.mark.parametrize("problem, status, words", [
    (SafetensorError("I/O error: No space left"), 1, "could not be written"), (UserError("file:3: broken"), 1, "error: file:3: broken"), (KeyboardInterrupt(), 130, "--resume"),
    (OSError(28, "No space left on device", "x"), 1, "No space left"),
    *((no_memory, 1, "out of memory") for no_memory in (torch.OutOfMemoryError("CUDA"), MemoryError("Unable to allocate"), MemoryError(),
                                                        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")))])
def test_a_users_mistake_is_one_line_without_traceback(problem, status, words, capsys):
    def train(args):
        raise problem
    with pytest.raises(SystemExit) as stop:
        main(Args, train, "", [])
    err = capsys.readouterr().err
    assert stop.value.code == status and words in err and "Traceback" not in err


def test_a_mistake_of_ours_is_not_hidden():
    def train(args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError):
        main(Args, train, "", [])


def test_the_command_can_be_pasted(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/a/coco.py", "--variants", "no LLM,full"])
    assert command_line() == "python coco.py --variants 'no LLM,full'"


def test_a_mistake_that_shows_late_leaves_no_folder_in_the_way_unless_work_was_done(tmp_path):
    def train(args, work):
        run = Run(args, "t", "abc")
        run.header(device="cpu")
        (run.folder / "scores.jsonl").touch()
        if work:
            run.log("phase", 1, 2, loss=1.0)
        raise UserError("too late")
    for work in (False, True):
        with pytest.raises(SystemExit):
            main(Args, lambda args: train(args, work), "", ["--run", str(tmp_path / "r")])
        assert (tmp_path / "r").exists() == work
    with pytest.raises(SystemExit):                                # a folder of an earlier process stays
        main(Args, lambda args: train(args, False), "", ["--run", str(tmp_path / "r"), "--resume"])
    assert (tmp_path / "r" / "metrics.jsonl").exists()


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        main(Args, lambda args: 1 / 0, "", [])


def start(folder, **changes):
    return Run(Args(run=str(folder), **changes), "t", changes.pop("fp", "abc"))


def test_a_checkpoint_gives_back_tensors_and_state_to_the_bit(tmp_path):
    run = start(tmp_path / "r")
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    state = {"x": 0.1 + 0.2, "s": "ü</answer>", "l": [1, None, True], "step": 7}
    run.save("c", tensors, state)
    got, back = run.load("c")
    assert all(torch.equal(got[k], tensors[k]) for k in tensors) and {k: back[k] for k in state} == state
    assert run.load("other") is None


@pytest.mark.parametrize("script, flags", [
    ("lcft", "--lr 1e37 --lora-alpha 1e6 --warmup 0 --steps 2 --batch 8 --eval-every 2 --eval-rows 20 --prompt-history 2"),
    ("lcft", "--host collm --mf-lr 1e30"), ("curec", "--no-align --no-correct --texts data --rm-lr 1e37 --min-interactions 1"),
    ("sllmr", "--lr 1e37 --batch 10000"), ("coco", "--lr 1e37")])
def test_a_training_that_diverges_is_one_line(script, flags, tmp_path, capsys):
    script = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args, script.train, "", [*flags.split(), "--data", "toy:60x300x1000", "--run", str(tmp_path / "r")])
    assert stop.value.code == 1 and "error: " in (told := capsys.readouterr().err.splitlines()[-1]) and "diverged" in told and "; lower " in told


def test_a_loss_or_a_validation_measure_that_is_no_number_stops_the_run(tmp_path):
    run = start(tmp_path / "r")
    run.log("a", 1, 9, loss=0.5, kl=math.nan)
    for wrong in ({"loss": math.nan}, {"valid_auc": None}, {"loss": math.inf}):
        with pytest.raises(UserError, match="diverged: .* of a, step 2, is no number"):
            run.log("a", 2, 9, **{"loss": 0.5} | wrong)
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_checkpoint_that_is_not_finite_is_refused_and_the_good_one_stays(tmp_path):
    run = start(tmp_path / "r")
    run.save("c", {"a": torch.ones(2)}, {"step": 1})
    with pytest.raises(UserError, match="diverged: a of .* not be finite"):
        run.save("c", {"a": torch.tensor([1.0, torch.nan])}, {"step": 2})
    assert run.load("c")[1]["step"] == 1 and not list((tmp_path / "r").glob("*.tmp"))


def test_a_folder_of_somebody_elses_is_neither_written_to_nor_removed(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="not empty and holds no run"):
            start(tmp_path / "mine", **flags)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_run_of_another_script_and_a_damaged_list_of_phases_are_one_line(tmp_path):
    start(tmp_path / "r").finish("a", {})
    path = tmp_path / "r" / "args.json"
    path.write_text(path.read_text().replace('"script": "t"', '"script": "other"'))
    with pytest.raises(UserError, match="a run of other.py"):
        start(tmp_path / "r", resume=True)
    path.write_text(path.read_text().replace('"script": "other"', '"script": "t"'))
    (tmp_path / "r" / "phases.json").write_text('{"a":')
    with pytest.raises(UserError, match="phases.json is not readable; remove it"):
        start(tmp_path / "r", resume=True)


@pytest.mark.parametrize("name,content", [("header.json", b"{"), ("header.json", b"[1]"), ("phases.json", b"[]"), ("phases.json", b"[1]"), ("metrics.jsonl", b'{"a": 1}\n\xff\n')])
def test_a_damaged_file_of_a_run_is_one_line_that_names_it(tmp_path, name, content):
    start(tmp_path / "r").header()
    (tmp_path / "r" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is not readable"):
        run = start(tmp_path / "r", resume=True)
        run.header()
        run.result({})


def test_a_folder_is_one_process_alone_until_the_run_has_its_result(tmp_path, capsys):
    """The others are told, with --resume and with --overwrite, and touch nothing; a kill frees it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        start(tmp_path / "file")
    code = ("import sys, time; from tests.test_run import start; run = start(sys.argv[1]); run.finish('a', {}); print('begun', flush=True);"
            "sys.stdin.read(1); run.result({}); print('told', flush=True); time.sleep(60)")
    other = lambda: subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "r")], cwd=ROOT, text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first = other()
    while first.stdout.readline() != "begun\n":
        assert first.poll() is None
    before = {f.name: f.read_bytes() for f in (tmp_path / "r").iterdir()}
    for flags in ({"resume": True}, {"overwrite": True, "seed": 1}):
        with pytest.raises(UserError, match="in use by another process"):
            start(tmp_path / "r", **flags)
    assert {f.name: f.read_bytes() for f in (tmp_path / "r").iterdir()} == before and len(list(tmp_path.iterdir())) == 2
    first.stdin.write("x")
    first.stdin.flush()
    while first.stdout.readline() != "told\n":
        assert first.poll() is None
    start(tmp_path / "r", resume=True)
    start(tmp_path / "r", resume=True)                                               # its own
    first.kill()
    first.wait()
    second = start(tmp_path / "r", overwrite=True)
    second.finish("b", {})
    assert list(second.phases) == ["b"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    run = start(tmp_path / "r")
    run.save("c", {"a": torch.ones(100)}, {})
    path = tmp_path / "r" / "c.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="c.safetensors is damaged"):
        run.load("c")


def test_an_optimiser_goes_on_as_if_nothing_had_happened(tmp_path):
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def steps(layer, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).pow(2).sum().backward()
            optimizer.step()
    straight, optimizer = make()
    steps(straight, optimizer, 6)
    first, optimizer = make()
    steps(first, optimizer, 3)
    run = start(tmp_path / "r")
    run.save("c", first.state_dict() | run.optimizer_tensors(optimizer), {})
    tensors, _ = run.load("c")
    second, optimizer = make()
    second.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("opt/")})
    run.load_optimizer(optimizer, tensors)
    steps(second, optimizer, 3)
    assert torch.equal(second.weight, straight.weight) and torch.equal(second.bias, straight.bias)


def test_a_run_that_fails_with_something_to_keep_replaces_the_earlier_one(tmp_path):
    start(tmp_path / "r").save("c", {"a": torch.ones(1)}, {})

    def fails(args):
        run = Run(args, "t", "abc")
        (run.folder / "scores.jsonl").write_text("paid for")
        raise UserError("no such backbone")
    with pytest.raises(SystemExit):
        main(Args, fails, "", ["--run", str(tmp_path / "r"), "--overwrite"])
    assert [p.name for p in tmp_path.iterdir()] == ["r"] and (tmp_path / "r" / "scores.jsonl").exists()


def test_a_phase_that_is_done_without_its_file_is_told_and_an_ablation_does_not_go_into_a_run(tmp_path):
    run = start(tmp_path / "r")
    run.save("c", {"a": torch.ones(1)}, {})
    run.finish("c", {})
    (tmp_path / "r" / "c.safetensors").unlink()
    with pytest.raises(UserError, match="c.safetensors is gone.*--overwrite"):
        start(tmp_path / "r", resume=True).load("c")
    with pytest.raises(UserError, match="holds a single run"):
        folder_of(Args(run=str(tmp_path / "r")), "t", "ablations")


def test_a_folder_with_another_run_is_not_touched_without_being_told(tmp_path):
    start(tmp_path / "r").save("c", {"a": torch.ones(1)}, {})
    with pytest.raises(UserError, match="--resume.*--overwrite.*--run"):
        start(tmp_path / "r")
    assert start(tmp_path / "r", resume=True).load("c") is not None
    assert start(tmp_path / "r", overwrite=True).load("c") is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no run"):
        start(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_resume_with_other_settings_is_refused_and_the_difference_is_shown(tmp_path):
    start(tmp_path / "r")
    with pytest.raises(UserError, match="lr: 0.001 then, 0.5 now"):
        start(tmp_path / "r", resume=True, lr=0.5)
    with pytest.raises(UserError, match="data_fingerprint: 'abc' then, 'xyz' now"):
        Run(Args(run=str(tmp_path / "r"), resume=True), "t", "xyz")


def test_a_folder_of_data_may_be_moved_and_a_named_set_is_another_setting(tmp_path):
    start(tmp_path / "r", data="logs")
    start(tmp_path / "r", resume=True, data="moved/logs")
    with pytest.raises(UserError, match="data: 'moved/logs' then, 'ml1m' now"):
        start(tmp_path / "r", resume=True, data="ml1m")


def test_resume_refuses_another_seed_and_a_setting_that_is_no_more(tmp_path):
    start(tmp_path / "r")
    with pytest.raises(UserError, match="seed: 0 then, 1 now"):
        start(tmp_path / "r", resume=True, seed=1)
    path = tmp_path / "r" / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"old": 3}))
    with pytest.raises(UserError, match="old: 3 then, None now"):
        start(tmp_path / "r", resume=True)


def test_a_text_file_that_cannot_be_written_to_its_end_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "phases.json"
    write_atomically(path, "old")

    def full(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_an_ablations_run_goes_on_where_it_has_begun_unless_it_is_to_start_anew(tmp_path):
    begun = lambda **flags: variant(Args(**flags), tmp_path / "r", lr=0.5)
    assert begun() == Args(run=str(tmp_path / "r"), lr=0.5)
    start(tmp_path / "r")
    assert begun().resume and not begun(overwrite=True).resume


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path, capsys):
    run = start(tmp_path / "r")
    run.log("p", 1, 3, loss=0.5)
    run.save("c", {"a": torch.ones(1)}, {})
    run.log("p", 2, 3, loss=0.4)
    with open(tmp_path / "r" / "metrics.jsonl", "a") as f:
        f.write('{"half')
    run.begin("c")
    assert [json.loads(line)["step"] for line in open(tmp_path / "r" / "metrics.jsonl")] == [1]
    run.log("q", 1, 3, loss=0.4)
    assert run.begin("q") is None                                             # killed before the first checkpoint of a phase
    assert [json.loads(line)["phase"] for line in open(tmp_path / "r" / "metrics.jsonl")] == ["p"]
    assert "p 1/3 | loss 0.5" in capsys.readouterr().out


def test_result_is_the_last_line_and_a_file(tmp_path, capsys):
    start(tmp_path / "r").result({"b": 1, "a": 2.5})
    assert capsys.readouterr().out.splitlines()[-1] == 'RESULT {"a": 2.5, "b": 1}'
    assert json.loads((tmp_path / "r" / "result.json").read_text()) == {"a": 2.5, "b": 1}


def test_a_checkpoint_survives_a_kill_at_any_moment_of_saving(tmp_path):
    code = ("import sys, torch; sys.path.insert(0, sys.argv[1])\n"
            "from tests.test_run import start\n"
            "run = start(sys.argv[2], resume=True)\n"
            "for step in range(10**6): run.save('c', {'a': torch.full((20000,), float(step))}, {'step': step}); print(step, flush=True)")
    rng = np.random.default_rng(0)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(tmp_path / "r")], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        tensors, state = start(tmp_path / "r", resume=True).load("c")
        assert (tensors["a"] == state["step"]).all()


def test_a_seed_depends_on_its_whole_key_and_on_nothing_else():
    assert cuda.key_seed(0, "align", 3) == cuda.key_seed(0, "align", 3)
    keys = {cuda.key_seed(s, n, k) for s in range(3) for n in ("a", "b") for k in range(5)}
    assert len(keys) == 30
    draw = lambda: torch.rand(4, generator=cuda.generator("cpu", 1, "x"))
    assert torch.equal(draw(), draw())


def test_a_key_gives_the_same_seed_in_every_process_and_a_seed_fixes_all_three_generators():
    assert cuda.key_seed(0, "align", 3) == 4085005063958772518
    drawn = []
    for _ in range(2):
        cuda.seed_everything(5)
        drawn.append((random.random(), np.random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_a_device_that_is_not_there_is_one_line():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="not available here"):
            cuda.pick_device("cuda")
    with pytest.raises(UserError, match="--dtype"):
        cuda.pick_dtype("float16", torch.device("cpu"))


def test_gradients_are_averaged_over_two_processes(tmp_path):
    code = ("import sys, os; sys.path.insert(0, sys.argv[1])\nimport torch\nfrom common import cuda\n"
            "rank, world = cuda.join(torch.device('cpu'))\n"
            "p, q = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))\n"
            "p.grad = torch.full((2,), float(rank + 1))\n"
            "if rank == 0: q.grad = torch.ones(1)\n"
            "cuda.average_gradients([p, q])\n"
            "assert p.grad.tolist() == [1.5, 1.5] and q.grad.tolist() == [0.5], (p.grad, q.grad)\n")
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen([sys.executable, "-c", code, str(ROOT)], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)})
                for r in range(2)]
    assert [c.wait(timeout=60) for c in children] == [0, 0]


def test_the_header_says_which_code_it_was_and_a_resumed_run_adds_its_minutes(tmp_path):
    found = []
    for resume in (False, True):
        run = start(tmp_path / "r", resume=resume)
        run.header(device="cpu")
        run.since -= 120
        run.finish("a", {})
        found.append(json.loads((run.folder / "header.json").read_text()))
    assert found[0]["minutes"] == pytest.approx(2, abs=0.2) and found[1]["minutes"] == pytest.approx(4, abs=0.4)
    inside = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    assert (found[0]["commit"] or "none").rstrip("+") == (inside.stdout.strip() if inside.returncode == 0 else "none")
