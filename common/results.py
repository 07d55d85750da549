"""make results: run what the README's tables come from, and write these tables into it.

    python -m common.results                    # everything, resumable; a day and a half on a core
    python -m common.results --method lcft --data toy
    python -m common.results --render           # only write the tables of finished runs
    python -m common.results --method sllmr --data toy --against none    # differences, seed by seed, to a row

A table stands in the README below the line that holds its command; no number in it is typed. What it is made of, the
values by seed, is kept in figures/METHOD-DATA.json.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from common import metrics
from common.run import Parser, pyplot, write_atomically

ROOT = Path(__file__).parent.parent
SLLMR_TOY = (   # of two tables: the same world and training, other scores
    "--ablations --seeds 0,1,2 --data toy:3000x400x45000 --cold-users 0.3 --redraw --decay "
    "--weight-decay 1e-4 --batch 1024 --dim 32 --epochs 20 --patience 20 --rank-users 100 "
    "--margin 0.05 --pick sample --pair-users 32 --pairs 2048 --pool 400")
COMMANDS = (   # method, data, flags, the picture that the README shows
    ("curec", "toy", "--ablations --seeds 0,1,2 --data toy", None),
    ("curec", "ml1m",
     "--ablations --seeds 0,1,2 --data ml1m --variants 'ids only' "
     "--min-interactions 1 --rm-batch 64 --negative-power 0.75 --rm-epochs 10", None),
    ("lcft", "toy",
     "--ablations --seeds 0,1,2 --data toy --steps 120 --batch 32 --eval-rows 500 "
     "--variants off,official:1e-4,official:1e-2,paper,swap,neg-ce", "ece.png"),
    ("lcft", "toy-follow",
     "--ablations --seeds 0,1,2 --data toy --steps 120 --batch 32 --eval-rows 500 "
     "--variants off,follow:1,follow:3", None),
    ("lcft", "toy-long",
     "--ablations --seeds 0,1,2 --data toy --steps 400 --batch 32 --eval-every 50 --eval-rows 500 "
     "--lora-targets all-linear --lora-rank 16 --keep last --variants off,paper:0.1,swap:1,neg-ce:1", None),
    ("lcft", "toy-swept",
     "--ablations --seeds 0,1,2 --data toy --steps 400 --batch 32 --eval-every 50 --eval-rows 500 "
     "--lora-targets all-linear --lora-rank 16 --keep last --variants off,swap:1,swap:3", None),
    ("lcft", "ml100k-long",
     "--ablations --seeds 0,1,2 --data ml100k --steps 1500 --batch 16 --eval-every 250 --eval-rows 1000 "
     "--prompt-history 3 --lora-targets all-linear --lora-rank 16 --keep last "
     "--variants off,swap:1,swap:3,neg-ce:1", None),
    ("lcft", "ml100k-follow",
     "--ablations --seeds 0,1,2 --data ml100k --steps 1500 --batch 16 --eval-every 250 --eval-rows 1000 "
     "--prompt-history 3 --lora-targets all-linear --lora-rank 16 --keep last "
     "--variants off,follow:1,follow:3", None),
    ("lcft", "ml100k",
     "--ablations --seeds 0,1,2 --data ml100k --steps 400 --batch 16 --eval-every 100 --eval-rows 400 "
     "--prompt-history 3 --lora-targets all-linear --lora-rank 16 --lam-ramp 1 --keep last "
     "--variants off,hinge:1,hinge:0.5,neg-ce:1,paper:0.1,official:1e-4", None),
    ("sllmr", "toy",
     f"{SLLMR_TOY} --lr 2e-2 --lams 0.1 --variants none,ones,paper,agreement "
     "--recommenders deepfm,dcnv2,autoint,dcn,din,xdeepfm", "dcnv2/gate.png"),
    ("sllmr", "toy-60",
     f"{SLLMR_TOY} --candidates 60 --test-negatives 10 --lrs 0.0025,0.005,0.01,0.02,0.04,0.08 --lams 0.03,0.1,0.3 "
     "--variants none,ones,agreement "
     "--recommenders deepfm,dcnv2,autoint,dcn,din,xdeepfm", None),
    ("sllmr", "toy-once",
     "--ablations --seeds 0,1,2 --data toy:3000x400x45000 --cold-users 0.3 "
     "--lr 3e-2 --weight-decay 1e-4 --batch 1024 --dim 32 --epochs 30 --patience 4 --rank-users 100 "
     "--margin 0.05 --pick sample --pair-users 32 --pairs 2048 --pool 400 --lams 0.1 "
     "--variants 'none,ones,paper,fixed,agreement,no prior,truth' "
     "--recommenders deepfm,dcnv2,din,dcn,autoint", None),
    ("sllmr", "amazon-beauty",
     "--ablations --seeds 0,1,2 --data amazon-beauty --brand --variants none "
     "--lr 1e-2 --weight-decay 1e-4 --batch 1024 --dim 32 --epochs 10 --rank-users 100 "
     "--recommenders deepfm,xdeepfm,dcnv2,din,dcn,autoint", None),
    ("sllmr", "amazon-beauty-llm",
     "--ablations --seeds 0,1,2 --data amazon-beauty --scored-users 1000 --candidates 10 --extra 0.02 "
     "--tune-steps 200 --prompt-history 5 --lr 1e-2 --weight-decay 1e-4 --batch 1024 --dim 32 "
     "--rank-users 100 --variants none,ones,KD,pointwise,agreement --lams 0.03,0.1", None),
    ("sllmr", "ml1m",
     "--ablations --seeds 0,1,2 --data ml1m --users 1000 --cold-users 0.3 --candidates 10 "
     "--tune-steps 200 --prompt-history 5 --lr 1e-2 --weight-decay 1e-5 --batch 1024 --dim 32 "
     "--rank-users 100 --variants none,ones,KD,pointwise,agreement --lams 0.03,0.1", None),
    ("coco", "toy",
     "--ablations --seeds 0,1,2 --data toy:1200x4000x30000:0.3 --prompt-len 7 --eliminate-epochs 2 "
     "--variants 'no LLM,no LLM but categories,static,codebook,full,judge all'", "pilot.png"),
    ("coco", "toy-parts",
     "--ablations --seeds 0,1,2 --data toy:400x1300x8000 --epochs 4 "
     "--variants 'codebook,shared,mixture,mean pool,no match,ste,ema,no reset'", None),
    ("coco", "ml1m",
     "--ablations --seeds 0,1,2 --data ml1m --users 200 --text-every 10 --epochs 3 --margin 0 "
     "--variants 'no LLM,no LLM but categories,static,gender,age,codebook,full'", "pilot.png"),
    # last: it stops where wordllama, an optional package, is missing
    ("sllmr", "amazon-beauty-encoder",
     "--ablations --seeds 0,1,2 --data amazon-beauty --brand --scorer encoder --candidates 10 --extra 0.02 "
     "--lr 1e-2 --weight-decay 1e-4 --batch 1024 --dim 32 --epochs 10 --rank-users 100 "
     "--variants none,ones,KD,pointwise,agreement --lams 0.03,0.1", None),
)

GATES = {"mean, ones": "no gate", "mean, paper": "gate as published", "mean, agreement": "agreement"}
PANELS = (   # of the overview: title, column, table, the row to compare with, {row, without its value (of another
    # table, "TABLE: ROW"): its name there}
    ("CURec, toy world: NDCG@10", "NDCG@10", "curec-toy", None,
     {"ids only": "ids only", "categories": "genre and theme", "random reasons": "wrong reasons",
      "w/o correction": "reasons of the aligned LLM", "full": "and corrected", "w/o both": "LLM as it comes"}),
    ("LCFT, toy world:\ncontradictions", "contradiction", "lcft-toy-long", None,
     {"off": "fine-tuning alone", "paper": "paper", "lcft-toy-swept: swap": "bounded",
      "neg-ce": "control: neg-ce"}),
    ("LCFT, MovieLens-100K:\ncontradictions", "contradiction", "lcft-ml100k-long", None,
     {"off": "fine-tuning alone", "swap": "bounded, swap", "lcft-ml100k-follow: follow": "bounded, follow",
      "neg-ce": "control: neg-ce"}),
    ("S-LLMR, toy world, cold users:\nAUC over no LLM", "cold", "sllmr-toy", "none", GATES),
    ("S-LLMR, toy world, neither cold nor tail:\nAUC over no LLM", "dense", "sllmr-toy", "none", GATES),
    ("CoCo, toy world: AUC", "overall", "coco-toy", None,
     {"no LLM": "no LLM", "no LLM but categories": "no LLM, but categories", "static": "one static text",
      "codebook": "codebook", "full": "and judged users tuned", "judge all": "and everybody tuned"}))


def command(method, flags):
    return f"python {method}.py {flags}"


def folder(method, data):
    return Path("runs") / f"results-{method}-{data}"


def markdown(rows):
    """{name: {column: {"mean", "std"} or a number}} -> the lines of a Markdown table; a column that a row lacks
    is empty."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))

    def cell(value):
        if value is None:
            return ""
        digits = 1 if abs(value["mean"]) >= 10 else 3
        return (f"{value['mean']:.{digits}f}"
                + ("" if value["std"] is None else f" ± {value['std']:.{digits}f}"))
    return ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)] + [
        f"| {name} | " + " | ".join(cell(row.get(c)) for c in columns) + " |" for name, row in rows.items()]


