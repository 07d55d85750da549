"""CoCo: a codebook of soft prompts, and a judge that fine-tunes the LLM only where it hurts (arXiv 2510.14257).

What an LLM knows of a user's history helps some users and misleads others, and one text prompt cannot suit all.
CoCo lets the recommender choose: the state of a user picks one of K learned soft prompts, with which a frozen
LLM reads the user's history; what it says is fused into the state. Then a judge looks where this made things
worse, and only there the LLM learns.

  1 base          the recommender alone
  2 collaborate   codes, prompts, extraction and fusion learn from the recommendation loss; LLM and base are frozen
  3 judge         whose choices are predicted worse with the LLM's knowledge than without?
  4 eliminate     LoRA on these users' texts, for these users; then the held-out texts are read and their vectors kept

EQUATIONS (u a user, x_u the text of the history, h_u the behavioural state, s(u, i) the logit of an item,
CTR the base model, sg stop-gradient, c_k the K codes)
  [1] state       h_u = W [e_u; mean of e_j over the past]                                       -> CoCo.state
  [2] code        z_u = BatchNorm(W_q h_u), c the code nearest to z_u, passed on with gradient to both:
                  c + (z - sg z)                                                                 -> Codebook
  [3] prompt      P_u = words + (their std) * reshape(W_p c), O_u = LLM([P_u; x_u])              -> CoCo.prompt, CoCo.read
  [4] extraction  k = MLP(softmax(P_u W_1 (O_u W_2)^T / sqrt d) O_u W_3), P, O normalised        -> Extract
  [5] fusion      k_u = sigmoid(W_g [h; k]) k, h+ = h + k_u, s+ = CTR(h+) + <k_u, W_t t_i>       -> CoCo.score
  [6] phase 2     L = rec(s+) + rec(s-) + mse(sg z, c) + beta mse(z, sg c), s- = CTR(h)          -> loss_of
  [7] rec         nce: -log softmax(s / tau) of the target among negatives; bce: 1:1             -> rec_loss
  [8] judge       M_u = 1 where rec(s+) > rec(s-) + margin, on the same negatives                -> contradicted
  [9] phase 4     rec(s+) + rec(s-), k read anew where M = 1, else as it was before phase 4      -> judged_loss

CHECKED BY, in tests/
  [1] test_state_extraction_and_fusion_by_hand
  [2] test_a_code_is_passed_on_as_it_is_and_learns_from_the_task_in_one_mode_only
  [3] test_code_and_prompt_by_hand
      test_the_llm_is_frozen_and_the_codes_learn_through_it
  [4] test_state_extraction_and_fusion_by_hand
  [5] test_state_extraction_and_fusion_by_hand
  [6] test_both_phases_losses_by_hand
      test_commitment_moves_the_state_only_and_the_codebook_term_the_codes_only
  [7] test_losses_by_hand
  [8] test_without_knowledge_nobody_is_contradicted_and_a_knowledge_that_hurts_is_found
  [9] test_both_phases_losses_by_hand
      test_a_text_that_is_not_judged_gives_the_llm_exactly_no_gradient_and_the_recommender_its_own

DEVIATIONS AND CHOICES. The paper's text is not public beyond abstract and summaries: the formulas above are
ours wherever these are silent, which is nearly everywhere (K, prompt length, losses' weights, recommender,
metric, data).
  - z is standardised over users: states are alike, and without it all codes are nearly the same prompt.
  - The usual straight-through z + sg(c - z) gives the codes no gradient of the task: prompts would move by
    k-means only. [2] gives it to both sides; --vq ste and ema are the usual forms, to compare: on the toy world
    all three do alike.
  - <k_u, W_t t_i> in [5], t_i the LLM's vector of the item's text: knowledge about a user is of no use to a
    model whose items are ids that the text never names. --no-match is the fusion of the state alone. These
    texts hold the items' categories, which the base model reads with --categories only: the ablation's "no LLM
    but categories" says what an LLM is worth beside them.
  - One text serves the next --text-every choices of its user: no text holds a choice that it is to predict, and
    the LLM reads a fifth as much.
  - The base model stays in phase 2 as phase 1 left it: trained on, it learns the training choices by heart, and
    what the LLM says has the worse companion (--no-freeze-base; then rec(s-) in [6] keeps the branch without the
    LLM trained, else the judge would compare a trained branch with one that is not).
  - The judge needs the target, so it exists in training only; when served, everybody has the knowledge.
    --judge-level user takes the mean over a user's choices, text that of one text's choices; one choice says
    too little (--judge-least), and so does one draw of the negatives (--judge-draws). It judges once, before
    phase 4 (the summaries call it dynamic; --joint judges every batch, on the negatives of the epoch).
  - In phase 4 each batch of judged texts comes with as many others, whose knowledge is taken from the last
    reading: the recommender, if --eliminate-lr lets it, learns from both, the LLM from the judged ones. States,
    and with them codes, prompts and extraction stay as they are: the knowledge of the others is read once.
  - The adapter is for users whom the judge named; the others are served with the LLM as it was, which is what
    the recommender saw of them in phase 4. --adapt all reads everybody with it: then what it does to the others
    is never trained. --judge-level text judges texts, but the adapter is the user's: all texts of a user with a
    judged one are served with it.
  - The summaries name InfoNCE: that is --head nce. The default, bce, is click prediction on 1:1 rows, and so
    are the README's tables.
  - Training negatives are drawn anew in each epoch: the same ones would be learned by heart.
  - Confidence (--judge confidence) is the probability of the right answers: of 1 - p for a negative. With nce
    and one choice to judge by it says what the loss says, but for the unit of --margin.
  - A served vector is a function of (text, code, with or without the adapter, which the user decides): at most
    K LLM passes per text of a user (K^levels with --levels), kept in knowledge.safetensors for the texts of
    validation and test.
  - --joint trains phases 2 to 4 in one, the base model with them, judged batch by batch.

  python coco.py --data toy:600x2000x15000                                # 20 minutes on a core
  python coco.py --data ml1m --head nce --backbone Qwen/Qwen2.5-3B        # on a GPU
  python coco.py --ablations --seeds 0,1,2 --data toy:600x2000x15000     # prompts, judges, codebooks
"""

# 1 ------------------------------------------------------------------------------------------ imports
import hashlib
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import cuda, data as datasets, llm, lora, metrics
from common.prompts import history_lines
from common.recommenders import CTR
from common.run import (Run, UserError, at_least, folder_of, left_to_variants, main, prefix, progress, pyplot,
                        strip, summarise, variant, write_table)
from common.sequences import Logs, category_table


