"""LCFT: fine-tuning that keeps "will like" and "will dislike" apart in logit space (EMNLP 2025, 2025.emnlp-main.1491).

Ask a fine-tuned LLM whether a user will like a film, then whether the user will dislike it: often it says Yes twice.
LCFT, added to a host (TALLRec: text alone; CoLLM: text and collaborative vectors), shows it both questions on
the same context and pushes the two answer distributions apart:

  1 mf        (--host collm) matrix factorisation gives every user and item a vector
  2 lora      a LoRA adapter learns to answer Yes or No, with the divergence of the two answers as a bonus
  3 map       (--host collm) an MLP carries the vectors into the prompt, the adapter stays as it is
  4 judge     AUC, and how often the answers to the opposite questions contradict each other

EQUATIONS (x+ and x- are the prompts with the two questions, P+ and P- the answers' distributions, y the answer)
  [1] host        CE = -log P(y | x+)                                          -> answer_loss
  [2] paper       L = CE - lambda min(KL(P+ || P-), cap)                       -> apart("paper")
  [3] official    L = CE - lambda min(sum_t KL(sg P-_t || P+_t), cap)          -> apart("official"), train_pairs
                  with CE the mean over the whole row of x+
  [4] bounded     L = CE + lambda JSD(P+, P- with Yes and No swapped)          -> apart("swap")
                  L = CE + lambda JSD(sg P+, P- with Yes and No swapped)       -> apart("follow")
                  L = CE - lambda JSD(P+, P-), which is at most ln 2           -> apart("jsd")
                  L = CE - lambda min(z (s+ - s-), cap), z = 1 like, -1 dislike -> apart("hinge")
  [5] control     L = CE + w * -log P(not y | x-)                              -> --neg-ce
  [6] score       s+ = logit(Yes) - logit(No) after x+, s- after x-            -> Host.look

CHECKED BY, in tests/
  [1] test_the_answer_loss_is_pytorchs_cross_entropy
  [2] test_each_divergence_by_hand_and_against_pytorch
  [3] test_the_officials_divergence_is_the_sum_over_positions_from_the_first_difference_aligned_at_the_answer
      test_officials_cross_entropy_is_hugging_faces_loss_on_the_row_and_defaults_are_the_documented_ones
  [4] test_equal_answers_have_a_gradient_under_swap_follow_and_hinge_only
  [5] test_a_step_on_the_flipped_answer_makes_the_opposite_of_the_label_likelier
  [6] test_a_packed_pair_gives_the_answers_of_two_separate_padded_passes

DEVIATIONS AND CHOICES. The paper's text is public in part; its code (TALLRec on films only) differs from it.
  - `--kl paper` follows the formula: KL(P+ || P-) at the answer, gradient through both branches. The formula has no
    bound, and without one the loss has no lower bound; --cap gives it one. A hinge max(0, cap - D) is the same
    up to a constant.
  - `--kl official` follows the code: the reversed KL, P- detached, summed over all positions from the first
    difference on and the whole vocabulary, CE on the whole row of x+, lambda = 1e-4, cap = 10,000 (there on a
    micro-batch, here on a pair). It is computed from log-probabilities: the code's log(softmax) gives NaN
    gradients at gaps that fp32 cannot hold. The rows are aligned from the answer back to where they begin to
    differ; the code compares by index, off by one from where the questions differ in length.
  - Of [3], with one answer position, two words, s the log-odds of the right one and p, n its probability in P+
    and P-: -dL/ds = (1 - p) + lambda (p - n). At p = 1 it still pulls, until the cap; where n > p it pushes the
    right answer down.
  - `--kl bounded` asks for what is meant: P-(Yes) = P+(No). With --bound follow the plain answer learns from
    the labels alone and the flipped one follows it, which is weaker in short training. Pushing P+ and P- apart,
    however bounded, has no gradient where both answers are equal (which is where a contradiction starts), pays
    for over-confidence, and over the whole vocabulary is won by a third word after the flipped question.
    --bound jsd and hinge are there to see that; the hinge works on log-odds, knows the right direction from the
    label, and stops once they are cap apart. All compare Yes and No only, unless --kl-vocab full (jsd).
  - The paper has one λ from the first step. --lam-ramp lets it grow from 0: an LLM that cannot tell likes from
    dislikes yet learns to answer both questions with a half, and needs many steps to leave that. The step with
    the best AUC may come before the divergence had its say: --keep last.
  - The answer is one token, Yes or No. `--template shared` puts context first and question last, so that a pair
    shares its context and runs through the model once; `--template tallrec` is the published order: instruction
    first, and a last line that asks for "like" in both prompts.
  - CoLLM trains the logit of Yes alone, by binary cross-entropy: --ce yes, which then also is the score. By
    default both hosts have [1] and [6]: under --ce yes contradictions are judged by logit(Yes), which the
    divergence of Yes against No need not move; --neg-ce does.
  - CoLLM's mapping is an MLP alone; here its output has the size of a word's embedding. No weight decay
    (CoLLM's: 1e-3).
  - Neither the wording of the flip for CoLLM nor which stage has the KL term is public: --kl-stages, both by default.
  - MovieLens-100K: TALLRec's 10,000 rows are the last of its list of users' sequences (80 users train, 14
    validate, 16 test); ours are as many, the last in time, so that nobody learns from what happens later.
    MovieLens-1M: CoLLM's rows came with a file of its own; ours are all ratings of the same months.
    Amazon-Book: CoLLM takes 2017 alone and likes above 4; ours is 80/10/10 of all years (--like-above 4).

  python lcft.py --data toy --kl bounded                                 # 4 minutes on 2 cores
  python lcft.py --data ml1m --host collm --backbone Qwen/Qwen2.5-1.5B    # on a GPU
  python lcft.py --ablations --seeds 0,1,2 --data ml100k                 # the objectives, lambda by validation
"""

# 1 ------------------------------------------------------------------------------------------ imports
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import cuda, data as datasets, llm, lora, metrics
from common.prompts import history_lines, item_line
from common.run import (Run, UserError, at_least, folder_of, left_to_variants, main, prefix, progress, pyplot,
                        strip, summarise, variant, write_table)


