"""Make the bundled backbone `common/tiny/`: a Qwen2-architecture causal LM of about 1 M parameters.

    python -m common.make_tiny --out common/tiny

Half an hour on 2 cores; the bundled one took four such runs, see its README.md.

It is pretrained on text that this file generates, and on nothing else: descriptions of items, and single skills on
random invented catalogues and on the toy world's catalogue, in the formats that the scripts prompt with. It never
sees who likes what: wherever a prompt asks for a user's choice, the answer that it is taught is a random candidate,
the first ones more often (large LLMs, too, prefer what comes first), after a thought that honestly describes the
history. So it can follow the format, read a history, find an attribute and compare texts, and it lacks the alignment.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from common import toy
from common.prompts import LETTERS, candidate_lines, history_lines, item_line, lettered
from common.run import progress

# This tool looks at the scripts for one thing: the prompts they use.
from curec import align_prompt, pattern_prompt, reason_prompt

WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATE = ("{% for message in messages %}"
            "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ATTRIBUTES = """action adventure animation children comedy crime documentary drama fantasy noir horror musical mystery
romance thriller war western sport space ocean music food robots winter school trains cooking gardening puzzle strategy
racing shooter platform simulation family classic poetry history travel science nature animals dragons magic pirates
detective spy heist ghosts vampires aliens time memory dreams art fashion dance opera jazz rock folk piano guitar
football tennis cycling running swimming fishing camping hiking climbing sailing flying driving boats cars planes dolls
blocks cards dice board outdoor indoor baby toddler teen adult hair skin nails makeup perfume soap lotion brush mirror
vintage modern retro cozy dark bright epic quiet fast slow tragic hopeful satire parody legend myth biography court
medicine hospital police prison desert jungle island city village farm castle palace temple market office factory
summer spring autumn rain storm fire ice stone wood metal glass paper silk wool cotton tea coffee bread cheese fruit
chess math language painting sculpture theatre circus carnival holiday wedding friendship revenge justice freedom
survival disaster zombie superhero samurai ninja cowboy viking roman greek egypt medieval future cyber steam wild""".split()
NAMES = """Arden Bellow Calder Dorset Elmwood Farrow Garnet Hadley Ivory Jasper Kestrel Linden Marlow Norwood Oakley
Piper Quill Rowan Sorrel Tamsin Umber Vesper Willow Yarrow Zephyr Alder Bramble Cobalt Dusk Ember Flint Grove""".split()


# -------------------------------------------------------------------------------- text from random catalogues
def random_title(rng):
    """Titles of several shapes, with and without a year, now and then with punctuation or digits."""
    kind = rng.integers(5)
    adjective, noun, name = rng.choice(toy.ADJECTIVES), rng.choice(toy.NOUNS), rng.choice(NAMES)
    title = (f"The {adjective} {noun}", f"{name} {noun}", f"{name}'s {adjective} {noun}", f"{noun} of {name}",
             f"{adjective} {noun}, The")[kind]
    if rng.random() < 0.15:
        title += f" {rng.integers(2, 9)}"
    return title + (f" ({rng.integers(1930, 2025)})" if rng.random() < 0.3 else "")


class Catalogue:
    """Items with attributes, and users whose histories lean to some of them: the ground of every generated prompt."""

    def __init__(self, rng, world=None):
        self.rng = rng
        if world is None:
            pool = rng.choice(ATTRIBUTES, rng.integers(4, 17), replace=False)
            pool = ([a.capitalize() if rng.random() < 0.5 else a for a in pool] if rng.random() < 0.5
                    else list(pool))
            weight = rng.dirichlet(np.full(len(pool), 2.0))
            most = int(rng.integers(1, 4))
            self.attributes = [
                [str(a) for a in rng.choice(pool, rng.integers(1, most + 1), replace=False, p=weight)]
                for _ in range(40)]
            self.titles = [random_title(rng) for _ in range(40)]
            self.texts = None
        else:
            self.attributes, self.titles, self.texts = world.categories, world.titles, world.texts

    def line(self, i):
        return item_line(self.titles[i], self.attributes[i])

    def history(self, length):
        """Items drawn with a lean to 1-4 random attributes, like somebody's choices; most frequent attributes
        first."""
        rng = self.rng
        every = sorted({a for row in self.attributes for a in row})
        lean = {a: rng.exponential(2.5)
                for a in rng.choice(every, min(len(every), rng.integers(1, 5)), replace=False)}
        score = np.array([sum(lean.get(a, 0.0) for a in row) for row in self.attributes])
        items = np.argsort(-(score + rng.gumbel(size=len(score))))[:length]
        rng.shuffle(items)
        counts = {}
        for i in items:
            for a in self.attributes[i]:
                counts[a] = counts.get(a, 0) + 1
        ranked = sorted(counts, key=lambda a: -counts[a] - 1e-3 * rng.random())
        return list(items), ranked, counts


def both(names):
    """`mystery, ocean`. A space stands before every attribute (see make_tokenizer)."""
    return ", ".join(names)


def thought(ranked, line):
    return f"<think>They often pick {both(ranked[:2])}. I look for {line}.</think>"


def pattern_text(ranked):
    return (f"This user often picks {both(ranked[:2])}"
            + (f"; sometimes {ranked[2]}." if len(ranked) > 2 else "."))


def reason_text(rng, attributes, ranked):
    """One sentence for a choice. It names attributes of the item, and one time in five a wrong one: room to
    improve."""
    names = [str(a) for a in rng.permutation(attributes)][:2]
    if rng.random() < 0.2 and ranked:
        names[-1] = str(rng.choice(ranked))
    a, b = names[0], names[-1]
    if a == b:
        return (f"It suits people who like {a}.", f"A good choice for fans of {a}.",
                f"They enjoy {a}, and this is just that.", f"It is all about {a}.")[rng.integers(4)]
    return (f"It suits people who like {a}, {b}.", f"A good choice for fans of {a}, as it has {b}, too.",
            f"They enjoy {a}, and here it comes with {b}.",
            f"The mix of {a}, {b}, fits well.")[rng.integers(4)]


SKILLS = {"align": 0.22, "similar": 0.24, "which": 0.12, "pattern": 0.11, "reason": 0.12,
          "match": 0.08, "share": 0.04, "describe": 0.02, "category": 0.03, "yesno": 0.02}


def sample(rng, world, stage=1.0):
    """One (skill, prompt, completion). `stage` in [0, 1]: histories grow from 2 to 10 lines over the training."""
    c = Catalogue(rng, world if rng.random() < 0.65 else None)
    most = 2 + int(round(8 * stage))
    items, ranked, counts = c.history(int(rng.integers(1, most + 1)))
    history = [c.line(i) for i in items]
    size = int(rng.choice([4, 5, 5, 5, 5, 8]))
    candidates = rng.choice(len(c.titles), size, replace=False)
    lines = [c.line(i) for i in candidates]
    first = 0.5 ** np.arange(size)
    pick = int(rng.choice(size, p=first / first.sum()))
    attributes = c.attributes[candidates[pick]]
    looked_for = [a for a in attributes if rng.random() < 0.6] or [str(rng.choice(attributes))]
    skill = str(rng.choice(list(SKILLS), p=list(SKILLS.values())))
    quoted = lettered(lines[pick], pick)
    if skill == "align":                      # the answer is random: a format, and no knowledge of users
        return (skill, align_prompt(history, lines),
                f"{thought(ranked, quoted)}\n<answer>{LETTERS[pick]}</answer>")
    if skill == "pattern":
        return skill, pattern_prompt(history), pattern_text(ranked)
    if skill == "reason":
        return (skill, reason_prompt(history, pattern_text(ranked), lines[pick]),
                reason_text(rng, attributes, ranked))
    if skill == "which":                      # exactly one candidate has all that is looked for
        keep = [k for k in range(size)
                if k == pick or not all(a in c.attributes[candidates[k]] for a in looked_for)]
        lines, pick = [lines[k] for k in keep], keep.index(pick)
        return (skill, f"{candidate_lines(lines)}\nWhich of these is about {both(looked_for)}?",
                f"<think>I look for {lettered(lines[pick], pick)}.</think>\n<answer>{LETTERS[pick]}</answer>")
    if skill == "similar":                    # a fact about texts, whoever chose them
        common = [sum(counts.get(a, 0) for a in c.attributes[k]) + 0.5 * rng.random() for k in candidates]
        pick = int(np.argmax(common))
        return (skill, f"{history_lines(history)}\nWhich of these has most in common with the titles above?\n"
                       f"{candidate_lines(lines)}",
                f"{thought(ranked, lettered(lines[pick], pick))}\n<answer>{LETTERS[pick]}</answer>")
    if skill == "match":                      # another one: does it share most titles' taste, or none of it?
        common = [sum(counts.get(a, 0) for a in c.attributes[k]) + 0.5 * rng.random() for k in candidates]
        pick = int((np.argmax, np.argmin)[rng.integers(2)](common))
        return (skill, f"{history_lines(history)}\nDoes this have much in common with the titles above?\n"
                       f"- {lines[pick]}\nAnswer Yes or No.",
                "Yes" if pick == int(np.argmax(common)) else "No")
    if skill == "share":
        return (skill, f"What do most of these titles have in common?\n{history_lines(history)}",
                f"They have {ranked[0]}.")
    if skill == "describe":
        if c.texts is None:
            return (skill, f"- {lines[pick]}\nWrite one sentence about it.",
                    f"A story of {both(attributes[:2])}.")
        return skill, f"- {lines[pick]}\nWrite one sentence about it.", c.texts[candidates[pick]]
    if skill == "category":
        if c.texts is None:
            return skill, f"- {lines[pick]}\nName its categories.", f"It has {', '.join(attributes)}."
        return (skill, f"Name the categories of {c.titles[candidates[pick]]}.",
                f"It has {', '.join(attributes)}.")
    other = c.attributes[candidates[(pick + 1) % size]]
    asked = str(rng.choice(attributes if rng.random() < 0.5 else other))
    return (skill, f"- {lines[pick]}\nIs it about {asked}? Answer Yes or No.",
            "Yes" if asked in attributes else "No")


# ---------------------------------------------------------------------------------------- tokenizer and model
def make_tokenizer(rng, world, vocab_size=2048):
    """Byte-level BPE (nothing is unknown to it) trained on generated text, with Qwen2's own way of cutting words.

    A word takes the space before it along: ` war` and `war` are different tokens. The texts here therefore put
    a space before every attribute, in lists and in sentences, so that each is the same token everywhere and can
    be looked up.
    """
    def corpus():
        for _ in range(12_000):
            _, prompt, completion = sample(rng, world)
            yield prompt + "\n" + completion
        for a in ATTRIBUTES * 20:
            yield f"- {a}, {a.capitalize()}"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer,
                                   eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as folder:                 # train with exactly what users will load
        fast.save_pretrained(folder)
        Qwen2Config().save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder)
    probe = "- war, Film-Noir: The Silent Harbor (1995) [B]\n<answer>B</answer> 42 naïve"
    assert loaded(probe)["input_ids"] == fast(probe)["input_ids"], (
        "the tokenizer changes when it is saved and loaded")
    return loaded


def make_model(tokenizer, seed, hidden=128, layers=4, heads=4, head_dim=64, theta=1e6):
    """A random Qwen2 that starts with an induction circuit: "find where this was written before, copy what followed".

    Quoting a line of the prompt is all that a choice among candidates takes, and a small model needs millions
    of texts to find out how. Here the first layer's heads 0 and 1 look one and two tokens back and write what
    they see beside the token's own embedding; the second layer's head 0 compares (this, previous) with
    (previous, the one before) of every earlier token, and copies the best match. Training changes all of it as
    it likes.

    Looking back is said by Qwen2's query and key biases: with k = (A, 0) and q = A (cos dw, -sin dw) per
    frequency w of the rotary embedding, distance t scores A^2 sum cos(w (t - d)), a peak at t = d. Comparing
    uses the slow half of the frequencies, which hardly turn within a prompt.
    """
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim, max_position_embeddings=2048,
        tie_word_embeddings=True, rope_theta=theta, bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>")))
    half, own, seen = head_dim // 2, 48, 40     # embeddings start in `own` dimensions; `seen` are copied
    w = theta ** (-torch.arange(half) / half)
    first, second = (model.model.layers[k].self_attn for k in (0, 1))
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table.zero_()[:, :own].normal_(std=0.1)
        for head, back in ((0, 1), (1, 2)):
            part = slice(head * head_dim, (head + 1) * head_dim)
            first.k_proj.bias[part] = 8 * torch.cat([torch.ones(half), torch.zeros(half)])
            first.q_proj.bias[part] = 8 * torch.cat([torch.cos(back * w), -torch.sin(back * w)])
            for proj in (first.q_proj, first.k_proj, first.v_proj):
                proj.weight[part] = 0
            first.o_proj.weight[:, part] = 0
            for d in range(seen):
                first.v_proj.weight[head * head_dim + d, d] = 1
                first.o_proj.weight[own + head * seen + d, head * head_dim + d] = 0.06
        for proj in (second.q_proj, second.k_proj, second.v_proj):
            proj.weight[:head_dim] = 0
        second.o_proj.weight[:, :head_dim] = 0
        slow = [k for k in range(head_dim) if k % half >= half - seen // 2]
        for d, row in enumerate(slow):          # 20 for (this, previous), 20 for (previous, the one before)
            n, which = d % (seen // 2), d // (seen // 2)
            second.q_proj.weight[row, n + (0, own)[which]] = 1.6
            second.k_proj.weight[row, n + (own, own + seen)[which]] = 1.6
        for d in range(own):
            second.v_proj.weight[d, d] = 1
            second.o_proj.weight[d, d] = 0.3
    return model


def batches(tokenizer, seed, size, world, stage):
    """Yield (tokens, labels, weights), (B, T) each; labels are -100 on prompt and padding, and the letter of an
    answer weighs 5: one token in ten, and the hardest to get right. `stage()` is asked for each group.

    Four batches' worth of texts are sorted by length and cut, which halves the padding.
    """
    rng = np.random.default_rng([seed, 2])
    head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(
        [mark + c for mark in ("", ">") for c in LETTERS[:8]]))
    while True:
        texts = [sample(rng, world, stage())[1:] for _ in range(4 * size)]
        prompts = tokenizer([head + p + tail for p, _ in texts])["input_ids"]
        answers = tokenizer([a + "<|im_end|>" for _, a in texts])["input_ids"]
        rows = sorted(zip(prompts, answers), key=lambda row: len(row[0]) + len(row[1]))
        for cut in rng.permutation(4):
            part = rows[cut * size:(cut + 1) * size]
            T = max(len(p) + len(a) for p, a in part)
            tokens, labels = torch.zeros(size, T, dtype=torch.long), torch.full((size, T), -100)
            weights = torch.ones(size, T)
            for b, (p, a) in enumerate(part):
                tokens[b, :len(p) + len(a)] = torch.tensor(p + a)
                labels[b, len(p):len(p) + len(a)] = torch.tensor(a)
                weights[b, torch.isin(labels[b], letters)] = 5.0
            yield tokens, labels, weights


# ------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def skills(model, tokenizer, world, seed=10**6, n=1024):
    """Exact-match rates of greedy answers to fresh prompts, {skill: rate}, of the skills that have one right
    answer."""
    from common.llm import chat, eos_ids, rollout
    rng = np.random.default_rng(seed)
    rows = [sample(rng, world) for _ in range(n)]
    device = next(model.parameters()).device
    right = {}
    for start in progress(range(0, n, 128), "skills"):
        part = rows[start:start + 128]
        out = rollout(model, [chat(tokenizer, p) for _, p, _ in part], n=1, max_new_tokens=64, greedy=True,
                      eos_ids=eos_ids(model, tokenizer), generator=torch.Generator(device).manual_seed(0))
        for (skill, _, answer), tokens, length in zip(part, out.tokens[:, 0], out.lengths[:, 0]):
            text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
            if skill in ("align", "reason", "describe"):
                continue                          # many right answers: judged where they are used
            if skill == "pattern":                # the two most frequent attributes, in any order
                said = [set(x.removeprefix("This user often picks ").split("; ")[0].rstrip(".").split(", "))
                        for x in (text, answer)]
                right.setdefault(skill, []).append(said[0] == said[1])
            elif skill == "similar":              # the letter: histories often tie in what is most frequent
                right.setdefault(skill, []).append(text.split("<answer>")[-1] == answer.split("<answer>")[-1])
            else:
                right.setdefault(skill, []).append(text.strip() == answer)
    return {skill: round(float(np.mean(x)), 3) for skill, x in sorted(right.items())}


CARD = """# tiny

