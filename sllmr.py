"""S-LLMR: LLM scores regularise a click model, where a gate says that they help (arXiv 2512.21526).

An LLM reads a user's history once, offline, and scores some items. While the click model trains, pairs of these
items are asked to keep the LLM's order, by a hinge, weighted by a gate that looks at three things: is the user
cold, is the item in the tail, is the model unsure. When the model is served there is no LLM.

  1 score     offline: (user, item) -> score in [0, 1], appended to scores.jsonl; --tune-steps teaches a small
              LLM the question first, --scorer encoder compares texts instead of asking
  2 train     L = L_rec + lambda L_LLM: rows 1:1 with sampled negatives, and users from a second sampler
  3 judge     AUC on 1:1 rows (the paper's) and on the full ranking; overall, cold, tail, dense

EQUATIONS
  [1] model     s_ui = CTR(u, i, categories, history), L_rec = BCE                              -> CTR in common/recommenders.py
  [2] gate      z_ui = [Cold(u), Tail(i), q_ui], alpha_ui = sigmoid(w z_ui + b)                 -> Gate
                alpha_uij = (alpha_ui + alpha_uj) / 2
  [3] pairs     the K pairs with the largest gap of LLM scores, both items of one user          -> pick_pairs
  [4] loss      L_LLM = sum over pairs with LLM(u, i) > LLM(u, j) of
                alpha_uij max(0, m - (s_ui - s_uj))                                             -> pair_loss
  [5] q         1 - max p, entropy, or variance under dropout; each scaled to [0, 1]            -> uncertainty

CHECKED BY, in tests/
  [1] test_every_click_model_reads_all_its_inputs_and_no_padding
  [2] test_the_gate_by_hand
      test_the_gate_as_published_can_only_fall_and_the_normalised_one_moves_both_ways
  [3] test_the_pairs_are_those_with_the_largest_gaps_of_one_user_and_never_ties_or_unknown_ones
  [4] test_the_pair_loss_by_hand
  [5] test_uncertainty_is_between_0_and_1_largest_at_a_half_finite_anywhere_and_without_gradient

DEVIATIONS AND CHOICES
  - The gate as published can only fall: dL/dalpha is a hinge, never negative, so descent lowers w and b
    wherever the model does not keep the LLM's order by the margin, and nothing raises them. Hence --gate:
      paper       as published
      normalised  divides by the sum of alpha: weights compete, and rise where the LLM is easier to follow than
                  on average
      budget      mean loss, and a penalty that keeps the mean of alpha near --budget
      agreement   (default, ours) sets a share of each user's scored items aside. alpha_uij learns, by
                  cross-entropy, how likely the model (under dropout) orders a pair of these as the LLM does.
                  The other pairs weigh max(0, 2 alpha_uij - 1), nothing where the LLM is no better than a coin;
                  the loss is their weighted mean, the K pairs are the largest by gap times weight. It measures
                  whether scores are consistent: an opinion of items that is the same for all users can be
                  learned, and then agreed with, be it right or wrong
      fixed       stays at --gate-init
      ones        no gate, the paper's "global"
      truth       with --scorer oracle: a pair of two right scores weighs 1, of one 1/2, of none 0
    normalised and budget judge by pairs that the model is trained to follow, and a model can follow noise.
  - --gate-init: at first cold users, tail items and unsure predictions are trusted more. The row "no prior"
    starts from zeros.
  - q is detached: else the model could lower the loss by being sure.
  - The sum over pairs is --reduction sum; by default their mean, so that lambda does not depend on K.
  - Not given, so flags: m (margin), K (pairs), M (candidates), N (pool).
  - Pairs of one user hardly occur in a random batch of 128, so a second sampler draws users that have LLM scores.
  - The K largest gaps among these users (--pick largest, the literal reading) are mostly those of the users
    with the most scores, and never those in the middle of a ranking. --pick sample takes of each user as many
    pairs, at random.
  - Cold is |H| <= 3 in the paper's Table 1, by row, H what precedes it, and < 3 in its text, by user; by what
    precedes a test row nobody is cold in these data. Here H is the user's training targets; both cuts are
    reported (cold, very cold). Tail is the last fifth of the items by training popularity (a tenth where the
    LLM gets extra items).
  - The paper's models read brand and category of Amazon's items. Where a data set comes without, --brand takes
    the first word of the title, which is where shops put the brand.
  - The paper says full ranking; its figures are those of 1:1 rows. Both are reported; more negatives to a
    held-out target (--test-negatives) say the same with less noise.
  - KD (--llm-loss kd) is BCE against the LLM's score as a soft label, on what was scored (the paper's KD: of a
    fine-tuned LLM, on the rows), pointwise is the paper's MSE; both use the same scores as the gates. KAR (kar)
    gives the model vectors of the item's text and of the past items' texts as inputs, from --backbone as it is,
    whatever the scores come from.
  - A training negative is an item that the user did not choose in training, and may be a held-out one: were
    these spared, no user would ever be pushed away from them. A negative to judge by is one that the user never
    chose.
  - The negatives of the paper's 1:1 rows are drawn once, and a model learns them by heart: --redraw draws new
    ones in each epoch, which makes the models better. So does --decay: the learning rate falls to 0, where the
    paper names one rate.
  - A score that the LLM leaves out is unknown and makes no pair; the paper sets it to 0.5.
  - The click models are the plain ones: no batch normalisation, DCNv2 with a full matrix, no experts, xDeepFM
    with two layers of 100 maps; of an item's categories the first eight.

  python sllmr.py --data toy:3000x400x45000 --cold-users 0.3                # scores from the toy's truth
  python sllmr.py --data amazon-beauty --backbone Qwen/Qwen2.5-3B            # on a GPU
  python sllmr.py --data ml1m --users 1000 --tune-steps 300                 # scores from the bundled LLM
  python sllmr.py --data amazon-beauty --brand --scorer encoder   # pip install wordllama: no LLM runs at all
  OPENAI_API_KEY=... python sllmr.py --data ml1m --scorer api --api-model gpt-4o-mini --dry-run
  python sllmr.py --data ml1m --scores runs/a/scores.jsonl --gate paper --run runs/b   # another gate, the same scores
  python sllmr.py --ablations --seeds 0,1,2 --data toy:3000x400x45000 --cold-users 0.3
"""

# 1 ------------------------------------------------------------------------------------------ imports
import concurrent.futures
import functools
import hashlib
import http.client
import json
import math
import os
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import cuda, data as datasets, llm, lora, metrics
from common.prompts import history_lines
from common.recommenders import CTR
from common.run import (Run, UserError, at_least, differences, folder_of, main, prefix, progress, pyplot,
                        read_json, strip, summarise, variant, write_atomically, write_table)
from common.sequences import Logs, category_table