# 2 ------------------------------------------------------------------------------------------ arguments
@dataclass
class Args:
    # -- run
    data: str = "toy"  # toy (or toy:USERSxITEMSxINTERACTIONS), ml1m, ml100k, ml-latest-small, amazon-...,
    # or a folder of your own logs
    data_dir: str | None = None  # a folder that already holds the data sets (else LLMREC_DATA, else download)
    max_bad_rows: int = 0  # broken rows to skip before giving up
    run: str | None = None  # run folder (default: runs/lcft-DATA-BACKBONE-sSEED)
    resume: bool = False  # continue where the run folder stopped
    overwrite: bool = False  # remove an earlier run in that folder first
    seed: int = 0  # of sampling, initialisation and training
    device: str = "auto"  # auto (CUDA if there is one, else CPU), cpu, cuda, mps
    dtype: str = "auto"  # of the frozen backbone: auto (bfloat16 on CUDA, else float32), float32, bfloat16
    ablations: bool = False  # run every objective of VARIANTS and print one table
    # (it sets --kl, --bound, --lam and --neg-ce)
    variants: tuple[str, ...] = ()  # with --ablations: rows of VARIANTS such as off,hinge:0.5,hinge:1
    # (default: all)
    seeds: tuple[int, ...] = ()  # with --ablations: the seeds to average over (default: --seed alone)
    # -- data
    like_above: float | None = None  # a rating above this is a like
    # (default 3; of BookCrossing's ten points 5)
    min_history: int | None = None  # earlier ratings that a row needs (default 1; on ml100k the published 10)
    shots: int = 0  # train on so many rows, half likes, half dislikes
    # (published: 16, 64, 256, drawn at random); 0 is all
    users: int | None = None  # keep a random sample of so many users
    # -- backbone
    backbone: str = "tiny"  # any Hugging Face causal LM by name or folder; tiny is bundled
    prompt_history: int = 10  # rated titles of the user in a prompt
    template: Literal["shared", "tallrec"] = "shared"  # question last (context computed once),
    # or instruction first
    flip: str = "like"  # which pair of questions, a row of FLIPS: like, enjoy
    answers: tuple[str, ...] = ("Yes", "No")  # two words of one token each
    # -- lora
    lora_targets: str = "q_proj,v_proj"  # comma-separated names of linear layers, or all-linear
    lora_rank: int = 8  # rank r of the adapter
    lora_alpha: float = 16.0  # α; the adapter is scaled by α / r
    lora_dropout: float = 0.05  # on the adapter's input
    # -- method
    host: Literal["tallrec", "collm"] = "tallrec"  # text only, or text with matrix-factorisation vectors
    kl: Literal["paper", "official", "bounded", "off"] = "bounded"  # paper | official: the KL as written
    # and as released | bounded: see --bound | off: fine-tuning alone
    bound: Literal["swap", "follow", "jsd", "hinge"] = "swap"  # of --kl bounded: swap: JSD to the
    # swapped answer, made small | follow: the same, gradient to the flipped answer alone |
    # jsd: JSD made large | hinge: log-odds kept apart
    kl_vocab: Literal["full", "answers"] | None = None  # of the divergence: all tokens, or Yes and No
    # (default: answers with bounded)
    lam: float | None = None  # λ (default 1; with --kl paper 0.1, with official the code's 1e-4)
    lam_ramp: float = 0.0  # share of the steps over which λ (and --neg-ce) grows from 0 to its value
    cap: float | None = None  # nats of divergence beyond which more earns nothing
    # (default: paper 10, official 10000, hinge 4; the others have a bound of their own)
    neg_ce: float = 0.0  # weight of eq. 5, the cross-entropy of the flipped answer to the flipped question,
    # in every stage
    ce: Literal["answer", "yes"] = "answer"  # CE of the answer over the vocabulary,
    # or CoLLM's BCE on the logit of Yes alone
    kl_stages: Literal["lora", "map", "both"] = "both"  # with --host collm: which stages have the KL term
    # -- matrix factorisation (with --host collm)
    mf_dim: int = 64  # width of the vectors; the paper's 256 is for larger data
    mf_lr: float = 1e-2  # learning rate
    mf_epochs: int = 100  # most epochs; stops after 5 without a better validation AUC
    map_lr: float = 1e-3  # of the MLP
    # -- optimisation
    lr: float | None = None  # of LoRA (default 1e-4; 2e-3 for tiny)
    batch: int = 64  # pairs per step
    micro_batch: int | None = None  # pairs at once: less memory, same result but for dropout's draws
    # (default: 16 on CUDA, else 64)
    steps: int = 200  # most steps, per stage
    warmup: int = 20  # steps to the full rate, which then falls linearly to 0
    max_grad_norm: float = 1.0  # gradient clipping
    # -- evaluation
    eval_every: int = 20  # steps
    patience: int = 10  # evaluations without a better validation AUC (with --keep best)
    keep: Literal["best", "last"] = "best"  # the step with the best validation AUC,
    # or the last (needed where λ grows)
    eval_rows: int = 1000  # validation rows that choose the checkpoint
    eval_batch: int = 64  # pairs at once

    def check(self):
        if len(self.answers) != 2:
            raise ValueError("--answers takes two words: YES,NO")
        chosen_variants(self.variants)
        left_to_variants(self, {name: ({**change, flag: None},) for name, (change, flag, _) in VARIANTS.items()})
        if self.flip not in FLIPS:
            raise ValueError(f"--flip {self.flip}: one of {', '.join(FLIPS)}")
        if self.shots % 2:
            raise ValueError("--shots must be even: half likes, half dislikes")
        at_least(self, 1, "batch micro_batch steps eval_every patience eval_rows eval_batch lora_rank "
                          "mf_dim mf_epochs")
        at_least(self, 0, "prompt_history min_history shots warmup lora_alpha lam neg_ce")
        if not 0 <= self.lam_ramp <= 1:
            raise ValueError("--lam-ramp must be in [0, 1]")
        if not all(x is None or x > 0
                   for x in (self.cap, self.lr, self.mf_lr, self.map_lr, self.max_grad_norm)):
            raise ValueError("--cap, --lr, --mf-lr, --map-lr and --max-grad-norm must be positive")
        runs = ([VARIANTS[name][0] for name in chosen_variants(self.variants)] if self.ablations else
                [{"kl": self.kl, "bound": self.bound}])
        kinds = {run["bound"] if run["kl"] == "bounded" else run["kl"] for run in runs}
        if "official" in kinds and (self.host == "collm" or self.ce == "yes"):
            raise ValueError("official is the released code's loss: TALLRec's, on the whole row; leave it, "
                             "or --host collm and --ce yes, out")
        if self.kl_vocab == "full" and not kinds & {"paper", "official", "jsd"}:
            raise ValueError(f"--kl-vocab full: {', '.join(sorted(kinds))} compares Yes and No at most; "
                             "it needs --bound jsd, or --kl paper or official")
        if self.cap and not kinds & {"paper", "official", "hinge"}:
            raise ValueError(f"--cap: {', '.join(sorted(kinds))} has a bound of its own or none; "
                             "it needs --bound hinge, or --kl paper or official")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError("--lora-dropout must be in [0, 1)")


