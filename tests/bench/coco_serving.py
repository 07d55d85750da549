"""What knowledge costs when it is served: the catalogue scored with knowledge vectors and without, same model, one process.

    python tests/bench/coco_serving.py [--users 16] [--items 2000] [--threads 2]

Alternating runs; the ratio is that of the medians. The vectors are looked up, as they are when served: no LLM is asked.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))

import torch

import coco
from timing import alternate


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
    sides = {"with": lambda k: model.score(table, store[index]), "without": lambda k: model.score(table)}
    with torch.no_grad():
        median, record, scores = alternate(sides, args.runs)
    assert all(s.shape == (part.shape[1], n) for side in scores.values() for s in side)
    print(json.dumps(vars(args) | {"items": n} | record | {"ratio": round(median["with"] / median["without"], 2)}))


if __name__ == "__main__":
    main()