# 2 ------------------------------------------------------------------------------------------ arguments
@dataclass
class Args:
    # -- run
    data: str = "toy"  # toy (or toy:USERSxITEMSxINTERACTIONS), ml1m, ml100k, ml-latest-small, amazon-...,
    # or a folder of your own logs
    data_dir: str | None = None  # a folder that already holds the data sets (else LLMREC_DATA, else download)
    max_bad_rows: int = 0  # broken rows to skip before giving up
    run: str | None = None  # run folder (default: runs/sllmr-DATA-BACKBONE-sSEED)
    resume: bool = False  # continue where the run folder stopped
    overwrite: bool = False  # remove an earlier run in that folder first, with its LLM scores
    # (to keep them: --scores OLD/scores.jsonl and a new --run)
    seed: int = 0  # of sampling, initialisation and training
    device: str = "auto"  # auto (CUDA if there is one, else CPU), cpu, cuda, mps
    ablations: bool = False  # run every method of VARIANTS and print one table
    seeds: tuple[int, ...] = ()  # with --ablations: the seeds to average over (default: --seed alone)
    variants: tuple[str, ...] = ()  # with --ablations: which rows of VARIANTS (default: all)
    lams: tuple[float, ...] = (0.1, 0.3)  # with --ablations: the λ among which validation chooses
    lrs: tuple[float, ...] = ()  # with --ablations: the learning rates among which validation of the variant
    # none chooses one for all rows of a click model (default: --lr)
    recommenders: tuple[str, ...] = ()  # with --ablations: the click models to compare
    # (default: --recommender alone)
    # -- data
    min_rating: float = 0.0  # interactions rated lower are dropped; 0 keeps all
    users: int | None = None  # keep a random sample of so many users
    cold_users: float = 0.0  # keep only the last 5 or 6 choices of this share of the users,
    # which makes them cold
    cold: int = 3  # τ_u: a cold user has at most so many training targets
    brand: bool = False  # the first word of an item's title is one more category of it:
    # shops name the brand first
    tail: float = 0.2  # τ_i: this share of the items, the least chosen in training, is the tail
    # -- model
    recommender: Literal["deepfm", "xdeepfm", "autoint", "dcn", "dcnv2", "din"] = "dcnv2"  # the click model
    dim: int = 64  # of the embeddings
    max_history: int = 20  # past items
    mlp: tuple[int, ...] = (200, 80)  # hidden layers
    dropout: float = 0.1  # in the MLP
    # -- LLM scores
    scorer: Literal["auto", "oracle", "file", "backbone",  # oracle: the toy world's truth | file: --scores |
                    "encoder", "api"] = "auto"
    # backbone: a causal LM | encoder: wordllama | api: an endpoint;
    # auto: file with --scores, else oracle on toy data, else backbone
    scores: str | None = None  # a file of scores: JSON lines {"user": , "item": , "score": 0..1}
    backbone: str = "tiny"  # any Hugging Face causal LM by name or folder; tiny is bundled
    dtype: str = "auto"  # of the backbone: auto (bfloat16 on CUDA, else float32), float32, bfloat16
    prompt_history: int = 10  # L: titles in a prompt, or that the encoder compares with
    candidates: int = 20  # M: popular items scored per user; cold users get M more of all,
    # and everybody some of --extra
    pool: int = 200  # N: the most chosen items, of which the M are drawn
    extra: float = 0.1  # share of the items, the least chosen, each scored for M / N of the users
    # (of a large catalogue most of the prompt: lower it)
    scored_users: int = 0  # users to score (0: all)
    tune_steps: int = 0  # first fine-tune the backbone (LoRA) on so many batches of training choices;
    # 0: ask it as it is
    tune_lr: float | None = None  # learning rate of --tune-steps (default 1e-4; 2e-3 for tiny)
    oracle: tuple[float, ...] = (0.0, 1.0, 1.0, 1.0)  # toy: share of true scores among
    # (warm, head), (warm, tail), (cold, head), (cold, tail) pairs; the rest is noise
    # -- endpoint (with --scorer api; the key is read from OPENAI_API_KEY)
    api_base: str = "https://api.openai.com/v1"  # any OpenAI-compatible endpoint
    api_model: str = "gpt-4o-mini"  # its model
    api_parallel: int = 8  # requests at once
    api_tries: int = 6  # per request
    api_pause: float = 0.5  # seconds after the first failure, doubled after each up to 30;
    # and up to as many again, by chance
    api_timeout: float = 60.0  # seconds for an answer
    api_price: tuple[float, ...] = (0.15, 0.60)  # dollars per million tokens in, out; for the estimate
    dry_run: bool = False  # with --scorer api: print the first prompt, the tokens and the price, then stop
    # -- method
    llm_loss: Literal["pairwise", "pointwise", "kd", "kar", "none"] = "pairwise"  # how the scores are used
    gate: Literal["paper", "agreement", "normalised",  # agreement: learns where model and LLM agree |
                  "budget", "fixed", "ones", "truth"] = "agreement"
    # paper: as published | normalised: weights compete | budget: mean α near --budget |
    # fixed: stays as it starts | ones: no gate | truth: toy, knows where scores are right
    gate_init: tuple[float, ...] = (1.0, 1.0, 1.0, -1.0)  # w for cold, tail, unsure; b
    gate_lr: float = 1e-2  # learning rate of the gate's four numbers
    uncertainty: Literal["maxprob", "entropy", "dropout"] = "maxprob"  # how q is measured
    lam: float = 0.1  # λ, weight of the LLM's loss
    margin: float = 1.0  # m of the hinge, on logits
    pairs: int = 256  # K: pairs per step
    pick: Literal["largest", "sample"] = "largest"  # the K largest gaps of all (agreement, truth: times the
    # pair's weight, and none of weight 0), or K / --pair-users random pairs of each user
    reduction: Literal["mean", "sum"] = "mean"  # over pairs
    pair_users: int = 16  # users per step of the second sampler
    budget: float = 0.3  # ρ: with --gate budget, the mean of α
    budget_weight: float = 10.0  # η: of the penalty η (mean α - ρ)²
    gate_share: float = 0.25  # with --gate agreement: the share of scored items that the gate learns from,
    # and the loss does not
    # -- optimisation
    lr: float = 1e-3  # learning rate
    weight_decay: float = 0.0  # L2, added to the gradient as Adam has it
    batch: int = 128  # rows per step, half of them negatives
    redraw: bool = False  # draw the training negatives anew in each epoch; else once, as in the paper's data
    epochs: int = 30  # most epochs
    decay: bool = False  # the learning rate falls linearly to 0 over --epochs (with a --patience as large);
    # else it stays, as in the paper
    patience: int = 2  # epochs without a better validation AUC
    test_negatives: int = 1  # per validation or test target, 1 in the paper; more means less noise
    rank_users: int = 500  # users of the full ranking

    def check(self):
        if (not 0 <= self.cold_users < 1 or not 0 < self.tail < 1 or not 0 <= self.extra < 1
                or not 0 <= self.dropout < 1 or not 0 < self.gate_share < 1):
            raise ValueError("--cold-users, --tail, --extra, --gate-share and --dropout are shares, below 1")
        if len(self.oracle) != 4 or not all(0 <= share <= 1 for share in self.oracle):
            raise ValueError("--oracle takes four shares: warm head, warm tail, cold head, cold tail")
        models = Args.__annotations__["recommender"].__args__
        if unknown := set(self.recommenders) - set(models):
            raise ValueError(f"--recommenders {','.join(sorted(unknown))}: among {','.join(models)}")
        if "autoint" in (self.recommender, *self.recommenders) and self.dim % 2:
            raise ValueError("--dim must be even for autoint, which has two heads")
        if self.ablations and (self.llm_loss, self.gate, self.lam) != (Args.llm_loss, Args.gate, Args.lam):
            raise ValueError("--ablations sets --llm-loss, --gate and --lam itself; leave them out "
                             "(--variants and --lams choose)")
        if not self.lams or not self.mlp:
            raise ValueError("--lams and --mlp take numbers")
        if unknown := set(self.variants) - set(VARIANTS):
            raise ValueError(f"--variants {','.join(sorted(unknown))}: among {','.join(VARIANTS)}")
        if len(self.gate_init) != 4:
            raise ValueError("--gate-init takes four numbers: cold, tail, unsure, b")
        if len(self.api_price) != 2:
            raise ValueError("--api-price takes two numbers: dollars per million tokens in, out")
        if not all(x is None or x > 0 for x in (self.lr, *self.lrs, self.tune_lr, self.api_timeout)):
            raise ValueError("--lr, --lrs, --tune-lr and --api-timeout must be positive")
        if self.lams != Args.lams and not self.ablations:
            raise ValueError("--lams goes with --ablations; --lam sets the one of a single run")
        if self.lrs and (not self.ablations or self.lr != Args.lr or "none" not in (self.variants or VARIANTS)):
            raise ValueError("--lrs goes with --ablations and the variant none, which chooses, and without --lr")
        if self.uncertainty == "dropout" and not self.dropout:
            raise ValueError("--uncertainty dropout is nothing with --dropout 0")
        if self.dry_run and self.scorer != "api":
            raise ValueError("--dry-run is the price of --scorer api")
        if self.scores and self.llm_loss in ("none", "kar"):
            raise ValueError(f"--llm-loss {self.llm_loss} takes no --scores; leave one of them out")
        if self.scorer == "file" and not self.scores:
            raise ValueError("--scorer file needs --scores FILE")
        if self.scores and self.scorer not in ("auto", "file"):
            raise ValueError(f"--scores is a file of scores, and --scorer {self.scorer} makes its own; "
                             "leave one of them out")
        gates = (self.variants or VARIANTS) if self.ablations else (self.gate,)
        if "normalised" in gates and self.reduction == "sum":
            raise ValueError("the gate normalised is a mean by itself; leave --reduction sum out")
        at_least(self, 1, "dim mlp max_history prompt_history candidates pool pairs pair_users batch epochs "
                          "patience test_negatives rank_users api_parallel api_tries")
        at_least(self, 0, "lam lams margin gate_lr weight_decay scored_users tune_steps api_pause api_price "
                          "budget budget_weight cold")
        if not self.api_base.startswith(("http://", "https://")):
            raise ValueError("--api-base must begin with http:// or https://")


