"""The command line, the run folder, the log and the checkpoints: the plumbing that all scripts share.

A script is `main(Args, train, __doc__)`: Args is a dataclass whose trailing comments are its --help.
"""

import argparse
import dataclasses
import difflib
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import tokenize
import types
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common import metrics

FORMAT = 1  # of checkpoints; raise it when an old run can no longer be resumed


class UserError(Exception):
    """A mistake of the user's, told in one line: what, where (file:line) and what to do. Exit status 1."""


# ----------------------------------------------------------------------------------------------- command line
def comments(Args):
    """Read {field: (group, help)} from the dataclass source: `# -- group` lines and trailing comments."""
    group, found, last = "options", {}, None
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(Args)).readline):
        if token.string == "def":                     # the fields end here
            break
        if token.type != tokenize.COMMENT:
            continue
        text, name = token.string.lstrip("# ").strip(), re.match(r"\s+(\w+)\s*:", token.line)
        if token.string.startswith("# -- "):
            group = text.removeprefix("-- ")
        elif name:
            last = name[1]
            found[last] = (group, text)
        elif last:                                    # a line of its own below a field goes on with its help
            found[last] = (group, found[last][1] + " " + text)
    return found


def converter(hint):
    """The strict argparse type of a field: no 1.5 for an int, no nan, commas for tuples; None only by leaving
    it out."""
    origin, parts = typing.get_origin(hint), [a for a in typing.get_args(hint) if a is not type(None)]
    if origin in (types.UnionType, typing.Union):
        return converter(parts[0])
    if origin is tuple:
        element = converter(parts[0])

        def several(text):
            return tuple(element(part.strip()) for part in text.split(",") if part.strip())
        several.__name__ = f"comma-separated {element.__name__}"
        return several
    if hint is float:
        def number(text):
            value = float(text)
            if not math.isfinite(value):
                raise ValueError(text)
            return value
        number.__name__ = "number"
        return number
    return hint


def literal(hint):
    """The choices of Literal[...] or Literal[...] | None, else ()."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return next((typing.get_args(p) for p in parts if typing.get_origin(p) is typing.Literal), ())


def placeholder(hint):
    """What --help shows for a value: N for an int, X for a float, N,... or X,... for several, nothing for a name."""
    kinds = (hint, *typing.get_args(hint))
    word = "N" if int in kinds else "X" if float in kinds else ""
    return word and word + ",..." * (typing.get_origin(hint) is tuple)


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and a suggestion for a misspelt flag."""

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], list(self._option_string_actions), 1)
            message = (f"unknown flag {unknown[1]}"
                       + (f", did you mean {near[0]}?" if near else "; see --help"))
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def parse(Args, doc, argv=None):
    """Command line -> Args. Exits with status 2 and one line on a usage error; Args.check() may raise ValueError."""
    parser = Parser(
        usage="%(prog)s [flags]", description=(doc or "").split("\n\n")[0], allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110))
    parser._negative_number_matcher = re.compile(r"-\.?\d")   # argparse takes -1,0,0 and -3e-2 for flags
    groups, notes, hints = {}, comments(Args), typing.get_type_hints(Args)
    for field in dataclasses.fields(Args):
        group, text = notes.get(field.name, ("options", ""))
        box = groups.setdefault(group, parser.add_argument_group(group))
        flag, hint, shown = "--" + field.name.replace("_", "-"), hints[field.name], field.default
        if isinstance(shown, tuple):
            shown = ",".join(map(str, shown))
        text = text.replace("%", "%%") + (
            "" if shown in (None, "") or shown is False else " [on]" if shown is True else f" [{shown}]")
        if hint is bool:
            box.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif choices := literal(hint):
            box.add_argument(flag, choices=choices, default=field.default, help=text)
        else:
            box.add_argument(flag, type=converter(hint), default=field.default, help=text,
                             metavar=placeholder(hint) or field.name.split("_")[-1].upper())
    args = Args(**vars(parser.parse_args(argv)))
    try:
        at_least(args, 0, "seed seeds max_bad_rows")
        at_least(args, 1, "users")
        for field in dataclasses.fields(Args):      # sizes beyond int32, numbers beyond fp32
            value = getattr(args, field.name)
            for x in value if isinstance(value, tuple) else (value,):
                if (type(x) is int and abs(x) >= 2**31 and field.name not in ("seed", "seeds")
                        or type(x) is float and abs(x) > torch.finfo(torch.float32).max):
                    raise ValueError(f"--{field.name.replace('_', '-')} {x:g} is out of range")
        if any(seed >= 2**63 for seed in (getattr(args, "seed", 0), *getattr(args, "seeds", ()))):
            raise ValueError("--seed and --seeds must be below 2**63")
        if getattr(args, "resume", False) and args.overwrite:
            raise ValueError("--resume goes on with a run and --overwrite removes it; leave one of them out")
        if len(set(seeds := getattr(args, "seeds", ()))) < len(seeds):
            raise ValueError("--seeds names one twice")
        if hasattr(args, "check"):
            args.check()
        for name in ("seeds", "variants", "recommenders"):
            if getattr(args, name, ()) and not args.ablations:
                raise ValueError(f"--{name} goes with --ablations")
    except ValueError as problem:
        parser.error(str(problem))
    return args


