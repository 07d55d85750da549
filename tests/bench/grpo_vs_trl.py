"""Ours against TRL's GRPOTrainer: one GRPO step (sampling, reference, loss, backward, AdamW) on the same weights.

    python tests/bench/grpo_vs_trl.py [--prompt 200] [--vocab 2048] [--steps 5] [--memory]

Same random-weight Qwen2, LoRA r8 on all linear layers, KL on, 4 prompts x 8 completions x 48 tokens, fp32, 2 threads,
alternating in one process; the ratio is that of the medians. --memory runs each side in a process of its own and
compares the peak above the loaded model.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))
os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from timing import alternate

PROMPTS, GROUP, TOKENS = 4, 8, 48


def backbone(vocab):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
        eos_token_id=1))


def word_tokenizer(vocab):
    """One word per id, so that a prompt of n words has n tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {f"w{k}": k for k in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", padding_side="left")


def prompt_ids(length, step):
    g = torch.Generator().manual_seed(step)
    return torch.randint(3, 2000, (PROMPTS, length), generator=g).tolist()


def reward(ids):
    """Anything that differs within a group: the share of even token ids."""
    return sum(i % 2 == 0 for i in ids) / max(len(ids), 1)


def ours(vocab, length):
    import curec
    from common import llm, lora
    policy = curec.Policy.__new__(curec.Policy)
    policy.args, policy.device = curec.Args(lora_rank=8, lora_alpha=16.0, group=GROUP, beta=0.04, lr=1e-5), torch.device("cpu")
    policy.model = backbone(vocab).eval()
    lora.inject(policy.model, "all-linear", 8, 16.0, 0.0)
    policy.start()

    def step(k):
        tokens = prompt_ids(length, k)
        out = llm.rollout(policy.model, tokens, GROUP, TOKENS, eos_ids=[], generator=torch.Generator().manual_seed(k))
        rewards = torch.tensor([[reward(c.tolist()) for c in group] for group in out.tokens])
        policy.step(tokens, out, rewards)
    return step


def theirs(vocab, length, folder):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer
    words = word_tokenizer(vocab)
    rows = [{"prompt": " ".join(f"w{i}" for i in row)} for k in range(200) for row in prompt_ids(length, k)]
    config = GRPOConfig(output_dir=folder, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
                        max_completion_length=TOKENS, beta=0.04, learning_rate=1e-5, use_cpu=True, bf16=False, report_to=[],
                        save_strategy="no", logging_steps=10**6, max_steps=10**6, disable_tqdm=True, temperature=1.0,
                        generation_kwargs={"min_new_tokens": TOKENS}, gradient_checkpointing=False)
    trainer = GRPOTrainer(model=backbone(vocab), reward_funcs=lambda completions, **_: [reward([int(w[1:]) for w in c.split()])
                          for c in completions], args=config, train_dataset=Dataset.from_list(rows), processing_class=words,
                          peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    trainer.create_optimizer_and_scheduler(10**6)
    trainer.current_gradient_accumulation_steps = 1          # what Trainer.train would set
    batches = iter(trainer.get_train_dataloader())

    def step(k):
        trainer.model.train()
        loss = trainer.training_step(trainer.model, next(batches), PROMPTS * GROUP)
        torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1
        return loss
    return step


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_of(step, k):
    """Peak resident MiB above the start while step(k) runs, sampled every 2 ms."""
    base, peak, done = resident(), [0.0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident() - base)
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    step(k)
    done.set()
    thread.join()
    return peak[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--side", choices=("ours", "trl"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:                                             # a child of --memory
        with tempfile.TemporaryDirectory() as folder:
            step = ours(args.vocab, args.prompt) if args.side == "ours" else theirs(args.vocab, args.prompt, folder)
            print("MIB", max(peak_of(step, k) for k in range(2)))
        return
    record = {"prompt": args.prompt, "vocab": args.vocab, "threads": args.threads}
    if args.memory:
        for side in ("ours", "trl"):
            out = subprocess.run([sys.executable, __file__, "--side", side, "--prompt", str(args.prompt), "--vocab",
                                  str(args.vocab), "--threads", str(args.threads)], capture_output=True, text=True)
            if "MIB" not in out.stdout:
                sys.exit(out.stderr[-2000:])
            record[f"{side}_mib"] = round(float(out.stdout.split("MIB")[1]), 1)
        record["ratio"] = round(record["ours_mib"] / record["trl_mib"], 3)
    else:
        with tempfile.TemporaryDirectory() as folder:
            sides = {"ours": ours(args.vocab, args.prompt), "trl": theirs(args.vocab, args.prompt, folder)}
            median, spread, _ = alternate(sides, args.steps)
        record |= spread | {"ratio": round(median["trl"] / median["ours"], 2)}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