# 3 ------------------------------------------------------------------------------------------ rows
class Rows:
    """Who is asked about what: training targets with one negative each, held-out targets with one or more, and
    which are cold or tail.

    A user's first choice has no history and is no target; the last is test, the one before validation.
    """

    def __init__(self, args, device):
        data = datasets.min_rating(datasets.load(args.data, args.data_dir, args.max_bad_rows, args.seed),
                                   args.min_rating)
        if args.users:
            data = datasets.sample_users(data, args.users, args.seed)
        if args.cold_users:
            data = starve(data, args.cold_users, args.seed)
        self.args, self.data, self.device, self.logs = args, data, device, Logs(data, args.prompt_history)
        logs, n = self.logs, len(data.items)
        asked = logs.targets(args.data)
        targets = np.maximum(logs.n_train - 1, 0)
        count = logs.item_counts()
        self.cold = targets <= args.cold                                                  # (n_users,)
        self.very_cold = targets < args.cold
        self.rank = np.argsort(np.argsort(-count, kind="stable"), kind="stable")          # 0 = most chosen
        self.tail = self.rank >= n - int(args.tail * n)                                   # (n_items,)
        brands = [[title.lower().split()[0].strip(",;:") + " (brand)"] if args.brand else []
                  for title in data.titles]
        self.categories = category_table([[*c[:8], *brand] for c, brand in zip(data.categories, brands)])
        seen = {"train": logs.train_keys()}                                               # see DEVIATIONS
        self.train, self.valid, self.test = (
            self.table(*pairs, 1 if name == "train" else args.test_negatives,
                       cuda.key_seed(args.seed, f"{name} negatives") % 2**31, seen.get(name))
            for name, pairs in zip(("train", "valid", "test"), asked))

    def table(self, users, place, many, seed, seen):
        """(3 + many, n) user, place, target, negatives: each column stands for 1 + many rows. seen: see
        datasets.negatives."""
        negatives = datasets.negatives(self.data, users, many, seed, seen)
        table = np.concatenate([np.stack([users, place, self.logs.item_at(users, place)]), negatives.T])
        return torch.as_tensor(table.astype(np.int64), device=self.device)

    def redraw(self, epoch):
        """New training negatives, a function of (seed, epoch)."""
        users, seed = (self.train[0].cpu().numpy(),
                       cuda.key_seed(self.args.seed, "train negatives", epoch) % 2**31)
        negative = datasets.negatives(self.data, users, 1, seed, self.logs.train_keys())
        self.train[3] = torch.as_tensor(negative[:, 0].astype(np.int64), device=self.device)

    def history(self, users, place):
        """(B, L) the items before a place, shifted by one, oldest first, 0 = padding on the right."""
        return self.logs.histories(users, place, self.args.max_history)


def starve(data, share, seed):
    """Keep of a seeded share of the users only the last 5 or 6 choices: cold users, where the data have none."""
    rng = np.random.default_rng([seed, 53])
    left = np.where(rng.random(len(data.users)) < share, rng.integers(5, 7, len(data.users)), len(data.user))
    after = np.bincount(data.user, minlength=len(data.users))[data.user] - 1 - datasets.places(data.user)
    return datasets.keep(data, after < left[data.user], f"cold-users {share} {seed}")


# 4 ------------------------------------------------------------------------------------------ prompts
# What all candidates of a user have in common comes first: it runs through the model once.
READ = """The user chose these titles, oldest first:
{history}
Will the user like the next title? Answer Yes or No.
"""
ASK = "- {item}"
RANK = """A user of a catalogue recently chose, oldest first:
{history}

How likely is it that this user likes each of these titles?
{items}

Answer with JSON only: {{"scores": [{{"id": 1, "score": 0.7}}, ...]}}, one entry for every id, scores between 0 and 1."""


# 5 ------------------------------------------------------------------------------------------ LLM scores
def candidates(rows):
    """{user: items to score}: M of the N most chosen items; for cold users M diverse ones of the whole
    catalogue as well; and each of the least chosen items goes to some users. Nothing that the user had in
    training."""
    args, logs, n = rows.args, rows.logs, len(rows.data.items)
    rng = np.random.default_rng([args.seed, 59])
    users = np.flatnonzero(logs.n_train > 0)
    if args.scored_users and args.scored_users < len(users):
        users = np.sort(rng.choice(users, args.scored_users, replace=False))
    pool = np.flatnonzero(rows.rank < args.pool)
    chosen = {int(u): list(rng.choice(pool, min(args.candidates, len(pool)), replace=False)) for u in users}
    for u in users[rows.cold[users]]:
        chosen[int(u)] += list(rng.choice(n, min(args.candidates, n), replace=False))
    rare = np.flatnonzero(rows.rank >= n - int(args.extra * n))
    # a rare item goes to as many users as one of the pool, M / N of them
    for u in users if len(rare) else ():
        chosen[int(u)] += list(rng.choice(
            rare, rng.binomial(len(rare), min(1.0, args.candidates / len(pool))), replace=False))
    had = lambda u: set(logs.sequence(u)[:logs.n_train[u]].tolist())
    wanted = {u: sorted(set(map(int, items)) - had(u)) for u, items in chosen.items()}
    if not any(wanted.values()):
        raise UserError("no user has a candidate that is new to them; raise --candidates, --pool or --extra")
    return {u: items for u, items in wanted.items() if items}


def oracle(rows, wanted):
    """Scores from the toy world's truth, an item's place in the order of what the user would choose next; noise
    outside the cells that --oracle calls reliable."""
    world, args = rows.data.world, rows.args
    if world is None:
        raise UserError("--scorer oracle: only the toy world knows the truth; take backbone, api or file")
    if args.min_rating:
        raise UserError("--scorer oracle: the toy world knows what comes after all choices, not after the kept ones; "
                        "leave --min-rating out, or take another --scorer")
    rng, users = np.random.default_rng([args.seed, 61]), list(wanted)
    number = lambda names: np.array([int(name[1:]) for name in names], dtype=int)             # "u7" -> 7
    raw_items = number(rows.data.items)
    for part in (users[k:k + 256] for k in range(0, len(users), 256)):
        for u, order in zip(part, world.order(number(rows.data.users[u] for u in part))):
            items = np.array(wanted[u], dtype=int)
            kept = rng.random(len(items)) < reliable(args, rows.cold[u], rows.tail[items])
            yield u, items.tolist(), np.where(kept, order[raw_items[items]], rng.random(len(items))).tolist()


def reliable(args, cold, tail):
    """The share of true scores that --oracle gives to pairs of a cold user or not, a tail item or not (n,)."""
    return np.array(args.oracle)[2 * np.asarray(cold, dtype=int) + np.asarray(tail, dtype=int)]


