"""Our click models against DeepCTR-Torch's: training and inference on the same rows, same sizes, fp32, one process.

    python tests/bench/ctr_vs_deepctr.py [--kind din|deepfm] [--batch 1024] [--dim 32] [--history 20] [--threads 2]

A row is user, item, the past items, half of the rows negatives. Theirs trains with its own `fit` (Adam, binary
cross-entropy, no regularisation, one epoch), ours with the step of sllmr.py; then `predict` against our forward pass.
Alternating runs; the ratio is that of the medians. --infer compares inference instead of training.
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))

import numpy as np
import torch

import sllmr
from common.recommenders import CTR
from timing import alternate

N_USERS, N_ITEMS, HIDDEN = 5000, 3000, (200, 80)


def ours(args, users, items, history, label):
    torch.manual_seed(0)
    model = CTR(args.kind, N_USERS, N_ITEMS, np.zeros((N_ITEMS + 1, 1)), args.dim, HIDDEN, 0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    users, items, history = torch.as_tensor(users[::2]), torch.as_tensor(items.reshape(-1, 2)), torch.as_tensor(history[::2])

    def fit(k):
        model.train()
        for part in torch.randperm(len(users)).split(args.batch // 2):
            s = model(users[part], items[part], history[part])
            loss = sllmr.click_loss(s)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def predict(k):
        model.eval()
        return torch.cat([model(users[k:k + 512], items[k:k + 512], history[k:k + 512]) for k in range(0, len(users), 512)])
    return predict if args.infer else fit


def theirs(args, users, items, history, label):
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
    from deepctr_torch.models import DIN, DeepFM
    user, item = SparseFeat("user", N_USERS, args.dim), SparseFeat("item", N_ITEMS + 1, args.dim)
    past = VarLenSparseFeat(SparseFeat("hist_item", N_ITEMS + 1, args.dim, embedding_name="item"), history.shape[1], combiner="mean",
                            length_name="length")
    flags = {"dnn_hidden_units": HIDDEN, "device": "cpu", "l2_reg_embedding": 0.0}
    if args.kind == "din":
        model = DIN([user, item, past], ["item"], att_hidden_size=(32,), **flags)
    else:
        model = DeepFM([user, item, past], [user, item, past], l2_reg_linear=0.0, **flags)
    model.compile("adam", "binary_crossentropy")
    x = {"user": users, "item": items, "hist_item": history, "length": (history > 0).sum(1)}

    def run(k):
        with contextlib.redirect_stdout(io.StringIO()):
            model.predict(x, args.batch) if args.infer else model.fit(x, label, batch_size=args.batch, epochs=1, verbose=0)
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=("din", "deepfm"), default="din")
    parser.add_argument("--infer", action="store_true")
    for name, default in (("rows", 20480), ("batch", 1024), ("dim", 32), ("history", 20), ("threads", 2), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    pairs = args.rows // 2
    users = np.repeat(rng.integers(0, N_USERS, pairs), 2)
    history = np.repeat(np.where(np.arange(args.history) < rng.integers(1, args.history + 1, (pairs, 1)), rng.integers(1, N_ITEMS + 1, (pairs, args.history)), 0), 2, 0)
    items, label = rng.integers(1, N_ITEMS + 1, args.rows), np.tile([1.0, 0.0], pairs)
    sides = {"ours": ours(args, users, items, history, label), "deepctr": theirs(args, users, items, history, label)}
    median, record, _ = alternate(sides, args.runs)
    rates = {f"{name}_rows_per_s": round(args.rows / t) for name, t in median.items()}
    print(json.dumps(vars(args) | rates | record | {"ratio": round(median["deepctr"] / median["ours"], 2)}))


if __name__ == "__main__":
    main()