# 3 ------------------------------------------------------------------------------------------ the host's extra parts
class MF(nn.Module):
    """Matrix factorisation: logit(u, i) = <p_u, q_i> + b_u + b_i + b."""

    def __init__(self, n_users, n_items, dim):
        super().__init__()
        self.user, self.item = nn.Embedding(n_users, dim), nn.Embedding(n_items, dim)
        self.of_user, self.of_item = nn.Embedding(n_users, 1), nn.Embedding(n_items, 1)
        self.bias = nn.Parameter(torch.zeros(()))
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)
        for table in (self.of_user, self.of_item):
            nn.init.zeros_(table.weight)

    def forward(self, users, items):
        both = (self.user(users) * self.item(items)).sum(-1)
        return both + self.of_user(users)[:, 0] + self.of_item(items)[:, 0] + self.bias


class Mapping(nn.Module):
    """CoLLM's mapping: a vector of MF -> one token in the LLM's embedding space, one MLP for users and one for
    items."""

    def __init__(self, dim, width, scale):
        super().__init__()
        self.user, self.item = (nn.Sequential(nn.Linear(dim, 10 * dim), nn.ReLU(), nn.Linear(10 * dim, width))
                                for _ in range(2))
        self.scale = scale                                       # std of the word embeddings

    def forward(self, p, q):
        """p, q (B, d) -> (B, 2, width), the soft tokens of slots 0 and 1."""
        tokens = torch.stack([self.user(p), self.item(q)], 1)
        return self.scale * F.layer_norm(tokens, tokens.shape[-1:])


# 4 ------------------------------------------------------------------------------------------ prompts
# Another wording of the flip is one more line.
FLIPS = {"like": ("Will the user like it?", "Will the user dislike it?"),
         "enjoy": ("Would the user enjoy it?", "Would the user not enjoy it?")}

CONTEXT = """The user liked these titles, oldest first:
{liked}
The user disliked these titles:
{disliked}
The user now sees this title:
- {item}
"""
# 0 and 1 are slots for vectors, before the context.
VECTORS = ("What other users chose says this of the user: ", 0, ", and this of the title: ", 1, "\n")


def pair_prompts(liked, disliked, item, template="shared", flip="like", answers=("Yes", "No"), vectors=False):
    """The two prompts of a pair, each a list of texts and slot numbers (see llm.chat). The context is the same."""
    context = [*(VECTORS if vectors else ()),
               CONTEXT.format(liked=history_lines(liked), disliked=history_lines(disliked), item=item)]
    answer = f" Answer {answers[0]} or {answers[1]}."
    if template == "shared":
        return [[*context, question + answer] for question in FLIPS[flip]]
    return [[f"Given the user's taste, say: {question}{answer}\n", *context, FLIPS[flip][0]]
            for question in FLIPS[flip]]


def answer_ids(tokenizer, answers):
    """Token ids of Yes and No. Raises UserError, with the fix, if a word is not one token."""
    found = [llm.single_token(tokenizer, word) for word in answers]
    if None in found or found[0] == found[1]:
        others = [pair for pair in (("Yes", "No"), ("yes", "no"), ("A", "B"), ("1", "0"), ("y", "n"))
                  if None not in (ids := [llm.single_token(tokenizer, w) for w in pair]) and ids[0] != ids[1]]
        fix = f"--answers {','.join(others[0])} works" if others else "take another --backbone"
        raise UserError(f"--answers {','.join(answers)}: not two different single tokens "
                        f"of this tokenizer; {fix}")
    return found


# 5 ------------------------------------------------------------------------------------------ losses
def kl_divergence(p, q):
    """KL(p || q) from log-probabilities (..., V) -> (...). Finite for any finite logits; so is its gradient."""
    return (p.exp() * (p - q)).sum(-1)


def js_divergence(p, q):
    """Jensen-Shannon divergence from log-probabilities (..., V) -> (...): symmetric, at most ln 2."""
    middle = torch.logaddexp(p, q) - np.log(2)
    return (kl_divergence(p, middle) + kl_divergence(q, middle)) / 2


def apart(pos, neg, kind, cap=10.0, ids=None, label=None):
    """[2]-[4]: how far the answers to the two questions are from each other, (N,) nats, from logits (N, V).

    kind: "paper", "official" (not capped here: its sum is, see train_pairs), "jsd", "follow", "swap", "hinge".
    ids: compare only these tokens. "follow", "swap" and "hinge" need ids = (yes, no): minus the divergence of P+
    from P- with the two swapped ("follow": no gradient to P+), and the gap of log-odds in the direction of label
    (N,) in {0, 1}. Example: equal logits give 0 in "paper", "official", "jsd" and "hinge".
    """
    if kind == "hinge":
        gap = (pos - neg)[..., ids[0]] - (pos - neg)[..., ids[1]]
        return ((2 * label - 1) * gap).clamp(max=cap)
    if ids is not None:
        pos, neg = pos[..., ids], neg[..., ids]
    p, n = F.log_softmax(pos, -1), F.log_softmax(neg, -1)
    if kind == "paper":
        return kl_divergence(p, n).clamp(max=cap)
    if kind == "official":
        return kl_divergence(n.detach(), p)
    if kind == "jsd":
        return js_divergence(p, n)
    if kind in ("follow", "swap"):
        return -js_divergence(p.detach() if kind == "follow" else p, n.flip(-1))
    raise ValueError(f"kind is paper, official, jsd, follow, swap or hinge, not {kind}")


