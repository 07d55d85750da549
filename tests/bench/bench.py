"""make bench: every comparison with a peer, each in a process of its own, one table at the end.

Ratios, not seconds: both sides run in the same minute on the same machine. A peer that is not installed is reported.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROWS = (   # what is compared, script and flags, how the ratio reads
    ("GRPO step, 200-token prompts, vs TRL", ["grpo_vs_trl.py", "--prompt", "200"], "times faster"),
    ("GRPO step, 600-token prompts, vs TRL", ["grpo_vs_trl.py", "--prompt", "600"], "times faster"),
    ("GRPO step, 151,669-token vocabulary, vs TRL", ["grpo_vs_trl.py", "--vocab", "151669", "--memory"], "of its peak memory"),
    ("LCFT step, shared context, vs PEFT", ["lcft_vs_peft.py"], "of its time"),
    ("LCFT step, instruction first, vs PEFT", ["lcft_vs_peft.py", "--template", "tallrec"], "of its time"),
    ("LCFT step, 151,669-token vocabulary, vs PEFT", ["lcft_vs_peft.py", "--vocab", "151669", "--memory"], "of its peak memory"),
    ("DIN, full catalogue, vs DeepCTR-Torch", ["din_vs_deepctr.py"], "times the rows per second"),
    ("DIN, training, vs DeepCTR-Torch", ["ctr_vs_deepctr.py"], "times the rows per second"),
    ("DeepFM, training, vs DeepCTR-Torch", ["ctr_vs_deepctr.py", "--kind", "deepfm"], "times the rows per second"),
    ("DIN, inference on rows, vs DeepCTR-Torch", ["ctr_vs_deepctr.py", "--infer"], "times the rows per second"),
    ("DeepFM, inference on rows, vs DeepCTR-Torch", ["ctr_vs_deepctr.py", "--kind", "deepfm", "--infer"], "times the rows per second"),
    ("LLM scores, history shared, vs a prompt each", ["llm_scores.py"], "times the rate"),
)


def main():
    table, failed = [], False
    for name, command, unit in ROWS:
        print(f"... {name}", flush=True)
        out = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], capture_output=True, text=True)
        lines = [line for line in out.stdout.splitlines() if line.startswith("{")]
        if out.returncode or not lines:
            failed = True
            table.append((name, "failed", (out.stderr.strip().splitlines() or ["no output"])[-1]))
            continue
        record = json.loads(lines[-1])
        table.append((name, f"{record.pop('ratio'):.2f} {unit}", ", ".join(f"{k} {v}" for k, v in record.items())))
    width = max(len(row[0]) for row in table)
    for name, ratio, details in table:
        print(f"{name:{width}}  {ratio:28}  {details}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