# 2 ------------------------------------------------------------------------------------------ arguments
@dataclass
class Args:
    # -- run
    data: str = "toy"  # toy (or toy:USERSxITEMSxINTERACTIONS[:MISLED], the share of misled users), ml1m,
    # ml100k, ml-latest-small, amazon-..., or a folder of your own logs
    data_dir: str | None = None  # a folder that already holds the data sets (else LLMREC_DATA, else download)
    max_bad_rows: int = 0  # broken rows to skip before giving up
    run: str | None = None  # run folder (default: runs/coco-DATA-BACKBONE-sSEED)
    resume: bool = False  # continue where the run folder stopped
    overwrite: bool = False  # remove an earlier run in that folder first
    seed: int = 0  # of sampling, initialisation and training
    device: str = "auto"  # auto (CUDA if there is one, else CPU), cpu, cuda, mps
    dtype: str = "auto"  # of the frozen backbone: auto (bfloat16 on CUDA, else float32), float32, bfloat16
    ablations: bool = False  # run VARIANTS and print one table
    variants: tuple[str, ...] = ()  # with --ablations: which rows of VARIANTS
    # (default: all that the data allow)
    seeds: tuple[int, ...] = ()  # with --ablations: the seeds to average over (default: --seed alone)
    # -- data
    min_rating: float = 0.0  # interactions rated lower are dropped; 0 keeps all
    users: int | None = None  # keep a random sample of so many users
    # -- recommender
    recommender: Literal["deepfm", "xdeepfm", "autoint", "dcn", "dcnv2", "din"] = "din"  # the base model
    categories: bool = False  # the base model reads the items' categories too, as the texts do
    head: Literal["bce", "nce"] = "bce"  # click prediction on 1:1 rows, or retrieval among --negatives
    negatives: int = 32  # with --head nce: per target
    tau: float = 1.0  # τ, temperature of the nce head
    dim: int = 32  # D: embeddings, states and knowledge vectors
    max_history: int = 20  # past items
    mlp: tuple[int, ...] = (64, 32)  # hidden layers
    dropout: float = 0.1  # in the MLP
    # -- LLM
    backbone: str = "tiny"  # any Hugging Face causal LM by name or folder; tiny is bundled
    prompt_history: int = 5  # titles in a text
    text_every: int = 5  # choices of a user that one text serves
    # -- method
    prompt: str = "codebook"  # codebook | mixture of the codes | shared: one soft prompt | static: a text |
    # group:FIELD: a text per group | none: no LLM
    codes: int = 16  # K, size of the codebook
    levels: int = 1  # residual levels of the codebook
    prompt_len: int = 4  # m: vectors of a soft prompt
    vq: Literal["both", "ste", "ema"] = "both"  # gradient of a code: both (the task's, too) |
    # ste (straight-through) | ema (moving average)
    beta: float = 0.25  # weight of the commitment term
    decay: float = 0.99  # of the moving average, with --vq ema
    dead: int = 20  # batches without being chosen after which a code moves to a random state (0: never)
    kmeans: bool = True  # codes start by k-means of the first states (else at random)
    freeze_base: bool = True  # phase 2 (without --joint) leaves the base model and the state as they are
    extract: Literal["attention", "mean"] = "attention"  # attention (eq. 4), or the mean of the LLM's output
    match: bool = True  # compare knowledge with the LLM's vector of the item's text
    static_prompt: str = "What does this user like?"  # the text of --prompt static;
    # soft prompts start from its words
    group_prompt: str = "This user's {field} is {value}. What does this user like?"  # of --prompt group:FIELD
    # -- judge
    judge: Literal["loss", "confidence", "off", "all"] = "loss"  # who trains the LLM:
    # those whom it hurts by loss or confidence (eq. 8), nobody (off), or all
    judge_level: Literal["user", "text"] = "user"  # the mean over all choices of a user,
    # or over those of one text
    judge_least: int = 3  # fewest choices to judge a user or a text by
    judge_draws: int = 10  # draws of the negatives that phase 4 judges by, on their mean: one is noisy
    margin: float = -0.06  # ε of eq. 8, nats (or probability);
    # negative: also those whom the LLM helps by less than that
    adapt: Literal["judged", "all"] = "judged"  # whose texts are read with the adapter:
    # the judged users', or everybody's (always so with --joint)
    align: float = 0.0  # weight of an InfoNCE term that pulls a judged user's knowledge
    # towards the behavioural state
    joint: bool = False  # phases 2 to 4 in one; the base model learns on
    # -- lora
    lora_targets: str = "q_proj,v_proj"  # comma-separated names of linear layers, or all-linear
    lora_rank: int = 8  # rank r of the adapter
    lora_alpha: float = 16.0  # α; the adapter is scaled by α / r
    # -- optimisation
    lr: float = 3e-3  # of the recommender, prompts and fusion
    lora_lr: float | None = None  # learning rate of the adapter (default 1e-4; 1e-3 for tiny);
    # 0: phase 4 without it
    weight_decay: float = 1e-6  # L2 of all but the adapter, added to the gradient as Adam has it
    base_epochs: int = 100  # most epochs of phase 1
    epochs: int = 24  # most epochs of phase 2
    eliminate_epochs: int = 4  # most epochs of phase 4
    eliminate_batch: int = 16  # judged texts per step of phase 4
    eliminate_lr: float = 0.0  # of the recommender in phase 4; 0: the LLM alone learns there
    patience: int = 6  # epochs without a better validation AUC
    base_batch: int = 256  # choices per step of phase 1
    batch: int = 64  # texts per step
    test_negatives: int = 10  # per validation or test target; more means less noise
    rank_users: int = 500  # users of the full ranking

    def check(self):
        if (self.prompt not in ("codebook", "mixture", "shared", "static", "none")
                and not self.prompt.startswith("group:")):
            raise ValueError("--prompt is codebook, mixture, shared, static, none or group:FIELD")
        at_least(self, 2, "batch dim")               # z is standardised over a batch, and drawn in the plane
        at_least(self, 1, "negatives test_negatives mlp max_history prompt_history text_every codes "
                          "levels prompt_len base_batch epochs eliminate_epochs eliminate_batch judge_least "
                          "judge_draws base_epochs patience rank_users lora_rank")
        at_least(self, 0, "beta dead align weight_decay lora_lr eliminate_lr lora_alpha")
        if self.tau <= 0 or self.lr <= 0:
            raise ValueError("--tau and --lr must be positive")
        if not self.static_prompt.strip() or not self.group_prompt.strip():
            raise ValueError("--static-prompt and --group-prompt must not be empty")
        if self.codes ** self.levels >= 2**63:
            raise ValueError("--codes to the power of --levels is the number of prompts, and too large")
        if self.recommender == "autoint" and self.dim % 2:
            raise ValueError("--dim must be even for autoint, which has two heads")
        if (self.vq != "both" or self.levels > 1) and self.prompt != "codebook":
            raise ValueError(f"--prompt {self.prompt} chooses no code, so that --vq {self.vq} and "
                             f"--levels {self.levels} mean nothing there; leave them out")
        phase4 = not self.joint and self.judge != "off" and self.prompt != "none"
        joint = self.ablations and "joint" in (self.variants or VARIANTS)
        if self.align and (not phase4 or joint):
            raise ValueError("--align is a term of phase 4, and --joint, --judge off and --prompt none have none")
        if phase4 and self.lora_lr == 0 == self.eliminate_lr:
            raise ValueError("--lora-lr 0 and --eliminate-lr 0 leave nothing to learn in phase 4; "
                             "raise one of them, or --judge off")
        left_to_variants(self, VARIANTS)
        if not 0 <= self.dropout < 1 or not 0 <= self.decay < 1 or not self.mlp:
            raise ValueError("--dropout and --decay must be in [0, 1), --mlp not empty")
        if unknown := set(self.variants) - set(VARIANTS):
            raise ValueError(f"--variants {','.join(sorted(unknown))}: among {','.join(VARIANTS)}")
        try:
            self.group_prompt.format(field="", value="")
        except (KeyError, IndexError, ValueError, AttributeError):
            raise ValueError("--group-prompt: only {field} and {value} may stand in braces") from None


