"""What knowledge costs when it is served: the catalogue scored with knowledge vectors and without, same model, one process.

    python tests/bench/coco_serving.py [--users 16] [--items 2000] [--threads 2]

Alternating runs; the ratio is that of the medians. The vectors are looked up, as they are when served: no LLM is asked.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

import coco


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("users", 16), ("items", 2000), ("threads", 2), ("runs", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = coco.Rows(coco.Args(data=f"toy:300x{args.items}x15000"), torch.device("cpu"))
    model = coco.CoCo(rows.args, rows).eval()
    n, part = len(rows.data.items), rows.test[:, :args.users]
    table = torch.cat([part[:3], torch.arange(n)[:, None].expand(n, part.shape[1])])
    store = torch.randn(1000, model.args.dim)
    index = torch.randint(1000, (part.shape[1],))
    sides = {"with": lambda: model.score(table, store[index]), "without": lambda: model.score(table)}
    times = {name: [] for name in sides}
    with torch.no_grad():
        for k in range(args.runs + 1):
            for name, run in sides.items():
                start = time.perf_counter()
                assert run().shape == (part.shape[1], n)
                if k:
                    times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    record = vars(args) | {"items": n} | {f"{name}_s": round(t, 4) for name, t in median.items()}
    record |= {f"{name}_spread_s": [round(min(t), 4), round(max(t), 4)] for name, t in times.items()}
    print(json.dumps(record | {"ratio": round(median["with"] / median["without"], 2)}))


if __name__ == "__main__":
    main()
