"""make bench-gpu: the real shapes of Qwen2.5 with random weights (the time does not depend on them), ours and the peer in turn.

    python tests/bench/gpu.py [--shapes 0.5B,1.5B,3B,7B] [--prompts 4] [--group 8] [--prompt 300] [--new 64]

Sampling: tokens a second of `llm.rollout` (prompts computed once for their group, static cache, one CUDA graph) against
`model.generate`, and against the floor that the memory's bandwidth sets: every step reads all weights once. Training: a
LoRA step on the same completions, packed rows and chunked log-probabilities against PEFT on one row per completion and
full logits. Peak memory of each, and what fits on cards of 24, 48 and 80 GB: a step of 4 prompts x 8 completions, CURec's --micro-batch on CUDA. --device cpu --shapes nano tries it without a GPU.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen2Config

from common import llm, lora

SHAPES = {   # hidden, layers, heads, key/value heads, intermediate, tied embeddings (the models' own config.json)
    "nano": (64, 2, 4, 2, 128, True), "0.5B": (896, 24, 14, 2, 4864, True), "1.5B": (1536, 28, 12, 2, 8960, True),
    "3B": (2048, 36, 16, 2, 11008, True), "7B": (3584, 28, 28, 4, 18944, False)}


def build(shape, device):
    hidden, layers, heads, kv, inter, tied = SHAPES[shape]
    config = Qwen2Config(vocab_size=1000 if shape == "nano" else 152064 if shape == "7B" else 151936, hidden_size=hidden, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=inter, tie_word_embeddings=tied, bos_token_id=0,
                         eos_token_id=0, max_position_embeddings=4096)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(run, device, times=3):
    """(median seconds, peak GiB) of run() after a warm-up."""
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(times):
        sync(device)
        start = time.perf_counter()
        run()
        sync(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def tried(run, device):
    """measure, or (nan, inf) where it does not fit: the row of a small card goes on."""
    try:
        return measure(run, device)
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return float("nan"), float("inf")


def bandwidth(device, gib=1.0):
    """Bytes a second that reading memory reaches here."""
    x = torch.zeros(int(gib * 2**30) // 4, device=device)
    seconds, _ = measure(lambda: x.sum(), device)
    return x.numel() * 4 / seconds


def rounded(x, digits=None):
    return x if x != x else round(x, digits)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("prompts", 4), ("group", 8), ("prompt", 300), ("new", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shapes", default="0.5B,1.5B,3B,7B")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("make bench-gpu: no CUDA device here")
    speed, table = bandwidth(device, 1.0 if device.type == "cuda" else 0.1), []
    for shape in args.shapes.split(","):
        model = build(shape, device)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, model.config.vocab_size, (args.prompts, args.prompt), generator=generator)
        count, rows = args.prompts * args.group * args.new, tokens.repeat_interleave(args.group, 0).to(device)
        record = {"shape": shape, "weights_gib": round(weights / 2**30, 2), "floor_tokens_per_s": round(args.prompts * args.group * speed / weights)}

        sampled = lambda: llm.rollout(model, tokens.tolist(), args.group, args.new, eos_ids=())
        theirs = lambda: model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=args.new, min_new_tokens=args.new, do_sample=True, pad_token_id=0)
        for name, run in (("ours", sampled), ("generate", theirs)):
            seconds, peak = tried(run, device)
            record |= {f"{name}_tokens_per_s": rounded(count / seconds), f"{name}_sampling_gib": round(peak, 2)}
        record["sampling_ratio"] = rounded(record["ours_tokens_per_s"] / record["generate_tokens_per_s"], 2)

        completions = torch.randint(1, model.config.vocab_size, (args.prompts, args.group, args.new), generator=generator)
        whole = torch.cat([rows, completions.flatten(0, 1).to(device)], 1)
        packed = llm.pack(tokens.tolist(), completions, torch.full(completions.shape[:2], args.new)).to(device)

        def step(parameters, loss):
            def run():
                loss().backward()
                for p in parameters:
                    p.grad = None
            return run
        from peft import LoraConfig, get_peft_model
        peft = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
        plain = lambda: F.cross_entropy(peft(whole).logits[:, args.prompt - 1:-1].flatten(0, 1).float(), whole[:, args.prompt:].flatten())
        seconds, peak = tried(step([p for p in peft.parameters() if p.requires_grad], plain), device)
        record |= {"peft_step_s": round(seconds, 3), "peft_gib": round(peak, 2)}
        model = peft.unload()
        model.requires_grad_(False)
        lora.inject(model, "all-linear", 16, 32.0)
        seconds, _ = tried(sampled, device)                                   # as phase 1 samples: through an adapter that changes each step
        record["adapter_tokens_per_s"] = rounded(count / seconds)
        seconds, peak = tried(step(lora.parameters(model), lambda: -llm.completion_logps(model, packed).logps.mean()), device)
        record |= {"our_step_s": round(seconds, 3), "our_gib": round(peak, 2), "step_ratio": rounded(record["peft_step_s"] / seconds, 2),
                   "fits_gb": [size for size in (24, 48, 80) if max(peak, record["ours_sampling_gib"]) * 1.1 * 2**30 < size * 1e9]}
        table.append(record)
        print(json.dumps(record), flush=True)
        del model, peft, sampled, theirs, plain
        gc.collect()
    head = ("shape", "ours_tokens_per_s", "adapter_tokens_per_s", "generate_tokens_per_s", "floor_tokens_per_s", "sampling_ratio", "our_step_s", "peft_step_s", "step_ratio", "our_gib", "peft_gib", "fits_gb")
    print("\n" + "".join(f"{h:>24}" for h in head))
    for record in table:
        print("".join(f"{str(record[h]):>24}" for h in head))


if __name__ == "__main__":
    main()
