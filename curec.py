"""CURec: user patterns and item reasons written by an aligned LLM, corrected in time order (arXiv 2508.07595, KDD 2026).

A language model explains, a small recommender scores, and each corrects the other:

  1 align     GRPO on "which of these will the user choose next?" with rule rewards (format, legal, correct)
  2 write     the aligned LLM writes a pattern P_u per user and a list of reasons R_i per item
  3 reward    a reward model learns from the interactions to score (u, i) given P_u and R_i
  4 correct   interaction by interaction in time order: write a group of reasons for (u, i), score each with the
              reward model, take one GRPO step, let the updated LLM rewrite P_u and the reason
  5 serve     the reward model with the corrected texts ranks the whole catalogue; no LLM call is left

EQUATIONS (numbers as used below; the paper's eqs. 3-4 are [2]-[3], 7-11 are [5]-[6], 12-15 are [7])
  [1] reward    r = w_f format + w_l legal + w_c correct                                     -> rule_rewards
  [2] advantage A_n = (r_n - mean r) / (std r + delta)                                       -> advantages
  [3] GRPO      L = -E[ min(rho A, clip(rho, 1 +- eps) A) ] + beta KL,  rho = pi / pi_old    -> grpo_loss
  [4] KL        k3 = exp(ref - pi) - (ref - pi) - 1      (log-probabilities)                 -> grpo_loss
  [5] matching  m_ui = MultiHead(query = P_u, keys = values = R_i)                           -> RewardModel.match
  [6] score     y_ui = MLP[e_u; z_i; DIN(z_i, TransformerEnc(history))],  z_i = [e_i; m_ui]  -> RewardModel
  [7] signal    r_n = y(u, i; R_i + {o_n}), o_n the n-th sampled reason; then u's reason in R_i is rewritten -> correct

CHECKED BY, in tests/
  [1] test_rules_by_hand
  [2] test_advantages_of_equal_rewards_are_zero_and_a_group_of_one_is_refused
  [3] test_clipping_on_both_sides_and_the_three_means_over_tokens_by_hand
  [4] test_k3_is_never_negative_and_its_gradients_are_the_two_kl_directions
  [5] test_matching_and_score_by_hand_in_the_catalogue_and_as_a_reward
  [6] test_matching_and_score_by_hand_in_the_catalogue_and_as_a_reward
      test_training_at_all_times_equals_serving_on_each_prefix
  [7] test_correction_asks_from_each_choices_past_and_puts_what_it_learned_in_its_place
      test_a_list_of_reasons_replaces_the_authors_own_and_drops_the_oldest

DEVIATIONS AND CHOICES. No code and no full text of the paper is public; what follows is a reading of it.
  - Not given in what is public: prompts, candidates, group size, learning rates, list bounds, the text encoder.
    All but the prompts and the encoder are flags; the encoder is the mean of the last hidden layer of the LLM
    as it was after phase 1, frozen: a live encoder would make every stored vector stale at each step of phase
    4.
  - The leaks are closed: a reason written from the interaction (u, i) is masked when (u, i) is trained or
    evaluated, negatives in training have one hidden as often (see match), and nothing is ever written from
    validation or test interactions. Negatives to train with may be held-out items: were these spared, a user
    would never be pushed away from them alone. What stays: a first pattern is written from the end of the
    training history, so that it may name a training target, never a held-out one.
  - The score [6] has parts of its own beside the MLP: <z, last state of the encoder>, a bias per item that
    starts at the log of its popularity, u * z as an input, and the pattern speaks for the user as well as for
    the query. Texts' vectors are whitened. --categories adds the mean of an item's categories to e_i: the control
    for what texts add.
  - A sampled reason that is empty or cut off is worth the score without a new reason, minus 1.
  - "Without update" steps the LLM, keeps the best sampled reason and rewrites neither pattern nor reason.
  - The signal [7] is the logit in fp32, not its sigmoid, which saturates and then has no differences to learn from.
  - A pass over all interactions of ML-1M would be 7.9 million generations; --correct-events takes the latest ones.
    Interactions with no user or item in common share a batch (and a GRPO step); see `schedule`.
  - Literal readings and sounder ones are named modes: --length-norm, --advantage-scale, --kl, --zero-std.

  python curec.py --data toy --backbone tiny                     # 5 minutes on 2 cores
  python curec.py --data ml1m --backbone Qwen/Qwen2.5-3B          # on a GPU
  python curec.py --recommend u7 --run runs/curec-toy-tiny-s0     # what user u7 is shown, and why
"""

# 1 ------------------------------------------------------------------------------------------ imports
import dataclasses
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import cuda, data as datasets, llm, lora, metrics
from common.prompts import LETTERS, candidate_lines, history_lines
from common.recommenders import AttentionUnit, mean_of
from common.run import (Run, UserError, at_least, folder_of, is_run, left_to_variants, main, prefix, progress,
                        read_checkpoint, strip, summarise, variant, write_table)
from common.sequences import Logs, bayes, category_table, popularity