def at_least(args, least, names):
    """Raise ValueError unless the arguments (their names, in one string) are None or at least this, each number
    of a tuple."""
    for name in names.split():
        value = getattr(args, name, None)
        if value is not None and any(x < least for x in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"--{name.replace('_', '-')} must "
                             + (f"be at least {least}" if least else "not be negative"))


def left_to_variants(args, variants):
    """Raise ValueError where --ablations comes with a setting that its variants change. variants: {name: (what
    changes, ...)}."""
    names = {name for change, *_ in variants.values() for name in change}
    for name in sorted(names) if args.ablations else ():
        if getattr(args, name) != getattr(type(args), name):
            raise ValueError(f"--ablations sets --{name.replace('_', '-')} itself; leave it out")


def main(Args, train, doc, argv=None):
    """Run train(parse(...)). A user's mistake is one line on standard error and status 1, an interrupt status 130."""
    for stream in (sys.stdout, sys.stderr):         # a terminal without λ shows ? instead of a traceback
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    args = parse(Args, doc, argv)
    Run.made.clear()
    try:
        try:
            train(args)
        except BaseException:                                                # Ctrl-C, too
            # a run that got nowhere would be in the way of the next
            for run in (r for r in Run.made if r.folder.is_dir()):
                if all(f.name in ("args.json", "header.json") or f.is_file() and not f.stat().st_size
                       for f in run.folder.iterdir()):
                    shutil.rmtree(run.folder)
                    if run.replaced and run.replaced.is_dir():
                        run.replaced.rename(run.folder)
                else:
                    run.drop_replaced()
            raise
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on from the last checkpoint",
              file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        sys.exit(1)
    except (MemoryError, RuntimeError) as problem:
        # torch says so of a GPU in a class of its own, of a CPU in words
        if not (isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(problem)):
            raise
        what = str(problem).split("\n")[0]
        print(f"error: out of memory ({what}); lower the batch, the group or the token "
              "limits, or take fewer --users, a smaller world or a smaller --backbone", file=sys.stderr)
        sys.exit(1)
    except SafetensorError as problem:
        print(f"error: a checkpoint could not be written ({str(problem).splitlines()[0]}); "
              "mend that, then --resume", file=sys.stderr)
        sys.exit(1)
    except OSError as problem:
        print(f"error: {problem.strerror or problem}: {problem.filename or 'file'}", file=sys.stderr)
        sys.exit(1)


def progress(iterable, desc=None, total=None, initial=0):
    """tqdm on standard error; silent without a description. Redirected output gets one line in 30 seconds."""
    return tqdm(iterable, desc=desc, total=total, initial=initial, disable=desc is None, dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 30, delay=2, file=sys.stderr, leave=False)