def answer_loss(yes, no, logsumexp, label, kind="answer"):
    """[1] per row: logits of Yes and No and the logsumexp over the vocabulary, each (N,); label (N,) in {0, 1}.

    "answer": cross-entropy of the right word among all tokens. "yes": CoLLM's binary cross-entropy on the logit
    of Yes.
    """
    if kind == "yes":
        return F.binary_cross_entropy_with_logits(yes, label.to(yes.dtype), reduction="none")
    return logsumexp - torch.where(label.bool(), yes, no)


# 6 ------------------------------------------------------------------------------------------ the LLM
class Rows:
    """Every rating as a question: user, item, label, and what the user liked and disliked before. Rows are
    numbered in time order; train, valid and test are sorted row numbers."""

    def __init__(self, args):
        data = datasets.load(args.data, args.data_dir, args.max_bad_rows, args.seed)
        if not data.has_ratings:
            raise UserError(f"--data {args.data}: has no ratings, and likes and dislikes are needed; "
                            "add a rating column")
        if args.users:
            data = datasets.sample_users(data, args.users, args.seed)
        self.data, self.args = data, args
        self.lines = [item_line(t, c) for t, c in zip(data.titles, data.categories)]
        self.user, self.item = data.user.astype(np.int64), data.item.astype(np.int64)
        self.books = (Path(args.data) / "BX-Book-Ratings.csv").exists()
        if self.books and args.host == "collm":
            raise UserError(f"--data {args.data}: BookCrossing is split by user, and --host collm knows none of "
                            "those it is tested on; leave it out")
        self.above = args.like_above if args.like_above is not None else (5.0 if self.books else 3.0)
        self.label = (data.rating > self.above).astype(np.int64)
        self.place = datasets.places(data.user)
        self.sequence = datasets.histories(data)  # positions: row numbers per user, in time order
        least = args.min_history if args.min_history is not None else (10 if args.data == "ml100k" else 1)
        usable = np.flatnonzero(self.place >= least)
        if len(usable) < 10:
            raise UserError(f"--data {args.data}: only {len(usable)} ratings have {least} earlier ones "
                            "of their user; lower --min-history or bring more ratings")
        self.train, self.valid, self.test = self.split(usable)
        for name in ("train", "valid", "test"):
            labels = self.label[getattr(self, name)]
            if not 0 < labels.sum() < len(labels):
                raise UserError(f"--data {args.data}: its {len(labels)} {name} rows have "
                                f"{'likes' if labels.any() else 'dislikes or nothing'} only; bring more ratings, or set "
                                f"--like-above (now {self.above:g}) between those that occur")
        if args.shots:
            self.train = self.few(args.shots)

    def split(self, usable):
        """ml100k: the last 10,000 rows, 80/10/10 (as many as TALLRec); ml1m: the last 20 months, 10/5/5
        (CoLLM); BookCrossing, which has no times: the last row of each user with more than 3, 80/10/10 of the
        users (TALLRec); else 80/10/10 of all rows in time order, which without times is the order of their
        places in the histories: validation and test are then of users with long ones."""
        if self.books:
            size = np.diff(self.sequence.offsets)
            last = self.sequence.positions[self.sequence.offsets[1:] - 1][size > 3]
            last = np.random.default_rng([self.args.seed, 37]).permutation(last[np.isin(last, usable)])
            return [np.sort(part) for part in np.split(last, [int(0.8 * len(last)), int(0.9 * len(last))])]
        if self.args.data == "ml1m":
            month = self.data.time.astype("datetime64[s]").astype("datetime64[M]").astype(int)[usable]
            last = month.max()
            return [usable[(last - month >= low) & (last - month < high)]
                    for low, high in ((10, 20), (5, 10), (0, 5))]
        if self.args.data == "ml100k":
            usable = usable[-10_000:]
        return np.split(usable, [int(0.8 * len(usable)), int(0.9 * len(usable))])

    def few(self, shots):
        rng, half = np.random.default_rng([self.args.seed, 31]), shots // 2
        kinds = [self.train[self.label[self.train] == k] for k in (0, 1)]
        if min(map(len, kinds)) < half:
            raise UserError(f"--shots {shots}: the training rows hold only {len(kinds[1])} likes "
                            f"and {len(kinds[0])} dislikes")
        return np.sort(np.concatenate([rng.choice(rows, half, replace=False) for rows in kinds]))

    def before(self, row):
        """(liked, disliked): the user's latest rated titles before this row, oldest first; nothing at or after it."""
        end = self.sequence.offsets[self.user[row]] + self.place[row]
        start = max(self.sequence.offsets[self.user[row]], end - self.args.prompt_history)
        rows = self.sequence.positions[start:end]
        return tuple([self.lines[self.item[r]] for r in rows if self.label[r] == k] for k in (1, 0))

    def sizes(self):
        text = " / ".join(f"{len(getattr(self, name)):,}" for name in ("train", "valid", "test"))
        published = {"ml100k": "8,000 / 1,000 / 1,000, of other users",
                     "ml1m": "33,891 / 10,401 / 7,331"}.get(self.args.data)
        return text + (f" (published: {published})" if published and not self.args.shots else "")


class Answers(NamedTuple):
    """Of a batch of pairs, after x+ and x- (the two columns): logits of Yes and No, logsumexp over the
    vocabulary and largest logit, (B, 2) each; and what apart() says of them, (B,)."""
    yes: torch.Tensor
    no: torch.Tensor
    lse: torch.Tensor
    top: torch.Tensor
    apart: torch.Tensor


