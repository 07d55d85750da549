"""Peak memory and speed of reading Amazon reviews.

    python tests/bench/memory_amazon.py [REVIEWS] [USERS] [ITEMS]

Writes that many made-up reviews in the layout of 2018 to a temporary .json.gz, reads them in a child process
and prints the child's peak resident memory (ru_maxrss). Status 1 if it is above 3 GiB.
"""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_GIB = 3.0
CHILD = """
import json, resource, sys, time
before = time.perf_counter()
from common.data import load
imported = time.perf_counter()
d = load(sys.argv[1])
seconds = time.perf_counter() - imported
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps(dict(users=len(d.users), items=len(d.items), interactions=len(d.user),
                      seconds=round(seconds, 1), peak_gib=round(peak, 2))))
"""


def generate(path, n, users, items):
    """n reviews of about 330 bytes; users and items are long-tailed, like the real ones."""
    rng, words = (
        random.Random(0),
        "great fun but the battery died after a week of playing with it every day".split(),
    )
    texts = [" ".join(rng.choices(words, k=24)) for _ in range(1000)]
    with gzip.open(path, "wt", compresslevel=1) as f:
        for _ in range(n):
            u, i = int(users * rng.random() ** 1.5), int(items * rng.random() ** 2)
            f.write(
                f'{{"overall": {rng.randint(1, 5)}.0, "verified": true, "reviewTime": "09 1, 2016", '
                f'"reviewerID": "A{u:013d}", "asin": "B{i:09d}", "reviewerName": "somebody", '
                f'"reviewText": "{rng.choice(texts)}", "summary": "Five Stars", '
                f'"unixReviewTime": {rng.randrange(9 * 10**8, 15 * 10**8)}}}\n'
            )


def main(n=100_000, users=None, items=None):
    users, items = users or n // 2, items or max(n // 20, 1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        start = time.perf_counter()
        generate(source / "Made_Up_5.json.gz", n, users, items)
        print(f"{n:,} reviews written in {time.perf_counter() - start:.0f} s", flush=True)
        env = os.environ | {"LLMREC_CACHE": str(Path(folder) / "cache"), "PYTHONPATH": str(ROOT)}
        for when in ("parsed", "cached"):
            out = subprocess.run(
                [sys.executable, "-c", CHILD, str(source)], env=env, check=True, capture_output=True
            )
            report = json.loads(out.stdout)
            print(f"{when}: {report}", flush=True)
            if report["peak_gib"] > LIMIT_GIB:
                sys.exit(f"above {LIMIT_GIB} GiB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
