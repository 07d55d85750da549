"""LLM scores of candidates: one pass per user with the history shared, against one prompt per candidate, same model.

    python tests/bench/llm_scores.py [--candidates 20] [--threads 2]

The bundled backbone on the toy world's users; both sides in batches of 8 users (8 prompts), alternating in one process.
The scores must agree to 1e-4.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

import sllmr
from common import llm


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("candidates", 20), ("users", 32), ("threads", 2), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = sllmr.Rows(sllmr.Args(data="toy"), torch.device("cpu"))
    model, tokenizer = llm.load("tiny")
    yes, no = (llm.single_token(tokenizer, word) for word in ("Yes", "No"))
    asked = [sllmr.ask(rows, int(u), list(range(args.candidates))) for u in rows.logs.judged[:args.users]]

    def shared():
        return torch.cat([torch.cat(sllmr.score_shared(model, tokenizer, asked[k:k + 8], yes, no)) for k in range(0, len(asked), 8)])

    def single():
        prompts = [llm.chat(tokenizer, "".join(prompt)) for user in asked for prompt in user]
        found = torch.cat([llm.next_token_logits(model, prompts[k:k + 8], [yes, no]) for k in range(0, len(prompts), 8)])
        return found[:, 0] - found[:, 1]
    sides, times = {"shared": shared, "single": single}, {"shared": [], "single": []}
    for k in range(args.runs + 1):
        scores = {}
        for name, run in sides.items():
            start = time.perf_counter()
            scores[name] = run()
            if k:
                times[name].append(time.perf_counter() - start)
    torch.testing.assert_close(scores["shared"], scores["single"], atol=1e-4, rtol=0)
    median = {name: statistics.median(t) for name, t in times.items()}
    count = args.users * args.candidates
    print(json.dumps(vars(args) | {f"{name}_per_s": round(count / t) for name, t in median.items()}
                     | {"ratio": round(median["single"] / median["shared"], 2)}))


if __name__ == "__main__":
    main()