# ------------------------------------------------------------------------------------------------- run folder
def write_atomically(path, text):
    """All of it or nothing: write beside, flush to disk, replace."""
    beside = Path(f"{path}.tmp")
    with open(beside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def commit():
    """The commit of this code, with a + where files differ from it; None outside a git checkout."""
    git = lambda *words: subprocess.run(["git", "-C", str(Path(__file__).parent), *words],
                                        capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short", "HEAD")
        return None if head.returncode else head.stdout.strip() + (
            "+" if git("status", "--porcelain", "-uno").stdout else "")
    except OSError:
        return None


def summarise(found, columns, width=24, digits=6):
    """{name: list over seeds of RESULT records}, {column: record -> number} -> {name: {column: summary}},
    printed as a table. A record that lacks a column (KeyError: its variant has no such phase) has an empty
    cell."""
    rows = {}
    print(f"{'':{width}}" + "".join(f"{c:>18}" for c in columns))
    for name, records in found.items():
        rows[name] = {}
        for column, value in columns.items():
            try:
                rows[name][column] = metrics.summary([value(r) for r in records], digits)
            except KeyError:
                continue
        print(f"{name:{width}}" + "".join(metrics.shown(rows[name].get(c)) for c in columns))
    return rows


def command_line():
    """What was typed, to paste it again: `python coco.py --variants 'no LLM'`."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def folder_of(args, script, tail):
    """--run, or runs/SCRIPT-DATA-BACKBONE-TAIL; no colon (toy:300x600x15000), which ends a host's name for scp
    and rsync. UserError where an ablation's runs would go into a run."""
    folder = Path(args.run or (
        f"runs/{script}-{Path(args.data).name}-{Path(args.backbone).name}-{tail}".replace(":", "-")))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--run {folder} is a file; name a folder")
    if tail == "ablations" and is_run(folder):
        raise UserError(f"{folder} holds a single run; name another folder for --ablations with --run")
    return folder


def variant(args, folder, **changes):
    """The settings of one run of an ablation: args with changes, in a folder of its own, gone on with where it
    has begun."""
    alone = {f.name: f.default for f in dataclasses.fields(args)
             if f.name in ("ablations", "variants", "seeds", "recommenders", "lams", "lrs")}
    begun = (folder / "args.json").exists() and not args.overwrite
    return dataclasses.replace(args, run=str(folder), resume=begun, **alone | changes)


def write_table(root, args, rows, runs):
    """The end of an ablation: table.json and report.html in its folder, RESULT {json} on standard output. rows:
    {name: {column: summary}}. runs: the folders that they are made of. Returns rows."""
    from common import report
    record = {"ablations": rows, "data": args.data, "backbone": args.backbone,
              "seeds": list(args.seeds or (args.seed,))}
    headers = [read_json(folder / "header.json") for folder in runs]
    made = {"command": command_line(), "runs": len(runs),
            "minutes": round(sum(h.get("minutes", 0) for h in headers)),
            "commits": sorted({h.get("commit") or "none" for h in headers})}
    write_atomically(Path(root) / "table.json", json.dumps(record | made, indent=1) + "\n")
    report.write(runs, Path(root) / "report.html")
    print("RESULT " + json.dumps(record, sort_keys=True))
    return rows


def pyplot():
    """matplotlib's, for files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def differences(earlier, now):
    """Where two dicts of settings differ, in words; "" where they do not."""
    return "; ".join(f"{k}: {earlier.get(k)!r} then, {now.get(k)!r} now"
                     for k in sorted({*earlier, *now}) if earlier.get(k) != now.get(k))


def prefix(word, tensors):
    return {word + name: t for name, t in tensors.items()}


def strip(tensors, word):
    return {name.removeprefix(word): t for name, t in tensors.items() if name.startswith(word)}


def is_run(folder):
    """Whether a folder's args.json was written by a Run."""
    try:
        return {"format", "data_fingerprint"} <= set(json.loads((Path(folder) / "args.json").read_text()))
    except (OSError, ValueError, TypeError):
        return False


def read_json(path):
    """A dict from a file, {} if it is not there. UserError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError
        return found
    except ValueError:
        raise UserError(f"{path} is not readable; remove it, or start anew with --overwrite") from None


CLAIMED = {}                                        # inode of a folder: the handle that locks it


def inode(where):
    found = os.stat(where)
    return found.st_dev, found.st_ino


def claim(folder):
    """The folder is this process's until its run has its result: two that write to one would mix their runs."""
    try:
        import fcntl
    except ImportError:                             # Windows
        return
    handle = os.open(folder, os.O_RDONLY)
    here = inode(handle)
    try:
        if here not in CLAIMED:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            CLAIMED[here], handle = handle, None
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process; wait for it, "
                        "or name another folder with --run") from None
    except OSError:                                 # a file system without locks
        pass
    finally:
        if handle is not None:
            os.close(handle)


def release(folder):
    if handle := CLAIMED.pop(inode(folder), None):
        os.close(handle)


def read_checkpoint(path):
    """(tensors, state) of what Run.save wrote. A damaged file is a UserError that names it."""
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["state"])
    except Exception as problem:
        raise UserError(f"{path} is damaged ({type(problem).__name__}); "
                        "remove it or start anew with --overwrite") from None