# 2 ------------------------------------------------------------------------------------------ arguments
@dataclass
class Args:
    # -- run
    data: str = "toy"  # toy (or toy:USERSxITEMSxINTERACTIONS), ml1m, ml100k, ml-latest-small, amazon-...,
    # or a folder of your own logs
    data_dir: str | None = None  # a folder that already holds the data sets (else LLMREC_DATA, else download)
    max_bad_rows: int = 0  # broken rows to skip before giving up
    run: str | None = None  # run folder (default: runs/curec-DATA-BACKBONE-sSEED)
    resume: bool = False  # continue where the run folder stopped
    overwrite: bool = False  # remove an earlier run in that folder first
    seed: int = 0  # of sampling, initialisation and training
    device: str = "auto"  # auto (CUDA if there is one, else CPU), cpu, cuda, mps
    dtype: str = "auto"  # of the frozen backbone: auto (bfloat16 on CUDA, else float32), float32, bfloat16
    recommend: str | None = None  # print what this user (raw id) is shown and why, from a finished --run
    top: int = 10  # how many titles --recommend prints
    ablations: bool = False  # run every variant of VARIANTS and print one table
    seeds: tuple[int, ...] = ()  # with --ablations: the seeds to average over (default: --seed alone)
    variants: tuple[str, ...] = ()  # with --ablations: which rows of VARIANTS (default: all)
    # -- data
    min_interactions: int | None = None  # users with fewer are dropped
    # (default: the paper's 30; 1 on the toy world; for small logs set it lower)
    min_rating: float = 0.0  # interactions rated lower are dropped; 0 keeps all, the literal reading
    users: int | None = None  # keep a random sample of so many users
    # -- backbone
    backbone: str = "tiny"  # any Hugging Face causal LM by name or folder; tiny is bundled
    prompt_history: int = 10  # titles of the user's history in a prompt
    llm_batch: int = 64  # texts at once when they are written or encoded;
    # a GRPO step's prompts are sampled all at once
    # -- lora
    lora_targets: str = "all-linear"  # comma-separated names of linear layers, or all-linear
    lora_rank: int = 16  # rank r of the adapter
    lora_alpha: float = 32.0  # α; the adapter is scaled by α / r
    # -- alignment (phase 1)
    align: bool = True  # --no-align is the ablation without pretraining
    align_steps: int = 80  # GRPO steps
    align_prompts: int = 16  # prompts a step
    candidates: int = 5  # candidates in a prompt: the next item and random unseen ones
    weights: tuple[float, ...] = (0.1, 0.1, 1.0)  # of the rewards for format, for a legal answer,
    # for the right one: w_f, w_l, w_c in [1]
    eval_prompts: int = 512  # held-out alignment prompts, of validation and of test users
    # -- GRPO (phases 1 and 4)
    group: int = 8  # G, completions per prompt
    temperature: float = 1.0  # of sampling, and of the log-probabilities
    align_tokens: int | None = None  # longest thought and answer (default 256; 64 for tiny)
    clip: float = 0.2  # ε, PPO's clip range; rollouts are used once, so that ρ = 1 and it never acts
    beta: float = 1e-3  # β, weight of the KL to the reference
    kl: Literal["k3", "k3-unbiased", "exact"] = "k3"  # estimator;
    # k3-unbiased multiplies by ρ (reverse-KL gradient)
    length_norm: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # grpo: mean per completion |
    # dapo: mean per token | dr_grpo: sum over the longest
    advantage_scale: Literal["group", "none"] = "group"  # divide by the group's std (literal) or only centre
    zero_std: Literal["keep", "drop"] = "keep"  # groups of equal rewards: keep in the mean, or drop
    lr: float | None = None  # of GRPO (default 1e-5; 2e-3 for tiny);
    # in phase 1 it rises over 10 steps, then falls to 0
    max_grad_norm: float = 1.0  # gradient clipping
    micro_batch: int | None = None  # prompts, with their completions, at once in a step: less memory,
    # same result (default: 4 on CUDA, else all)
    # -- texts (phase 2)
    reasons: int = 3  # written per item in phase 2, each from another training interaction
    max_reasons: int = 6  # most reasons an item keeps; the oldest goes
    text_tokens: int | None = None  # longest pattern or reason (default 96; 40 for tiny)
    texts: Literal["llm", "data"] = "llm"  # data is an ablation: the lines that the LLM would have read,
    # instead of what it writes
    random_reasons: bool = False  # ablation: deal the reasons out to other items
    # -- reward model (phase 3)
    features: Literal["both", "ids", "text"] = "both"  # both, or the ablations: ids only, text only
    text_dim: int = 64  # dimensions kept of a text's vector
    categories: bool = False  # items bring their categories as plain inputs: what do texts add to these?
    history_text: bool = False  # past items carry their reasons, too, not only the candidate
    dim: int = 64  # width of the embeddings
    heads: int = 2  # attention heads, in [5] and in the Transformer
    layers: int = 1  # Transformer layers over the history
    max_history: int = 50  # items of the history that the reward model reads
    dropout: float = 0.2  # in the reward model
    rm_loss: Literal["softmax", "bce"] = "softmax"  # softmax, or binary cross-entropy,
    # of an interaction against the negatives
    negatives: int = 64  # items not had in training, per training window, shared by its positions
    negative_power: float = 0.0  # draw negatives by popularity to this power,
    # and correct the loss for it; 0 is uniform
    rm_batch: int = 16  # windows per step
    rm_lr: float = 4e-3  # learning rate of the reward model
    weight_decay: float = 0.01  # of the reward model's matrices and embeddings
    rm_epochs: int = 30  # all are trained: the learning rate falls until the last;
    # the best on validation is kept
    rm_valid_users: int = 1000  # most users that validation ranks for, evenly spaced: every k-th
    # -- correction (phase 4)
    correct: bool = True  # --no-correct is the ablation without correction
    update: bool = True  # --no-update keeps the best sampled reason and rewrites neither pattern nor reason
    shuffled_order: bool = False  # ablation: the same interactions in random order
    correct_events: int = 256  # correct on so many of the latest training interactions, in time order
    correct_batch: int = 16  # independent interactions that share a GRPO step
    correct_lr_scale: float = 0.3  # phase 4's learning rate relative to phase 1's
    refit: bool = False  # train the reward model anew on the corrected texts

    def check(self):
        if self.group < 2:
            raise ValueError("--group must be at least 2: "
                             "a completion is judged against the others of its group")
        if not 2 <= self.candidates <= 26:
            raise ValueError("--candidates must be between 2 and 26 (they are lettered)")
        if len(self.weights) != 3:
            raise ValueError("--weights takes three numbers: format,legal,correct")
        if unknown := set(self.variants) - set(VARIANTS):
            raise ValueError(f"--variants {','.join(sorted(unknown))}: among {','.join(VARIANTS)}")
        if "full" not in self.variants and (heirs := [name for name in self.variants if VARIANTS[name][1]]):
            raise ValueError(f"--variants {','.join(heirs)}: needs full too, whose LLM it takes over")
        left_to_variants(self, VARIANTS)
        if self.refit and not (self.correct and self.features != "ids"):
            raise ValueError("--refit follows phase 4: it needs texts and correction")
        if self.categories and self.features == "text":
            raise ValueError("--categories needs --features ids or both: with text an item is its reasons alone")
        if self.features == "ids" and (self.random_reasons or self.texts == "data" or self.history_text):
            raise ValueError("--random-reasons, --texts data and --history-text mean nothing with --features ids")
        if (not self.update or self.shuffled_order) and not (self.correct and self.features != "ids"):
            raise ValueError("--no-update and --shuffled-order are of phase 4: they need texts and correction")
        if self.recommend is not None and not self.run:
            raise ValueError("--recommend needs --run FOLDER of a finished run")
        if (self.random_reasons or self.texts == "data") and self.correct:
            raise ValueError("--random-reasons and --texts data need --no-correct: phase 4 would write anew")
        at_least(self, 1, "micro_batch align_steps align_prompts align_tokens text_tokens reasons "
                          "max_reasons max_history rm_batch dim heads text_dim negatives correct_batch "
                          "correct_events llm_batch eval_prompts lora_rank rm_epochs rm_valid_users top "
                          "layers prompt_history")
        at_least(self, 0, "min_interactions weights clip beta correct_lr_scale lora_alpha weight_decay "
                          "negative_power")
        if self.dim % self.heads:
            raise ValueError("--dim must be a multiple of --heads")
        if (not all(x is None or x > 0 for x in (self.temperature, self.rm_lr, self.max_grad_norm, self.lr))
                or not 0 <= self.dropout < 1):
            raise ValueError("--temperature, --lr, --rm-lr and --max-grad-norm must be positive "
                             "and --dropout in [0, 1)")


