"""Two sides of a comparison, timed in turn: what disturbs the machine disturbs both."""

import statistics
import time


def alternate(sides, runs):
    """sides: {name: step(k)}, called in turn for k = 0 .. runs, the first round being a warm-up.
    -> (medians {name: seconds}, record {name_s, name_spread_s: [shortest, longest]}, results {name: what each call returned})."""
    times, results = {name: [] for name in sides}, {name: [] for name in sides}
    for k in range(runs + 1):
        for name, step in sides.items():
            start = time.perf_counter()
            results[name].append(step(k))
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t[1:]) for name, t in times.items()}
    record = {f"{name}_s": round(t, 4) for name, t in median.items()}
    return median, record | {f"{name}_spread_s": [round(min(t[1:]), 4), round(max(t[1:]), 4)] for name, t in times.items()}, results