A Qwen2-architecture causal LM of {parameters:,} parameters with its own byte-level BPE tokenizer ({vocab:,} tokens),
trained on text that `common/make_tiny.py` generates ({made}; each later run continued with `--init`; `make backbone` trains a new one). It knows single skills and has never seen who likes what. It is a teaching and test
device: it writes short templated English and knows nothing of the world. Same licence as this repository.

Exact match on {n:,} fresh prompts (random catalogues and the toy world's), greedy:

| skill | exact match |
| --- | --- |
{rows}

`which`: quote the only candidate with the attributes asked for and give its letter. `pattern`: the two most frequent attributes of a
history of 1-10 titles (ties make 1.0 impossible). `similar`: the letter of the candidate whose attributes
occur most in a list of titles (ties, too). `share`: the most frequent one. `category`: recall or read an
item's categories. `yesno`: is title X about Y. `match`: has a title much in common with a list of titles.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", default="common/tiny")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", default=None,
                        help="go on from this folder, with lists of full length at once")
    parser.add_argument("--minutes", type=float, default=None,
                        help="stop (with a decayed rate) after about so long")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.init and Path(args.init).resolve() == Path(args.out).resolve():
        parser.error("--init and --out name the same folder")
    world = toy.make()
    if args.init:
        tokenizer = AutoTokenizer.from_pretrained(args.init)
        model = Qwen2ForCausalLM.from_pretrained(args.init, dtype=torch.float32).to(device)
    else:
        tokenizer = make_tokenizer(np.random.default_rng(args.seed), world)
        model = make_model(tokenizer, args.seed).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    model.set_attn_implementation("eager")        # at these lengths faster than the fused kernel on a CPU
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=2 * args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)]
    start, losses, letters = time.time(), [], []
    elapsed, stage = 0.0, float(args.init is not None)
    source = batches(tokenizer, args.seed, args.batch, world, stage=lambda: stage)
    print(f"{parameters:,} parameters, {len(tokenizer):,} tokens", flush=True)
    for step in progress(range(args.steps), "pretraining", args.steps):
        elapsed = step / args.steps
        if args.minutes:                          # the clock decides where on the schedule we are
            elapsed = max(elapsed, (time.time() - start) / 60 / args.minutes)
            if elapsed >= 1:
                break
        rate = args.lr * min(1, (step + 1) / 100) * min(1.0, 2.5 * (1 - elapsed))         # trapezoid
        for group, factor in zip((g for o in optimizers for g in o.param_groups), (2, 1)):
            group["lr"] = factor * rate
        tokens, labels, weights = (x.to(device) for x in next(source))
        with torch.autocast(device, dtype=torch.bfloat16):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]   # (B, T-1, D)
            wanted = labels[:, 1:] != -100
            logits = model.lm_head(hidden[wanted]).float()                                      # (N, V)
        target, weight = labels[:, 1:][wanted], weights[:, 1:][wanted]
        loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        letters.append((logits.argmax(-1) == target)[weight > 1].float().mean().item()
                       if (weight > 1).any() else np.nan)
        stage = min(1.0, max(stage + 0.004 * (np.nanmean(letters[-20:]) > 0.8), 2 * elapsed - 0.9))
        if step % 50 == 49:
            print(f"step {step + 1} | loss {np.mean(losses[-50:]):.4f} | "
                  f"letters right {np.nanmean(letters[-50:]):.3f} | stage {stage:.2f} | "
                  f"{time.time() - start:.0f} s", flush=True)
        if step % 500 == 499:
            save(model, tokenizer, args.out)
    sittings = getattr(model.config, "pretraining", []) + [
        {"steps": len(losses), "batch": args.batch, "seed": args.seed, "device": device,
         "minutes": round((time.time() - start) / 60)}]
    model.config.pretraining = sittings
    save(model, tokenizer, args.out)
    model.set_attn_implementation("sdpa")                      # the one that knows the masks of common/llm.py
    rates = skills(model.eval().float(), tokenizer, world)
    rows = "\n".join(f"| {skill} | {rate:.3f} |" for skill, rate in rates.items())
    made = "; ".join(
        "{steps:,} steps of {batch} texts, seed {seed}, {minutes} minutes on {device}".format(**x)
        for x in sittings)
    (Path(args.out) / "README.md").write_text(CARD.format(
        parameters=parameters, vocab=len(tokenizer), made=made, n=1024, rows=rows))
    print("RESULT " + json.dumps(rates, sort_keys=True))


def save(model, tokenizer, folder):
    """Hugging Face format in bf16 (half the size; it was trained with bf16 products)."""
    os.makedirs(folder, exist_ok=True)
    import copy
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