# 3 ------------------------------------------------------------------------------------------ the reward model
class RewardModel(nn.Module):
    """f(u, i; P_u, R_i): what phase 3 trains, phase 4 asks for rewards, and phase 5 serves.

    Item ids are shifted by one inside (0 = padding). Histories are (B, L) with the oldest item first and the padding
    last; `texts` has patterns (U, K), reasons (I, M, K) and author (I, M), -1 = empty slot (see Texts).
    """

    def __init__(self, args, logs, text_dim):
        super().__init__()
        D, n_users, n_items, self.args = args.dim, len(logs.data.users), len(logs.data.items), args
        self.user, self.item = nn.Embedding(n_users, D), nn.Embedding(n_items + 1, D, padding_idx=0)
        self.position = nn.Embedding(args.max_history, D)
        for table in (self.user, self.item, self.position):
            nn.init.normal_(table.weight, std=0.02)
        if args.categories:
            self.register_buffer("categories", torch.from_numpy(
                category_table([names[:8] for names in logs.data.categories])))
            self.category = nn.Embedding(int(self.categories.max()) + 1, D)
            nn.init.normal_(self.category.weight, std=0.02)
        self.query, self.key, self.value = (nn.Linear(text_dim, D) for _ in range(3))
        self.of_user = nn.Linear(text_dim, D)                # the pattern also speaks for the user directly
        self.no_reason_key, self.no_reason_value = (nn.Parameter(torch.zeros(D)) for _ in range(2))
        self.join = nn.Linear(2 * D, D)                      # z = W [e_i; m_ui]
        layer = nn.TransformerEncoderLayer(D, args.heads, 2 * D, args.dropout,
                                           batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, args.layers, nn.LayerNorm(D), enable_nested_tensor=False)
        self.unit = AttentionUnit(D)
        self.first = nn.Linear(4 * D, 64)                    # MLP on [u; z; u * z; DIN(z, H)]
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
        self.bias = nn.Embedding(n_items + 1, 1, padding_idx=0)
        nn.init.zeros_(self.rest[-1].weight)                 # the MLP starts as a constant
        self.drop = nn.Dropout(args.dropout)
        # per item: how often a positive has one of its reasons hidden
        self.register_buffer("told", torch.zeros(n_items))

    def set_priors(self, texts, logs):
        """Set what is known before training. The item bias starts at the log of the training popularity: that is what
        BCE against uniform negatives converges to first (softmax ignores the shift). told: the share of an item's
        training users who wrote one of its reasons, which is how often a positive has a masked one (see match)."""
        count = logs.item_counts()
        self.bias.weight.data[1:, 0] = (torch.from_numpy(np.log((count + 1) / (count + 1).mean()))
                                        - math.log(self.args.negatives))
        users, positions = logs.train_events()
        items = logs.item_at(users, positions)
        wrote = (texts.author.cpu().numpy()[items] == users[:, None]).any(1)
        self.told.copy_(torch.from_numpy(
            np.bincount(items, wrote, minlength=len(count)) / np.maximum(count, 1)))

    # [5] ----------------------------------------------------------------------------------------------------
    def tables(self, texts):
        """Keys and values of all reasons, (I, M, D) each: computed once where the whole catalogue is scored."""
        return self.key(texts.reasons), self.value(texts.reasons)

    def match(self, users, items, texts, extra=None, tables=None, return_weights=False, hide_one=False):
        """m_ui: multi-head attention, query = pattern, keys and values = the item's reasons. users (B,), items (B, C)
        -> (B, C, D), or the weights (B, C, heads, 1 + M (+ 1)).

        The reason that u's own interaction with i produced is masked, or every positive would carry its own label.
        The first key is learned and stands for "no reason": an item without reasons is finite. extra (B, C, K) is
        one more reason per pair, never masked: the candidate that phase 4 wants to have judged. hide_one: these
        are the negatives of training; one of their reasons is hidden as often as one of a positive's is, or a
        missing reason would tell the label as well.
        """
        B, C, D, heads = *items.shape, self.args.dim, self.args.heads
        q = self.query(texts.patterns[users]).view(B, 1, heads, D // heads, 1)
        index = items - 1
        if tables is None:
            reasons = texts.reasons[index]                                         # (B, C, M, K)
            keys, values = self.key(reasons), self.value(reasons)
        else:
            keys, values = tables[0][index], tables[1][index]
        author = texts.author[index]                                               # (B, C, M)
        hidden = (author < 0) | (author == users[:, None, None])
        if hide_one:
            draw = torch.rand(author.shape, device=author.device).masked_fill(author < 0, -1.0)
            drawn = ((draw == draw.amax(-1, keepdim=True))
                     & (torch.rand(B, C, 1, device=draw.device) < self.told[index][..., None]))
            hidden = hidden | drawn
        keys, values = ([self.no_reason_key.expand(B, C, 1, D), keys],
                        [self.no_reason_value.expand(B, C, 1, D), values])
        if extra is not None:
            keys, values = [*keys, self.key(extra)[:, :, None]], [*values, self.value(extra)[:, :, None]]
        keys, values = torch.cat(keys, 2), torch.cat(values, 2)                    # (B, C, 1 + M (+ 1), D)
        hidden = F.pad(hidden, (1, 0 if extra is None else 1), value=False)
        split = lambda x: x.view(B, C, -1, heads, D // heads).transpose(2, 3)      # (B, C, heads, ., D/heads)
        logits = (split(keys) @ q)[..., 0] / math.sqrt(D // heads)                 # (B, C, heads, .)
        weights = logits.masked_fill(hidden[:, :, None], -torch.inf).softmax(-1)
        if return_weights:
            return weights
        return (weights[..., None, :] @ split(values)).reshape(B, C, D)

    # [6] ----------------------------------------------------------------------------------------------------
    def e(self, items):
        """The item's own vector, (..., D): of its id, with --categories plus the mean of its categories'."""
        e = self.item(items)
        return e + mean_of(self.category, self.categories[items]) if self.args.categories else e

    def z(self, users, items, texts, extra=None, tables=None, hide_one=False):
        """[e_i; m_ui] -> (B, C, D); with --features ids or text one half is zero."""
        e = self.drop(self.e(items))
        e = torch.zeros_like(e) if self.args.features == "text" else e
        if self.args.features == "ids":
            return self.join(torch.cat([e, torch.zeros_like(e)], -1))
        return self.join(torch.cat(
            [e, self.match(users, items, texts, extra, tables, hide_one=hide_one)], -1))

    def u(self, users, texts):
        e = self.drop(self.user(users)) if self.args.features != "text" else 0.0
        return e if self.args.features == "ids" else e + self.of_user(texts.patterns[users])

    def past(self, users, history, texts):
        """H_u (B, L, D): causal Transformer over the history, so that H_t knows items up to t and none after."""
        tokens = self.e(history)
        if self.args.features == "text" or self.args.history_text:       # past items carry their reasons, too
            own = torch.zeros_like(tokens) if self.args.features == "text" else tokens
            m = self.match(users, history.clamp(min=1), texts)
            tokens = self.join(torch.cat([own, m], -1))
        L = history.shape[1]
        x = self.drop(tokens + self.position.weight[:L])
        causal = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)
        return self.encoder(x, mask=causal) * (history > 0)[..., None]

    def head(self, items, z, u, pooled, state):
        """MLP [u; z; u * z; pooled] + <z, state>. pooled: already through its part of the first layer."""
        wu, wz, wx, _ = self.first.weight.split(self.args.dim, dim=1)
        flat = z @ wz.T + (u[:, None] * z) @ wx.T + (u @ wu.T)[:, None] + self.first.bias     # (B, C, 64)
        bias = self.bias(items)[..., 0]
        if pooled.dim() > flat.dim():  # one candidate, many times t
            flat, bias = flat[:, :, None], bias[:, :, None]
        return self.rest(flat + pooled)[..., 0] + state + bias

    def forward(self, users, history, items, texts, extra=None, tables=None):
        """Logits (B, C) of candidates after the whole history: users (B,), history (B, L), items (B, C)."""
        H, u = self.past(users, history, texts), self.u(users, texts)
        z = self.z(users, items, texts, extra, tables)
        pooled = self.unit(z, H, history > 0) / math.sqrt(self.args.max_history)
        last = H[torch.arange(len(users)), (history > 0).sum(1) - 1]
        state = (z @ last[:, :, None])[..., 0]
        return self.head(items, z, u, pooled @ self.first.weight[:, -self.args.dim:].T, state)

    def forward_all_times(self, users, sequence, negatives, texts):
        """Training: every position of `sequence` (B, L) is a target, judged on what came before it, together with
        `negatives` (B, K) at every position -> positive logits (B, L), negative logits (B, L, K).

        DIN has no softmax, so its weights do not change with time, only how many are summed: one pass gives all
        times. Equal to `forward` on each prefix (tested).
        """
        L, scale = sequence.shape[1], 1 / math.sqrt(self.args.max_history)
        H, u = self.past(users, sequence, texts), self.u(users, texts)
        of_past = H @ self.first.weight[:, -self.args.dim:].T * scale                    # (B, L, 64)
        before = torch.cat([torch.zeros_like(H[:, :1]), H[:, :-1]], 1)                   # state before time t
        earlier = torch.ones(L, L, dtype=H.dtype, device=H.device).tril(-1)
        z = self.z(users, sequence.clamp(min=1), texts)
        pooled = (self.unit.weights(z, H) * earlier) @ of_past
        positive = self.head(sequence, z, u, pooled, (z * before).sum(-1))
        zn = self.z(users, negatives, texts, hide_one=self.training)
        shares = self.unit.weights(zn, H)[:, :, None] * earlier                          # (B, K, L, L)
        running = (shares.flatten(1, 2) @ of_past).view(*shares.shape[:3], -1)           # (B, K, L, 64)
        negative = self.head(negatives, zn, u, running, zn @ before.transpose(1, 2))
        return positive, negative.transpose(1, 2)

    # serving ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def score_catalogue(self, users, history, texts, tables=None, chunk=1024):
        """Logits of the whole catalogue, (B, n_items) fp32, column i = item id i."""
        every = torch.arange(1, self.item.num_embeddings, device=history.device)
        return torch.cat([self(users, history, part.expand(len(users), -1), texts, tables=tables).float()
                          for part in every.split(chunk)], 1)

    @torch.no_grad()
    def rewards(self, logs, texts, users, positions, items, extra):
        """[7] fp32 logits of each event's item: without a new reason (B,), and with each candidate reason (B, G)."""
        device, G = extra.device, extra.shape[1]
        history = logs.histories(users, positions, self.args.max_history).to(device)
        u, i = torch.as_tensor(users, device=device), torch.as_tensor(items, device=device)[:, None] + 1
        return (self(u, history, i, texts)[:, 0].float(),
                self(u, history, i.expand(-1, G), texts, extra=extra).float())


# 4 ------------------------------------------------------------------------------------------ prompts
ALIGN = """A user chose these titles, oldest first:
{history}
Which of these will the user choose next?
{candidates}
Think inside <think></think>, then give one letter inside <answer></answer>."""

PATTERN = """A user chose these titles, oldest first:
{history}
Describe the user's interests in one sentence."""

REASON = """A user chose these titles, oldest first:
{history}
Interests: {pattern}
The user then chose: {item}
Give one reason for this choice in one sentence."""

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def align_prompt(history, candidates):
    return ALIGN.format(history=history_lines(history), candidates=candidate_lines(candidates))


def pattern_prompt(history):
    return PATTERN.format(history=history_lines(history))


def reason_prompt(history, pattern, item):
    return REASON.format(history=history_lines(history), pattern=pattern or "not known yet", item=item)


def align_examples(logs, users, positions, candidates, seed, seen=None):
    """Prompts and target letters: the item at each position, hidden among random items that the user never
    chose (or that are not among the keys seen, see datasets.negatives)."""
    others = datasets.negatives(logs.data, users, candidates - 1, seed, seen)
    slot = np.random.default_rng([seed, 7]).integers(0, candidates, len(users))
    prompts = []
    for b, (u, p) in enumerate(zip(users, positions)):
        shown = np.insert(others[b], slot[b], logs.item_at(u, p))
        prompts.append(align_prompt(logs.history(u, p), [logs.lines[i] for i in shown]))
    return prompts, slot


def rule_rewards(text, n_candidates, target):
    """Format, legal, correct in {0, 1} with correct <= legal <= format ([1] before weighting).

    Format: each of the four tags exactly once, thought before answer, nothing but space outside. Legal: the answer is
    the letter of a candidate. Correct: it is the letter of the target. A thought with a tag in it never scores; titles
    bring none, as prompts show their < and > as ‹ and ›.
    Example: rule_rewards("<think>sea</think>\\n<answer>B</answer>", 5, 1) -> (1, 1, 1)
    """
    shape = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", text, flags=re.DOTALL)
    if shape is None or any(text.count(tag) != 1 for tag in TAGS):
        return 0, 0, 0
    answer = shape[2].strip().upper()
    if len(answer) != 1 or answer not in LETTERS[:n_candidates]:
        return 1, 0, 0
    return 1, 1, int(LETTERS.index(answer) == target)


def clean_text(text, limit=300):
    """The first non-empty line of what the LLM wrote, thoughts, tags and control characters out, bounded; "" if
    none is left."""
    text = re.sub(r"<think>.*?(</think>|\Z)", " ", text, flags=re.DOTALL)
    text = re.sub(r"</?(think|answer)>|<\|[^|<>]*\|>", " ", text)
    text = "".join(ch if ch.isprintable() or ch == "\n" else " " for ch in text)
    lines = [re.sub(r"\s+", " ", line).strip(" -*") for line in text.split("\n")]
    return next((line for line in lines if line), "")[:limit]


# 5 ------------------------------------------------------------------------------------------ losses
def advantages(rewards, scale="group", delta=1e-4):
    """[2]: rewards (B, G) -> (B, G). scale "none" only centres. Groups of equal rewards give exactly 0.

    delta = 1e-4: with rewards from a model, 1e-8 would blow rounding noise up to advantages of 2.
    """
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least 2 completions: the advantage compares them with one another")
    centred = (rewards - rewards.mean(1, keepdim=True)).masked_fill(
        (rewards == rewards[:, :1]).all(1, keepdim=True), 0)
    return centred if scale == "none" else centred / (rewards.std(1, keepdim=True) + delta)


def grpo_loss(logps, old_logps, ref_logps, adv, mask, clip=0.2, beta=1e-3, kl="k3",
              length_norm="grpo", kl_exact=None):
    """[3] and [4]. logps, old_logps, ref_logps, mask (B, G, T), adv (B, G) -> (scalar loss, {name: float}).

    On-policy (logps == old_logps) the clipped part is 0 in value while its gradient is the policy gradient: the loss
    is no measure of progress, the reward is. `k3` differentiates to the forward KL; times ρ it is the reverse KL.
    """
    ratio = torch.exp(logps - old_logps)
    a = adv[..., None]
    policy = -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    if kl == "exact":
        divergence = kl_exact
    else:
        log_ratio = (ref_logps - logps) * mask
        divergence = torch.exp(log_ratio) - log_ratio - 1
        divergence = ratio * divergence if kl == "k3-unbiased" else divergence
    token = (policy + beta * divergence) * mask
    if length_norm == "grpo":     # mean over each completion, then over them
        loss = (token.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    elif length_norm == "dapo":   # every token weighs the same
        loss = token.sum() / mask.sum().clamp(min=1)
    else:                         # dr_grpo: all by the longest of the batch, no length bias
        loss = token.sum() / mask.numel()
    n = mask.sum().clamp(min=1)
    with torch.no_grad():
        inside = ratio[mask.bool()] if mask.any() else ratio.flatten()[:1]
        clipped = ((ratio < 1 - clip) & (a < 0) | (ratio > 1 + clip) & (a > 0)) & mask.bool()
        stats = {"kl": float((divergence * mask).sum() / n), "ratio": float(inside.mean()),
                 "ratio_max": float(inside.max()), "clip_frac": float(clipped.sum() / n)}
    return loss, stats


def recommendation_loss(positive, negative, kind="softmax", log_q=None):
    """Of an interaction against K others: positive (B, L), negative (B, L, K) logits -> (B, L). The paper
    names no loss.

    softmax: -log of the positive's share among the 1 + K, which puts the weight on the negatives that rank high.
    bce: the mean binary cross-entropy of the 1 + K labels.
    log_q = ((B, L), (B, 1, K)): log-probability of each item under the sampler, subtracted from its logit (logQ
    correction, Bengio and Senecal 2003), so that the optimum is the same for every sampler. None: all alike.
    """
    if log_q is not None:
        positive, negative = positive - log_q[0], negative - log_q[1]
    if kind == "bce":
        return (F.softplus(-positive) + F.softplus(negative).sum(-1)) / (1 + negative.shape[-1])
    return torch.logsumexp(torch.cat([positive[..., None], negative], -1), -1) - positive


# 6 ------------------------------------------------------------------------------------------ the LLM
class Policy:
    """The LLM with its adapter, its optimiser and how prompts become tokens. Nothing here is specific to a phase."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        dtype = cuda.pick_dtype(args.dtype, device)
        self.model, self.tokenizer = llm.load(args.backbone, device, dtype)
        # no dropout in RL
        lora.inject(self.model, args.lora_targets, args.lora_rank, args.lora_alpha, 0.0, seed=args.seed)
        self.eos = llm.eos_ids(self.model, self.tokenizer)
        self.align_tokens = llm.suited(args.align_tokens, args.backbone, 64, 256)
        self.text_tokens = llm.suited(args.text_tokens, args.backbone, 40, 96)
        self.start()

    def start(self):
        """A fresh optimiser on the adapter as it is: AdamW without weight decay."""
        self.lr = llm.suited(self.args.lr, self.args.backbone, 2e-3, 1e-5)
        self.optimizer = torch.optim.AdamW(lora.parameters(self.model), lr=self.lr, weight_decay=0.0)

    def tokens(self, prompt):
        return llm.chat(self.tokenizer, prompt, think="<think>" in prompt)          # in no title: they hold no <

    def write(self, prompts, max_tokens, key, sample=False, desc=None):
        """One text per prompt, greedy or sampled at temperature 1; a pure function of weights, prompts, key
        and, where sampled, --llm-batch."""
        order = np.argsort([len(p) for p in prompts], kind="stable")          # like lengths share a batch
        texts = [""] * len(prompts)
        size = self.args.llm_batch
        for start in progress(range(0, len(prompts), size), desc, -(-len(prompts) // size)):
            part = order[start:start + size]
            out = llm.rollout(self.model, [self.tokens(prompts[k]) for k in part], n=1,
                              max_new_tokens=max_tokens, temperature=1.0, greedy=not sample, eos_ids=self.eos,
                              generator=cuda.generator(self.device, self.args.seed, key, start))
            for k, tokens, length in zip(part, out.tokens[:, 0], out.lengths[:, 0]):
                texts[k] = self.tokenizer.decode(tokens[:length], skip_special_tokens=True)
        return texts

    def sample(self, prompts, max_tokens, key):
        """A group of G completions per prompt: (prompt tokens, Rollout, texts as B lists of G)."""
        tokens = [self.tokens(p) for p in prompts]
        out = llm.rollout(self.model, tokens, n=self.args.group, max_new_tokens=max_tokens,
                          temperature=self.args.temperature, eos_ids=self.eos,
                          generator=cuda.generator(self.device, self.args.seed, *key))
        texts = [[self.tokenizer.decode(o[:n], skip_special_tokens=True) for o, n in zip(group, lengths)]
                 for group, lengths in zip(out.tokens, out.lengths)]
        return tokens, out, texts

    def step(self, tokens, out, rewards, reference=None, lr_scale=1.0):
        """One GRPO step [3] from rewards (B, G). reference: adapter state of the reference policy, None = no adapter.

        Returns the logged statistics. Rollouts are used once, so ρ is 1 up to rounding unless the caller repeats.
        """
        args = self.args
        rewards = rewards.to(self.device, torch.float32)
        adv = advantages(rewards, args.advantage_scale)
        mixed = rewards.amax(1) > rewards.amin(1)                     # (B,) groups that carry a signal
        stats = {"reward": float(rewards.mean()), "reward_std": float(rewards.std(1).mean()),
                 "frac_zero_std": float((~mixed).float().mean()),
                 "length": float(out.lengths.float().mean()),
                 "truncated_frac": float(out.truncated.float().mean())}
        if args.zero_std == "drop" and mixed.any():                   # with no signal at all only the KL acts
            tokens = [t for t, keep in zip(tokens, mixed.tolist()) if keep]
            out, adv = out.select(mixed), adv[mixed]
        mask = (torch.arange(out.tokens.shape[2], device=self.device)
                < out.lengths.to(self.device)[..., None]).float()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_scale
        self.optimizer.zero_grad(set_to_none=True)
        size, loss, extra = args.micro_batch or (4 if self.device.type == "cuda" else len(tokens)), 0.0, {}
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            packed = llm.pack(tokens[part], out.tokens[part], out.lengths[part]).to(self.device)
            swapped = lora.disabled(self.model) if reference is None else lora.swapped(self.model, reference)
            with torch.no_grad(), swapped:
                ref = llm.completion_logps(self.model, packed, args.temperature, hidden=args.kl == "exact")
            new = llm.completion_logps(self.model, packed, args.temperature, hidden=args.kl == "exact")
            exact = (llm.exact_kl(self.model, packed, new.hidden, ref.hidden, args.temperature)
                     if args.kl == "exact" else None)
            some, found = grpo_loss(new.logps, out.logps[part].to(self.device), ref.logps, adv[part],
                                    mask[part], args.clip, args.beta, args.kl, args.length_norm, exact)
            found["entropy"] = float((new.entropy * mask[part]).sum() / mask[part].sum().clamp(min=1))
            of_tokens = float(mask[part].sum() / mask.sum().clamp(min=1))
            # the parts add up to the whole
            some = some * (of_tokens if args.length_norm == "dapo" else len(adv[part]) / len(adv))
            some.backward()
            loss += some.item()
            for key, value in found.items():
                extra[key] = (max(value, extra.get(key, 0.0)) if key == "ratio_max"
                              else extra.get(key, 0.0) + of_tokens * value)
        cuda.average_gradients(lora.parameters(self.model))
        norm = nn.utils.clip_grad_norm_(lora.parameters(self.model), args.max_grad_norm)
        self.optimizer.step()
        return stats | extra | {"loss": loss, "grad_norm": float(norm)}


# 7 ------------------------------------------------------------------------------------------ evaluation, and phases 1 to 4
@torch.no_grad()
def rank_all(args, model, logs, texts, which, limit=None):
    """Full ranking of the held-out item among all items the user has not had before. which: "valid" or "test"."""
    model.eval()
    device = next(model.parameters()).device
    users = logs.held_out if limit is None else logs.held_out[::-(-len(logs.held_out) // limit)]
    target = logs.n_train[users] + (which == "test")             # position of the target
    tables = model.tables(texts) if args.features != "ids" else None
    ranks, started = [], time.perf_counter()
    for part in np.array_split(np.arange(len(users)), max(1, len(users) // 32)):
        u, p = users[part], target[part]
        history = logs.histories(u, p, args.max_history).to(device)
        scores = model.score_catalogue(torch.as_tensor(u, device=device), history,
                                       texts, tables).cpu().numpy()
        if np.isnan(scores).any():
            raise UserError("training has diverged: scores of the reward model are no numbers; lower --rm-lr")
        ranks.append(metrics.ranks_of(scores, logs.item_at(u, p), logs.had(u, p)))
    report = metrics.ranking_report(np.concatenate(ranks))
    return report | {"ms_per_user": round(1000 * (time.perf_counter() - started) / len(users), 3)}


# phase 1 ----------------------------------------------------------------------------------------------------
def evaluate_alignment(policy, prompts, targets, desc):
    """Greedy answers to held-out prompts -> {"format", "legal", "correct"}: rates."""
    texts = policy.write(prompts, policy.align_tokens, "judge", desc=desc)
    rates = np.mean([rule_rewards(t, policy.args.candidates, k) for t, k in zip(texts, targets)], axis=0)
    return dict(zip(("format", "legal", "correct"), (round(float(r), 4) for r in rates)))


def align(args, run, policy, logs):
    """Phase 1. Leaves the adapter that did best on validation users in the model; returns the held-out rates.

    Under torchrun every process samples and learns from its share of a step's prompts; process 0 judges and
    saves, and goes on alone with what follows.
    """
    rank, world = cuda.join(policy.device)

    def held_out(offset):
        users = np.random.default_rng([args.seed, 3]).permutation(logs.held_out)[:args.eval_prompts]
        return align_examples(logs, users, logs.n_train[users] + offset,
                              args.candidates, args.seed + 11 * offset)
    saved = run.begin("align")
    if saved is None:
        step, best = 0, -1.0
        best_adapter = lora.state(policy.model)
    else:
        tensors, state = saved
        step, best = state["step"], state["best"]
        best_adapter = strip(tensors, "best/")
        lora.load_state(policy.model, strip(tensors, "now/"))
        run.load_optimizer(policy.optimizer, tensors)
    valid = held_out(0)
    users, positions = logs.train_events()
    users, positions = users[positions > 0], positions[positions > 0]
    seen = logs.train_keys()
    for step in progress(range(step, args.align_steps), "align", args.align_steps, initial=step):
        rng = np.random.default_rng([args.seed, 5, step])
        pick = rng.integers(0, len(users), args.align_prompts)
        draw = cuda.key_seed(args.seed, "candidates", step) % 2**31
        prompts, targets = align_examples(logs, users[pick], positions[pick], args.candidates, draw, seen)
        prompts, targets = prompts[rank::world], targets[rank::world]
        tokens, out, texts = policy.sample(prompts, policy.align_tokens, ("align", step, rank))
        rules = torch.tensor([[rule_rewards(t, args.candidates, k) for t in group]
                              for group, k in zip(texts, targets)], dtype=torch.float32)   # (B, G, 3)
        stats = policy.step(tokens, out, rules @ torch.tensor(args.weights),
                            lr_scale=min((step + 1) / 10, 1 - step / args.align_steps))
        stats |= dict(zip(("format", "legal", "correct"), rules.mean((0, 1)).tolist()))
        stats["invalid_frac"] = 1 - stats["legal"]
        if rank > 0:
            continue
        run.log("align", step + 1, args.align_steps, **stats)
        if step == 0 and not stats["legal"]:
            print("warning: no answer of the first step names a candidate: GRPO has nothing to learn from; raise "
                  "--align-tokens where truncated_frac is high, or take an instruction-tuned --backbone", flush=True)
        if (step + 1) % 40 == 0 or step + 1 == args.align_steps:
            rates = evaluate_alignment(policy, *valid, desc="align: validation")
            run.log("align-valid", step + 1, args.align_steps, **rates)
            if rates["correct"] >= best:
                best, best_adapter = rates["correct"], lora.state(policy.model)
        if (step + 1) % 10 == 0 or step + 1 == args.align_steps:
            run.save("align", prefix("now/", lora.state(policy.model)) | prefix("best/", best_adapter)
                     | run.optimizer_tensors(policy.optimizer), {"step": step + 1, "best": best})
    cuda.part()                                            # the others need not wait for the judging
    if rank > 0:
        return None
    test = held_out(1)
    with lora.disabled(policy.model):
        before = evaluate_alignment(policy, *test, desc="align: test, before")
    lora.load_state(policy.model, best_adapter)
    after = evaluate_alignment(policy, *test, desc="align: test, after")
    run.save("aligned", best_adapter, {})
    lora.save(policy.model, run.folder / "adapter", args.backbone)
    return {"before": before, "after": after, "chance": round(1 / args.candidates, 4)}


# phase 2 ----------------------------------------------------------------------------------------------------
class Texts:
    """Patterns and reasons with their vectors: what the LLM wrote, and what the reward model reads.

    pattern[u]: str. reason[i]: list of {"author": uid, "text": str, "by": phase}, oldest first, bounded by `most`.
    vectors: patterns (U, K), reasons (I, M, K), author (I, M) int64 (-1 = empty slot), all on the device, fp32.
    They are the encoder's (.., Dt), whitened: an LLM's sentence vectors share a large common part and differ in few
    directions. mean (2, Dt), basis (Dt, K): fitted once, on what phase 2 wrote.
    """

    def __init__(self, n_users, n_items, most, dim, device):
        self.mean, self.basis = torch.zeros(2, dim, device=device), torch.eye(dim, device=device)
        self.pattern, self.reason = [""] * n_users, [[] for _ in range(n_items)]
        self.patterns = torch.zeros(n_users, dim, device=device)
        self.reasons = torch.zeros(n_items, most, dim, device=device)
        self.author = torch.full((n_items, most), -1, dtype=torch.long, device=device)

    def fit(self, patterns, reasons):
        """Means of both kinds, and their common principal directions scaled to unit variance (over K: unit
        length)."""
        K = self.reasons.shape[2]
        self.mean = torch.stack([patterns.mean(0), reasons.mean(0) if len(reasons) else patterns.mean(0)])
        centred = torch.cat([patterns - self.mean[0], reasons - self.mean[1]]).cpu().double()
        size, direction = torch.linalg.eigh(centred.T @ centred / len(centred))               # ascending
        size, direction = size.flip(0)[:K], direction.flip(1)[:, :K]
        basis = direction / (size.clamp(min=0) + 1e-3 * size[0] + 1e-12).sqrt() / math.sqrt(K)
        self.basis = F.pad(basis, (0, K - basis.shape[1])).float().to(patterns.device)

    def whiten(self, vectors, kind):
        """Encoder's vectors (.., Dt) of patterns (kind 0) or reasons (kind 1) -> (.., K)."""
        return (vectors - self.mean[kind]) @ self.basis

    def put_pattern(self, u, text, vector):
        self.pattern[u], self.patterns[u] = text, vector

    def put_reason(self, i, author, text, vector, by):
        """R_i <- (R_i - {this author's}) + {the new one}, in its place; of a full list the first goes."""
        entries = self.reason[i]
        slot = next((k for k, entry in enumerate(entries) if entry["author"] == author), len(entries))
        if slot == self.reasons.shape[1]:
            entries.pop(0)
            self.reasons[i] = self.reasons[i].roll(-1, 0)
            self.author[i] = self.author[i].roll(-1, 0)
            slot -= 1
        entries[slot:slot + 1] = [{"author": int(author), "text": text, "by": by}]
        self.reasons[i, slot], self.author[i, slot] = vector, int(author)

    def deal_out(self, rng):
        """Ablation: every list of reasons goes to another item."""
        order = rng.permutation(len(self.reason))
        index = torch.as_tensor(order, device=self.author.device)
        self.reason = [self.reason[k] for k in order]
        self.reasons, self.author = self.reasons[index], self.author[index]

    def tensors(self):
        return {name: getattr(self, name) for name in ("patterns", "reasons", "author", "mean", "basis")}

    def state(self):
        return {"pattern": self.pattern, "reason": self.reason}

    def restore(self, tensors, state):
        for name in self.tensors():
            setattr(self, name, tensors[name].to(self.author.device))
        self.pattern, self.reason = list(state["pattern"]), [list(r) for r in state["reason"]]
        return self

    def rows(self, data):
        """JSON lines for people: one per user, one per item."""
        return ([{"user": data.users[u], "pattern": p} for u, p in enumerate(self.pattern)]
                + [{"item": data.items[i], "title": data.titles[i],
                    "reasons": [entry | {"author": data.users[entry["author"]]} for entry in r]}
                   for i, r in enumerate(self.reason)])

    def check_no_leak(self, logs):
        """Every reason must come from a training interaction; a held-out one would tell the answer."""
        train = {(int(u), int(logs.item_at(u, p))) for u, p in zip(*logs.train_events())}
        for i, entries in enumerate(self.reason):
            for entry in entries:
                if (entry["author"], i) not in train:
                    raise UserError(f"leak: the reason {entry['text']!r} of item {logs.data.items[i]} "
                                    f"was written from user {logs.data.users[entry['author']]}'s "
                                    "held-out interaction")


def write_texts(args, run, policy, logs):
    """Phase 2: a pattern per user from the training history, reasons per item from some of its training users."""
    data = logs.data
    users, positions = logs.train_events()
    items = logs.item_at(users, positions)
    rng = np.random.default_rng([args.seed, 13])
    chosen, n_chosen = [], np.zeros(len(data.items), dtype=int)
    for e in rng.permutation(len(users)):                        # at most --reasons interactions of each item
        if n_chosen[items[e]] < args.reasons:
            n_chosen[items[e]] += 1
            chosen.append(e)
    chosen = np.sort(chosen)                                     # in time order again
    if args.texts == "data":
        patterns = ["; ".join(logs.history(u, logs.n_train[u])) for u in range(len(data.users))]
        reasons = [logs.lines[items[e]] for e in chosen]
    else:
        patterns = policy.write([pattern_prompt(logs.history(u, logs.n_train[u]))
                                 for u in range(len(data.users))],
                                policy.text_tokens, "pattern", desc="patterns")
        patterns = [clean_text(t) for t in patterns]
        reasons = policy.write([reason_prompt(logs.history(users[e], positions[e]), patterns[users[e]],
                                              logs.lines[items[e]]) for e in chosen],
                               policy.text_tokens, "reason", sample=True, desc="reasons")
        reasons = [clean_text(t) for t in reasons]
    vectors = llm.encode(policy.model, policy.tokenizer, patterns + reasons, args.llm_batch)
    texts = Texts(len(data.users), len(data.items), args.max_reasons, args.text_dim, policy.device)
    texts.fit(vectors[:len(patterns)], vectors[len(patterns):])
    for u, text in enumerate(patterns):
        texts.put_pattern(u, text, texts.whiten(vectors[u], 0))
    for e, text, vector in zip(chosen, reasons, vectors[len(patterns):]):
        if text:
            texts.put_reason(items[e], users[e], text, texts.whiten(vector, 1), "write")
    texts.check_no_leak(logs)
    run.save("texts", texts.tensors(), texts.state())
    run.write_jsonl("texts", texts.rows(data))
    return text_report(texts, logs)


def text_report(texts, logs):
    """Is the writing sound? distinct-2, mean words, and the share of named attributes that the item does not
    have, in the reasons of each phase."""
    words = lambda text: re.findall(r"[\w'-]+", text.lower())
    names = [{" ".join(words(a)) for a in row} for row in logs.data.categories]
    vocabulary = set().union(*names) - {""}
    sizes = {len(a.split()) for a in vocabulary}                # a name may be several words
    named, wrong = {"write": 0, "correct": 0}, {"write": 0, "correct": 0}
    for own, entries in zip(names, texts.reason):
        for entry in entries:
            w = words(entry["text"])
            said = {" ".join(w[k:k + n]) for n in sizes for k in range(len(w))} & vocabulary
            named[entry["by"]] += len(said)
            wrong[entry["by"]] += len(said - own)
    return {"reasons": sum(map(len, texts.reason)), "empty_items": sum(not r for r in texts.reason),
            **diversity([entry["text"] for r in texts.reason for entry in r]),
            **{name: round(wrong[by] / named[by], 4)
               for name, by in (("hallucinated", "write"), ("hallucinated_corrected", "correct"))
               if named[by]}}


def diversity(texts):
    words = [t.lower().split() for t in texts]
    pairs = [pair for w in words for pair in zip(w, w[1:])]
    return {"distinct_2": round(len(set(pairs)) / max(len(pairs), 1), 4),
            "words": round(float(np.mean([len(w) for w in words])), 2) if words else 0.0}


# phase 3 ----------------------------------------------------------------------------------------------------
def train_reward_model(args, run, logs, texts, device, name="reward"):
    """Phase 3: every training interaction against --negatives items that the user did not have in training
    (--rm-loss).

    The epoch that does best on validation users is kept, as "best/" of the checkpoint. Returns what it reached.
    """
    torch.manual_seed(args.seed)
    model = RewardModel(args, logs, texts.patterns.shape[1]).to(device)
    model.set_priors(texts, logs)
    decay = [p for n, p in model.named_parameters() if p.ndim > 1 and "bias" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim == 1 or "bias" in n]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": args.weight_decay},
                                   {"params": rest, "weight_decay": 0.0}], lr=args.rm_lr)
    L = args.max_history
    weights, seen = (logs.item_counts() + 1.0) ** args.negative_power, logs.train_keys()
    log_q = torch.as_tensor(np.log(weights / weights.mean()), dtype=torch.float32, device=device)
    saved, first, best, best_epoch = run.begin(name), 0, -1.0, 0
    best_model = {k: v.clone() for k, v in model.state_dict().items()}
    if saved is not None:
        tensors, state = saved
        first, best, best_epoch = state["epoch"], state["best"], state["best_epoch"]
        model.load_state_dict(strip(tensors, "now/"))
        best_model = strip(tensors, "best/")
        run.load_optimizer(optimizer, tensors)
    for epoch in range(first, args.rm_epochs):
        model.train()
        # windows of L targets of a user's training sequence, cut elsewhere in each epoch
        batches = logs.windows(L, args.rm_batch, np.random.default_rng([args.seed, 19, epoch]))
        total, count = {"loss": 0.0, "grad_norm": 0.0}, len(batches)
        for s, (u, start, end) in enumerate(progress(batches, f"reward model, epoch {epoch + 1}", count)):
            torch.manual_seed(cuda.key_seed(args.seed, "rm", epoch, s) % 2**31)       # dropout, on resume too
            sequence = logs.histories(u, end, int((end - start).max()), start).to(device)
            others = datasets.negatives(logs.data, u, args.negatives,
                                        cuda.key_seed(args.seed, "neg", epoch, s) % 2**31,
                                        seen, weights if args.negative_power else None)
            others = torch.as_tensor(others, device=device).long()
            # 100 steps up, then down to 2 %
            lr = args.rm_lr * min((epoch * count + s + 1) / 100, 1.02 - (epoch + s / count) / args.rm_epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            positive, negative = model.forward_all_times(torch.as_tensor(u, device=device), sequence,
                                                         others + 1, texts)
            real = (sequence > 0).float()
            drawn_by = (log_q[(sequence - 1).clamp(min=0)], log_q[others][:, None])
            loss = (recommendation_loss(positive, negative, args.rm_loss, drawn_by) * real).sum() / real.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total["loss"] += loss.item() / count
            total["grad_norm"] += float(norm) / count
        report = rank_all(args, model, logs, texts, "valid", limit=args.rm_valid_users)
        score = report["ndcg@10"]
        if score > best:
            best, best_epoch = score, epoch + 1
            best_model = {k: v.clone() for k, v in model.state_dict().items()}
        run.log(name, epoch + 1, args.rm_epochs, **total,
                valid_ndcg10=score, valid_recall10=report["recall@10"])
        run.save(name, prefix("now/", model.state_dict()) | prefix("best/", best_model)
                 | run.optimizer_tensors(optimizer),
                 {"epoch": epoch + 1, "best": best, "best_epoch": best_epoch})
    return {"best_epoch": best_epoch, "valid_ndcg@10": round(best, 4)}


def fit_or_load(args, run, logs, texts, device, name="reward"):
    """Phase 3, or what it left in the run folder: the reward model."""
    if not run.done(name):
        run.finish(name, train_reward_model(args, run, logs, texts, device, name))
    model = RewardModel(args, logs, texts.patterns.shape[1]).to(device)
    model.load_state_dict(strip(run.load(name)[0], "best/"))
    return model.eval()


# phase 4 ----------------------------------------------------------------------------------------------------
def schedule(users, items, size):
    """Batches of event numbers, at most `size` each, in which no user and no item occurs twice.

    Every event stands in a later batch than all earlier events of its user and of its item, so it meets exactly the
    pattern and the item's reasons that it would meet if the events were taken one by one (with --history-text and
    --features text the reasons of past items may be older, or newer).
    Example: schedule([0, 1, 0], [5, 6, 7], 2) -> [[0, 1], [2]]
    """
    batches, last_user, last_item, first_open = [], {}, {}, 0
    for e, (u, i) in enumerate(zip(users, items)):
        b = max(last_user.get(u, -1) + 1, last_item.get(i, -1) + 1, first_open)
        while b < len(batches) and len(batches[b]) >= size:
            b += 1
        if b == len(batches):
            batches.append([])
        batches[b].append(e)
        last_user[u] = last_item[i] = b
        while first_open < len(batches) and len(batches[first_open]) >= size:
            first_open += 1
    return batches


def correct(args, run, policy, logs, reward_model, texts):
    """Phase 4 [7]: write a group of reasons per interaction, score, one GRPO step, rewrite pattern and reason.

    The reward model is frozen. So are the text encoder and the KL reference: both are the LLM as phase 1 left it.
    """
    aligned = {k: v.clone() for k, v in lora.state(policy.model).items()}
    users, positions = (x[-args.correct_events:] for x in logs.train_events())
    if args.shuffled_order:
        order = np.random.default_rng([args.seed, 17]).permutation(len(users))
        users, positions = users[order], positions[order]
    items = logs.item_at(users, positions)
    batches = schedule(users.tolist(), items.tolist(), args.correct_batch)
    policy.start()
    saved, first = run.begin("correct"), 0
    if saved is not None:
        tensors, state = saved
        first = state["batch"]
        lora.load_state(policy.model, strip(tensors, "now/"))
        run.load_optimizer(policy.optimizer, tensors)
        texts.restore(strip(tensors, "texts/"), state)

    def encode(written):
        with lora.swapped(policy.model, aligned):
            return llm.encode(policy.model, policy.tokenizer, written, args.llm_batch)

    for b in progress(range(first, len(batches)), "correct", len(batches), initial=first):
        events = batches[b]
        u, p, i = users[events], positions[events], items[events]
        prompts = [reason_prompt(logs.history(x, y), texts.pattern[x], logs.lines[k])
                   for x, y, k in zip(u, p, i)]
        tokens, out, groups = policy.sample(prompts, policy.text_tokens, ("correct", b))
        groups = [[clean_text(t) for t in group] for group in groups]
        flat = texts.whiten(encode([t for group in groups for t in group]), 1).view(
            len(u), args.group, -1)                                             # (B, G, K)
        before, scores = reward_model.rewards(logs, texts, u, p, i, flat)       # (B,), (B, G) fp32 logits
        broken = torch.tensor([[not t for t in group] for group in groups], device=scores.device)
        rewards = torch.where(broken | out.truncated.to(scores.device), before[:, None] - 1.0, scores)
        # Adam's steps do not shrink with the batch
        stats = policy.step(tokens, out, rewards, reference=aligned,
                            lr_scale=args.correct_lr_scale * len(u) / args.correct_batch)
        if not args.update:  # the best reason of the group stays, nothing is rewritten
            for k, best in enumerate(rewards.argmax(1).tolist()):
                if groups[k][best]:
                    texts.put_reason(i[k], u[k], groups[k][best], flat[k, best], "correct")
        else:
            written = policy.write([pattern_prompt(logs.history(x, y + 1)) for x, y in zip(u, p)] + prompts,
                                   policy.text_tokens, "update")
            written = [clean_text(t) for t in written]
            vectors = encode(written)
            for k in range(len(u)):
                if written[k]:
                    texts.put_pattern(u[k], written[k], texts.whiten(vectors[k], 0))
                if written[len(u) + k]:
                    texts.put_reason(i[k], u[k], written[len(u) + k],
                                     texts.whiten(vectors[len(u) + k], 1), "correct")
        run.log("correct", b + 1, len(batches), **stats, invalid_frac=float(broken.float().mean()),
                gain=float((scores - before[:, None]).mean()),
                **diversity([t for group in groups for t in group]))
        if (b + 1) % 10 == 0 or b + 1 == len(batches):
            run.save("correct", prefix("now/", lora.state(policy.model)) | prefix("texts/", texts.tensors())
                     | run.optimizer_tensors(policy.optimizer), {"batch": b + 1} | texts.state())
    texts.check_no_leak(logs)
    lora.save(policy.model, run.folder / "adapter-corrected", args.backbone)
    run.write_jsonl("texts-corrected", texts.rows(logs.data))
    return text_report(texts, logs) | {"events": len(users), "batches": len(batches)}


# 8 ------------------------------------------------------------------------------------------ train
def prepare(args):
    """Load, filter, and lay out the interactions."""
    data = datasets.min_rating(datasets.load(args.data, args.data_dir, args.max_bad_rows, args.seed),
                               args.min_rating)
    lowest = args.min_interactions if args.min_interactions is not None else (30 if data.world is None else 1)
    if (most := np.bincount(data.user).max()) < lowest:
        raise UserError(f"--data {args.data}: no user has {lowest} interactions, the most is {most}; "
                        "lower --min-interactions")
    data = datasets.min_interactions(data, lowest)
    if args.users:
        data = datasets.sample_users(data, args.users, args.seed)
    logs = Logs(data, args.prompt_history)
    logs.targets(args.data)                                     # or one line on what is missing
    if args.categories and not any(data.categories):
        raise UserError(f"--categories: no item of --data {args.data} has any; leave it out "
                        "(of --variants, too)")
    unseen = int(len(data.items) - np.diff(logs.bounds).max())
    if unseen < max(args.negatives, args.candidates - 1):
        raise UserError(f"--data {args.data}: a user has had all but {unseen} of {len(data.items)} items, "
                        f"and --negatives {args.negatives} and --candidates {args.candidates} take more; "
                        "lower them, or bring a larger catalogue")
    return logs


def train(args, shared=(None, (), ())):
    """All phases in one run; each is skipped when the run folder says that it is done. Returns the RESULT record.

    shared: a run folder, the phases that are the same there and taken over, and their files.
    """
    if args.recommend is not None:
        return recommend(args)
    if args.ablations:
        cuda.alone("--ablations")
        return ablations(args)
    cuda.seed_everything(args.seed)
    device = cuda.pick_device(args.device)
    logs = prepare(args)
    rank, world = cuda.join(device)
    if args.align_prompts % world:
        raise UserError(f"--align-prompts {args.align_prompts} cannot be shared by {world} processes; "
                        "use a multiple")
    run = Run(args, "curec", logs.data.fingerprint, free=("micro_batch", "top"), rank=rank)
    if run.done("result"):
        return {} if rank > 0 else run.result(run.done("result"))
    words = args.features != "ids"
    policy = Policy(args, device) if words else None
    trainable = sum(p.numel() for p in lora.parameters(policy.model)) if words else 0
    run.header(words, device=str(device) + (f" x {world}" if world > 1 else ""),
               data=f"{logs.data.name} ({logs.data.fingerprint}): {len(logs.data.users):,} users, "
                    f"{len(logs.data.items):,} items, {len(logs.items):,} interactions, "
                    f"{logs.n_train.sum():,} of them training",
               backbone=f"{args.backbone}: {sum(p.numel() for p in policy.model.parameters()):,} parameters, "
                        f"{trainable:,} trainable" if words else "none (--features ids)",
               **{"grpo": f"{args.align_steps} steps of {args.align_prompts} prompts x {args.group} completions"}
               if words and args.align else {})
    source, phases, files = shared
    for phase in phases:
        if not run.done(phase):
            run.inherit(source, phase, files)
    result = {"script": "curec", "data": logs.data.name, "backbone": args.backbone, "seed": args.seed,
              "features": args.features, "users": len(logs.held_out), "items": len(logs.data.items)}
    texts = Texts(len(logs.data.users), len(logs.data.items), args.max_reasons, args.text_dim, device)
    if words and args.align and not run.done("align"):
        rates = align(args, run, policy, logs)
        if rank == 0:
            run.finish("align", rates)
    cuda.part()
    if rank > 0:
        return {}
    if words:
        if args.align:
            result["align"] = run.done("align")
            lora.load_state(policy.model, run.load("aligned")[0])
        if not run.done("write"):
            run.finish("write", write_texts(args, run, policy, logs))
        result["texts"] = run.done("write")
        texts = restore_texts(args, logs, device, *run.load("texts"))
        if args.random_reasons:
            texts.deal_out(np.random.default_rng([args.seed, 29]))
    model = fit_or_load(args, run, logs, texts, device)
    if words and args.correct:
        if not run.done("correct"):
            run.finish("correct", correct(args, run, policy, logs, model, texts))
        result["correct"] = run.done("correct")
        tensors, state = run.load("correct")
        texts = restore_texts(args, logs, device, strip(tensors, "texts/"), state)
        if args.refit:
            model = fit_or_load(args, run, logs, texts, device, "refit")
            result["refit"] = run.done("refit")
    run.save("served", model.state_dict() | prefix("texts/", texts.tensors()), texts.state())
    valid, test = (rank_all(args, model, logs, texts, which) for which in ("valid", "test"))
    run.begin("serve")
    run.log("serve", 1, 1, ms_per_user=test.pop("ms_per_user"))
    valid.pop("ms_per_user")
    result |= {"valid": valid, "test": test, "popularity": popularity(logs)}
    if words:
        result["attention_entropy"] = attention_entropy(model, logs, texts)
    # the world knows its own choices, all of them
    if logs.data.world is not None and not args.min_rating:
        result["bayes_optimal"] = bayes(logs)
    run.write_jsonl("examples", [explain(args, model, logs, texts, u, 3)
                                 for u in logs.held_out[:20].tolist()])
    run.finish("result", result)
    show(result)
    return run.result(result)


def restore_texts(args, logs, device, tensors, state):
    texts = Texts(len(logs.data.users), len(logs.data.items), args.max_reasons, args.text_dim, device)
    return texts.restore(tensors, state)


@torch.no_grad()
def attention_entropy(model, logs, texts):
    """Is the attention on reasons peaked (0) or flat (1)? Entropy / log(number of keys) over test pairs, mean
    and 10 % and 90 % quantiles; "no reason" counts as a key."""
    device = next(model.parameters()).device
    users = torch.as_tensor(logs.held_out, device=device)
    items = torch.as_tensor(logs.item_at(logs.held_out, logs.n_train[logs.held_out] + 1).astype(np.int64),
                            device=device)[:, None]
    w = model.match(users, items + 1, texts, return_weights=True)[:, 0].mean(1)                # (B, 1 + M)
    n = (w > 0).sum(1)
    entropy = (-(w.clamp(min=1e-12).log() * w).sum(1) / n.clamp(min=2).float().log())[n > 1]
    if len(entropy) == 0:
        return {}
    q = torch.quantile(entropy, torch.tensor([0.1, 0.9], device=device)).tolist()
    return {"mean": round(float(entropy.mean()), 4), "q10": round(q[0], 4), "q90": round(q[1], 4)}


def show(result):
    """Print the test figures beside their baselines."""
    rows = [("popularity", result["popularity"]), (f"CURec ({result['features']})", result["test"])]
    if "bayes_optimal" in result:
        rows.append(("Bayes-optimal (the toy world's truth)", result["bayes_optimal"]))
    print(f"\nnext item of {result['users']} users, full ranking of {result['items']} items, test")
    print(f"{'':38} {'Recall@10':>10} {'NDCG@10':>9}   95 % interval")
    for name, report in rows:
        low, high = report["ndcg@10_ci"]
        print(f"{name:38} {report['recall@10']:10.4f} {report['ndcg@10']:9.4f}   {low:.4f} .. {high:.4f}")
    if "align" in result:
        a = result["align"]
        print(f"alignment: correct answers among {round(1 / a['chance'])} candidates "
              f"{a['before']['correct']:.3f} -> {a['after']['correct']:.3f} (chance {a['chance']:.3f}), "
              f"legal answers {a['before']['legal']:.3f} -> {a['after']['legal']:.3f}")


# 9 ------------------------------------------------------------------------------------------ use and compare
def recommend(args):
    """What one user is shown, from a finished run: titles with the pattern, the reasons and how they were weighed."""
    if not is_run(args.run) or not (Path(args.run) / "served.safetensors").exists():
        raise UserError(f"--run {args.run}: no finished run there; train one first")
    earlier = json.loads((Path(args.run) / "args.json").read_text())
    names = {f.name for f in dataclasses.fields(Args)}
    old = Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in earlier.items() if k in names})
    moved = args.data if args.data != Args.data else old.data
    old = dataclasses.replace(old, data=moved, data_dir=args.data_dir or old.data_dir)
    logs, device = prepare(old), cuda.pick_device(args.device)
    if args.recommend not in logs.data.users:
        raise UserError(f"--recommend {args.recommend}: no such user; "
                        f"for example {', '.join(logs.data.users[:5])}")
    u = logs.data.users.index(args.recommend)
    if logs.data.fingerprint != earlier["data_fingerprint"]:
        raise UserError(f"--run {args.run}: was trained on other data than --data {old.data} holds now")
    tensors, state = read_checkpoint(Path(args.run) / "served.safetensors")
    texts = restore_texts(old, logs, device, strip(tensors, "texts/"), state)
    model = RewardModel(old, logs, texts.patterns.shape[1]).to(device).eval()
    model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("texts/")})
    found = explain(old, model, logs, texts, u, args.top)
    print(f"user {found['user']}, {len(logs.sequence(u))} choices, the last: " + "; ".join(found["history"]))
    print(f"pattern: {found['pattern'] or '(none)'}\n")
    for rank, item in enumerate(found["top"], 1):
        print(f"{rank:2d}. {item['title']}   score {item['score']:.2f}")
        for reason in item["reasons"]:
            print(f"      {reason['weight']:4.0%}  {reason['text']}")
        if item["no_reason"] is not None:
            print(f"      {item['no_reason']:4.0%}  (no reason)")
    return {}