class Host:
    """The LLM with its adapter and, for CoLLM, the vectors and their mapping; and how rows become packed pairs."""

    def __init__(self, args, device, rows):
        self.args, self.device, self.rows = args, device, rows
        self.model, self.tokenizer = llm.load(args.backbone, device, cuda.pick_dtype(args.dtype, device))
        self.ids = answer_ids(self.tokenizer, args.answers)
        lora.inject(self.model, args.lora_targets, args.lora_rank, args.lora_alpha, args.lora_dropout,
                    seed=args.seed)
        self.mf = self.mapping = None
        if args.host == "collm":
            words = self.model.get_input_embeddings().weight
            self.mf = MF(len(rows.data.users), len(rows.data.items), args.mf_dim).to(device)
            self.mapping = Mapping(args.mf_dim, words.shape[1], float(words.float().std())).to(device)

    def pack(self, rows, vectors=False, whole=False):
        """Row numbers -> (llm.Packed, soft tokens). What both questions of a pair have in common runs once: one
        packed row, completion 0 for the question and 1 for its flip. Where that is little, each has a row of
        its own, in turn. whole: so that every token after the first is predicted, not the answer alone."""
        args, pairs = self.args, []
        for row in rows:
            prompts = pair_prompts(*self.rows.before(row), self.rows.lines[self.rows.item[row]],
                                   args.template, args.flip, args.answers, vectors)
            pos, neg = (llm.chat(self.tokenizer, p) for p in prompts)
            label = int(self.rows.label[row])
            pairs.append((pos, neg, [self.ids[1 - label]], [self.ids[label]]))
        same = [next((k for k, (a, b) in enumerate(zip(pos, neg)) if a != b), 0) for pos, neg, *_ in pairs]
        if share := not whole and 2 * sum(same) > sum(len(pos) for pos, *_ in pairs):
            prefixes = [pos[:k] for (pos, *_), k in zip(pairs, same)]
            tails = [[pos[k:] + yes, neg[k:] + no] for (pos, neg, yes, no), k in zip(pairs, same)]
        else:
            each = [text for pos, neg, yes, no in pairs for text in ((pos, yes), (neg, no))]
            prefixes = [prompt[:1] if whole else prompt for prompt, _ in each]
            tails = [[prompt[1:] + answer if whole else answer] for prompt, answer in each]
        soft = self.soft(rows) if vectors else None
        return (llm.pack_tails(prefixes, tails).to(self.device),
                soft if share or not vectors else soft.repeat_interleave(2, 0))

    def soft(self, rows):
        """The mapped vectors of CoLLM's slots for these rows (B, 2, D)."""
        index = torch.as_tensor(np.stack([self.rows.user[rows], self.rows.item[rows]]), device=self.device)
        return self.mapping(self.mf.user(index[0]).detach(), self.mf.item(index[1]).detach())

    def compared(self, kind):
        """The tokens that a divergence compares, None = all. Over all of them a bounded one is soon won by
        answering the flipped question with any third word, and the contradictions stay."""
        if kind in ("follow", "swap", "hinge"):
            return self.ids
        return (self.ids if (self.args.kl_vocab or ("answers" if kind == "jsd" else "full")) == "answers"
                else None)

    def look(self, rows, kind, cap, vectors=False, ids=None):
        """[6] The Answers of these rows, from one pass."""
        packed, soft = self.pack(rows, vectors)
        hidden = llm.packed_hidden(self.model, packed, soft)
        last = llm.last_slots(packed).view(-1, 2)                # the answers' slots
        yes, no = self.ids
        ids = ids or self.compared(kind)

        def columns(pos, neg, label):
            far = apart(pos, neg, kind, cap, ids, label) if kind else torch.zeros_like(pos[:, 0])
            answered = [x for z in (pos, neg) for x in (z[:, yes], z[:, no], z.logsumexp(-1), z.amax(-1))]
            return torch.stack([*answered, far], -1)
        label = torch.as_tensor(self.rows.label[rows], device=self.device)
        seen = llm.over_logits(self.model, columns, hidden[last[:, 0]], hidden[last[:, 1]],
                               beside=(label,), exact=self.ids)  # (B, 9)
        return Answers(*seen[:, :8].view(-1, 2, 4).unbind(-1), seen[:, 8])


def train_pairs(host, rows, kl, vectors=False, grown=1.0):
    """The loss of these rows (row numbers), one value each, and what is logged: {name: (B,)}. grown: the share of λ
    and w that --lam-ramp has reached."""
    args = host.args
    label = torch.as_tensor(host.rows.label[rows], device=host.device)
    kind = {"bounded": args.bound, "off": None}.get(kl, kl)
    cap = args.cap or {"paper": 10.0, "official": 1e4, "hinge": 4.0}.get(kind, 1.0)
    lam = args.lam if args.lam is not None else {"official": 1e-4, "paper": 0.1}.get(kl, 1.0)
    if kl == "official":  # [3]: the whole row, and all positions from the first difference on
        packed, _ = host.pack(rows, whole=True)
        scored = llm.completion_logps(host.model, packed, hidden=True)
        length = packed.valid.sum(-1).view(-1, 2)                                             # (B, 2)
        ce = -scored.logps.view(len(rows), 2, -1)[:, 0].sum(-1) / length[:, 0]
        # the common context says the same
        same = (packed.tokens[0::2] == packed.tokens[1::2]).long().cumprod(1).sum(1)
        last, n = llm.last_slots(packed).view(-1, 2), length.min(1).values - same
        # back: counted from the answer
        pair, back = (torch.arange(int(n.max()), device=host.device) < n[:, None]).nonzero(as_tuple=True)
        pos, neg = (last[pair, g] - back for g in (0, 1))
        ids = host.compared(kind)
        each = llm.over_logits(host.model, lambda p, n: apart(p, n, "official", ids=ids),
                               scored.hidden[pos], scored.hidden[neg])
        far = each.new_zeros(len(rows)).index_add(0, pair, each).clamp(max=cap)
    else:
        seen = host.look(rows, kind, cap, vectors)
        ce, far = answer_loss(seen.yes[:, 0], seen.no[:, 0], seen.lse[:, 0], label, args.ce), seen.apart
    loss, stats = ce - grown * lam * far, {"ce": ce, "apart": far}
    if args.neg_ce:                                              # [5]
        seen = host.look(rows, None, 1.0, vectors) if kl == "official" else seen
        stats["neg_ce"] = answer_loss(seen.yes[:, 1], seen.no[:, 1], seen.lse[:, 1], 1 - label, args.ce)
        loss = loss + grown * args.neg_ce * stats["neg_ce"]
    return loss, stats | {"loss": loss}