def bare(row):
    """A row's name without its value: "swap 3" -> "swap"."""
    return re.sub(r" [\d.e-]+$", "", row)


def against(rows, base):
    """What each row gains over the row `base`, seed by seed: {name: {column: summary of the differences}}. Rows
    are called NAME or NAME VALUE; where tables of several models are one ("MODEL, NAME"), each is compared
    within its model, and "mean, NAME" is the mean over the models, each with the value that it chose. Raises
    ValueError where there is no such row."""
    parts = {name: name.rpartition(", ")[::2] for name in rows}   # model (or nothing), name with its value
    bases = {model: rows[name] for name, (model, variant) in parts.items() if base in (variant, bare(variant))}
    gains, means = {}, {}
    for name, (model, variant) in parts.items():
        if model not in bases:
            raise ValueError(f"no row {base} beside {name}")
        if rows[name] is not bases[model]:
            gains[name] = {c: np.subtract(cell["values"], bases[model][c]["values"])
                           for c, cell in rows[name].items() if c in bases[model]}
            means.setdefault(bare(variant), []).append(gains[name])
    if len(bases) > 1:
        gains |= {f"mean, {name}": {c: np.mean([g[c] for g in found], 0) for c in found[0]}
                  for name, found in means.items()}
    return {name: {c: metrics.summary(v) for c, v in row.items()} for name, row in gains.items()}