# 3 ------------------------------------------------------------------------------------------ rows
class Rows:
    """Who is asked about what, and what the LLM reads for it. A table is (3 + C, n): user, place, text, then
    target and negatives. A user's last choice is test, the one before validation; the first has no past and is
    no target.

    Text number t is of user text_user[t], and was written after text_place[t] choices; texts of one user are in
    time order.
    """

    def __init__(self, args, device):
        data = datasets.min_rating(datasets.load(args.data, args.data_dir, args.max_bad_rows, args.seed),
                                   args.min_rating)
        if args.users:
            data = datasets.sample_users(data, args.users, args.seed)
        self.args, self.data, self.device, self.logs = args, data, device, Logs(data, args.prompt_history)
        logs = self.logs
        asked = logs.targets(args.data)
        # a text is written every few choices, and serves the next
        stands = [(u, p - (p - 1) % args.text_every) for u, p in asked]
        pairs, number = np.unique(np.concatenate([np.stack(s) for s in stands], 1),
                                  axis=1, return_inverse=True)
        self.text_user, self.text_place = (torch.as_tensor(x.astype(np.int64), device=device) for x in pairs)
        number = np.split(number.ravel(), np.cumsum([len(u) for u, _ in asked])[:-1])
        tables = []
        for (u, p), text, name in zip(asked, number, ("train", "valid", "test")):
            many = {"train": args.negatives if args.head == "nce" else 1}.get(name, args.test_negatives)
            # a training negative may be a held-out item
            seen = logs.train_keys() if name == "train" else None
            negatives = datasets.negatives(data, u, many,
                                           cuda.key_seed(args.seed, f"{name} negatives") % 2**31, seen)
            table = np.concatenate([np.stack([u, p, text, logs.item_at(u, p)]), negatives.T])
            tables.append(torch.as_tensor(table.astype(np.int64), device=device))
        self.train, self.valid, self.test = tables
        # rows of a text are neighbours
        ends = torch.bincount(self.train[2], minlength=len(self.text_user)).cumsum(0)
        self.first = torch.cat([ends.new_zeros(1), ends])
        self.train_texts = (self.first.diff() > 0).nonzero()[:, 0].cpu().numpy()

    def of_texts(self, texts):
        """Texts (T,) -> (the training rows that they serve, and which of the texts each has), a table and (n,)."""
        count = self.first[texts + 1] - self.first[texts]
        owner = torch.repeat_interleave(torch.arange(len(texts), device=self.device), count)
        start = self.first[texts] - F.pad(count.cumsum(0), (1, 0))[:-1]
        return self.train[:, start[owner] + torch.arange(len(owner), device=self.device)], owner

    def redraw(self, *when):
        """New training negatives, a function of (seed, when): the same ones in every epoch would be learned by
        heart."""
        users, seed = (self.train[0].cpu().numpy(),
                       cuda.key_seed(self.args.seed, "train negatives", *when) % 2**31)
        negatives = datasets.negatives(self.data, users, len(self.train) - 4, seed, self.logs.train_keys())
        self.train = torch.cat([self.train[:4],
                                torch.as_tensor(negatives.T.astype(np.int64), device=self.device)])

    def history(self, users, place):
        """(B, L) the items before a place, shifted by one, oldest first, 0 = padding on the right."""
        return self.logs.histories(users, place, self.args.max_history)

    def groups(self, field):
        """(names, (n_users,) group of each user)."""
        fields = self.data.user_fields
        if field not in fields:
            raise UserError(f"--prompt group:{field}: these data have "
                            f"{', '.join(fields) if fields else 'no user fields'}; take another --prompt")
        names, group = np.unique([str(v) for v in fields[field]], return_inverse=True)
        return [str(n) for n in names], group


# 4 ------------------------------------------------------------------------------------------ prompts
TEXT = "\nThe user chose these titles, oldest first:\n{history}\nAnswer in one line."


def words(model, tokenizer, texts, length):
    """Texts as prompts: the embeddings of their words, (n, m, width). Longer than `length` is cut if it is
    given; shorter ones repeat their last word."""
    ids = [list(llm.plain_ids(tokenizer, t))[:length] for t in texts]
    if not all(ids):
        raise UserError("--static-prompt or --group-prompt: a text without words; give it some")
    m = length or max(map(len, ids))
    return model.get_input_embeddings()(
        torch.tensor([x + x[-1:] * (m - len(x)) for x in ids], device=model.device)).detach()


