"""make bench: every comparison with a peer, each in a process of its own, one table at the end.

Ratios, not seconds: both sides run in the same minute on the same machine. A peer that is not installed is reported.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROWS = (   # what is compared, script and flags, how the ratio reads, the bar: at least (+) or at most (-)
    ("GRPO step, 200-token prompts, vs TRL", ["grpo_vs_trl.py", "--prompt", "200"], "times faster", 2.5),
    ("GRPO step, 600-token prompts, vs TRL", ["grpo_vs_trl.py", "--prompt", "600"], "times faster", 4.0),
    ("GRPO step, 151,669-token vocabulary, vs TRL", ["grpo_vs_trl.py", "--vocab", "151669", "--memory"], "of its peak memory", -0.25),
    ("LCFT step, shared context, vs PEFT", ["lcft_vs_peft.py"], "of its time", -0.6),
    ("LCFT step, instruction first, vs PEFT", ["lcft_vs_peft.py", "--template", "tallrec"], "of its time", -1.0),
    ("LCFT step, 151,669-token vocabulary, vs PEFT", ["lcft_vs_peft.py", "--vocab", "151669", "--memory"], "of its peak memory", -0.25),
    ("DIN, full catalogue, vs DeepCTR-Torch", ["din_vs_deepctr.py"], "times the rows per second", 8.0),
    ("DIN, training, vs DeepCTR-Torch", ["ctr_vs_deepctr.py"], "times the rows per second", 3.0),
    ("DeepFM, training, vs DeepCTR-Torch", ["ctr_vs_deepctr.py", "--kind", "deepfm"], "times the rows per second", 3.0),
    ("DIN, inference on rows, vs DeepCTR-Torch", ["ctr_vs_deepctr.py", "--infer"], "times the rows per second", 8.0),
    ("DeepFM, inference on rows, vs DeepCTR-Torch", ["ctr_vs_deepctr.py", "--kind", "deepfm", "--infer"], "times the rows per second", 8.0),
    ("LLM scores, history shared, vs a prompt each", ["llm_scores.py"], "times the rate", 5.0),
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


def main():
    table, records = [], []
    for name, command, unit, bar in ROWS:
        print(f"... {name}", flush=True)
        out = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], capture_output=True, text=True)
        lines = [line for line in out.stdout.splitlines() if line.startswith("{")]
        if out.returncode or not lines:
            table.append((name, "failed", "", (out.stderr.strip().splitlines() or ["no output"])[-1]))
            records.append({"name": name, "failed": table[-1][-1]})
            continue
        record = json.loads(lines[-1])
        ratio = record["ratio"]
        held = ratio >= bar if bar > 0 else ratio <= -bar
        verdict = f"bar {abs(bar):g}: " + ("held" if held else f"missed by {abs(ratio - abs(bar)):.2f}")
        records.append({"name": name, "command": " ".join(command), "unit": unit, "bar": bar, "held": held} | record)
        table.append((name, f"{record.pop('ratio'):.2f} {unit}", verdict, ", ".join(f"{k} {v}" for k, v in record.items())))
    width = max(len(row[0]) for row in table)
    for name, ratio, verdict, details in table:
        print(f"{name:{width}}  {ratio:30}  {verdict:24}  {details}")
    (HERE / "results.json").write_text(json.dumps({"versions": versions(), "rows": records}, indent=1) + "\n")
    return int(any("failed" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