class Run:
    """A run folder: args.json, header.json, metrics.jsonl, checkpoints NAME.safetensors, phases.json,
    result.json, report.html.

    args: the script's Args. fingerprint: of the data. free: arguments that may differ on --resume. rank: processes
    other than 0 wait for the folder and only read.
    Raises UserError when the folder holds another run, or one with other settings.
    """

    made = []                                   # those that this process has begun

    def __init__(self, args, script, fingerprint, free=(), rank=0):
        self.args, self.script, self.clock, self.rank, self.since, self.replaced = (
            args, script, None, rank, time.perf_counter(), None)
        self.folder = folder_of(args, script, f"s{args.seed}")
        settings = {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(args))).items()
                    if k not in {"run", "resume", "overwrite", "device", *free}}
        identity = {"format": FORMAT, "script": script, "data_fingerprint": fingerprint, **settings}
        path = self.folder / "args.json"
        if rank > 0:
            torch.distributed.barrier()
            self.phases = self.read("phases.json")
            return
        # kept aside until there is something to keep of the new one, which may fail to start
        if args.overwrite and not args.resume and is_run(self.folder):
            claim(self.folder)
            self.replaced = self.folder.with_name(f"{self.folder.name}.replaced")
            if is_run(self.replaced):           # left by a process that was killed on the way
                shutil.rmtree(self.replaced)
            self.folder.rename(self.replaced)
        if path.exists():
            if not is_run(self.folder):
                raise UserError(f"{path} is not of a run of ours; name another folder with --run")
            if not args.resume:
                raise UserError(f"{self.folder} already holds a run; go on with --resume, "
                                "start anew with --overwrite, or name another folder with --run")
            earlier = {"script": script} | self.read("args.json")
            if earlier["script"] != script:
                raise UserError(f"{self.folder} holds a run of {earlier['script']}.py; "
                                "name another folder with --run")
            # the data may have been moved: their fingerprint says whether they are the same
            from common.data import SOURCES
            named = any(d["data"].split(":")[0] in {"toy", *SOURCES} for d in (earlier, identity))
            moves = {"data_dir"} if named else {"data_dir", "data"}
            shaping = lambda d: {k: v for k, v in d.items() if k not in {*moves, *free}}
            if differ := differences(shaping(earlier), shaping(identity)):
                raise UserError(f"cannot resume {self.folder}, it was started with other settings ({differ})")
        elif self.folder.exists() and any(f.suffix != ".tmp" for f in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and holds no run; name another folder with --run")
        if not path.exists():
            Run.made.append(self)
        self.folder.mkdir(parents=True, exist_ok=True)
        claim(self.folder)
        write_atomically(path, json.dumps(identity, indent=1, sort_keys=True))
        self.phases = self.read("phases.json")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def read(self, name):
        return read_json(self.folder / name)

    # phases --------------------------------------------------------------------------------
    def done(self, phase):
        """What `finish(phase, ...)` recorded, or None."""
        return self.phases.get(phase)

    def drop_replaced(self):
        """The run that this one replaces (--overwrite) goes."""
        if self.replaced and self.replaced.is_dir():
            release(self.replaced)
            shutil.rmtree(self.replaced)
        self.replaced = None

    def finish(self, phase, record):
        self.drop_replaced()
        self.phases[phase] = record
        write_atomically(self.folder / "phases.json", json.dumps(self.phases, indent=1))
        if (path := self.folder / "header.json").exists():      # a resumed run adds to what it took before
            now, facts = time.perf_counter(), self.read("header.json")
            facts["minutes"], self.since = round(facts.get("minutes", 0) + (now - self.since) / 60, 2), now
            write_atomically(path, json.dumps(facts, indent=1))
        if phase != "result":
            print(f"{phase} done: " + " | ".join(f"{k} {v}" for k, v in record.items()), flush=True)

    def inherit(self, other, phase, files):
        """Take a finished phase over from another run folder (the ablations share what they do not change)."""
        for name in files:
            if (Path(other) / name).exists():
                shutil.copyfile(Path(other) / name, self.folder / f"{name}.tmp")
                os.replace(self.folder / f"{name}.tmp", self.folder / name)
        self.phases[phase] = read_json(Path(other) / "phases.json")[phase]
        write_atomically(self.folder / "phases.json", json.dumps(self.phases, indent=1))

    # checkpoints ---------------------------------------------------------------------------
    def save(self, name, tensors, state):
        """One safetensors file whose metadata carries the JSON state, so that both are replaced in one instant.

        Re-opened and checked: tensors there, or RuntimeError, and finite, or UserError (an adapter full of NaN
        is no result).
        """
        path, beside = self.folder / f"{name}.safetensors", self.folder / f"{name}.safetensors.tmp"
        state = {"log_bytes": self.log_bytes(), **state}
        self.drop_replaced()
        save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, beside,
                  metadata={"state": json.dumps(state), "format": str(FORMAT)})
        with safe_open(beside, "pt") as f:
            if set(f.keys()) != set(tensors):
                raise RuntimeError(f"{beside}: tensors are missing after saving")
            for key in f.keys():
                if not torch.isfinite(f.get_tensor(key)).all():
                    beside.unlink()
                    raise UserError(f"training has diverged: {key} of {path} would not be finite; "
                                    "lower the learning rate")
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)

    def load(self, name):
        """`read_checkpoint` of the last save, or None."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            if name in self.phases:
                raise UserError(f"{path} is gone, of a phase that is done; start anew with --overwrite")
            return None
        return read_checkpoint(path)

    @staticmethod
    def optimizer_tensors(optimizer):
        """AdamW's state as flat tensors `opt/INDEX/NAME`; parameters in the optimiser's own order."""
        return {f"opt/{k}/{name}": torch.as_tensor(value)
                for k, state in optimizer.state_dict()["state"].items() for name, value in state.items()}

    @staticmethod
    def load_optimizer(optimizer, tensors):
        state = optimizer.state_dict()
        state["state"] = {}
        for key, value in strip(tensors, "opt/").items():
            index, name = key.split("/")
            state["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(state)

    # log -----------------------------------------------------------------------------------
    def log_bytes(self):
        path = self.folder / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def begin(self, phase):
        """load(phase), with metrics.jsonl cut back to where that was written, or, where nothing was, to before
        the phase: the steps after it will be run again."""
        saved, path = self.load(phase), self.folder / "metrics.jsonl"
        if saved is None:
            before = path.read_bytes() if path.exists() else b""
            keep = before.find(b'{"phase": ' + json.dumps(phase).encode())
        else:
            keep = saved[1]["log_bytes"]
        if 0 <= keep < self.log_bytes():
            os.truncate(path, keep)
        return saved

    def log(self, phase, step, total, **values):
        """One record in metrics.jsonl and one line `align 00120/02000 | loss 0.6312 | 1.32 s/it | 1.8 GiB`.
        UserError where a loss or a validation measure is no number."""
        from common import cuda
        for key, value in values.items():
            if ((key == "loss" or key.startswith("valid_"))
                    and not math.isfinite(math.nan if value is None else value)):
                raise UserError(f"training has diverged: {key} of {phase}, step {step}, is no number; "
                                "lower the learning rate")
        now = time.perf_counter()
        before, self.clock = self.clock, (phase, step, now)
        record = {"phase": phase, "step": step} | {
            k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        pace = (f" | {(now - before[2]) / (step - before[1]):.2f} s/it"
                if before and before[0] == phase and step > before[1] else "")
        shown = " | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        width = len(str(total))
        say = tqdm.write if sys.stderr.isatty() else print       # a log file gets no bar redrawn at each line
        say(f"{phase} {step:0{width}d}/{total} | {shown}{pace} | {cuda.memory_gib():.1f} GiB",
                   file=sys.stdout)
        sys.stdout.flush()

    # files ---------------------------------------------------------------------------------
    def write_jsonl(self, name, rows):
        write_atomically(self.folder / f"{name}.jsonl",
                         "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))

    def header(self, reads=True, **facts):
        """What was run, on what, on which data: printed once and kept in header.json, where `finish` adds the
        minutes that it took. No environment, so no keys. reads: whether this run loads --backbone."""
        import transformers
        if self.rank > 0:
            return
        path = self.folder / "header.json"
        earlier = self.read("header.json")
        facts = {"command": command_line(),
                 "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
                             f"transformers {transformers.__version__}", "commit": commit(), **facts}
        for key, value in facts.items():
            print(f"{key:>12}  {value}")
        if reads and getattr(self.args, "backbone", None) == "tiny" and not self.args.data.startswith("toy"):
            print(f"{'note':>12}  the bundled LLM has only ever read the toy world's titles; "
                  "for texts that are worth something, --backbone takes a real one")
        sys.stdout.flush()
        kept = {"minutes": earlier["minutes"]} if "minutes" in earlier else {}
        write_atomically(path, json.dumps(facts | kept, indent=1, default=str))

    def result(self, record):
        """result.json and report.html, and RESULT {json} as the last line of standard output."""
        from common import report
        text = json.dumps(record, sort_keys=True)
        write_atomically(self.folder / "result.json", text + "\n")
        report.write([self.folder], self.folder / "report.html")
        release(self.folder)
        print("RESULT " + text, flush=True)
        return record
