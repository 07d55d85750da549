"""make bench: every comparison with a peer, each in a process of its own; results.json, and the README's table from it.

    python tests/bench/bench.py [--only LCFT] [--render]

Ratios, not seconds: both sides run in the same minute on the same machine. A peer that is not installed is reported.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from common.results import put
from common.run import commit, write_atomically

ROWS = (   # what is compared, script and flags, how the ratio reads, the bar: at least (+) or at most (-)
    ("GRPO step, 200-token prompts, vs TRL", ["grpo_vs_trl.py", "--prompt", "200"], "times faster", 2.5),
    ("GRPO step, 600-token prompts, vs TRL", ["grpo_vs_trl.py", "--prompt", "600"], "times faster", 4.0),
    ("GRPO step, 151,669-token vocabulary, vs TRL", ["grpo_vs_trl.py", "--vocab", "151669", "--memory"], "of its peak memory", -0.25),
    ("LCFT step, shared context, vs PEFT", ["lcft_vs_peft.py"], "of its time", -0.6),
    ("LCFT step, instruction first, vs PEFT", ["lcft_vs_peft.py", "--template", "tallrec"], "of its time", -1.0),
    ("LCFT step, 151,669-token vocabulary, vs PEFT", ["lcft_vs_peft.py", "--vocab", "151669", "--memory"], "of its peak memory", -0.25),
    ("DIN, full catalogue, vs DeepCTR-Torch", ["din_vs_deepctr.py"], "times faster", 8.0),
    ("DIN, training on rows, vs DeepCTR-Torch", ["ctr_vs_deepctr.py", "--rows", "102400"], "times faster", 3.0),
    ("DeepFM, training on rows, vs DeepCTR-Torch", ["ctr_vs_deepctr.py", "--kind", "deepfm", "--rows", "102400"], "times faster", 3.0),
    ("DIN, inference on rows, vs DeepCTR-Torch", ["ctr_vs_deepctr.py", "--infer", "--rows", "102400"], "times faster", 8.0),
    ("DeepFM, inference on rows, vs DeepCTR-Torch", ["ctr_vs_deepctr.py", "--kind", "deepfm", "--infer", "--rows", "102400"], "times faster", 8.0),
    ("LLM scores, history shared, vs a prompt each", ["llm_scores.py"], "times faster", 5.0),
    ("CoCo, catalogue with knowledge, vs without", ["coco_serving.py"], "times the time", -1.2),
)


def versions():
    from importlib.metadata import PackageNotFoundError, version
    found = {}
    for name in ("torch", "transformers", "trl", "peft", "deepctr-torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"}


def measure(name, command, unit, bar):
    """One row: the record that a script printed as its last line, or why there is none."""
    out = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], capture_output=True, text=True)
    lines = [line for line in out.stdout.splitlines() if line.startswith("{")]
    if out.returncode or not lines:
        return {"name": name, "failed": (out.stderr.strip().splitlines() or ["no output"])[-1]}
    record = json.loads(lines[-1])
    held = record["ratio"] >= bar if bar > 0 else record["ratio"] <= -bar
    return {"name": name, "command": " ".join(command), "unit": unit, "bar": bar, "held": held, "commit": commit()} | record


def table(results):
    """results.json -> the lines of the README's table and of what stands below it."""
    lines = ["| what | ours / peer | both sides | aim |", "| --- | --- | --- | --- |"]
    for r in results["rows"]:
        if "failed" in r:
            lines.append(f"| {r['name']} | failed | {r['failed']} | |")
            continue
        sides = [f"{key.removesuffix('_mib')} {r[key]:,.0f} MiB" for key in r if key.endswith("_mib")]
        for key in (k for k in r if k.endswith("_s") and f"{k.removesuffix('_s')}_spread_s" in r):
            low, high = r[f"{key.removesuffix('_s')}_spread_s"]
            sides.append(f"{key.removesuffix('_s')} {r[key]:.3g} s ({low:.3g} to {high:.3g})")
        miss = "held" if r["held"] else f"missed by {abs(r['ratio'] - abs(r['bar'])):.2f}"
        lines.append(f"| {r['name']} | {r['ratio']:.3g} {r['unit']} | {', '.join(sides)} | {abs(r['bar']):g}: {miss} |")
    v = results["versions"]
    return [*lines, "", "Measured with " + ", ".join(f"{name} {x}" for name, x in v.items() if x) + "; commit " + ", ".join(sorted({r["commit"] or "none" for r in results["rows"] if "commit" in r})) + "."]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="rows whose name holds this; the others stay as they were")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the README's table")
    args = parser.parse_args()
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"rows": []}
    if not args.render:
        rows = {r["name"]: r for r in results["rows"]}
        for row in ROWS:
            if args.only in row[0]:
                print(f"... {row[0]}", flush=True)
                rows[row[0]] = measure(*row)
        results = {"versions": versions(), "rows": [rows[name] for name, *_ in ROWS if name in rows]}
        write_atomically(file, json.dumps(results, indent=1) + "\n")
    lines = table(results)
    print("\n".join(lines))
    readme = ROOT / "README.md"
    write_atomically(readme, put(readme.read_text(encoding="utf-8"), "make bench", lines))
    return int(any("failed" in r for r in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