@torch.no_grad()
def explain(args, model, logs, texts, u, top):
    """What user number u is shown, as a record: last choices, pattern, the best items with their reasons and
    the attention."""
    model.eval()
    device = next(model.parameters()).device
    users, end = torch.tensor([u], device=device), np.array([len(logs.sequence(u))])
    history = logs.histories(np.array([u]), end, args.max_history).to(device)
    scores = model.score_catalogue(users, history, texts)[0]
    scores[torch.as_tensor(logs.sequence(u).astype(np.int64), device=device)] = -torch.inf
    shown = []
    for i in scores.topk(min(top, int(torch.isfinite(scores).sum()))).indices.tolist():
        item = torch.tensor([[i + 1]], device=device)
        w = ([] if args.features == "ids"
             else model.match(users, item, texts, return_weights=True)[0, 0].mean(0).tolist())
        reasons = [{"weight": round(weight, 4), "text": entry["text"]}
                   for entry, weight in sorted(zip(texts.reason[i], w[1:]), key=lambda x: -x[1])]
        shown.append({"title": logs.lines[i], "score": round(float(scores[i]), 4), "reasons": reasons,
                      "no_reason": round(w[0], 4) if w else None})
    return {"user": logs.data.users[u], "history": logs.history(u, end[0])[-5:],
            "pattern": texts.pattern[u], "top": shown}