# 5 ------------------------------------------------------------------------------------------ codebook
class Codebook(nn.Module):
    """[2] Vector quantisation (arXiv 1711.00937): each z becomes the nearest of K codes.

    gradient: "both"  value c, gradient to code and state: c + (z - sg z). The codes learn from the task.
              "ste"   value c, gradient to the state only: z + sg(c - z); codes learn by the codebook term.
              "ema"   as ste, but a code is the moving average of what chose it (no gradient at all).
    dead: a code that nobody chose in so many training batches becomes a random z of the batch (0: never).
    """

    def __init__(self, n_codes, dim, gradient="both", beta=0.25, decay=0.99, dead=0, kmeans=True):
        super().__init__()
        self.gradient, self.beta, self.decay, self.dead, self.kmeans = gradient, beta, decay, dead, kmeans
        self.codes = nn.Parameter(torch.randn(n_codes, dim), requires_grad=gradient != "ema")
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.register_buffer("unused", torch.zeros(n_codes, dtype=torch.long))
        self.register_buffer("size", torch.ones(n_codes))        # EMA: how many chose a code, and their sum
        self.register_buffer("total", self.codes.detach().clone())
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def start(self, z, rounds=10):
        """k-means on z (N, D): codes where the states are."""
        z, K = z.detach().float(), len(self.codes)
        pick = torch.cat([torch.randperm(len(z), generator=self.generator)
                          for _ in range(-(-K // len(z)))])[:K]
        codes = z[pick.to(z.device)].clone()
        for _ in range(rounds):
            index = self.nearest(z, codes)
            count = torch.bincount(index, minlength=K)[:, None]
            codes = torch.where(count > 0,
                                torch.zeros_like(codes).index_add_(0, index, z) / count.clamp(min=1), codes)
        self.codes.copy_(codes)
        self.total.copy_(codes)
        self.size.fill_(1.0)
        self.ready.fill_(True)

    @staticmethod
    def nearest(z, codes):
        """(N,) index of the nearest code, in fp32; of equally near ones the lowest."""
        z, codes = z.float(), codes.float()
        far = (z * z).sum(1, keepdim=True) - 2 * z @ codes.T + (codes * codes).sum(1)
        return far.argmin(1)

    def forward(self, z):
        """z (N, D) -> (its code, with the gradient chosen, (N, D); index (N,); codebook and commitment terms, a
        number)."""
        if self.training and self.kmeans and not self.ready:
            self.start(z)
        index = self.nearest(z.detach(), self.codes.detach())
        c = self.codes[index]
        if self.training:
            self.learn(z.detach(), index)
        commitment = self.beta * F.mse_loss(z, c.detach())
        if self.gradient == "both":
            return c + (z - z.detach()), index, commitment + F.mse_loss(c, z.detach())
        return (z + (c - z).detach(), index,
                commitment if self.gradient == "ema" else commitment + F.mse_loss(c, z.detach()))

    @torch.no_grad()
    def learn(self, z, index):
        """What is not learned by gradient: moving averages, and the restart of dead codes."""
        count = torch.bincount(index, minlength=len(self.codes))
        if self.gradient == "ema":
            self.size.lerp_(count.to(self.size.dtype), 1 - self.decay)
            self.total.lerp_(torch.zeros_like(self.total).index_add_(0, index, z.to(self.total.dtype)),
                             1 - self.decay)
            n = self.size.sum()
            self.codes.copy_(self.total / ((self.size + 1e-5) / (n + len(self.codes) * 1e-5) * n)[:, None])
        self.unused.copy_(torch.where(count > 0, 0, self.unused + 1))
        if self.dead and (gone := self.unused >= self.dead).any():
            pick = torch.randint(len(z), (int(gone.sum()),), generator=self.generator).to(z.device)
            self.codes[gone] = z[pick].to(self.codes.dtype)
            self.total[gone], self.size[gone], self.unused[gone] = z[pick].to(self.total.dtype), 1.0, 0


def usage(index, n_codes):
    """(share of codes that are used, perplexity exp(H)) of the codes chosen, (N,)."""
    p = torch.bincount(index, minlength=n_codes).float() / len(index)
    return float((p > 0).float().mean()), float(torch.exp(-(p * p.clamp(min=1e-12).log()).sum()))


# 6 ------------------------------------------------------------------------------------------ model
class Extract(nn.Module):
    """[4] What the prompt asks of the LLM's output: cross-attention, an MLP on its m answers side by side."""

    def __init__(self, width, dim, kind, m):
        super().__init__()
        self.kind, self.dim = kind, dim
        self.of_prompt, self.of_output = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, dim), nn.Linear(width, dim)
        self.value = nn.Linear(width, 2 * dim)
        # not ReLU: of misled users, of whom little is to be said, its units die, and the LLM is never tuned
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(2 * dim * (m if kind == "attention" else 1), dim))

    def forward(self, prompt, output, mask):
        """prompt (B, m, W), output (B, T, W), mask (B, T) -> (B, D)."""
        o = self.of_output(output)
        if self.kind == "mean":
            weight = (mask / mask.sum(1, keepdim=True))[:, None]
        else:
            score = self.query(self.of_prompt(prompt)) @ self.key(o).transpose(1, 2) / self.dim ** 0.5
            weight = score.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return self.mlp((weight @ self.value(o)).flatten(1))


class CoCo(nn.Module):
    """Recommender, codebook, prompts, extraction and fusion; the LLM is beside it (self.llm, not a submodule),
    frozen but for its adapter. self.passes counts the texts that it has read."""

    def __init__(self, args, rows):
        super().__init__()
        torch.manual_seed(cuda.key_seed(args.seed, "init"))
        self.args, self.rows, D, n = args, rows, args.dim, len(rows.data.items)
        categories = category_table([c[:8] if args.categories else [] for c in rows.data.categories])
        self.ctr = CTR(args.recommender, len(rows.data.users), n, categories, D, args.mlp, args.dropout)
        self.to_state = nn.Linear(2 * D, D)
        self.passes = 0
        if args.prompt == "none":
            return
        model, tokenizer = llm.load(args.backbone, rows.device, cuda.pick_dtype(args.dtype, rows.device))
        lora.inject(model, args.lora_targets, args.lora_rank, args.lora_alpha, 0.0,
                    cuda.key_seed(args.seed, "lora") % 2**31)
        train_adapter(model, False)
        self.__dict__["llm"], self.tokenizer, W = model, tokenizer, llm.width(model)
        self.books = nn.ModuleList()
        self.soft = args.prompt in ("codebook", "mixture", "shared")
        texts, group = [args.static_prompt], np.zeros(len(rows.data.users), dtype=np.int64)
        if args.prompt.startswith("group:"):
            names, group = rows.groups(args.prompt[6:])
            texts = [args.group_prompt.format(field=args.prompt[6:], value=name) for name in names]
        self.register_buffer("words", words(model, tokenizer, texts,
                                            args.prompt_len if self.soft else None).float(), persistent=False)
        self.register_buffer("group", torch.as_tensor(group.astype(np.int64)), persistent=False)
        self.register_buffer("adapted", torch.ones(len(group), dtype=torch.bool), persistent=False)
        self.m = self.words.shape[1]
        if self.soft:
            if len(rows.train_texts) < 2:
                raise UserError(f"--data {args.data}: one text to train on, and states are standardised over "
                                "two or more; lower --text-every or bring more choices")
            # users apart, however alike their h
            self.to_query = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, affine=False))
            self.to_prompt = nn.Linear(D, self.m * W)
            self.scale = float(self.words.std())                 # the size of a word's embedding
            books = 1 if args.prompt == "shared" else args.levels
            self.books = nn.ModuleList(
                Codebook(1 if args.prompt == "shared" else args.codes, D, args.vq,
                         args.beta, args.decay, args.dead, args.kmeans) for _ in range(books))
        self.extract, self.gate = Extract(W, D, args.extract, self.m), nn.Linear(2 * D, D)
        vectors = llm.encode(model, tokenizer, rows.logs.lines, desc="item texts")
        self.register_buffer("items", (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6), persistent=False)
        self.to_item = nn.Linear(W, D)

    def state(self, users, place):
        """[1] h (B, D) of users before a place."""
        past = F.embedding_bag(self.rows.history(users, place), self.ctr.item.weight,
                               mode="mean", padding_idx=0)
        return self.to_state(torch.cat([self.ctr.user(users), past], -1))

    def prompt(self, texts):
        """[2, 3] The prompts of texts (T,) -> (P (T, m, width); codes (T,), of several levels in one number; VQ
        terms)."""
        users, none = (self.rows.text_user[texts],
                       torch.zeros(len(texts), dtype=torch.long, device=texts.device))
        if not self.soft:
            group = self.group[users]
            return self.words[group], group, self.words.new_zeros(())
        norm = self.to_query[1]
        # its moments are those of the states from the first batch on: starting at (0, 1) is one code for all
        norm.momentum = max(0.1, 1 / (1 + int(norm.num_batches_tracked)))
        z = self.to_query(self.state(users, self.rows.text_place[texts]))
        index, terms, value, left = none, z.new_zeros(()), 0, z
        if self.args.prompt == "mixture":  # soft attention over the codes, instead of one
            codes = self.books[0].codes
            if self.training and self.args.kmeans and not self.books[0].ready:
                self.books[0].start(z)
            value = (z @ codes.T / z.shape[-1] ** 0.5).softmax(-1) @ codes
        elif self.args.prompt == "shared":
            value = self.books[0].codes.expand(len(texts), -1)
        else:
            for level, book in enumerate(self.books):
                c, chosen, term = book(left)
                c = c - (left - left.detach()) if level else c   # the task's gradient goes to the state once
                value, left = value + c, left - c.detach()
                index, terms = index * len(book.codes) + chosen, terms + term   # levels are digits
        return self.words[0] + self.scale * self.to_prompt(value).view(len(texts), self.m, -1), index, terms

    @torch.no_grad()
    def codes(self, texts):
        """The codes of texts (T,) -> (T,), as the model stands. The LLM is not asked."""
        self.eval()
        return torch.cat([self.prompt(part)[1] for part in texts.split(1024)])

    def tokens(self, text):
        """What the LLM reads: slots for the prompt, then the user's last titles."""
        u, place = int(self.rows.text_user[text]), int(self.rows.text_place[text])
        return llm.chat(self.tokenizer, [
            *range(self.m), TEXT.format(history=history_lines(self.rows.logs.history(u, place)))])

    def read(self, texts, prompt):
        """[3, 4] texts (T,), prompt (T, m, width) -> what the LLM knows (T, D), before fusion. One LLM pass per
        text, for users of self.adapted with the adapter."""
        self.passes += len(texts)
        known, adapted = prompt.new_zeros(len(texts), self.args.dim), self.adapted[self.rows.text_user[texts]]
        for part, switch in ((adapted, nullcontext), (~adapted, lora.disabled)):
            if part.any():
                with switch(self.llm):
                    output, mask = llm.hidden_states(self.llm, [self.tokens(t) for t in texts[part].tolist()],
                                                     prompt[part])
                known[part] = self.extract(prompt[part], output.float(), mask)
        return known

    def score(self, table, known=None):
        """[5] Logits (n, C) of a table's items; known (n, D): what the LLM knows for each row, None: the
        recommender alone."""
        users, place, items = table[0], table[1], table[3:].T
        return self.score_items(users, items, self.state(users, place),
                                self.rows.history(users, place), known)

    def score_items(self, users, items, h, history, known=None):
        """[5] users (B,), items (B, C), states h (B, D), history (B, L), known (B, D) or None -> (B, C)."""
        if known is None:
            return self.ctr(users, items + 1, history, state=h)
        k = torch.sigmoid(self.gate(torch.cat([h, known], -1))) * known
        s = self.ctr(users, items + 1, history, state=h + k)
        if not self.args.match:
            return s
        few = items.numel() < len(self.items)                    # else each item's vector is computed once
        t = self.to_item(self.items[items]) if few else self.to_item(self.items)[items]
        return s + (t @ k[:, :, None])[..., 0]


