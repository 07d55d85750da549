"""Ranking and classification metrics. Ties never help: a constant scorer gets the worst rank and an AUC of 1/2."""

import numpy as np


def ranks_of(scores, targets, exclude=None):
    """Rank of each row's target among the row's items, 1 = best: scores (B, N), targets (B,), exclude (B, N) bool.

    Items that tie with the target count as better. Excluded items do not compete; the target always does.
    Raises ValueError on scores that are not a number.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN: nothing can be ranked")
    row = np.arange(len(scores))
    better = scores >= scores[row, targets][:, None]
    if exclude is not None:
        better &= ~exclude
    better[row, targets] = False
    return 1 + better.sum(1)


def recall_at(ranks, k):
    """Per row 1 if the only relevant item is within the first k (leave-one-out: recall = hit rate)."""
    return (np.asarray(ranks) <= k).astype(float)


def ndcg_at(ranks, k):
    """Per row 1 / log2(rank + 1) within the first k, else 0 (one relevant item: the ideal DCG is 1)."""
    ranks = np.asarray(ranks, dtype=float)
    return np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0)


def ranking_report(ranks, ks=(5, 10, 20), seed=0, draws=1000):
    """{"recall@5": mean, ..., "ndcg@10_ci": [low, high]}: 95 % bootstrap intervals over rows."""
    ranks = np.asarray(ranks)
    values = {f"{name}@{k}": metric(ranks, k)
              for name, metric in (("recall", recall_at), ("ndcg", ndcg_at)) for k in ks}
    rng, table = np.random.default_rng(seed), np.stack(list(values.values()), 1)             # (rows, metrics)
    # one draw at a time: (draws, rows) is GiBs
    means = np.array([table[rng.integers(0, len(ranks), len(ranks))].mean(0) for _ in range(draws)])
    report = {"n": len(ranks)}
    for (name, value), drawn in zip(values.items(), means.T):
        report[name] = round(float(value.mean()), 6)
        report[f"{name}_ci"] = [round(float(q), 4) for q in np.quantile(drawn, (0.025, 0.975))]
    return report


def auc(label, score):
    """Area under the ROC curve, ties 1/2: labels (n,) in {0, 1}, scores (n,). nan when one class is missing
    or a score is nan."""
    label, score = np.asarray(label).astype(bool), np.asarray(score, dtype=float)
    positives, negatives = label.sum(), (~label).sum()
    if positives == 0 or negatives == 0 or np.isnan(score).any():
        return float("nan")
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]                     # mean rank of each tie, 1-based
    return float((rank[label].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def uauc(user, label, score, weighting="user"):
    """Mean over users of their own AUC; users with one class only are left out.

    weighting: "user" counts every user once, "impressions" by the user's number of rows. The literature uses both.
    """
    if weighting not in ("user", "impressions"):
        raise ValueError(f"weighting is user or impressions, not {weighting}")
    user, label, score = map(np.asarray, (user, label, score))
    values, weights = [], []
    for u in np.unique(user):
        mine = user == u
        value = auc(label[mine], score[mine])
        if not np.isnan(value):
            values.append(value)
            weights.append(1 if weighting == "user" else mine.sum())
    return float(np.average(values, weights=weights)) if values else float("nan")


def log_loss(label, logit):
    """Mean binary cross-entropy of logits, in nats; finite for any finite logit."""
    label, logit = np.asarray(label, dtype=float), np.asarray(logit, dtype=float)
    return float(np.mean(np.logaddexp(0, logit) - label * logit))


def calibration(label, probability, bins=10):
    """(expected calibration error, rows of (mean probability, share of positives, count)) over equal-width bins."""
    label, probability = np.asarray(label, dtype=float), np.asarray(probability, dtype=float)
    which = np.minimum((probability * bins).astype(int), bins - 1)
    rows = [(float(probability[which == b].mean()), float(label[which == b].mean()), int((which == b).sum()))
            for b in range(bins) if (which == b).any()]
    return sum(abs(p - y) * n for p, y, n in rows) / len(label), rows


def summary(values, digits=6):
    """mean_std for JSON: {"mean": , "std": , "values": }, rounded; std None where there is none."""
    mean, std = mean_std(values)
    return {"mean": round(mean, digits), "std": None if np.isnan(std) else round(std, digits),
            "values": [round(float(v), digits) for v in values]}


def shown(cell):
    """A summary as a cell of a table, 18 wide: no deviation of a single seed; None leaves it empty."""
    if cell is None:
        return " " * 18
    return f"{cell['mean']:9.4f}" + (" " * 9 if cell["std"] is None else f" ± {cell['std']:.4f}")


def mean_std(values):
    """(mean, sample standard deviation) over seeds; the deviation of a single value is nan, not 0."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")