ALIGNED = ("aligned.safetensors", "align.safetensors")
WRITTEN = (*ALIGNED, "texts.safetensors", "texts.jsonl")
FITTED = (*WRITTEN, "reward.safetensors")
CORRECTED = (*FITTED, "correct.safetensors", "texts-corrected.jsonl")
VARIANTS = {   # name: (what changes, phases taken over from "full", their files)
    "full": ({}, (), ()),
    "ids only": ({"features": "ids"}, (), ()),
    "categories": ({"features": "ids", "categories": True}, (), ()),
    "data's lines": ({"texts": "data", "correct": False}, ("align",), ALIGNED),
    "random reasons": ({"random_reasons": True, "correct": False}, ("align", "write"), WRITTEN),
    "content only": ({"features": "text", "correct": False}, ("align", "write"), WRITTEN),
    "texts and categories": ({"categories": True, "correct": False}, ("align", "write"), WRITTEN),
    "w/o correction": ({"correct": False}, ("align", "write", "reward"), FITTED),
    "w/o update": ({"update": False}, ("align", "write", "reward"), FITTED),
    "w/o GRPO": ({"correct_lr_scale": 0.0}, ("align", "write", "reward"), FITTED),
    "shuffled order": ({"shuffled_order": True}, ("align", "write", "reward"), FITTED),
    "refit": ({"refit": True}, ("align", "write", "reward", "correct"), CORRECTED),
    "w/o pretraining": ({"align": False}, (), ()),
    "w/o both": ({"align": False, "correct": False}, (), ()),
}