def rec_loss(s, head, tau=1.0):
    """[7] (n,) from logits s (n, C), the target first."""
    if head == "nce":
        return -F.log_softmax(s / tau, -1)[:, 0]
    return (F.softplus(-s[:, 0]) + F.softplus(s[:, 1:]).mean(1)) / 2


def confidence(s, head, tau=1.0):
    """(n,) probability given to the right answers: of the target, and with bce of 1 - p for its negative."""
    if head == "nce":
        return F.softmax(s / tau, -1)[:, 0]
    return (torch.sigmoid(s[:, 0]) + torch.sigmoid(-s[:, 1:]).mean(1)) / 2


def loss_of(args, model, texts, known, terms):
    """[6] on texts (T,) and what the LLM knows of them (T, D) -> a number, and the parts that are logged."""
    table, owner = model.rows.of_texts(texts)
    with_llm = rec_loss(model.score(table, known[owner]), args.head, args.tau).mean()
    without = rec_loss(model.score(table), args.head, args.tau).mean()
    return (with_llm + without + terms,
            {"with_llm": with_llm.detach(), "without": without.detach(), "vq": terms.detach()})


def judged_loss(args, model, texts, known, judged):
    """[9] on texts (T,): those in judged (T,) are read now, of the others known (T, D) is taken as it is."""
    for module in (model.books, *([model.to_query] if model.soft else ())):                   # the codes stay
        module.eval()
    known = known.clone()
    if judged.any():
        known[judged] = model.read(texts[judged], model.prompt(texts[judged])[0].detach())
    loss, parts = loss_of(args, model, texts, known, known.new_zeros(()))
    if args.align:
        parts["align"] = align_loss(
            known, model.state(model.rows.text_user[texts], model.rows.text_place[texts]), judged)
        loss, parts["align"] = loss + args.align * parts["align"], parts["align"].detach()
    return loss, parts


def align_loss(known, h, mask, tau=0.1):
    """InfoNCE of judged users' knowledge (T, D) against their states (T, D), in the batch; 0 with fewer than two."""
    if mask.sum() < 2:
        return known.sum() * 0
    a, b = F.normalize(known[mask], dim=-1), F.normalize(h[mask].detach(), dim=-1)
    return F.cross_entropy(a @ b.T / tau, torch.arange(len(a), device=a.device))


# 7 ------------------------------------------------------------------------------------------ judge
@torch.no_grad()
def knowledge(model, texts, desc=None, batch=64):
    """What the LLM knows of texts (T,) -> (T, D), dropout off."""
    model.eval()
    parts = torch.as_tensor(texts, device=model.rows.device).split(batch)
    return torch.cat([model.read(part, model.prompt(part)[0]) for part in progress(parts, desc, len(parts))])


@torch.no_grad()
def contradicted(args, model, texts, known, draws=0):
    """[8] Which of these texts (T,) the LLM misleads, (T,) bool, by the training choices that they serve: the mean
    over so many draws of their negatives, or (0) against those at hand."""
    if args.judge in ("all", "off"):
        return torch.full((len(texts),), args.judge == "all", device=texts.device)
    training = model.training
    model.eval()
    worse = 0
    for draw in range(max(draws, 1)):
        if draws:
            model.rows.redraw("judge", draw)
        table, owner = model.rows.of_texts(texts)
        parts = []
        for part in torch.arange(table.shape[1], device=texts.device).split(4096):
            with_llm, without = model.score(table[:, part], known[owner[part]]), model.score(table[:, part])
            if args.judge == "loss":
                parts.append(rec_loss(with_llm, args.head, args.tau) - rec_loss(without, args.head, args.tau))
            else:
                parts.append(confidence(without, args.head, args.tau) - confidence(with_llm, args.head, args.tau))
        worse = worse + torch.cat(parts) / max(draws, 1)
    model.train(training)
    unit = (model.rows.text_user[texts] if args.judge_level == "user"
            else torch.arange(len(texts), device=texts.device))
    total, count = (torch.zeros(int(unit.max()) + 1, device=texts.device).index_add_(0, unit[owner], x)
                    for x in (worse, torch.ones_like(worse)))
    return ((total / count.clamp(min=1) > args.margin) & (count >= args.judge_least))[unit]


def users_of(rows, texts):
    """(n_users,) bool: whose texts these are."""
    users = np.zeros(len(rows.data.users), dtype=bool)
    users[rows.text_user[texts].cpu().numpy()] = True
    return users


def judge_report(rows, texts, known, judged):
    """The share of texts (T,) that are judged, (T,) bool, the mean length of their knowledge (T, D) and of the
    others'; on the toy world the judge's precision and recall: judged against misled users, among those with
    training choices."""
    size, mean = known.norm(dim=1), lambda x: round(float(x.sum() / max(len(x), 1)), 4)
    report = {"texts": round(float(judged.float().mean()), 4), "knowledge": mean(size[judged]),
              "knowledge_others": mean(size[~judged])}
    if (truth := misled(rows)) is None:
        return report
    users, there = users_of(rows, texts[judged]), users_of(rows, texts)
    hit = (users & truth & there).sum()
    return report | {"judged": round(float(users[there].mean()), 4),
                     "precision": round(float(hit / max(users[there].sum(), 1)), 4),
                     "recall": round(float(hit / max(truth[there].sum(), 1)), 4)}


def misled(rows):
    """(n_users,) bool, the toy world's truth; None elsewhere."""
    return (None if rows.data.world is None
            else rows.data.world.misled[[int(name[1:]) for name in rows.data.users]])


# 8 ------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def evaluate_rows(model, table, known=None):
    """Targets against their negatives with what the LLM knows (n, D), or without -> {cell: AUC} and log-loss
    (negatives together weigh as much as the target). Cells: overall; on the toy world misled users and the
    rest; else the groups of every user field with at most 10 values."""
    model.eval()
    parts = torch.arange(table.shape[1], device=table.device).split(4096)
    s = torch.cat([model.score(table[:, p], None if known is None else known[p]) for p in parts])
    loss, s = float(rec_loss(s, "bce").mean()), s.cpu().numpy()
    user, label = np.repeat(table[0].cpu().numpy(), s.shape[1]), np.tile(np.arange(s.shape[1]) == 0, len(s))
    s = s.flatten()
    cells, truth = {"overall": user >= 0}, misled(model.rows)
    if truth is not None:
        cells |= {"misled": truth[user], "rest": ~truth[user]}
    for field in model.rows.data.user_fields:
        names, group = model.rows.groups(field)
        cells |= {f"{field}={name}": group[user] == k for k, name in enumerate(names) if len(names) <= 10}
    found = {name: metrics.auc(label[mask], s[mask]) for name, mask in cells.items() if mask.any()}
    return ({name: round(v, 6) for name, v in found.items() if v == v or name == "overall"}
            | {"log_loss": round(loss, 6)})