# 7 ------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def ask(host, rows, vectors=False, desc=None):
    """Both questions on every row -> arrays (n,): gap and flipped gap logit(Yes) - logit(No) (--ce yes trains
    the logit of Yes alone: then that), Jensen-Shannon divergence of the two answers, and the share of the two
    whose likeliest token is neither Yes nor No."""
    host.model.eval()
    shown = np.minimum(host.rows.place[rows], host.args.prompt_history)  # titles in the prompt
    order, size = np.argsort(shown, kind="stable"), host.args.eval_batch
    parts = [host.look(np.asarray(rows)[order[start:start + size]], "jsd", 1.0, vectors, host.ids)
             for start in progress(range(0, len(rows), size), desc, -(-len(rows) // size))]
    yes, no, _, top, jsd = (torch.cat(x).cpu().double().numpy()[np.argsort(order)] for x in zip(*parts))
    gap = yes if host.args.ce == "yes" else yes - no                                          # (n, 2)
    return {"gap": gap[:, 0], "flipped": gap[:, 1], "jsd": jsd,
            "invalid": (top > np.maximum(yes, no)).mean(1)}


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))


def report(user, label, gap, flipped, invalid, jsd):
    """All measures of a set of rows. gap, flipped (n,): logit(Yes) - logit(No) after the question and after its flip.

    contradiction: same answer to both questions. soft_inconsistency: mean |P+(Yes) + P-(Yes) - 1|.
    joint_accuracy: both answers right. flip_auc: AUC of P+(Yes) - P-(Yes). neg_auc: AUC of the flipped question
    alone. divergence: mean JSD.
    """
    p, n = sigmoid(gap), sigmoid(flipped)
    ece, curve = metrics.calibration(label, p)
    values = {"auc": metrics.auc(label, gap), "uauc_user": metrics.uauc(user, label, gap),
              "uauc_impressions": metrics.uauc(user, label, gap, "impressions"),
              "log_loss": metrics.log_loss(label, gap),
              "contradiction": np.mean((gap > 0) == (flipped > 0)),
              "soft_inconsistency": np.mean(np.abs(p + n - 1)),
              "joint_accuracy": np.mean(((gap > 0) == label) & ((flipped > 0) != label)),
              "flip_auc": metrics.auc(label, p - n), "neg_auc": metrics.auc(label, -flipped),
              "divergence": np.mean(jsd), "invalid": np.mean(invalid), "ece": ece}
    return {k: round(float(v), 6) if np.isfinite(v) else None for k, v in values.items()} | {
        "n": len(label), "positives": round(float(np.mean(label)), 4),
        "reliability": [[round(a, 4), round(b, 4), c] for a, b, c in curve]}


def evaluate(host, rows, vectors=False, desc=None):
    found = ask(host, rows, vectors, desc)
    if not np.isfinite(found["gap"]).all():
        raise UserError("training has diverged: answers are no numbers; "
                        f"lower {'--map-lr' if vectors else '--lr'}")
    return report(host.rows.user[rows], host.rows.label[rows], **found), found


def worst(rows, index, found, most=50):
    """The contradictions with the surest answers, readable: one dict each, every answer with its probability."""
    p, n = sigmoid(found["gap"]), sigmoid(found["flipped"])
    same = np.flatnonzero((p > 0.5) == (n > 0.5))
    chosen = same[np.argsort(-np.abs(p + n - 1)[same], kind="stable")][:most]
    word = lambda x: rows.args.answers[0 if x > 0.5 else 1]
    lines = []
    for k in chosen:
        liked, disliked = rows.before(index[k])
        lines.append({"user": rows.data.users[rows.user[index[k]]], "title": rows.lines[rows.item[index[k]]],
                      "liked": liked, "disliked": disliked,
                      "truth": "like" if rows.label[index[k]] else "dislike",
                      "asked": {question: f"{word(x[k])} {max(x[k], 1 - x[k]):.3f}"
                                for question, x in zip(FLIPS[rows.args.flip], (p, n))}})
    return lines


# 8 ------------------------------------------------------------------------------------------ train
def train_mf(args, run, host):
    """MF on the training rows, BCE, the best epoch by validation AUC. Returns what was reached."""
    rows, model = host.rows, host.mf
    optimizer = torch.optim.Adam(model.parameters(), lr=args.mf_lr, weight_decay=1e-4)
    tensor = lambda index: [torch.as_tensor(x[index], device=host.device)
                            for x in (rows.user, rows.item, rows.label)]
    auc = lambda index: metrics.auc(rows.label[index], model(*tensor(index)[:2]).detach().cpu().numpy())
    best, kept, waited = -1.0, None, 0
    for epoch in progress(range(args.mf_epochs), "matrix factorisation"):
        for part in np.array_split(np.random.default_rng([args.seed, 41, epoch]).permutation(rows.train),
                                   max(1, len(rows.train) // 1024)):
            users, items, label = tensor(part)
            loss = F.binary_cross_entropy_with_logits(model(users, items), label.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        now, waited = auc(rows.valid), waited + 1
        if not np.isfinite(now):
            raise UserError(f"matrix factorisation has diverged in epoch {epoch + 1}; lower --mf-lr")
        if now > best:
            best, kept, waited = now, {k: v.clone() for k, v in model.state_dict().items()}, 0
        if waited >= 5:
            break
    model.load_state_dict(kept)
    run.save("mf", kept, {})
    return {"valid_auc": round(best, 4), "test_auc": round(auc(rows.test), 4), "epochs": epoch + 1}


def stage(args, run, host, name, module, lr, kl, vectors=False):
    """Train one part (the adapter, or the mapping) and keep what did best on validation AUC, or the last. Resumable,
    bit-equal.

    module: (state() -> tensors, load(tensors), parameters). A batch is a pure function of (seed, step).
    """
    state, restore, parameters = module
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    rows, done, best, waited, kept = host.rows, 0, -1.0, 0, state()
    if (saved := run.begin(name)) is not None:
        tensors, earlier = saved
        done, best, waited, kept = (earlier["step"], earlier["best"], earlier["waited"],
                                    strip(tensors, "best/"))
        restore(strip(tensors, "now/"))
        run.load_optimizer(optimizer, tensors)
    valid = np.sort(np.random.default_rng([args.seed, 3]).permutation(rows.valid)[:args.eval_rows])
    if not 0 < rows.label[valid].mean() < 1:
        raise UserError(f"--eval-rows {args.eval_rows}: these validation rows are all likes or all dislikes; "
                        "raise it")
    size, totals = min(args.batch, len(rows.train)), []
    at_once = args.micro_batch or (16 if host.device.type == "cuda" else 64)
    per_epoch = len(rows.train) // size
    for step in progress(range(done, args.steps), name, args.steps, initial=done):
        if waited >= args.patience and args.keep == "best":
            break
        done = step + 1
        epoch, k = divmod(step, per_epoch)
        batch = np.random.default_rng([args.seed, 5, epoch]).permutation(rows.train)[k * size:(k + 1) * size]
        torch.manual_seed(cuda.key_seed(args.seed, name, step))                               # LoRA's dropout
        host.model.train()
        optimizer.zero_grad(set_to_none=True)
        parts = []
        grown = min(done / (args.lam_ramp * args.steps), 1.0) if args.lam_ramp else 1.0
        for part in np.split(batch, range(at_once, size, at_once)):
            loss, stats = train_pairs(host, part, kl, vectors, grown)
            (loss.sum() / size).backward()
            parts.append({k: v.detach().sum() for k, v in stats.items()})
        norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / max(args.warmup, 1), 1.0,
                                   (args.steps - step) / max(args.steps - args.warmup, 1))
        optimizer.step()
        totals.append({k: float(sum(p[k] for p in parts)) / size for k in parts[0]}
                      | {"grad_norm": float(norm)})
        if done % args.eval_every == 0 or done == args.steps:
            now, _ = evaluate(host, valid, vectors)
            means = {k: float(np.mean([t[k] for t in totals])) for k in totals[0]}
            measures = ("auc", "contradiction", "soft_inconsistency", "ece")
            run.log(name, done, args.steps, **means, **{f"valid_{k}": now[k] for k in measures})
            totals, waited = [], waited + 1
            if now["auc"] > best or args.keep == "last":
                best, kept, waited = now["auc"], state(), 0
            run.save(name, prefix("now/", state()) | prefix("best/", kept) | run.optimizer_tensors(optimizer),
                     {"step": done, "best": best, "waited": waited})
    restore(kept)
    return {"steps": done, "valid_auc": round(best, 4)}


def train(args):
    """All stages in one run; each is skipped when the run folder says that it is done. Returns the RESULT record."""
    cuda.alone("lcft.py")
    if args.ablations:
        return ablations(args)
    cuda.seed_everything(args.seed)
    device, rows = cuda.pick_device(args.device), Rows(args)
    run = Run(args, "lcft", rows.data.fingerprint, free=("micro_batch", "eval_batch"))
    if run.done("result"):
        return run.result(run.done("result"))
    host = Host(args, device, rows)
    adapter = lora.parameters(host.model)
    learned = [*adapter, *(host.mapping.parameters() if host.mapping else ())]
    run.header(device=str(device),
               backbone=f"{args.backbone}: {sum(p.numel() for p in host.model.parameters()):,} parameters, "
                        f"{sum(p.numel() for p in learned):,} trainable",
               data=f"{rows.data.name} ({rows.data.fingerprint}): {len(rows.data.users):,} users, "
                    f"{len(rows.data.items):,} items",
               rows=f"train / valid / test {rows.sizes()}, likes {rows.label[rows.train].mean():.2f} / "
                    f"{rows.label[rows.valid].mean():.2f} / {rows.label[rows.test].mean():.2f}",
               answers=", ".join(f"{w} = token {i}" for w, i in zip(args.answers, host.ids)))
    collm, result = args.host == "collm", {
        "script": "lcft", "data": rows.data.name, "backbone": args.backbone, "host": args.host,
        "kl": args.kl, "bound": args.bound, "neg_ce": args.neg_ce, "seed": args.seed}
    if collm:
        if not run.done("mf"):
            run.finish("mf", train_mf(args, run, host))
        host.mf.load_state_dict(run.load("mf")[0])
        host.mf.requires_grad_(False)
        result["mf"] = run.done("mf")
    lr = llm.suited(args.lr, args.backbone, 2e-3, 1e-4)
    part = (lambda: lora.state(host.model), lambda t: lora.load_state(host.model, t), adapter)
    if not run.done("lora"):
        record = stage(args, run, host, "lora", part, lr,
                       args.kl if args.kl_stages != "map" or not collm else "off")
        lora.save(host.model, run.folder / "adapter", args.backbone)
        run.finish("lora", record)
    lora.load_state(host.model, strip(run.load("lora")[0], "best/"))
    result["lora"] = run.done("lora")
    if collm:
        for p in adapter:
            p.requires_grad_(False)
        copy = lambda: {k: v.detach().clone() for k, v in host.mapping.state_dict().items()}
        part = (copy, host.mapping.load_state_dict, list(host.mapping.parameters()))
        if not run.done("map"):
            run.finish("map", stage(args, run, host, "map", part, args.map_lr,
                                    args.kl if args.kl_stages != "lora" else "off", True))
        host.mapping.load_state_dict(strip(run.load("map")[0], "best/"))
        result["map"] = run.done("map")
    result["valid"], _ = evaluate(host, rows.valid, collm, "evaluate valid")
    result["test"], found = evaluate(host, rows.test, collm, "evaluate test")
    run.write_jsonl("contradictions", worst(rows, rows.test, found))
    run.finish("result", result)
    show(result)
    return run.result(result)


def show(result):
    """Print the test figures beside their baselines."""
    t = result["test"]
    print(f"\n{t['n']} test rows, {t['positives']:.0%} likes, host {result['host']}, --kl {result['kl']}")
    for name, key in (("AUC", "auc"), ("UAUC (users)", "uauc_user"),
                      ("UAUC (impressions)", "uauc_impressions"), ("log-loss", "log_loss"),
                      ("same answer to both questions", "contradiction"),
                      ("|P+(Yes) + P-(Yes) - 1|", "soft_inconsistency"),
                      ("both answers right", "joint_accuracy"), ("calibration error (ECE)", "ece"),
                      ("neither Yes nor No", "invalid")):
        print(f"  {name:30} {np.nan if t[key] is None else t[key]:.4f}")


# 9 ------------------------------------------------------------------------------------------ compare
VARIANTS = {   # name: (what changes, the flag that is swept, its values; the validation split picks one)
    "off": ({"kl": "off", "neg_ce": 0.0}, "lam", (0.0,)),
    "official": ({"kl": "official", "neg_ce": 0.0}, "lam", (1e-4, 1e-2)),
    "paper": ({"kl": "paper", "neg_ce": 0.0}, "lam", (0.03, 0.1, 0.3)),
    "swap": ({"kl": "bounded", "bound": "swap", "neg_ce": 0.0}, "lam", (0.3, 1.0, 3.0)),
    "follow": ({"kl": "bounded", "bound": "follow", "neg_ce": 0.0}, "lam", (1.0, 3.0)),
    "hinge": ({"kl": "bounded", "bound": "hinge", "neg_ce": 0.0}, "lam", (0.3, 1.0, 3.0)),
    "neg-ce": ({"kl": "off"}, "neg_ce", (0.3, 1.0)),
}
COLUMNS = {"AUC": "auc", "contradiction": "contradiction", "soft inc.": "soft_inconsistency",
           "joint acc.": "joint_accuracy", "ECE": "ece"}


def chosen_variants(variants):
    """--variants NAME or NAME:VALUE (none: all of VARIANTS) -> {name: list of values}. Raises ValueError."""
    found = {}
    for name, _, value in (v.partition(":") for v in variants or VARIANTS):
        if name not in VARIANTS or value and (
                name == "off" or not re.fullmatch(r"\d+\.?\d*(e-?\d{1,2})?", value)):
            raise ValueError(f"--variants {name}{value and ':' + value}: NAME or NAME:VALUE, "
                             f"NAME among {', '.join(VARIANTS)}; off has no value")
        found.setdefault(name, []).extend([float(value)] if value else VARIANTS[name][2])
    if "off" not in found:
        raise ValueError("--variants needs off among them: the others are measured against it")
    return found


def choose(reports, floor):
    """The swept value with the fewest contradictions on validation among those whose AUC is at least `floor`,
    else the one with the best AUC. reports: {value: list over seeds of RESULT records}."""
    mean = lambda value, key: np.mean([r["valid"][key] for r in reports[value]])
    good = [v for v in reports if mean(v, "auc") >= floor]
    return (min(good, key=lambda v: mean(v, "contradiction")) if good
            else max(reports, key=lambda v: mean(v, "auc")))


def ablations(args):
    """Every objective, swept value and seed, one run folder each; one table on test, the sweep on validation,
    and (with matplotlib) ece.png: calibration error against λ. The same command again goes on where it
    stopped."""
    root = folder_of(args, "lcft", "ablations")
    found = {name: {value: [] for value in values} for name, values in chosen_variants(args.variants).items()}
    folders = []
    for seed in args.seeds or (args.seed,):
        for name, by_value in found.items():
            change, flag, _ = VARIANTS[name]
            for value in by_value:
                folder = root / f"s{seed}" / f"{name}-{value:g}"
                print(f"\n=== {name}, {flag} {value:g}, seed {seed}", flush=True)
                by_value[value].append(train(variant(args, folder, seed=seed, **change | {flag: value})))
                folders.append(folder)
    floor = np.mean([r["valid"]["auc"] for r in found["off"][0.0]]) - 0.005
    columns = lambda split: {name: lambda r, key=key: r[split][key] for name, key in COLUMNS.items()}
    print(f"\nvalidation, mean ± std over {len(found['off'][0.0])} seeds")
    summarise({f"{name} {v:g}": by_value[v] for name, by_value in found.items() for v in by_value},
              columns("valid"))
    print("\ntest, at the value that validation chose (fewest contradictions with AUC ≥ off - 0.005)")
    chosen = {name: choose(by_value, floor) for name, by_value in found.items()}
    table = summarise({f"{name} {v:g}": found[name][v] for name, v in chosen.items()}, columns("test"))
    plot(found, root / "ece.png")
    return write_table(root, args, table, folders)


def plot(found, path):
    """ECE on validation against λ, one line per objective. Without matplotlib the table above has the same
    numbers."""
    if (plt := pyplot()) is None:
        return
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, by_value in found.items():
        values = sorted(by_value)
        mean, std = zip(*(metrics.mean_std([r["valid"]["ece"] for r in by_value[v]]) for v in values))
        if name == "off":
            axis.axhline(mean[0], color="grey", linestyle=":", label="off")
        else:
            axis.errorbar(values, mean, yerr=np.nan_to_num(std), marker="o", capsize=3, label=name)
    axis.set(xscale="log", xlabel="λ (neg-ce: its weight)", ylabel="calibration error on validation",
             title="Calibration against λ")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"ECE against λ: {path}")


if __name__ == "__main__":
    main(Args, train, __doc__)