def by_backbone(rows, wanted, missing=None, batch=8):
    """sigmoid(logit Yes - logit No) of a causal LM. A user's history runs through the model once, then all
    candidates. missing: only the batches with one of these users are read, as padded as they would be."""
    args = rows.args
    model, tokenizer = llm.load(args.backbone, rows.device, cuda.pick_dtype(args.dtype, rows.device))
    yes, no = (llm.single_token(tokenizer, word) for word in ("Yes", "No"))
    if yes is None or no is None:
        raise UserError(f"--backbone {args.backbone}: Yes and No are not one token each; "
                        "take another or --scorer file")
    if args.tune_steps:
        tune(rows, model, tokenizer, yes, no)
    users = list(wanted)
    for start in progress(range(0, len(users), batch), "LLM scores", -(-len(users) // batch)):
        part = users[start:start + batch]
        if missing is not None and not any(u in missing for u in part):
            continue
        gap = score_shared(model, tokenizer, [ask(rows, u, wanted[u]) for u in part], yes, no)
        for u, g in zip(part, gap):
            yield u, wanted[u], torch.sigmoid(g).tolist()


def ask(rows, u, items, before=None):
    """A prompt per item, (history, the item's question), with what user u chose in training, or before that
    position."""
    read = READ.format(history=history_lines(
        rows.logs.history(u, rows.logs.n_train[u] if before is None else before)))
    return [(read, ASK.format(item=rows.logs.lines[i])) for i in items]


def tune(rows, model, tokenizer, yes, no, batch=16, asked=500):
    """A LoRA adapter for the question that will be asked: Yes after a training choice that came next, No after
    its negative. No held-out choice is ever a Yes; the AUC on some of validation's rows, 1:1, is printed."""
    args, rng, train = rows.args, np.random.default_rng([rows.args.seed, 79]), rows.train.T.cpu().numpy()
    lora.inject(model, seed=args.seed)
    rate = llm.suited(args.tune_lr, args.backbone, 2e-3, 1e-4)
    optimizer = torch.optim.AdamW(lora.parameters(model), lr=rate, weight_decay=0.0)
    for step in progress(range(args.tune_steps), "tuning", args.tune_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / args.tune_steps)
        optimizer.zero_grad(set_to_none=True)
        pick, size = train[rng.integers(0, len(train), batch)], 4 if model.device.type == "cuda" else batch
        for start in range(0, batch, size):                     # in parts that fit a GPU's memory
            prefixes, tails = split(tokenizer, [ask(rows, u, [i, j], place)
                                                for u, place, i, j in pick[start:start + size]])
            packed = llm.pack_tails(prefixes, [[tail + [answer] for tail, answer in zip(row, (yes, no))]
                                               for row in tails]).to(model.device)
            last = llm.last_slots(packed)
            loss = llm.over_logits(model, lambda z, y: F.cross_entropy(z, y, reduction="none"),
                                   llm.packed_hidden(model, packed)[last],
                                   beside=(packed.labels[packed.valid][last],))
            (loss.sum() / (2 * batch)).backward()
        optimizer.step()
    held = rows.valid[:4, :asked].T.tolist()
    parts = [held[k:k + 8] for k in range(0, len(held), 8)]
    print(f"tuned on {args.tune_steps * batch:,} training choices")
    print_auc([gap for part in parts for gap in score_shared(
        model, tokenizer, [ask(rows, u, [i, j], p) for u, p, i, j in part], yes, no)])


def print_auc(scores):
    """Print what the scores (2,) of some validation rows, a target and its negative, are worth without any
    click model."""
    s = np.stack([np.asarray(pair, dtype=np.float64) for pair in scores])
    auc = metrics.auc(np.tile([True, False], len(s)), s.flatten())
    print(f"the LLM alone has AUC {auc:.4f} on {2 * len(s)} validation rows", flush=True)


def by_encoder(rows, wanted):
    """How near an item's text is to the mean of the texts that the user chose last: cosine, standardised over
    some training rows, through a sigmoid. The encoder is wordllama, an LLM's token embeddings averaged over a
    text: an optional package that brings its weights along. What all texts have in common, their mean, is taken
    away first."""
    try:
        import wordllama
    except ImportError:
        raise UserError("--scorer encoder: the sentence encoder is an optional package; "
                        "pip install wordllama") from None
    encoder = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    text = encoder.embed(rows.logs.lines, norm=True)                                          # (n_items, 256)
    text = text - text.mean(0)
    text /= np.linalg.norm(text, axis=1, keepdims=True).clip(1e-9)

    def cosine(u, items, before):
        taste = text[rows.logs.sequence(u)[:before][-rows.args.prompt_history:]].mean(0)
        return text[items] @ taste / np.linalg.norm(taste).clip(1e-9)
    print_auc([cosine(u, [i, j], place) for u, place, i, j in rows.valid[:4].T.tolist()])
    usual = np.concatenate([cosine(u, [i, j], place) for u, place, i, j in rows.train[:, :5000].T.tolist()])
    for u in wanted:
        z = (cosine(u, wanted[u], rows.logs.n_train[u]) - usual.mean()) / usual.std().clip(1e-9)
        yield u, wanted[u], (1 / (1 + np.exp(-z))).tolist()


def split(tokenizer, asked):
    """Per user, prompts that begin alike -> (what they share, token ids per user; the rest of each, per user
    and prompt)."""
    prefixes, tails = [], []
    for prompts in asked:
        ids = [llm.chat(tokenizer, read + question) for read, question in prompts]
        same = min(len(os.path.commonprefix(ids)), min(map(len, ids)) - 1)
        prefixes.append(ids[0][:same])
        tails.append([x[same:] for x in ids])
    return prefixes, tails


@torch.no_grad()
def score_shared(model, tokenizer, asked, yes, no):
    """Per user (G prompts that begin alike) -> list of (G,) logit(Yes) - logit(No), fp32, the history computed
    once."""
    prefixes, tails = split(tokenizer, asked)
    answers = llm.after_tails(model, prefixes, tails)
    gap = llm.few_logits(model, answers, [yes, no]) @ torch.tensor([1.0, -1.0], device=answers.device)
    return gap.cpu().split([len(row) for row in tails])


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_):
        return None


def call(args, key, prompt):
    """One chat completion -> the answer's text. Raises OSError or ValueError where another try may help,
    UserError where not."""
    body = {"model": args.api_model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    request = urllib.request.Request(
        f"{args.api_base.rstrip('/')}/chat/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=args.api_timeout) as answer:
            reply = json.loads(answer.read(1 << 22))
    except urllib.error.HTTPError as problem:
        if problem.code in (408, 409, 429) or problem.code >= 500:
            raise OSError(f"status {problem.code}") from None
        raise UserError(f"--api-base {args.api_base}: the server says {problem.code} {problem.reason}; "
                        "check the address, --api-model and OPENAI_API_KEY") from None
    try:
        return reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("no answer in the reply") from None


def parse_scores(text, n, some=False):
    """n scores from a model's JSON, in the order of the ids. Raises ValueError unless every id from 1 to n is
    there once, with a number in [0, 1]; with some, ids may be missing, not all of them: their score is None."""
    if not isinstance(text, str):
        raise ValueError("not a text")
    start, end = text.find("{"), text.rfind("}")
    # bad JSON raises a ValueError of its own, or RecursionError
    found = json.loads(text[start:end + 1])
    scores = {}
    for entry in found["scores"] if isinstance(found, dict) and isinstance(found.get("scores"), list) else ():
        if not isinstance(entry, dict):
            raise ValueError("an entry is not an object")
        k, score = entry.get("id"), entry.get("score")
        if (type(k) is not int or not 1 <= k <= n or k in scores
                or type(score) not in (int, float) or not 0 <= score <= 1):
            raise ValueError("an id that was not asked for, or twice, or a score outside of 0 to 1")
        scores[k] = float(score)
    if len(scores) < (1 if some else n):
        raise ValueError(f"{n - len(scores)} of {n} scores are missing")
    return [scores.get(k) for k in range(1, n + 1)]


def api_key():
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError("--scorer api: set OPENAI_API_KEY (any word if your server wants none)")
    if not (key.isascii() and key.isprintable()):                # http.client would quote it in its error
        raise UserError("--scorer api: OPENAI_API_KEY holds characters that no key has, "
                        "such as a line break; set it anew")
    return key


def by_api(rows, wanted):
    """Scores from an OpenAI-compatible endpoint, in whatever order they arrive; None for what the LLM would not
    score in any try. UserError once the server has failed for good, or nobody has got a usable answer."""
    args, key = rows.args, api_key()
    usable, stop = [], threading.Event()                         # users with an answer; no more tries

    def one(u):
        prompt, pause = rank_prompt(rows, u, wanted[u]), args.api_pause
        for left in reversed(range(args.api_tries)):
            try:
                scores = parse_scores(call(args, key, prompt), len(wanted[u]), some=not left)
                usable.append(u)
                return u, wanted[u], scores
            except (OSError, ValueError, RecursionError, http.client.HTTPException) as problem:
                # it answers others: a refusal
                if not left and usable and isinstance(problem, (ValueError, RecursionError)):
                    return u, wanted[u], [None] * len(wanted[u])
                if not left or stop.wait(pause * (1 + np.random.default_rng().random())):
                    raise UserError(f"--api-base {args.api_base}: user {rows.data.users[u]} failed "
                                    f"{args.api_tries} times, last: {str(problem)[:100]}; "
                                    "what was scored is kept, --resume goes on") from None
                pause = min(2 * pause, 30)
    failed, crew, told = None, concurrent.futures.ThreadPoolExecutor(args.api_parallel), set()
    jobs = [crew.submit(one, u) for u in wanted]

    def settle(done):
        """What these jobs brought, each told once. Ask no more after a failure, but keep what is on its way: it
        is paid for."""
        nonlocal failed
        for job in done:
            try:
                if job not in told:
                    answer = job.result()
                    told.add(job)
                    yield answer
            except concurrent.futures.CancelledError:
                pass
            except UserError as problem:
                failed = failed or problem
                ask_no_more()

    def ask_no_more():
        stop.set()
        for job in jobs:
            job.cancel()
    try:
        yield from settle(progress(concurrent.futures.as_completed(jobs), "LLM scores", len(jobs)))
    except KeyboardInterrupt:
        ask_no_more()
        yield from settle(jobs)
        raise
    finally:
        ask_no_more()
        crew.shutdown()
    if failed:
        raise failed


def rank_prompt(rows, u, items):
    lines = "\n".join(f"{k}. {rows.logs.lines[i]}" for k, i in enumerate(items, 1))
    return RANK.format(history=history_lines(rows.logs.history(u, rows.logs.n_train[u])), items=lines)


def read_scores(path, data):
    """{(user, item): score, None where the LLM gave none} of a scores.jsonl, raw ids. A broken line is a
    UserError with its place."""
    users, items = ({raw: k for k, raw in enumerate(ids)} for ids in (data.users, data.items))
    table = {}
    for number, line in datasets.lines_of(path):
        try:
            record = json.loads(line)
            u, i, score = users.get(str(record["user"])), items.get(str(record["item"])), record["score"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{path}:{number}: not {{"user": , "item": , "score": }}; '
                            "mend or remove the line") from None
        if score is not None and (type(score) not in (int, float) or not 0 <= score <= 1):
            raise UserError(f"{path}:{number}: score {str(score)[:40]} is no number between 0 and 1")
        # nothing of users and items that a filter took out
        if u is not None and i is not None:
            table[u, i] = score
    if not table:
        raise UserError(f"{path}: no score of a user and an item of this data set; "
                        "ids are those of the data's own files")
    return table


REMADE = set()   # folders whose scores are of this process: --overwrite is for earlier ones


def score(args, folder, rows):
    """Phase 1 -> {(user, item): score}. Every user's answers are appended at once: what was paid for is never
    asked again."""
    kind, data = scorer(args, rows), rows.data
    if kind == "file":
        made = Path(args.scores).with_name("scores-args.json")
        if made.exists() and read_json(made).get("data") != data.fingerprint:
            if data.world is not None:                           # its ids are those of every toy world
                raise UserError(f"--scores {args.scores}: made for another toy world, or another --seed; "
                                "leave it out")
            print("the scores were made for other users, items or choices; those that are here are taken",
                  flush=True)
        return read_scores(Path(args.scores), data)
    path, wanted = folder / "scores.jsonl", candidates(rows)
    settings, made = made_by(args, kind, data), folder / "scores-args.json"
    if kind == "api":
        api_key()
    if args.overwrite and folder not in REMADE:
        path.unlink(missing_ok=True)
        made.unlink(missing_ok=True)
    REMADE.add(folder)
    earlier = read_json(made) if made.exists() else settings
    if differ := differences(earlier, settings):
        raise UserError(f"{folder} holds scores that were made with other settings ({differ}); "
                        "remove it, or name another folder with --run")
    if path.exists():                                            # a kill may have cut the last line
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    table = read_scores(path, data) if path.exists() and path.stat().st_size else {}
    missing = {u: items for u, items in wanted.items() if not all((u, i) in table for i in items)}
    if missing:
        lines = lambda u, pairs: "".join(
            json.dumps({"user": data.users[u], "item": data.items[i], "score": s}) + "\n" for i, s in pairs)
        if table:                                                # a user cut short is asked about again
            table = {(u, i): s for (u, i), s in table.items() if u not in missing}
            write_atomically(path, "".join(lines(u, [(i, s)]) for (u, i), s in table.items()))
        # the oracle's noise is one stream: ask it for all again
        source = {"oracle": lambda: oracle(rows, wanted), "backbone": lambda: by_backbone(rows, wanted, missing),
                  "encoder": lambda: by_encoder(rows, missing), "api": lambda: by_api(rows, missing)}[kind]
        for u, items, scores in source():
            if u in missing:
                if not made.exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(made, json.dumps(settings, indent=1))
                scores = [s if s is None else round(s, 6) for s in scores]
                table |= {(u, i): s for i, s in zip(items, scores)}
                with open(path, "a", encoding="utf-8") as f:
                    f.write(lines(u, zip(items, scores)))
    return table


def made_by(args, kind, data):
    """What scores depend on: {name: value}, as JSON gives it back."""
    names = {"oracle": ("oracle",),
             "backbone": ("backbone", "dtype", "tune_steps", "tune_lr", "prompt_history"),
             "encoder": ("prompt_history",), "api": ("api_base", "api_model", "prompt_history")}[kind]
    names += ("seed", "cold", "tail", "candidates", "pool", "extra", "scored_users")
    return json.loads(json.dumps({"scorer": kind, "data": data.fingerprint}
                                 | {name: getattr(args, name) for name in names}))


def scorer(args, rows):
    auto = "file" if args.scores else "oracle" if rows.data.world is not None else "backbone"
    return auto if args.scorer == "auto" else args.scorer


def estimate(rows):
    """--dry-run: the first prompt, and how much all would take. Four characters count as a token; what is asked
    for again, after an unusable answer, is not counted."""
    args, wanted = rows.args, candidates(rows)
    u = next(iter(wanted))
    print(rank_prompt(rows, u, wanted[u]), "\n")
    given = sum(len(rank_prompt(rows, u, items)) for u, items in wanted.items()) / 4
    taken = sum(12 * len(items) + 10 for items in wanted.values())
    times = len(args.seeds or (0,)) if args.ablations else 1      # every seed has candidates of its own
    price = times * (given * args.api_price[0] + taken * args.api_price[1]) / 1e6
    print(f"{times * len(wanted):,} requests, about {times * given:,.0f} tokens in and "
          f"{times * taken:,} out: ${price:,.2f} at {args.api_price[0]} and {args.api_price[1]} "
          "dollars per million")


# 6 ------------------------------------------------------------------------------------------ gate and losses
class Gate(nn.Module):
    """[2] alpha = sigmoid(w . [Cold(u), Tail(i), q(u, i)] + b): four numbers."""

    def __init__(self, init):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.linear.weight.data[0] = torch.tensor(init[:3])
        self.linear.bias.data[0] = init[3]

    def forward(self, cold, tail, q):
        """Three tensors of one shape -> alpha of that shape."""
        return torch.sigmoid(self.linear(torch.stack([cold.float(), tail.float(), q], -1))[..., 0])


def uncertainty(logit, kind="maxprob", draws=None):
    """[5] q in [0, 1]: 2 (1 - max(p, 1 - p)), or H(p) / ln 2, or 4 Var of p over draws (n, ...) under dropout.
    No gradient."""
    if kind == "dropout":
        return 4 * torch.sigmoid(draws.detach()).var(0, unbiased=False)
    logit = logit.detach()
    p = torch.sigmoid(logit)
    if kind == "maxprob":
        return 2 * torch.minimum(p, 1 - p)
    return -(p * F.logsigmoid(logit) + (1 - p) * F.logsigmoid(-logit)) / math.log(2)


def pick_pairs(scores, known, most, weight=1.0, pick="largest"):
    """[3] Pairs (user row, i, j), each (P,), the item that the LLM scores higher first. scores, known (U, M);
    weight (U, M, M) scales the gaps. largest: the `most` largest gaps of all users. sample: most / U (at least 1)
    random pairs of each user. Ties and unknown scores make no pair."""
    M = scores.shape[1]
    gap = (scores[:, :, None] - scores[:, None, :]).masked_fill(~(known[:, :, None] & known[:, None, :]), 0)
    gap = (gap * weight).view(1, -1)
    if pick == "sample":
        gap = ((gap > 0) * torch.rand_like(gap)).view(len(scores), -1)
    top = gap.topk(min(max(most // len(gap), 1), gap.shape[1]))
    chosen = (top.indices
              + torch.arange(0, gap.numel(), gap.shape[1], device=gap.device)[:, None])[top.values > 0]
    return chosen // M**2, chosen // M % M, chosen % M


def pair_loss(s, alpha, pairs, margin=1.0, gate="paper", reduction="mean", budget=(0.3, 10.0)):
    """[4] over pairs (user row, i, j) of s, alpha (U, M) -> a number; 0 without pairs. budget: (rho, eta) of
    gate "budget"."""
    u, i, j = pairs
    if not len(u):
        return s.sum() * 0
    hinge, a = F.relu(margin - (s[u, i] - s[u, j])), (alpha[u, i] + alpha[u, j]) / 2
    if gate == "normalised":
        return (a * hinge).sum() / a.sum()
    if gate in ("agreement", "truth"):
        # a weighted mean, which fades out where hardly a pair has weight
        a = (2 * a.detach() - 1).clamp(min=0)
        return (a * hinge).sum() / (1.0 if reduction == "sum" else a.sum().clamp(min=0.1 * len(a)))
    a = torch.ones_like(a) if gate == "ones" else a.detach() if gate == "fixed" else a
    loss = (a * hinge).sum() if reduction == "sum" else (a * hinge).mean()
    return loss + budget[1] * (a.mean() - budget[0]) ** 2 if gate == "budget" else loss


def click_loss(s):
    """[1] L_rec: mean binary cross-entropy of targets and their negatives, the columns of s (B, 2), a number."""
    return (F.softplus(-s[:, 0]) + F.softplus(s[:, 1])).mean() / 2


def agreement_loss(s, alpha, pairs):
    """What the gate "agreement" learns from: cross-entropy of alpha_uij against whether the model orders the
    pair as the LLM does. Gradient to alpha only."""
    u, i, j = pairs
    if not len(u):
        return alpha.sum() * 0
    return F.binary_cross_entropy((alpha[u, i] + alpha[u, j]) / 2, (s[u, i] > s[u, j]).to(alpha.dtype))


# 7 ------------------------------------------------------------------------------------------ train
class Scored:
    """The LLM's scores as padded rows of users that have any: users (U,), items, scores, known (U, M)."""

    def __init__(self, rows, table):
        by_user = {}
        for (u, i), s in sorted((pair, s) for pair, s in table.items() if s is not None):
            by_user.setdefault(u, []).append((i, s))
        if not by_user:
            raise UserError("the LLM gave no score at all; nothing can be learned from it")
        M, device = max(map(len, by_user.values())), rows.device
        self.users = torch.tensor(list(by_user), device=device)
        self.items, self.scores = torch.zeros(len(by_user), M, dtype=torch.long), torch.zeros(len(by_user), M)
        self.known = torch.zeros(len(by_user), M, dtype=torch.bool)
        for row, found in enumerate(by_user.values()):
            self.items[row, :len(found)] = torch.tensor([i for i, _ in found])
            self.scores[row, :len(found)] = torch.tensor([s for _, s in found])
            self.known[row, :len(found)] = True
        share = rows.args.gate_share if rows.args.gate == "agreement" else 0
        aside = torch.from_numpy(np.random.default_rng([rows.args.seed, 73]).random(self.known.shape)) < share
        self.items, self.scores, self.known, self.aside = (
            x.to(device) for x in (self.items, self.scores, self.known, aside))
        # The place that a user's LLM scores speak for: after the training part.
        self.place = torch.as_tensor(rows.logs.n_train, device=device)[self.users]
        self.cold = torch.as_tensor(rows.cold, device=device)[self.users][:, None].expand(-1, M)
        self.tail = torch.as_tensor(rows.tail, device=device)[self.items]


def text_vectors(rows):
    """KAR's inputs: what the LLM makes of each item's text -> (n_items + 1, D) for shifted items, standardised,
    0 for padding."""
    model, tokenizer = llm.load(rows.args.backbone, rows.device,
                                cuda.pick_dtype(rows.args.dtype, rows.device))
    v = llm.encode(model, tokenizer,
                   [f"{line}. {text}" for line, text in zip(rows.logs.lines, rows.data.texts)],
                   desc="item texts")
    return F.pad(F.normalize((v - v.mean(0)) / (v.std(0) + 1e-6), dim=-1), (0, 0, 1, 0))


class Model(nn.Module):
    """The click model and its gate; asked by (user, place, item) instead of by history."""

    def __init__(self, args, rows, vectors=None):
        super().__init__()
        torch.manual_seed(cuda.key_seed(args.seed, "init"))
        self.rows = rows
        self.register_buffer("vectors", vectors, persistent=False)
        self.ctr = CTR(args.recommender, len(rows.data.users), len(rows.data.items), rows.categories,
                       args.dim, args.mlp, args.dropout, extra=0 if vectors is None else 2 * vectors.shape[1])
        self.gate = Gate(args.gate_init)

    def forward(self, users, place, items):
        """users, place (B,), items (B, C) -> logits (B, C)."""
        history, extra = self.rows.history(users, place), None
        if self.vectors is not None:
            # KAR: the item's text, and the mean of the past ones
            past = F.embedding_bag(history, self.vectors, mode="mean", padding_idx=0)
            extra = torch.cat([self.vectors[items + 1], past[:, None].expand(*items.shape, -1)], -1)
        return self.ctr(users, items + 1, history, extra)


def logits_of(model, scored, pick):
    """The model's logits (U, M) of what the LLM scored for the users `pick` (rows of scored)."""
    return model(scored.users[pick], scored.place[pick], scored.items[pick])


def alphas(args, model, scored, pick, s):
    """The gate's (U, M) where the model says s. The dropout kind of q asks the model five times more."""
    if args.gate == "truth":
        right = reliable(args, scored.cold[pick].cpu(), scored.tail[pick].cpu())
        return torch.as_tensor((1 + right) / 2, dtype=s.dtype, device=s.device)
    draws, training = None, model.training
    if args.uncertainty == "dropout":
        model.train()
        with torch.no_grad():
            draws = torch.stack([logits_of(model, scored, pick) for _ in range(5)])
        model.train(training)
    return model.gate(scored.cold[pick], scored.tail[pick], uncertainty(s, args.uncertainty, draws))


def regulariser(args, model, scored, pick):
    """L_LLM on the users `pick` (rows of scored), a number; with --gate agreement and the gate's own
    cross-entropy."""
    scores, known = scored.scores[pick], scored.known[pick]
    s = logits_of(model, scored, pick)
    if args.llm_loss == "pointwise":
        return F.mse_loss(torch.sigmoid(s[known]), scores[known])
    if args.llm_loss == "kd":
        return F.binary_cross_entropy_with_logits(s[known], scores[known])
    alpha = alphas(args, model, scored, pick, s)
    aside, weight = scored.aside[pick], 1.0                      # nothing is set aside but for "agreement"
    if args.gate in ("agreement", "truth"):
        weight = (alpha[:, :, None] + alpha[:, None, :] - 1).detach().clamp(min=0)
    pairs = pick_pairs(scores, known & ~aside, args.pairs, weight, args.pick)
    loss = pair_loss(s, alpha, pairs, args.margin, args.gate, args.reduction,
                     (args.budget, args.budget_weight))
    if args.gate == "agreement":
        loss = loss + agreement_loss(s, alpha, pick_pairs(scores, known & aside, args.pairs, pick=args.pick))
    return loss


@torch.no_grad()
def gate_view(args, model, scored, every=1):
    """alpha of the scored pairs of every such user, as the model stands: (alpha, cold, tail), each (n,), in the
    order of scored.known."""
    model.eval()
    torch.manual_seed(cuda.key_seed(args.seed, "view"))          # of --uncertainty dropout
    users = torch.arange(0, len(scored.users), every, device=scored.users.device)
    alpha = [alphas(args, model, scored, pick, logits_of(model, scored, pick))[scored.known[pick]]
             for pick in users.split(64)]
    known = scored.known[users]
    return tuple(x.cpu().numpy() for x in (torch.cat(alpha), scored.cold[users][known], scored.tail[users][known]))


def gate_map(rows, scored, alpha, bins=5):
    """Mean alpha (n,) by length of the user's history and popularity of the item, in bins of equally many
    scored pairs."""
    length = (rows.logs.n_train[scored.users.cpu().numpy()][:, None]
              .repeat(scored.known.shape[1], 1)[scored.known.cpu().numpy()])
    count = rows.logs.item_counts()[scored.items.cpu().numpy()][scored.known.cpu().numpy()]
    edges = [np.unique(np.quantile(x, np.linspace(0, 1, bins + 1)).astype(int)) for x in (length, count)]
    where = [np.clip(np.searchsorted(e, x, side="right") - 1, 0, max(len(e) - 2, 0))
             for e, x in zip(edges, (length, count))]
    names = [[f"{a}–{b}" if a < b else str(a) for a, b in zip(e, [*(e[1:-1] - 1), e[-1]])] for e in edges]
    cell = lambda mask: round(float(alpha[mask].mean()), 4) if mask.any() else None
    return {"history": names[0], "popularity": names[1],
            "alpha": [[cell((where[0] == i) & (where[1] == j)) for j in range(len(names[1]))]
                      for i in range(len(names[0]))]}


def fit(args, run, rows, scored, vectors):
    """Phase 2: Adam on L_rec + lambda L_LLM, the epoch with the best validation AUC. Resumable after any epoch."""
    model = Model(args, rows, vectors).to(rows.device)
    optimizer = torch.optim.Adam([{"params": model.ctr.parameters(), "weight_decay": args.weight_decay},
                                  {"params": model.gate.parameters(), "lr": args.gate_lr}],
                                 lr=args.lr, fused=True)
    first, best, kept, waited = 0, -1.0, None, 0
    if (saved := run.begin("train")) is not None:
        tensors, state = saved
        first, best, waited, kept = state["epoch"], state["best"], state["waited"], strip(tensors, "best/")
        model.load_state_dict(strip(tensors, "now/"))
        run.load_optimizer(optimizer, tensors)
    used, epochs = scored is not None and args.lam > 0, first
    for epoch in range(first, args.epochs):
        if waited >= args.patience:
            break
        epochs = epoch + 1
        if args.redraw:
            rows.redraw(epoch)
        rng = np.random.default_rng([args.seed, 67, epoch])
        order = torch.as_tensor(rng.permutation(rows.train.shape[1]), device=rows.device)
        batches, total = order.split(max(args.batch // 2, 1)), torch.zeros(2)
        torch.manual_seed(cuda.key_seed(args.seed, "epoch", epoch))                           # dropout
        model.train()
        for k, batch in enumerate(progress(batches, f"epoch {epoch + 1}", len(batches))):
            if args.decay:
                optimizer.param_groups[0]["lr"] = args.lr * (1 - (epoch + k / len(batches)) / args.epochs)
            users, place, *items = rows.train[:, batch]
            s = model(users, place, torch.stack(items, 1))
            loss = click_loss(s)
            total[0] += loss.item()
            if not math.isfinite(total[0]):
                raise UserError(f"training has diverged in epoch {epochs}; lower --lr")
            if used:
                pick = rng.choice(len(scored.users), min(args.pair_users, len(scored.users)), replace=False)
                pick = torch.as_tensor(pick, device=rows.device)
                llm_loss = regulariser(args, model, scored, pick)
                total[1] += llm_loss.item()
                loss = loss + args.lam * llm_loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        now, waited = evaluate_rows(model, rows, rows.valid)["overall"], waited + 1
        alpha = {}
        if used and args.llm_loss == "pairwise" and args.gate not in ("ones", "truth"):
            a, cold, tail = gate_view(args, model, scored, every=-(-len(scored.users) // 500))
            alpha = {f"alpha_{'cold' if c else 'warm'}_{'tail' if t else 'head'}":
                         float(a[(cold == c) & (tail == t)].mean())
                     for c in (0, 1) for t in (0, 1) if ((cold == c) & (tail == t)).any()}
        run.log("train", epoch + 1, args.epochs, loss=float(total[0]) / len(batches),
                llm_loss=float(total[1]) / len(batches), valid_auc=now, **alpha)
        state = model.state_dict()
        if now > best:
            best, waited, kept = now, 0, {k: v.clone() for k, v in state.items()}
        run.save("train", prefix("now/", state) | prefix("best/", kept) | run.optimizer_tensors(optimizer),
                 {"epoch": epoch + 1, "best": best, "waited": waited})
    model.load_state_dict(kept)
    return model, {"epochs": epochs, "valid_auc": round(best, 4)}


# 8 ------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def evaluate_rows(model, rows, table):
    """AUC over targets and their negatives: all; rows of cold users (|H| <= tau and < tau); rows on tail items;
    dense = neither cold nor tail."""
    model.eval()
    s = torch.cat([model(part[0], part[1], part[2:].T)
                   for part in table.split(4096, 1)]).T.flatten().cpu().numpy()
    table = table.cpu().numpy()
    many = len(table) - 2                                        # rows of a column
    user, item, label = np.tile(table[0], many), table[2:].flatten(), np.arange(len(s)) < table.shape[1]
    cold, tail = rows.cold[user], rows.tail[item]
    cells = {"overall": cold >= 0, "cold": cold, "very_cold": rows.very_cold[user],
             "tail": tail, "dense": ~cold & ~tail}
    return {name: round(metrics.auc(label[mask], s[mask]), 6)
            for name, mask in cells.items() if len(set(label[mask])) == 2}


@torch.no_grad()
def evaluate_ranking(model, rows):
    """Full ranking of the test target among all items that the user has not had before: mean AUC and NDCG@10,
    per cell. A tie is lost."""
    model.eval()
    logs, n = rows.logs, len(rows.data.items)
    users = logs.held_out
    if rows.args.rank_users < len(users):
        users = np.sort(np.random.default_rng([rows.args.seed, 71])
                        .choice(users, rows.args.rank_users, replace=False))
    every, ranks, rivals = torch.arange(n, device=rows.device)[None], [], []
    for u in progress(users, "full ranking", len(users)):
        s = model(*torch.tensor([[u], [logs.n_train[u] + 1]], device=rows.device), every).cpu().numpy()
        target, seen = logs.sequence(u)[-1], logs.had([u], [-1])
        seen[0, target] = False
        ranks.append(metrics.ranks_of(s, np.array([target]), seen)[0])
        rivals.append(n - 1 - int(seen.sum()))
    ranks, target = np.array(ranks), np.array([logs.sequence(u)[-1] for u in users])
    auc, ndcg = 1 - (ranks - 1) / np.array(rivals), metrics.ndcg_at(ranks, 10)
    cold, tail = rows.cold[users], rows.tail[target]
    cells = {"overall": users >= 0, "cold": cold, "very_cold": rows.very_cold[users],
             "tail": tail, "dense": ~cold & ~tail}
    return {name: {"n": int(mask.sum()), "auc": round(float(auc[mask].mean()), 6),
                   "ndcg@10": round(float(ndcg[mask].mean()), 6)}
            for name, mask in cells.items() if mask.any()}


def train(args, shared=None):
    """All phases in one run; each is skipped when the run folder says that it is done. Returns the RESULT record.

    shared: a folder for the LLM's scores, which runs that differ in later phases have in common.
    """
    cuda.alone("sllmr.py")
    if args.ablations and not args.dry_run:
        return ablations(args)
    cuda.seed_everything(args.seed)
    device = cuda.pick_device(args.device)
    rows = Rows(args, device)
    if args.gate == "truth" and scorer(args, rows) != "oracle":
        raise UserError("--gate truth: where scores are right is only known of the toy world's "
                        "(--scorer oracle); take another gate")
    if args.tune_steps and scorer(args, rows) != "backbone":
        raise UserError(f"--tune-steps trains a backbone, and the scores are those of --scorer {scorer(args, rows)}; "
                        "leave it out, or add --scorer backbone")
    if args.dry_run:
        return estimate(rows)
    fingerprint = rows.data.fingerprint
    if args.scores:
        if not Path(args.scores).is_file():
            raise UserError(f"--scores {args.scores}: no such file")
        folder = folder_of(args, "sllmr", f"s{args.seed}").resolve()
        if args.overwrite and folder in Path(args.scores).resolve().parents:
            raise UserError(f"--scores {args.scores}: of the run that --overwrite removes; name another --run")
        fingerprint += "-" + hashlib.sha256(Path(args.scores).read_bytes()).hexdigest()[:12]
    run = Run(args, "sllmr", fingerprint,
              free=("api_parallel", "api_tries", "api_pause", "api_timeout", "api_price"))
    if run.done("result"):
        return run.result(run.done("result"))
    reads = args.llm_loss == "kar" or args.llm_loss != "none" and scorer(args, rows) == "backbone"
    run.header(reads, device=str(device),
               data=f"{rows.data.name} ({rows.data.fingerprint}): {len(rows.data.users):,} users, "
                    f"{len(rows.data.items):,} items",
               rows=f"train {2 * rows.train.shape[1]:,} (of a history of at most {args.cold}: "
                    f"{2 * int((rows.train[1] <= args.cold).sum()):,}), "
                    f"valid {rows.valid[2:].numel():,}, test {rows.test[2:].numel():,}; "
                    f"cold users {rows.cold[rows.logs.held_out].mean():.1%}, tail items {rows.tail.sum():,}")
    scored, vectors = None, text_vectors(rows) if args.llm_loss == "kar" else None
    if args.llm_loss in ("pairwise", "pointwise", "kd"):
        table = score(args, shared or run.folder, rows)
        scored = Scored(rows, table)
        print(f"score done: {len(table):,} pairs of {len(scored.users):,} users by {scorer(args, rows)}",
              flush=True)
    if not run.done("train"):
        model, record = fit(args, run, rows, scored, vectors)
        run.finish("train", record)
    else:
        model = Model(args, rows, vectors).to(device)
        model.load_state_dict(strip(run.load("train")[0], "best/"))
    result = {"script": "sllmr", "data": rows.data.name, "recommender": args.recommender,
              "llm_loss": args.llm_loss, "gate": args.gate, "lam": args.lam, "seed": args.seed,
              "train": run.done("train"), "valid": evaluate_rows(model, rows, rows.valid),
              "test": evaluate_rows(model, rows, rows.test), "ranking": evaluate_ranking(model, rows)}
    if scored is not None and args.llm_loss == "pairwise" and args.gate not in ("ones", "truth"):
        alpha, cold, tail = gate_view(args, model, scored)
        result["gate_map"] = gate_map(rows, scored, alpha)
        numbers = (*model.gate.linear.weight[0].tolist(), model.gate.linear.bias.item())
        result["gate_is"] = {name: round(x, 4) for name, x in zip(("cold", "tail", "unsure", "b"), numbers)}
        truth = reliable(args, cold, tail)
        # does it find where the LLM is right?
        if scorer(args, rows) == "oracle" and len(set(truth)) > 1:
            result["gate_auc"] = round(metrics.auc(truth > truth.mean(), alpha), 4)
    run.finish("result", result)
    show(result)
    return run.result(result)


def show(result):
    """Print the test figures beside their baselines."""
    gate = f" with gate {result['gate']}" if result["llm_loss"] == "pairwise" else ""
    print(f"\n{result['recommender']}, LLM scores: {result['llm_loss']}{gate}")
    print(f"{'test':12}{'AUC, rows':>16}{'AUC, full ranking':>20}{'NDCG@10':>10}")
    for cell in ("overall", "cold", "very_cold", "tail", "dense"):
        ranked = result["ranking"].get(cell, {})
        if cell in result["test"]:
            print(f"{cell.replace('_', ' '):12}{result['test'][cell]:16.4f}"
                  f"{ranked.get('auc', math.nan):20.4f}{ranked.get('ndcg@10', math.nan):10.4f}")
    if "gate_auc" in result:
        print(f"the gate finds the pairs on which the LLM is right: AUC {result['gate_auc']:.3f}")


# 9 ------------------------------------------------------------------------------------------ compare
VARIANTS = {   # name: what changes
    "none": {"llm_loss": "none"},
    "KAR": {"llm_loss": "kar"},
    "KD": {"llm_loss": "kd"},
    "pointwise": {"llm_loss": "pointwise"},
    "ones": {"llm_loss": "pairwise", "gate": "ones"},
    "paper": {"llm_loss": "pairwise", "gate": "paper"},
    "normalised": {"llm_loss": "pairwise", "gate": "normalised"},
    "budget": {"llm_loss": "pairwise", "gate": "budget"},
    "fixed": {"llm_loss": "pairwise", "gate": "fixed"},   # --gate-init as it is: what learning adds to it
    "agreement": {"llm_loss": "pairwise", "gate": "agreement"},
    "no prior": {"llm_loss": "pairwise", "gate": "agreement", "gate_init": (0.0, 0.0, 0.0, 0.0)},
    "truth": {"llm_loss": "pairwise", "gate": "truth"},
}
WITHOUT_LAMBDA = ("none", "KAR")
CELLS = ("overall", "cold", "very_cold", "tail", "dense")


def ablations(args):
    """Every model, variant, lambda and seed, one run folder each; lambda by validation AUC, with --lrs the
    learning rate by that of "none"; one table per model on test, and (with matplotlib) gate.png: alpha per cell
    over the epochs. The same command again goes on where it stopped."""
    root = folder_of(args, "sllmr", "ablations")
    told = args.data.split(":")[0] == "toy" and not args.scores and args.scorer in ("auto", "oracle")
    known = [name for name in VARIANTS if name != "truth" or told]
    if "truth" in args.variants and "truth" not in known:
        raise UserError("--variants truth: where scores are right is only known of the toy world's own "
                        "(--scorer oracle)")
    REMADE.clear()
    tables, runs = {}, []   # {recommender, variant, lambda: its row}
    best = lambda found: max(found, key=lambda k: np.mean([r["valid"]["overall"] for r in found[k]]))
    for recommender in args.recommenders or (args.recommender,):
        place = lambda lr: root / (f"{recommender}-{lr:g}" if args.lrs else recommender)

        @functools.cache
        def records(name, lam, lr):
            """Of every seed."""
            found = []
            for seed in args.seeds or (args.seed,):
                print(f"\n=== {recommender}, {name}, lambda {lam:g}, rate {lr:g}, seed {seed}", flush=True)
                runs.append(place(lr) / f"s{seed}" / f"{name}-{lam:g}")
                now = variant(args, runs[-1], recommender=recommender, seed=seed, lam=lam, lr=lr, **VARIANTS[name])
                found.append(train(now, root / f"scores-s{seed}"))
            return found
        lr = best({lr: records("none", 0.0, lr) for lr in args.lrs}) if args.lrs else args.lr
        columns = {c: lambda r, c=c: r["test"][c] for c in CELLS} | {
            "gate_auc": lambda r: r["gate_auc"], "validation": lambda r: r["valid"]["overall"]}
        rows = {}
        for name in args.variants or known:
            found = {lam: records(name, lam, lr) for lam in ((0.0,) if name in WITHOUT_LAMBDA else args.lams)}
            lam = best(found)
            rows[f"{recommender}{f' ({lr:g})' if args.lrs else ''}, {name} {lam:g}"] = found[lam]
        print(f"\n{recommender}, learning rate {lr:g}: AUC on 1:{args.test_negatives} test rows, lambda by "
              f"validation, mean ± std over {len(args.seeds or (0,))} seeds; validation: AUC, overall")
        tables |= summarise(rows, columns)
        plot(place(lr))
    return write_table(root, args, tables, runs)


def plot(folder):
    """alpha per cell over the epochs, one picture per gate: its last seed, its largest lambda. Without
    matplotlib the same numbers are in metrics.jsonl."""
    if (plt := pyplot()) is None:
        return
    # s2/paper-0.1/metrics.jsonl -> (2, 0.1)
    number = lambda file: (int(file.parent.parent.name[1:]), float(file.parent.name.partition("-")[2]))
    runs = {gate: max(found, key=number) for gate in ("paper", "normalised", "budget", "agreement")
            if (found := [file for file in folder.glob(f"s*/{gate}-*/metrics.jsonl")
                          if file.parent.suffix != ".replaced"])}
    if not runs:
        return
    figure, axes = plt.subplots(1, len(runs), figsize=(4 * len(runs), 3.5), sharey=True, squeeze=False)
    axes = axes[0]
    for axis, (gate, file) in zip(axes, runs.items()):
        log = [json.loads(line) for line in file.read_text().splitlines()]
        for key in sorted(k for k in log[0] if k.startswith("alpha_")):
            label = key.removeprefix("alpha_").replace("_", " user, ") + " item"
            axis.plot([r["step"] for r in log], [r[key] for r in log], marker="o", label=label)
        axis.set(title=f"--gate {gate}, λ = {number(file)[1]:g}", xlabel="epoch", ylim=(0, 1))
    axes[0].set_ylabel("mean α")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(folder / "gate.png", dpi=150)
    plt.close(figure)
    print(f"the gates over the epochs: {folder / 'gate.png'}")


if __name__ == "__main__":
    main(Args, train, __doc__)