@torch.no_grad()
def evaluate_ranking(model, known=None):
    """Full ranking of the test target among all items that the user has not had: Recall and NDCG. known (n, D)
    of rows.test."""
    model.eval()
    rows, logs = model.rows, model.rows.logs
    n, pick = len(rows.data.items), np.arange(rows.test.shape[1])
    if rows.args.rank_users < len(pick):
        pick = np.sort(np.random.default_rng([rows.args.seed, 71]).choice(
            pick, rows.args.rank_users, replace=False))
    every, ranks = torch.arange(n, device=rows.device), []
    for part in progress(torch.as_tensor(pick, device=rows.device).split(8),
                         "full ranking", -(-len(pick) // 8)):
        table = rows.test[:, part]
        s = model.score(torch.cat([table[:3], every[:, None].expand(n, len(part))]),
                        None if known is None else known[part])
        users, place, _, target = table[:4].cpu().numpy()
        ranks.append(metrics.ranks_of(s.cpu().numpy(), target, logs.had(users, place)))
    return metrics.ranking_report(np.concatenate(ranks))


def codes_view(model, codes):
    """Every code in words: the tokens nearest to what its prompt adds to the mean prompt, how many texts chose
    it, on the toy world the share of these that are of misled users, and three typical users with their last
    titles. codes (n_texts,): the choice of every text."""
    rows, book, truth = model.rows, model.books[0], misled(model.rows)
    table = F.normalize(model.llm.get_input_embeddings().weight.float(), dim=-1)
    prompts = model.words[0] + model.scale * model.to_prompt(book.codes).view(len(book.codes), model.m, -1)
    near = (F.normalize(prompts - prompts.mean(0), dim=-1) @ table.T).argmax(-1)
    z = model.to_query(model.state(rows.text_user, rows.text_place))
    lines = []
    for k in range(len(book.codes)):
        mine = (codes == k).nonzero()[:, 0]
        typical = mine[torch.cdist(z[mine], book.codes[k:k + 1])[:, 0].argsort()[:3]].tolist()
        titles = [rows.logs.history(int(rows.text_user[t]), int(rows.text_place[t])) for t in typical]
        hurt = ({} if truth is None or not len(mine) else
                {"misled": round(float(truth[rows.text_user[mine].cpu().numpy()].mean()), 4)})
        lines.append({"code": k, "texts": len(mine), **hurt,
                      "nearest_tokens": [model.tokenizer.decode([i]) for i in near[k].tolist()],
                      "typical_users": [{"user": rows.data.users[int(rows.text_user[t])], "titles": lines_}
                                        for t, lines_ in zip(typical, titles)]})
    return lines, z


class Store:
    """Served knowledge: (text, code, adapter or not) -> vector (D,), in knowledge.safetensors. What is there is
    never read again."""

    def __init__(self, run, model):
        self.run, self.model = run, model
        found = run.load("knowledge")
        self.keys = {key: k for k, key in enumerate(found[1]["keys"])} if found else {}
        self.vectors = found[0]["vectors"] if found else torch.zeros(0, model.args.dim)

    @torch.no_grad()
    def get(self, texts, desc=None):
        """Texts (T,) -> ((T, D), codes (T,)): looked up, and read by the LLM where not there yet."""
        codes = self.model.codes(texts)
        adapted = self.model.adapted[self.model.rows.text_user[texts]].tolist()
        keys = [hashlib.sha256(repr((self.model.tokens(t), k, a)).encode()).hexdigest()[:32]
                for t, k, a in zip(texts.tolist(), codes.tolist(), adapted)]
        if self.model.args.prompt == "mixture":                  # no code: the vector is the user's own
            keys = [f"{key}/{t}" for key, t in zip(keys, texts.tolist())]
        new = {key: t for key, t in zip(keys, texts.tolist()) if key not in self.keys}
        if new:
            self.vectors = torch.cat([self.vectors, knowledge(self.model, list(new.values()), desc).cpu()])
            for key in new:
                self.keys[key] = len(self.keys)
            self.run.save("knowledge", {"vectors": self.vectors}, {"keys": list(self.keys)})
        return self.vectors[[self.keys[key] for key in keys]].to(self.model.rows.device), codes


# 9 ------------------------------------------------------------------------------------------ train
def epochs(args, run, model, name, most, batches, step, optimizer, valid, adapter=False, fall=False):
    """Train a phase and keep the epoch with the best validation AUC. Resumable after any epoch, bit-equal.

    batches(rng) -> list of index arrays; step(batch) -> loss and parts to log, under the phase's own random numbers.
    adapter: the LLM's adapter is trained too. fall: the learning rates fall, epoch by epoch, to 1 / most of what
    they were. Returns (what the phase reports, seconds).
    """
    now = lambda: (prefix("model/", model.state_dict())
                   | (prefix("lora/", lora.state(model.llm)) if adapter else {}))

    def restore(tensors):
        model.load_state_dict(strip(tensors, "model/"))
        if adapter:
            lora.load_state(model.llm, strip(tensors, "lora/"))
    first, waited, spent, rates = 0, 0, 0.0, [group["lr"] for group in optimizer.param_groups]
    if (saved := run.begin(name)) is not None:
        tensors, earlier = saved
        first, best, waited, steps, spent, model.passes = (
            earlier[k] for k in ("epoch", "best", "waited", "steps", "seconds", "passes"))
        kept = strip(tensors, "best/")
        restore(strip(tensors, "now/"))
        run.load_optimizer(optimizer, tensors)
    else:                                                        # a phase may end where it began
        best, kept, steps = (valid() if name == "eliminate" else -1.0,
                             {k: v.clone() for k, v in now().items()}, 0)
    for epoch in range(first, most):
        if waited >= args.patience:
            break
        rng, start, totals = (np.random.default_rng([args.seed, cuda.key_seed(name) % 2**31, epoch]),
                              time.perf_counter(), [])
        torch.manual_seed(cuda.key_seed(args.seed, name, epoch))                              # dropout
        for book in getattr(model, "books", ()):
            book.generator = cuda.generator("cpu", args.seed, name, epoch)
        model.rows.redraw(name, epoch)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (1 - epoch / most) if fall else rate
        todo = batches(rng)
        model.train()
        for batch in progress(todo, f"{name} {epoch + 1}", len(todo)):
            loss, parts = step(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            totals.append(parts)
        steps, spent, waited = steps + len(todo), spent + time.perf_counter() - start, waited + 1
        value = valid()
        run.log(name, epoch + 1, most,
                **{k: float(sum(t[k] for t in totals)) / len(totals) for k in totals[0]},
                valid_auc=value, **({} if name == "base" else train_usage(model)))
        if value > best:
            best, waited, kept = value, 0, {k: v.clone() for k, v in now().items()}
        run.save(name, prefix("now/", now()) | prefix("best/", kept) | run.optimizer_tensors(optimizer),
                 {"epoch": epoch + 1, "best": best, "waited": waited,
                  "steps": steps, "seconds": spent, "passes": model.passes})
    restore(kept)
    return {"valid_auc": round(best, 4), "steps": steps}, spent


def train_usage(model):
    """Usage and perplexity of the codebook over the training texts."""
    if model.args.prompt != "codebook":
        return {}
    share, perplexity = usage(
        first_level(model, torch.as_tensor(model.rows.train_texts, device=model.rows.device)),
        model.args.codes)
    return {"code_usage": share, "perplexity": perplexity}


def first_level(model, texts):
    """Codes of texts (T,) in the first codebook -> (T,)."""
    return model.codes(texts) // model.args.codes ** (model.args.levels - 1)


def adam(args, model, adapter=False, lr=None):
    groups = [{"params": [p for p in model.parameters() if p.requires_grad],
               "weight_decay": args.weight_decay}]
    if adapter:
        groups.append({"params": lora.parameters(model.llm),
                       "lr": llm.suited(args.lora_lr, args.backbone, 1e-3, 1e-4)})
    return torch.optim.Adam(groups, lr=args.lr if lr is None else lr)


def train_adapter(model, on):
    """Whether the LLM's adapter gets gradients; it is read in any case."""
    for p in lora.parameters(model):
        p.requires_grad_(on)


def train_base(args, run, model):
    """Phase 1: the recommender alone."""
    rows = model.rows

    def step(batch):
        loss = rec_loss(model.score(rows.train[:, batch]), args.head, args.tau).mean()
        return loss, {"loss": loss.detach()}
    batches = lambda rng: torch.as_tensor(
        rng.permutation(rows.train.shape[1]), device=rows.device).split(args.base_batch)
    return epochs(args, run, model, "base", args.base_epochs, batches, step, adam(args, model),
                  lambda: evaluate_rows(model, rows.valid)["overall"])


def train_prompts(args, run, model):
    """Phase 2 (with --joint all that follows): codes, prompts, extraction, fusion and (--no-freeze-base, --joint)
    recommender, through the frozen LLM."""
    rows, learn = model.rows, args.joint or not args.freeze_base
    for module in (model.ctr, model.to_state):
        module.requires_grad_(learn)

    def step(texts):
        prompt, _, terms = model.prompt(texts)
        train_adapter(model.llm, False)
        known, extra = model.read(texts, prompt), {}
        if args.joint:  # the adapter sees the judged texts only, prompts see all
            train_adapter(model.llm, True)
            mask = contradicted(args, model, texts, known.detach())
            known, extra = known.clone(), {"judged": mask.float().mean()}
            if mask.any():
                known[mask] = model.read(texts[mask], prompt[mask])
        loss, parts = loss_of(args, model, texts, known, terms)
        return loss, parts | extra
    # two texts or more in each
    many = max(1, min(-(-len(rows.train_texts) // args.batch), len(rows.train_texts) // 2))
    batches = lambda rng: torch.as_tensor(
        rng.permutation(rows.train_texts), device=rows.device).tensor_split(many)
    return epochs(args, run, model, "collaborate", args.epochs, batches, step, adam(args, model, args.joint),
                  lambda: valid_auc(model), adapter=args.joint, fall=True)


def valid_auc(model):
    """With what the LLM knows now."""
    texts, row = torch.unique(model.rows.valid[2], return_inverse=True)
    return evaluate_rows(model, model.rows.valid, knowledge(model, texts)[row])["overall"]


def eliminate(args, run, model, known, mask):
    """Phase 4: [9]. known (T, D), mask (T,) of the training texts, in their order. The LLM reads judged texts
    only."""
    rows = model.rows
    texts = torch.as_tensor(rows.train_texts, device=rows.device)
    soft = [model.to_query, model.to_prompt] if model.soft else []
    model.requires_grad_(True)
    for module in (model.to_state, model.ctr.user, model.ctr.item, model.extract, model.books, *soft):
        module.requires_grad_(False)
    train_adapter(model.llm, True)

    def batches(rng):
        judged, others = (rng.permutation(np.flatnonzero(m))
                          for m in (mask.cpu().numpy(), ~mask.cpu().numpy()))
        many = -(-len(judged) // args.eliminate_batch)
        beside = np.array_split(others[:len(judged)], many)
        return [torch.as_tensor(np.concatenate(pair), device=rows.device)
                for pair in zip(np.array_split(judged, many), beside)]

    step = lambda pick: judged_loss(args, model, texts[pick], known[pick], mask[pick])
    return epochs(args, run, model, "eliminate", args.eliminate_epochs, batches, step,
                  adam(args, model, True, args.eliminate_lr), lambda: valid_auc(model), adapter=True)


def train(args, shared=None):
    """All phases in one run; each is skipped when the run folder says that it is done. Returns the RESULT record.

    shared: {phase: a run folder in which it is the same}, to be taken over from there.
    """
    cuda.alone("coco.py")
    if args.ablations:
        return ablations(args)
    cuda.seed_everything(args.seed)
    device = cuda.pick_device(args.device)
    rows = Rows(args, device)
    run = Run(args, "coco", rows.data.fingerprint)
    if run.done("result"):
        return run.result(run.done("result"))
    model = CoCo(args, rows).to(device)
    run.header(args.prompt != "none", device=str(device),
               data=f"{rows.data.name} ({rows.data.fingerprint}): {len(rows.data.users):,} users, "
                    f"{len(rows.data.items):,} items",
               rows=f"train {rows.train.shape[1]:,}, valid {rows.valid.shape[1]:,}, "
                    f"test {rows.test.shape[1]:,} choices; {len(rows.text_user):,} texts",
               model=f"{sum(p.numel() for p in model.parameters()):,} trained beside {args.backbone}, "
                     f"prompt {args.prompt}")
    for phase, other in (shared or {}).items():
        if not run.done(phase):
            run.inherit(other, phase, [f"{phase}.safetensors"])
    take = lambda name: strip(run.load(name)[0], "best/")
    if not run.done("base"):
        run.finish("base", train_base(args, run, model)[0])
    # of phase 1 the recommender alone: the rest may be another variant's, and is as it began
    model.load_state_dict({name: tensor for name, tensor in strip(take("base"), "model/").items()
                           if name.startswith(("ctr.", "to_state."))}, strict=False)
    result = {"script": "coco", "data": rows.data.name, "backbone": args.backbone, "prompt": args.prompt,
              "head": args.head, "judge": args.judge if args.prompt != "none" else "off", "seed": args.seed,
              "base": run.done("base")}
    known = known_valid = None
    if args.prompt != "none":
        if not run.done("collaborate"):
            run.finish("collaborate", train_prompts(args, run, model)[0] | {"passes": model.passes})
        best = take("collaborate")
        model.load_state_dict(strip(best, "model/"))
        if args.joint:
            lora.load_state(model.llm, strip(best, "lora/"))
        result["collaborate"] = run.done("collaborate")
        if args.judge != "off" and not args.joint:
            texts = torch.as_tensor(rows.train_texts, device=device)
            if not run.done("judge"):
                before = knowledge(model, texts, "reading all texts")
                mask = contradicted(args, model, texts, before, args.judge_draws)
                run.save("judge", {"known": before, "judged": mask}, {})
                run.finish("judge", judge_report(rows, texts, before, mask))
            kept = run.load("judge")[0]
            before, mask = kept["known"].to(device), kept["judged"].to(device)
            if args.adapt == "judged" and args.judge != "all":
                model.adapted = torch.as_tensor(users_of(rows, texts[mask]), device=device)
            result["judged"] = run.done("judge")
            if not run.done("eliminate"):
                if mask.any():
                    record, seconds = eliminate(args, run, model, before, mask)
                    print(f"eliminate: {seconds:.1f} s", flush=True)
                    run.finish("eliminate", record)
                else:
                    run.finish("eliminate", {"steps": 0})
            if mask.any():
                best = take("eliminate")
                model.load_state_dict(strip(best, "model/"))
                lora.load_state(model.llm, strip(best, "lora/"))
            result["eliminate"] = run.done("eliminate")
        if (args.joint or args.judge != "off") and args.lora_lr != 0:
            lora.save(model.llm, run.folder / "adapter", args.backbone)
        store = Store(run, model)
        (known_valid, _), (known, _) = (store.get(table[2], "writing knowledge down")
                                        for table in (rows.valid, rows.test))
        if args.prompt == "codebook":
            result["codes"] = describe(run, model)
    result["valid"], result["test"] = (evaluate_rows(model, rows.valid, known_valid),
                                       evaluate_rows(model, rows.test, known))
    if known is not None:
        result["test_without_llm"] = evaluate_rows(model, rows.test)
    result["ranking"] = evaluate_ranking(model, known)
    run.finish("result", result)
    show(result)
    return run.result(result)


@torch.no_grad()
def describe(run, model):
    """codes.jsonl, and map.png of the users' states by code. -> usage of the codes over all texts."""
    codes = first_level(model, torch.arange(len(model.rows.text_user), device=model.rows.device))
    lines, z = codes_view(model, codes)
    run.write_jsonl("codes", lines)
    if (plt := pyplot()) is not None:
        centred = (z - z.mean(0)).float().cpu()
        # the first two principal axes
        xy = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
        figure, axis = plt.subplots(figsize=(6, 5))
        axis.scatter(xy[:, 0], xy[:, 1], c=codes.cpu(), s=4, cmap="tab20", linewidths=0)
        axis.set(title="States of the users, by code", xlabel="first principal axis", ylabel="second")
        figure.tight_layout()
        figure.savefig(run.folder / "map.png", dpi=150)
        plt.close(figure)
    share, perplexity = usage(codes, model.args.codes)
    return {"usage": round(share, 4), "perplexity": round(perplexity, 4)}


def show(result):
    """Print the test figures beside their baselines."""
    print(f"\nprompt {result['prompt']}, judge {result['judge']}, head {result['head']}")
    print(f"{'AUC on test':22}{'':>10}{'same model, LLM off':>22}")
    for cell, value in result["test"].items():
        beside = result.get("test_without_llm", {}).get(cell)
        print(f"  {cell:20}{value:10.4f}" + (f"{beside:22.4f}" if beside is not None else ""))
    print(f"  {'NDCG@10, all items':20}{result['ranking']['ndcg@10']:10.4f}")
    if "precision" in result.get("judged", {}):
        print(f"the judge finds the misled users: precision {result['judged']['precision']:.3f}, "
              f"recall {result['judged']['recall']:.3f}")


# 10 ---------------------------------------------------------------------------------------------- compare
VARIANTS = {   # name: (what changes, the variant whose phase 2 is the same); of phase 1 see `ablations`
    "no LLM": ({"prompt": "none"}, None),
    "no LLM but categories": ({"prompt": "none", "categories": True}, None),
    "static": ({"prompt": "static", "judge": "off"}, None),
    "shared": ({"prompt": "shared", "judge": "off"}, None),
    "mixture": ({"prompt": "mixture", "judge": "off"}, None),
    "gender": ({"prompt": "group:gender", "judge": "off"}, None),
    "age": ({"prompt": "group:age", "judge": "off"}, None),
    "codebook": ({"judge": "off"}, None),
    "codebook and categories": ({"judge": "off", "categories": True}, None),
    "full": ({}, "codebook"),
    "adapt all": ({"adapt": "all"}, "codebook"),
    "judge all": ({"judge": "all"}, "codebook"),
    "recommender too": ({"eliminate_lr": 3e-4}, "codebook"),
    "joint": ({"joint": True}, None),
    "mean pool": ({"extract": "mean", "judge": "off"}, None),
    "no match": ({"match": False, "judge": "off"}, None),
    "ste": ({"vq": "ste", "judge": "off"}, None),
    "ema": ({"vq": "ema", "judge": "off"}, None),
    "no reset": ({"dead": 0, "kmeans": False, "judge": "off"}, None),
}


def ablations(args):
    """Every variant and seed, one run folder each; one table on test, and (with matplotlib) pilot.png: the gain
    of every prompt by group of users. Variants whose recommender has the same inputs have phase 1 in common. The
    same command again goes on where it stopped."""
    root = folder_of(args, "coco", "ablations")
    fields = datasets.load(args.data, args.data_dir, args.max_bad_rows, args.seed).user_fields
    names = [n for n in VARIANTS
             if (n in args.variants if args.variants else n not in ("gender", "age") or n in fields)]
    if absent := [n for n in names if n in ("gender", "age") and n not in fields]:
        raise UserError(f"--variants {absent[0]}: these data have no such user field; leave it out")
    found, runs = {name: [] for name in names}, []
    for seed in args.seeds or (args.seed,):
        for name in found:
            change, alike = VARIANTS[name]
            folder = lambda n: root / f"s{seed}" / n.replace(" ", "-")
            first = next(n for n in found if VARIANTS[n][0].get("categories") == change.get("categories"))
            shared = {"base": folder(first)} if first != name else {}
            if alike in found:
                shared["collaborate"] = folder(alike)
            print(f"\n=== {name}, seed {seed}", flush=True)
            found[name].append(train(variant(args, folder(name), seed=seed, **change), shared))
            runs.append(folder(name))
    cells = [c for c in found[names[0]][0]["test"] if c != "log_loss" and "=" not in c]
    columns = {c: lambda r, c=c: r["test"][c] for c in cells} | {
        "NDCG@10": lambda r: r["ranking"]["ndcg@10"], "codes used": lambda r: r["codes"]["usage"],
        "perplexity": lambda r: r["codes"]["perplexity"], "precision": lambda r: r["judged"]["precision"],
        "recall": lambda r: r["judged"]["recall"], "LoRA steps": lambda r: r["eliminate"]["steps"],
        "validation": lambda r: r["valid"]["overall"]}
    print(f"\ntest, mean ± std over {len(found[names[0]])} seeds; validation: AUC, overall")
    table = summarise(found, columns)
    plot(found, root / "pilot.png")
    return write_table(root, args, table, runs)


def plot(found, path):
    """The pilot study's figure: AUC against that of no LLM, by group of users, for every prompt; lines: std
    over seeds."""
    if (plt := pyplot()) is None or "no LLM" not in found:
        return
    groups = [c for c in found["no LLM"][0]["test"] if c not in ("log_loss", "overall")]
    others = [name for name in found if VARIANTS[name][0].get("prompt") != "none"]
    figure, axis = plt.subplots(figsize=(max(6, 1.2 * len(groups) + 2), 4))
    for k, name in enumerate(others):
        gain = np.array([[r["test"].get(g, np.nan) - b["test"].get(g, np.nan) for g in groups]
                         for r, b in zip(found[name], found["no LLM"])])
        spread = gain.std(0, ddof=1) if len(gain) > 1 else None
        axis.bar(np.arange(len(groups)) + (k - (len(others) - 1) / 2) / (len(others) + 1), gain.mean(0),
                 1 / (len(others) + 1), yerr=spread,
                 error_kw={"linewidth": 0.8, "ecolor": "grey"}, label=name)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(groups)), groups, rotation=30 if len(groups) > 4 else 0)
    axis.set(ylabel="AUC over no LLM", title=f"Who gains by which prompt ({len(found['no LLM'])} seeds)")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"gain by group: {path}")


if __name__ == "__main__":
    main(Args, train, __doc__)
