"""LCFT's training step against PEFT: the pair of prompts packed into one row, or two padded passes with full logits.

    python tests/bench/lcft_vs_peft.py [--template shared|tallrec] [--vocab N] [--steps 5] [--memory]

Same weights (the bundled backbone's shape, at random), same rows of the toy world, LoRA r8 on q_proj and v_proj without
dropout, cross-entropy and --kl bounded, AdamW, fp32; alternating in one process, the
ratio is that of the medians; both losses must be equal. Ours includes writing and tokenising the prompts, theirs gets
them tokenised. --memory runs each side in a process of its own and compares the peak above the loaded model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lcft
from common import llm, lora
from grpo_vs_trl import peak_of
from timing import alternate

BATCH, LAM = 16, 0.3


def backbone(folder, vocab):
    """The bundled backbone's shape and tokenizer with random weights and a vocabulary of the size asked for."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(llm.TINY)
    config.vocab_size = max(vocab, config.vocab_size)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(llm.TINY).save_pretrained(folder)
    return str(folder)


def host_of(folder, template):
    args = lcft.Args(backbone=folder, template=template, lora_dropout=0.0, kl="bounded", lam=LAM)
    return lcft.Host(args, torch.device("cpu"), lcft.Rows(args))


def ours(folder, template):
    host = host_of(folder, template)
    host.model.train()
    optimizer = torch.optim.AdamW(lora.parameters(host.model), lr=1e-4)

    def step(k):
        loss, _ = lcft.train_pairs(host, host.rows.train[k * BATCH:(k + 1) * BATCH], "bounded")
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        return loss.mean().item()
    return step


def theirs(folder, template, steps):
    from peft import LoraConfig, get_peft_model
    host = host_of(folder, template)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])).train()
    own = {f"base_model.model.{n.replace('lora_A', 'lora_A.default.weight').replace('lora_B', 'lora_B.default.weight')}": p
           for n, p in host.model.named_parameters() if "lora_" in n}
    for name, p in model.named_parameters():                  # the same adapter to start from
        if name in own:
            p.data.copy_(own[name])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batches = []
    for k in range(steps + 1):
        rows = host.rows.train[k * BATCH:(k + 1) * BATCH]
        prompts = [lcft.pair_prompts(*host.rows.before(r), host.rows.lines[host.rows.item[r]], template) for r in rows]
        batches.append(([[llm.chat(host.tokenizer, p[g]) for p in prompts] for g in (0, 1)], host.rows.label[rows]))
    ids = host.ids
    del host

    def logits(prompts):
        tokens, mask, lengths = llm._right_padded(prompts, "cpu")
        full = model(input_ids=tokens, attention_mask=mask.long()).logits                     # (B, T, V)
        return full[torch.arange(len(prompts)), lengths - 1].float()

    def step(k):
        (pos, neg), label = batches[k]
        pos, neg = logits(pos), logits(neg)
        loss = F.cross_entropy(pos, torch.tensor([ids[1 - y] for y in label])) - LAM * lcft.apart(pos, neg, "swap", ids=ids).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--template", choices=("shared", "tallrec"), default="shared")
    for name, default in (("vocab", 2048), ("steps", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--side", choices=("ours", "peft"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = {"template": args.template, "vocab": args.vocab, "threads": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        folder = backbone(folder, args.vocab)
        if args.side:                                         # a child of --memory
            step = ours(folder, args.template) if args.side == "ours" else theirs(folder, args.template, 1)
            return print("MIB", max(peak_of(step, k) for k in range(2)))
        if args.memory:
            for side in ("ours", "peft"):
                out = subprocess.run([sys.executable, __file__, "--side", side, "--template", args.template, "--vocab", str(args.vocab),
                                      "--threads", str(args.threads)], capture_output=True, text=True)
                if "MIB" not in out.stdout:
                    sys.exit(out.stderr[-2000:])
                record[f"{side}_mib"] = round(float(out.stdout.split("MIB")[1]), 1)
            return print(json.dumps(record | {"ratio": round(record["ours_mib"] / record["peft_mib"], 3)}))
        sides = {"ours": ours(folder, args.template), "peft": theirs(folder, args.template, args.steps)}
    median, spread, losses = alternate(sides, args.steps)
    assert all(abs(a - b) < 1e-3 for a, b in zip(*losses.values())), losses
    print(json.dumps(record | spread | {"ratio": round(median["ours"] / median["peft"], 3)}))


if __name__ == "__main__":
    main()
