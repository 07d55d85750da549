"""Our DIN against DeepCTR-Torch's: every item of the catalogue scored for some users, same sizes, fp32, one process.

    python tests/bench/din_vs_deepctr.py [--users 16] [--items 2000] [--history 50] [--threads 2]

Theirs is given the same rows through its own `predict` (a row per user and item, batch 4096); ours scores the catalogue
per user. Alternating runs; the ratio is that of the medians. Weights are random: the time does not depend on them.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))

import numpy as np
import torch

from common.recommenders import CTR
from timing import alternate

N_USERS, DIM, HIDDEN, UNIT = 1000, 32, (64, 32), 32   # UNIT: hidden units of the attention, as CTR has them


def ours(items, users, history):
    model = CTR("din", N_USERS, items, torch.zeros(items + 1, 1), DIM, HIDDEN).eval()
    users, history = torch.as_tensor(users), torch.as_tensor(history)
    return lambda k: model.score_catalogue(users, history)


def theirs(items, users, history):
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
    from deepctr_torch.models import DIN as DeepCtrDIN
    features = [SparseFeat("user", N_USERS, DIM), SparseFeat("item", items + 1, DIM),
                VarLenSparseFeat(SparseFeat("hist_item", items + 1, DIM, embedding_name="item"), history.shape[1], length_name="length")]
    model = DeepCtrDIN(features, ["item"], dnn_hidden_units=HIDDEN, att_hidden_size=(UNIT,), device="cpu")
    every = np.arange(1, items + 1)
    x = {"user": np.repeat(users, items), "item": np.tile(every, len(users)), "hist_item": np.repeat(history, items, 0),
         "length": np.repeat((history > 0).sum(1), items)}
    return lambda k: model.predict(x, batch_size=4096)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("users", 16), ("items", 2000), ("history", 50), ("threads", 2), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    users, history = rng.integers(0, N_USERS, args.users), rng.integers(1, args.items + 1, (args.users, args.history))
    sides = {"ours": ours(args.items, users, history), "deepctr": theirs(args.items, users, history)}
    median, record, scores = alternate(sides, args.runs)
    rows = args.users * args.items
    assert all(np.prod(s.shape) == rows for side in scores.values() for s in side)
    rates = {f"{name}_rows_per_s": round(rows / t) for name, t in median.items()}
    print(json.dumps(vars(args) | rates | record | {"ratio": round(median["deepctr"] / median["ours"], 2)}))


if __name__ == "__main__":
    main()