def put(readme, line, table):
    """The README with the first table after the line that holds `line`, and the line below it, replaced. Raises
    ValueError where there is none."""
    lines = readme.split("\n")
    at = next((k for k, text in enumerate(lines) if f"`{line}`" in text), None)
    start = (next((k for k in range(at, len(lines)) if lines[k].startswith("|")), None)
             if at is not None else None)
    if start is None or any(re.match("#+ ", text) for text in lines[at:start]):
        raise ValueError(f"the README has no table below `{line}`")
    end = next((k for k in range(start, len(lines)) if not lines[k].startswith("|")), len(lines))
    # the line below a table
    if lines[end + 1:end + 2] and lines[end + 1].startswith(("Seeds ", "Measured with ")):
        end += 2
    return "\n".join(lines[:start] + table + lines[end:])


def made(record):
    """The line below a table: what it took, and which code it was."""
    minutes = f", {record['minutes']:,} minutes in all" if record["minutes"] else ""
    return (f"Seeds {', '.join(map(str, record['seeds']))}; {record['runs']} runs{minutes}; "
            f"commit {', '.join(record['commits'])}.")


def render(path, chosen=COMMANDS, base=ROOT):
    """Take the tables and pictures of finished runs over into figures/ beside the README at path, and write all
    tables that are there into it; returns which."""
    readme, done, kept = path.read_text(encoding="utf-8"), [], path.parent / "figures"
    kept.mkdir(exist_ok=True)
    for method, data, flags, picture in chosen:
        table = kept / f"{method}-{data}.json"
        for made_here, file in (("table.json", table), (picture, table.with_suffix(".png"))):
            if made_here and (base / folder(method, data) / made_here).exists():
                shutil.copyfile(base / folder(method, data) / made_here, file)
        if table.exists():
            record = json.loads(table.read_text(encoding="utf-8"))
            readme = put(readme, command(method, flags), [*markdown(record["ablations"]), "", made(record)])
            done.append(table.stem)
    write_atomically(path, readme)
    if found := panels(kept):
        overview(found, kept / "overview.png")
    return done


