"""LLM scores of candidates: one pass per user with the history shared, against one prompt per candidate, same model.

    python tests/bench/llm_scores.py [--candidates 20] [--threads 2]

The bundled backbone on the toy world's users; both sides in batches of 8 users (8 prompts), alternating in one process.
The scores must agree to 1e-4.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))

import torch

import sllmr
from common import llm
from timing import alternate


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("candidates", 20), ("users", 32), ("threads", 2), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = sllmr.Rows(sllmr.Args(data="toy"), torch.device("cpu"))
    model, tokenizer = llm.load("tiny")
    yes, no = (llm.single_token(tokenizer, word) for word in ("Yes", "No"))
    asked = [sllmr.ask(rows, int(u), list(range(args.candidates))) for u in rows.logs.held_out[:args.users]]

    def shared(_):
        return torch.cat([torch.cat(sllmr.score_shared(model, tokenizer, asked[k:k + 8], yes, no)) for k in range(0, len(asked), 8)])

    def single(_):
        prompts = [llm.chat(tokenizer, "".join(prompt)) for user in asked for prompt in user]
        found = torch.cat([llm.next_token_logits(model, prompts[k:k + 8], [yes, no]) for k in range(0, len(prompts), 8)])
        return found[:, 0] - found[:, 1]
    median, record, scores = alternate({"shared": shared, "single": single}, args.runs)
    torch.testing.assert_close(scores["shared"][0], scores["single"][0], atol=1e-4, rtol=0)
    rates = {f"{name}_per_s": round(args.users * args.candidates / t) for name, t in median.items()}
    print(json.dumps(vars(args) | rates | record | {"ratio": round(median["single"] / median["shared"], 2)}))


if __name__ == "__main__":
    main()