def ablations(args):
    """Every variant and seed, one run folder each, one table at the end. The same command again goes on where it
    stopped."""
    root = folder_of(args, "curec", "ablations")
    table, runs = {}, []
    for seed in args.seeds or (args.seed,):
        for name, (change, phases, files) in VARIANTS.items():
            if args.variants and name not in args.variants:
                continue
            folder = root / f"s{seed}" / re.sub(r"\W+", "-", name)
            print(f"\n=== {name}, seed {seed}", flush=True)
            now, shared = (variant(args, folder, seed=seed, **change),
                           (root / f"s{seed}" / "full", phases, files))
            table.setdefault(name, []).append(train(now, shared))
            runs.append(folder)
    first = next(iter(table.values()))
    columns = {"NDCG@10": lambda r: r["test"]["ndcg@10"], "Recall@10": lambda r: r["test"]["recall@10"],
               "NDCG@20": lambda r: r["test"]["ndcg@20"],
               "attention": lambda r: r["attention_entropy"]["mean"],
               "aligned": lambda r: r["align"]["after"]["correct"],
               "validation": lambda r: r["valid"]["ndcg@10"]}
    print(f"\ntest, mean ± std over {len(first)} seeds; attention: entropy on reasons, 1 = flat; "
          "aligned: right answers of the LLM; validation: NDCG@10")
    table |= {name: [{"test": r[key]} for r in first] for name, key in (("popularity", "popularity"),
              ("Bayes-optimal", "bayes_optimal")) if key in first[0]}
    return write_table(root, args, summarise(table, columns, digits=4), runs)


if __name__ == "__main__":
    main(Args, train, __doc__)