def panels(kept):
    """The PANELS whose tables are in this folder: {title: {name: values by seed}}; rows that are there."""
    tables = {file.stem: json.loads(file.read_text(encoding="utf-8"))["ablations"] for file in kept.glob("*.json")}
    found = {}
    for title, column, table, base, names in PANELS:
        for row, name in names.items():
            other, _, row = row.rpartition(": ")
            rows = tables.get(other or table, {})
            cells = {bare(r): c for r, c in (against(rows, base) if base else rows).items()}.get(row, {})
            if "values" in cells.get(column, {}):
                found.setdefault(title, {})[name] = cells[column]["values"]
    return found


def overview(found, path):
    """One picture of what the methods do: a point a seed, a line at the mean. Without matplotlib the old one
    stays."""
    if (plt := pyplot()) is None:
        return
    figure, axes = plt.subplots(2, -(-len(found) // 2), figsize=(12.5, 5.5), squeeze=False)
    for axis, (title, rows) in zip(axes.flat, found.items()):
        for y, values in enumerate(rows.values()):
            axis.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.5)
            axis.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color="black")
        axis.set_title(title, fontsize=10)
        axis.set_yticks(range(len(rows)), rows)
        axis.invert_yaxis()
        axis.locator_params("x", nbins=5)
        axis.tick_params(labelsize=9)
        axis.grid(axis="x", alpha=0.4)
    for axis in list(axes.flat)[len(found):]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def print_gains(names, base, kept=ROOT / "figures"):
    """`against` for those of these tables (METHOD-DATA) that are there; one line and status 1 where that cannot
    be."""
    finished = [name for name in names if (kept / f"{name}.json").exists()]
    if not finished:
        sys.exit(f"error: {kept} has no table {' or '.join(names)}; run make results first")
    for name in finished:
        rows = json.loads((kept / f"{name}.json").read_text(encoding="utf-8"))["ablations"]
        try:
            gains = against(rows, base)
        except ValueError as problem:
            sys.exit(f"error: {name}: {problem}")
        except KeyError:
            sys.exit(f"error: {name}: its table was made by an earlier version and has no values by seed; "
                     "run make results again")
        print("\n".join([f"{name}: differences to {base}, mean ± std over seeds", *markdown(gains)]))


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", help="one of " + ", ".join(sorted({m for m, *_ in COMMANDS})))
    parser.add_argument("--data", help="one of " + ", ".join(sorted({d for _, d, *_ in COMMANDS})))
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--against", metavar="ROW",
                        help="run nothing; print what each row of the finished tables gains over this one")
    args = parser.parse_args(argv)
    chosen = [c for c in COMMANDS if args.method in (None, "", c[0]) and args.data in (None, "", c[1])]
    if not chosen:
        parser.error(f"there is no table for --method {args.method} --data {args.data}; see --help")
    if args.against:
        return print_gains([f"{method}-{data}" for method, data, *_ in chosen], args.against)
    for method, data, flags, picture in () if args.render else chosen:
        print(f"\n##### {command(method, flags)}", flush=True)
        out = subprocess.run([sys.executable, f"{method}.py", *shlex.split(flags),
                              "--run", str(folder(method, data)), "--resume"], cwd=ROOT)
        if out.returncode:
            sys.exit(out.returncode)
        render(ROOT / "README.md", [(method, data, flags, picture)])
    print("tables written: " + ", ".join(render(ROOT / "README.md", chosen)))


if __name__ == "__main__":
    main()
