"""A causal LM from Hugging Face: load, tokenise, sample groups, score, encode.

ONE IDEA carries sampling and training: a packed row holds one prompt and its G completions, and `owner` says
whose each position is (-1 the prompt's, g completion g's, anything below nobody's). A query may look at the
prompt and at its own completion, and positions restart at the prompt's end:

    row       p0 p1 p2 p3 | a0 a1 a2 | b0 b1          keys that b1 sees:  p0 p1 p2 p3 . . . b0 b1
    owner     -1 -1 -1 -1    0  0  0    1  1
    position   0  1  2  3    4  5  6    4  5

So the prompt is computed once for its G completions, when they are sampled and when they are trained on.
Models that do not follow such a mask (sliding windows, recurrent layers, ALiBi) or that change their logits
after the output head are refused.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from common.run import UserError, progress

TINY = Path(__file__).parent / "tiny"
# cuDNN's attention, the first choice on Hopper, returns NaN gradients with some masks (pytorch issue 196678),
# and plans anew for each shape.
torch.backends.cuda.enable_cudnn_sdp(False)
logging.disable_progress_bar()                # of loading: seconds for what runs here, and lines between ours
logging.set_verbosity_error()                 # its report of weights that do not fit is a page; ours is a line
logging.get_logger("huggingface_hub").setLevel(logging.ERROR)         # each of its retries is a line


# --------------------------------------------------------------------------------------------- load, tokenise
def is_bundled(name):
    return name == "tiny" or Path(name).resolve() == TINY.resolve()


def suited(given, backbone, bundled, other):
    """A setting as given, or else what suits the bundled LLM, or a larger one."""
    return given if given is not None else bundled if is_bundled(backbone) else other


def load(name, device="cpu", dtype=torch.float32):
    """(model, tokenizer) of a Hugging Face causal LM by name or folder ("tiny" = the bundled one), frozen, in
    eval mode. Weights come from safetensors and no code of the model's repository is run.

    Raises UserError, in one line, when it cannot be had or cannot be used here.
    """
    source = str(TINY) if name == "tiny" else str(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            attn_implementation="sdpa", output_loading_info=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:                      # of many kinds: a folder may hold anything
        what = ("give a folder with config.json, tokenizer and model.safetensors, or a name and a network"
                if isinstance(problem, OSError) else "take another one; code of a checkpoint is never run")
        why = ("its weights do not fit its config.json" if "mismatched" in str(problem)
               else _first_line(problem))
        raise UserError(f"--backbone {name}: cannot be loaded ({why}); {what}") from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:    # transformers would make up an empty one
        raise UserError(f"--backbone {name}: has no tokenizer files; get them, too")
    if missing := sorted(info["missing_keys"]):       # transformers would go on with random numbers there
        raise UserError(f"--backbone {name}: its files lack {len(missing)} of the weights, "
                        f"such as {missing[0]}; get them anew")
    if (most := max(tokenizer.get_vocab().values())) >= (rows := model.get_input_embeddings().weight.shape[0]):
        raise UserError(f"--backbone {name}: its tokenizer has the token {most}, "
                        f"its model only {rows} embeddings; resize these, or take another one")
    model = model.to(device).eval().requires_grad_(False)
    check_backbone(model, name)
    return model, tokenizer


@torch.no_grad()
def check_backbone(model, name):
    """Raise UserError unless the model follows the packed rows' mask and its logits are head(hidden state).

    Known offenders by their config, the others by trying: one packed row against plain passes. Both errors
    are relative, so that bf16's rounding (about 1 %) passes and another computation does not.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    why = "models that rescale their logits are not supported"
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "logit_scale", 1) not in (1, None):
        raise UserError(f"--backbone {name}: {why}; take another one")
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)}
    if scaled := ropes & {"longrope", "dynamic"}:
        raise UserError(f"--backbone {name}: its positions ({', '.join(scaled)}) depend on the longest text of a "
                        "batch, which is not supported; take another one")
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    if set(kinds) != {"full_attention"}:
        raise UserError(f"--backbone {name}: only models with full attention in every layer are supported, "
                        f"this one has {', '.join(sorted(set(kinds)))}; take another one")
    a, b = torch.tensor([[[1, 2, 3, 4], [5, 6, 7, 8]]]) % config.vocab_size, [9 % config.vocab_size, 2, 3]
    try:
        packed = pack([b], a, torch.tensor([[4, 4]])).to(model.device)
        plain = torch.tensor([b + c.tolist() for c in a[0]], device=model.device)
        want = model.get_decoder()(input_ids=plain, use_cache=False).last_hidden_state[:, 2:-1]
        far = _distance(packed_hidden(model, packed), want.flatten(0, 1))
        logits = model(input_ids=plain, use_cache=False).logits[:, 2:-1]
        rescaled = _distance(model.get_output_embeddings()(want), logits)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as problem:
        raise UserError(f"--backbone {name}: does not take packed rows ({_first_line(problem)}); "
                        "take another one") from None
    if not torch.isfinite(want).all():
        raise UserError(f"--backbone {name}: its weights give no finite numbers; get them anew")
    if not far < 0.1:
        raise UserError(f"--backbone {name}: its attention ignores the mask of packed rows; take another one")
    if not rescaled < 0.02:
        raise UserError(f"--backbone {name}: {why}; take another one")


def _first_line(problem):
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]


def _distance(x, y):
    return float((x.float() - y.float()).norm() / y.float().norm())


MARK = "\ue000user\ue001"                             # private-use letters: in no template, in no system text


def eos_ids(model, tokenizer):
    """The tokens that end a text, sorted: the model's, the tokenizer's, and that of the chat template after an
    answer, which a base model with a template (Qwen2.5) names nowhere else."""
    found = getattr(model.generation_config, "eos_token_id", None)
    found = [found] if isinstance(found, int) else list(found or [])
    after = tokenizer(_after_answer(tokenizer, MARK).partition(MARK)[2], add_special_tokens=False)["input_ids"]
    turn = [i for i in after if i in tokenizer.added_tokens_decoder][:1]
    return sorted({*found, *turn, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})


def _render(tokenizer, messages, think=False, **flags):
    # date_string is of Llama's templates: a prompt is the same on any day; enable_thinking of Qwen3's
    return tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024",
                                         enable_thinking=think, **flags)


def _after_answer(tokenizer, answer):
    """What follows the user's text where the answer is already there; "" if the template cannot say it."""
    messages = [{"role": "user", "content": MARK}, {"role": "assistant", "content": answer}]
    try:
        return _render(tokenizer, messages).partition(MARK)[2] if tokenizer.chat_template else ""
    except Exception:                                                 # jinja's, or what the template raises
        return ""


def _frame(tokenizer, system=None, think=False):
    """The chat template's text before and after the user's. think: the answer begins with the model's own
    <think>; else it is the text that is asked for, and a template that opens a thought has it closed."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": MARK})
    if tokenizer.chat_template:
        try:
            text = _render(tokenizer, messages, think, add_generation_prompt=True)
        except Exception as problem:                                  # jinja's, or what the template raises
            raise UserError(f"--backbone: its chat template fails ({_first_line(problem)}); "
                            "take another one") from None
        if text.rstrip().endswith("<think>"):
            text = text.rstrip().removesuffix("<think>") + ("" if think else "<think>\n\n</think>\n\n")
    else:
        text = (tokenizer.bos_token or "") + "\n".join(m["content"] for m in messages) + "\n"
    if text.count(MARK) != 1:
        raise UserError("--backbone: its chat template drops or repeats the user's text; take another one")
    return text.split(MARK)


@functools.lru_cache(maxsize=8)
def _frame_ids(tokenizer, system, think):
    return [tokenizer(part, add_special_tokens=False)["input_ids"] for part in _frame(tokenizer, system, think)]


@functools.lru_cache(maxsize=8)
def _control(tokenizer):
    """Pattern of the places after the first letter of the chat format's tokens that are not on the list of
    special tokens, such as Qwen3's <think> and <tool_call>: split_special_tokens would leave them whole."""
    words = [w for w in set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
             if len(w.strip()) > 1 and w in str(tokenizer.chat_template)]
    return re.compile("|".join(f"(?<={re.escape(w[0])})(?={re.escape(w[1:])})" for w in words) or r"(?!)")


@functools.lru_cache(maxsize=4096)
def plain_ids(tokenizer, text):
    """Token ids (tuple) of text that is data: control tokens inside are tokenised as the letters they are."""
    return tuple(i for part in _control(tokenizer).split(text) if part
                 for i in tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def single_token(tokenizer, word):
    """The id of a word that is one token where an answer begins, else None: its first piece would be scored in its
    place. SentencePiece has two of most words, and only one of them begins a line."""
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    ask, told = _frame(tokenizer)[1], _after_answer(tokenizer, word)
    space = " " * (told.startswith(ask) and told.removeprefix(ask).startswith(" "))        # [/INST] Yes
    before, both = ids(ask), ids(ask + space + word)
    found = both[len(before):] if both[:len(before)] == before else ids(word)
    return found[0] if len(found) == 1 and tokenizer.decode(found).strip() == word.strip() else None


def chat(tokenizer, text, system=None, think=False):
    """One user message in the model's chat format -> token ids. A control token in `text` is tokenised as
    plain text: what users and titles say is data and can neither end the message nor open another.

    A SentencePiece tokenizer that puts a space before every text puts one before the user's text and before
    what follows, too. text may be a list of texts and slot numbers k >= 0: slot k becomes the id -1 - k, a
    place for a vector (see `embed`). think: see `_frame`.
    """
    before, after = _frame_ids(tokenizer, system, think)
    inside = []
    for part in [text] if isinstance(text, str) else text:
        inside += plain_ids(tokenizer, part) if isinstance(part, str) else [-1 - part]
    return [*before, *inside, *after]


# --------------------------------------------------------------------------------------------- group rollouts
def block_mask(owner_q, owner_k, causal=False):
    """owner_q (B, Q), owner_k (B, K) -> (B, 1, Q, K) bool, True = may look.

    causal: the queries are the keys, in order. Padding sees the prompt too: a query that sees nothing would
    be NaN, and 0 x NaN is NaN for everybody.
    """
    q, k = owner_q[:, :, None], owner_k[:, None, :]
    seen = (k == -1) | ((k == q) & (k >= 0))
    return (seen.tril() if causal else seen)[:, None]


class SharedCache:
    """Keys and values of packed rows, one buffer (B, heads, capacity, head_dim) per layer, filled from left;
    owner (B, capacity) says whose each column is. Hugging Face's cache protocol, as far as decoders ask.

    `fixed` hands out the whole buffer at a fixed address, as CUDA graphs need it; otherwise the filled part.
    """

    def __init__(self, rows, capacity, device):
        self.owner = torch.full((rows, capacity), -2, device=device)
        self.layers, self.width, self.fixed, self.columns = {}, 0, False, None

    def update(self, keys, values, layer, *_, **__):
        if layer not in self.layers:
            capacity = self.owner.shape[1]
            self.layers[layer] = [x.new_zeros(*x.shape[:2], capacity, x.shape[-1]) for x in (keys, values)]
        end = self.width + keys.shape[2]
        for buffer, new in zip(self.layers[layer], (keys, values)):
            if self.fixed:                          # the columns are in a tensor: one graph serves every step
                buffer.index_copy_(2, self.columns, new)
            else:
                buffer[:, :, self.width:end] = new
        return [buffer if self.fixed else buffer[:, :, :end] for buffer in self.layers[layer]]

    def get_seq_length(self, layer=0):
        return self.width

    def select(self, rows):
        self.owner = self.owner[rows]
        for layer, buffers in self.layers.items():
            self.layers[layer] = [buffer[rows] for buffer in buffers]


@dataclass
class Rollout:
    """tokens (B, G, T) right-padded with 0, lengths (B, G) with the end token, logps (B, G, T) as sampled,
    truncated (B, G) bool. `fed`: how many token positions went through the model, the prompts' included."""
    tokens: torch.Tensor
    lengths: torch.Tensor
    logps: torch.Tensor
    truncated: torch.Tensor
    fed: int = 0

    def select(self, rows):
        parts = (x[rows] for x in (self.tokens, self.lengths, self.logps, self.truncated))
        return Rollout(*parts, self.fed)


def _pick(logits, uniform, temperature, greedy):
    """logits (N, V), uniform (N,) -> (token (N,), its log-probability (N,)), in fp32. Sampling inverts the
    cumulative distribution at `uniform`: a row's draw does not depend on which other rows are still there."""
    logps = F.log_softmax(logits.float() / temperature, dim=-1)
    if greedy:
        token = logits.argmax(-1)
    else:
        precise = torch.float32 if logits.device.type == "mps" else torch.float64
        cdf = logps.to(precise).exp().cumsum(-1)
        token = torch.searchsorted(cdf, uniform.to(precise)[:, None] * cdf[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logps.gather(1, token[:, None])[:, 0]


def _positions(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


def width(model):
    """Of the last hidden states, which some models project down before their head."""
    return model.get_output_embeddings().weight.shape[1]


def _check_length(model, n, what="a prompt"):
    if n > _positions(model):
        raise UserError(f"--backbone: {what} would take {n} positions, and it has {_positions(model)}; "
                        "shorten it (--prompt-history) or take another one")


def embed(model, tokens, soft):
    """Input embeddings (B, S, D) of token ids in which -1 - k stands for the vector soft[:, k], soft (B, K, D)."""
    words = model.get_input_embeddings()(tokens.clamp(min=0))
    slot = (-1 - tokens).clamp(min=0)[..., None].expand_as(words)
    return torch.where((tokens < 0)[..., None], soft.to(words.dtype).gather(1, slot), words)


def _hidden(model, tokens, position, mask, cache, soft=None):
    read = {"input_ids": tokens} if soft is None else {"inputs_embeds": embed(model, tokens, soft)}
    return model.get_decoder()(**read, attention_mask=mask, position_ids=position,
                               cache=cache, use_cache=cache is not None).last_hidden_state


def _prefill(model, prompts, capacity):
    """Run the right-padded prompts once -> (cache, lengths (B,), logits (B, V) after each last token)."""
    tokens, real, lengths = _right_padded(prompts, model.device)
    B, P = tokens.shape
    cache = SharedCache(B, P + capacity, model.device)
    cache.owner[:, :P] = torch.where(real, -1, -2)
    mask = block_mask(cache.owner[:, :P], cache.owner[:, :P], causal=True)
    hidden = _hidden(model, tokens, torch.arange(P, device=model.device).expand(B, P), mask, cache)
    cache.width = P
    last = hidden[torch.arange(B, device=model.device), lengths - 1]
    return cache, lengths, model.get_output_embeddings()(last)


def _step(model, cache, tokens, position, who):
    """Feed one token to each of the A completions `who` (rows, A) of every row -> logits (rows, A, V)."""
    end = cache.width + who.shape[1]
    cache.owner[:, cache.width:end] = who
    hidden = _hidden(model, tokens, position, block_mask(who, cache.owner[:, :end]), cache)
    cache.width = end
    return model.get_output_embeddings()(hidden)


def _leave(cache, rows, who, tokens):
    """Close ranks: unfinished completions move to the left, finished rows go. -> (rows, who, tokens)"""
    count = (who >= 0).sum(1)
    keep = count.nonzero()[:, 0]
    slots = (who[keep] < 0).int().argsort(dim=1, stable=True)[:, :int(count.max())]
    if len(keep) < len(rows):
        cache.select(keep)
    return rows[keep], who[keep].gather(1, slots), tokens[keep].gather(1, slots)


@torch.no_grad()
def rollout(model, prompts, n, max_new_tokens, temperature=1.0, greedy=False, eos_ids=(), generator=None,
            static=None):
    """Sample n completions of each prompt (lists of token ids). The prompts are prefilled once; a decoding
    step feeds (rows, A) tokens, one per unfinished completion, into the cache the group shares. Finished ones
    leave. static (default: on CUDA): fixed shapes, one CUDA graph for all steps; nobody leaves early.

    Returns a Rollout; a pure function of weights, arguments and the generator's state. Raises UserError when
    the texts would be longer than the model has positions.
    """
    if not prompts or min(map(len, prompts)) == 0 or n < 1 or max_new_tokens < 1:
        raise ValueError("rollout needs at least one prompt, completion and token, and no empty prompt")
    device, B, P = model.device, len(prompts), max(map(len, prompts))
    _check_length(model, P + max_new_tokens, f"a prompt of {P} tokens and {max_new_tokens} new ones")
    static = device.type == "cuda" if static is None else static
    # All noise first, one number for each token that may come: who else is still there changes nobody's draw.
    source = generator.device if generator else device
    uniform = torch.rand(B, n, max_new_tokens, generator=generator, device=source).to(device)
    stop = torch.tensor(list(eos_ids), device=device, dtype=torch.long)
    cache, lengths, logits = _prefill(model, prompts, max_new_tokens * n)
    step = _StaticStep(model, cache, B, n) if static else functools.partial(_step, model, cache)
    logits = logits[:, None].expand(B, n, -1)
    out = Rollout(torch.zeros(B, n, max_new_tokens, dtype=torch.long, device=device),
                  torch.zeros(B, n, dtype=torch.long, device=device),
                  torch.zeros(B, n, max_new_tokens, device=device),
                  torch.ones(B, n, dtype=torch.bool, device=device), fed=B * P)
    rows = torch.arange(B, device=device)                             # which prompt each remaining row is
    who = torch.arange(n, device=device).repeat(B, 1)                 # (rows, A) whose slot it is, -3: none
    for t in range(max_new_tokens):
        b, a = (who >= 0).nonzero(as_tuple=True)
        r, g = rows[b], who[b, a]
        token, logp = _pick(logits[b, a], uniform[r, g, t], temperature, greedy)
        ended = torch.isin(token, stop)
        out.tokens[r, g, t], out.logps[r, g, t] = token, logp
        out.lengths[r, g], out.truncated[r, g] = t + 1, ~ended
        some, everyone = torch.stack([ended.any(), ended.all()]).tolist()
        if everyone or t + 1 == max_new_tokens:
            break
        fed = torch.zeros_like(who)
        fed[b, a] = token
        if some:
            who[b[ended], a[ended]] = -3
            if not static:
                rows, who, fed = _leave(cache, rows, who, fed)
        out.fed += who.numel()
        logits = step(fed, (lengths[rows] + t)[:, None].expand_as(who), who)
    T = int(out.lengths.max())
    return Rollout(out.tokens[..., :T], out.lengths, out.logps[..., :T], out.truncated, out.fed)


@functools.lru_cache
def _side_stream(device):
    """One for all graphs: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class _StaticStep:
    """`_step` at fixed shapes and addresses; on CUDA it is captured once as a graph and replayed."""

    def __init__(self, model, cache, B, n):
        self.model, self.cache, device = model, cache, model.device
        self.tokens, self.position = (torch.zeros(B, n, dtype=torch.long, device=device) for _ in range(2))
        self.mask = torch.zeros(B, 1, n, cache.owner.shape[1], dtype=torch.bool, device=device)
        cache.fixed, cache.columns = True, torch.zeros(n, dtype=torch.long, device=device)
        self.graph, self.logits = None, None

    def forward(self):
        hidden = _hidden(self.model, self.tokens, self.position, self.mask, self.cache)
        return self.model.get_output_embeddings()(hidden)

    def __call__(self, tokens, position, who):
        cache, end = self.cache, self.cache.width + who.shape[1]
        cache.owner[:, cache.width:end] = who
        self.tokens.copy_(tokens)
        self.position.copy_(position)
        self.mask.copy_(block_mask(who, cache.owner))
        cache.columns.copy_(torch.arange(cache.width, end, device=who.device))
        cache.width = end
        if who.device.type != "cuda":
            return self.forward()
        if self.graph is None:
            side = _side_stream(who.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                        # warm-up outside the capture, as CUDA asks
                self.forward()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side):
                self.logits = self.forward()
        self.graph.replay()
        return self.logits


# ---------------------------------------------------------------------------------- log-probabilities, packed
@dataclass
class Packed:
    """Prompts with their completions in packed rows. tokens, position, owner (B, S); labels (B, G, T); valid
    (B, G, T) bool; source (B, G, T): flat index into (B * S) of the position that predicts each token."""
    tokens: torch.Tensor
    position: torch.Tensor
    owner: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    source: torch.Tensor

    def to(self, device):
        return Packed(*(getattr(self, f).to(device) for f in self.__dataclass_fields__))


def pack(prompts, completions, lengths):
    """prompts: B lists of token ids; completions (B, G, T), lengths (B, G) -> Packed.

    The first token of each completion is predicted by the prompt's last position; the last token of a
    completion predicts nothing and is left out.
    """
    if min(map(len, prompts)) == 0:
        raise ValueError("pack: an empty prompt cannot predict a completion's first token")
    B, G, T = completions.shape
    completions, lengths = completions.cpu(), lengths.cpu()
    size = [len(p) + int((lengths[b] - 1).clamp(min=0).sum()) for b, p in enumerate(prompts)]
    S = max(size)
    tokens, position = torch.zeros(B, S, dtype=torch.long), torch.zeros(B, S, dtype=torch.long)
    owner = torch.full((B, S), -2)
    source = torch.zeros(B, G, T, dtype=torch.long)
    for b, p in enumerate(prompts):
        start = len(p)
        tokens[b, :start], position[b, :start], owner[b, :start] = torch.tensor(p), torch.arange(start), -1
        for g in range(G):
            k = max(int(lengths[b, g]) - 1, 0)
            tokens[b, start:start + k] = completions[b, g, :k]
            position[b, start:start + k] = len(p) + torch.arange(k)
            owner[b, start:start + k] = g
            source[b, g, 0] = b * S + len(p) - 1
            source[b, g, 1:k + 1] = b * S + start + torch.arange(k)
            start += k
    return Packed(tokens, position, owner, completions, torch.arange(T) < lengths[..., None], source)


def pack_tails(prefixes, tails):
    """prefixes: B lists of token ids; tails: B lists of lists of token ids, which need not be alike in number
    or length -> Packed."""
    lengths = torch.zeros(len(tails), max(map(len, tails)), dtype=torch.long)
    completions = torch.zeros(*lengths.shape, max(len(t) for row in tails for t in row), dtype=torch.long)
    for b, row in enumerate(tails):
        for g, tail in enumerate(row):
            lengths[b, g], completions[b, g, :len(tail)] = len(tail), torch.tensor(tail)
    return pack(prefixes, completions, lengths)


def last_slots(packed):
    """Which of packed_hidden's rows predicts the last token of each completion: one index for each that is not
    empty."""
    length = packed.valid.sum(-1).flatten()
    return (length.cumsum(0) - 1)[length > 0]


class _ChunkedLogp(torch.autograd.Function):
    """log softmax(h W^T / temperature)[label], a few rows at a time: no (N, V) tensor in either direction.

    The gradient of a row's log-probability, (W[label] - softmax W) / temperature, is found in the forward
    pass while its softmax is at hand; the backward pass only scales it. Exact, and the head is computed once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, temperature):
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            raise ValueError("the output head must be frozen: chunked log-probabilities give it no gradient")
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logps, entropy = (torch.empty(len(hidden), dtype=precise, device=hidden.device) for _ in range(2))
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _chunks(len(hidden), weight):
            h, y = hidden[part], labels[part, None]
            logp = F.log_softmax(F.linear(h, weight, bias).to(precise) / temperature, -1)         # (rows, V)
            logps[part] = logp.gather(1, y)[:, 0]
            p = logp.exp()
            entropy[part] = -(p * logp).sum(-1)
            if slope is not None:                # p - 1 before rounding to bf16: near p = 1 it would be noise
                p.scatter_add_(1, y, torch.full_like(logps[part, None], -1))
                slope[part] = (p.to(weight.dtype) @ weight) / -temperature
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        slope, = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None, None


def _chunks(n, weight):
    """Slices of n rows, such that rows x vocabulary is about 2**24 numbers (64 MiB in fp32)."""
    rows = max(16, 2**24 // weight.shape[0])
    return [slice(k, min(k + rows, n)) for k in range(0, n, rows)]


@dataclass
class Scored:
    """logps, entropy (B, G, T) fp32, 0 beyond each completion; hidden (N, D) at valid positions."""
    logps: torch.Tensor
    entropy: torch.Tensor
    hidden: torch.Tensor | None = None


def packed_hidden(model, packed, soft=None):
    """Hidden states that predict the completion tokens (N, D), in the order of packed.valid's True ones.
    soft (B, K, D): the vectors of the slots in a row's tokens (see `embed`)."""
    if packed.tokens.shape[1] > _positions(model):      # perhaps too long: only then wait for the numbers
        _check_length(model, int(packed.position.max()) + 1)
    position, mask = packed.position, block_mask(packed.owner, packed.owner, causal=True)
    if packed.labels.shape[1] == 1:                     # plain causal rows: kernels are faster without a mask
        position = mask = None
    hidden = _hidden(model, packed.tokens, position, mask, None, soft)
    return hidden.reshape(-1, hidden.shape[-1])[packed.source[packed.valid]]


def completion_logps(model, packed, temperature=1.0, hidden=False):
    """log pi(completion token | prompt, earlier tokens) -> Scored; differentiable in the adapters."""
    head = model.get_output_embeddings()
    h = packed_hidden(model, packed)
    logps, entropy = _ChunkedLogp.apply(h, head.weight, head.bias, packed.labels[packed.valid], temperature)
    shape = packed.valid.shape
    return Scored(logps.new_zeros(shape).masked_scatter(packed.valid, logps),
                  entropy.new_zeros(shape).masked_scatter(packed.valid, entropy), h if hidden else None)


def few_logits(model, hidden, ids):
    """Logits (N, len(ids)) of a few tokens, such as Yes and No, in fp32: a bf16 head would round away how they
    differ."""
    head = model.get_output_embeddings()
    precise = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden.to(precise), head.weight[ids].to(precise),
                    None if head.bias is None else head.bias[ids].to(precise))


def over_logits(model, fn, *hidden, beside=(), exact=()):
    """fn(logits (n, V) of each hidden, and these rows of each tensor `beside`) -> (N, ...) for hidden states
    (N, D), a few rows at a time; the backward pass computes the logits again, so that none are kept. exact: token ids
    whose logits are `few_logits`."""
    head = model.get_output_embeddings()

    def part(*some):
        logits = [head(h).to(torch.promote_types(h.dtype, torch.float32)) for h in some[:len(hidden)]]
        if len(exact) and head.weight.dtype == torch.bfloat16:
            ids = torch.tensor(exact, device=head.weight.device)
            logits = [x.index_copy(1, ids, few_logits(model, h, ids)) for x, h in zip(logits, some)]
        return fn(*logits, *some[len(hidden):])
    return torch.cat([checkpoint(part, *(h[rows] for h in (*hidden, *beside)), use_reentrant=False)
                      for rows in _chunks(len(hidden[0]), head.weight)])


def exact_kl(model, packed, hidden, ref_hidden, temperature=1.0):
    """KL(pi || ref) over the whole vocabulary at each completion position -> (B, G, T); hidden and ref_hidden
    (N, D) as `completion_logps` gives them."""
    def divergence(logits, ref_logits):
        p, q = (F.log_softmax(x / temperature, -1) for x in (logits, ref_logits))
        return (p.exp() * (p - q)).sum(-1)
    kl = over_logits(model, divergence, hidden, ref_hidden)
    return kl.new_zeros(packed.valid.shape).masked_scatter(packed.valid, kl)


# ------------------------------------------------------------------------------------------- encode and score
def _right_padded(batch, device):
    """Lists of token ids -> tokens (B, T), mask (B, T) bool, lengths (B,)."""
    lengths = torch.tensor([len(x) for x in batch], device=device)
    T = max(map(len, batch))
    tokens = torch.tensor([list(x) + [0] * (T - len(x)) for x in batch], device=device)
    return tokens, torch.arange(T, device=device) < lengths[:, None], lengths


def _plain_hidden(model, tokens, mask, soft=None):
    """Last hidden states (B, T, D) of right-padded rows: a causal model never sees padding on its right."""
    _check_length(model, tokens.shape[1])
    read = {"input_ids": tokens} if soft is None else {"inputs_embeds": embed(model, tokens, soft)}
    return model.get_decoder()(**read, attention_mask=mask.long(), use_cache=False).last_hidden_state


def hidden_states(model, prompts, soft=None):
    """Prompts (B lists of token ids, with slots for the vectors soft (B, K, D), see `embed`) -> (last hidden states
    (B, T, D), mask (B, T) of the real ones). Differentiable in soft, though the model is frozen."""
    tokens, mask, _ = _right_padded(prompts, model.device)
    return _plain_hidden(model, tokens, mask, soft), mask


@torch.no_grad()
def encode(model, tokenizer, texts, batch_size=64, max_tokens=256, desc=None):
    """Mean of the last hidden layer over a text's tokens -> (N, D) fp32 on the model's device. An empty text
    is the end token alone. Independent of padding: a padded position is neither seen nor averaged."""
    empty = [(eos_ids(model, tokenizer) or [0])[0]]
    ids = [plain_ids(tokenizer, t)[:max_tokens] or empty for t in texts]
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    vectors = torch.zeros(len(ids), width(model), device=model.device)
    for start in progress(range(0, len(ids), batch_size), desc, -(-len(ids) // batch_size)):
        part = order[start:start + batch_size]
        tokens, mask, _ = _right_padded([ids[k] for k in part], model.device)
        hidden = _plain_hidden(model, tokens, mask)
        vectors[part] = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return vectors


class _ForkedCache:
    """Keys and values of B prefixes (a filled DynamicCache), read by R rows each. Every layer in turn uses one
    pair of buffers (B, R, heads, P + T, head_dim)."""

    def __init__(self, prefixes, R):
        self.layers, self.R, self.buffers = prefixes.layers, R, None

    def update(self, keys, values, layer, *_, **__):
        before = self.layers[layer].keys, self.layers[layer].values     # (B, heads, P, head_dim)
        B, heads, P, _ = before[0].shape
        if self.buffers is None:
            self.buffers = [x.new_empty(B, self.R, heads, P + x.shape[2], x.shape[3]) for x in (keys, values)]
        for buffer, old, new in zip(self.buffers, before, (keys, values)):
            buffer[..., :P, :] = old[:, None]
            buffer[..., P:, :] = new.view(B, self.R, heads, -1, new.shape[3])
        return [buffer.flatten(0, 1) for buffer in self.buffers]

    def get_seq_length(self, layer=0):
        return self.layers[layer].keys.shape[2]


@torch.no_grad()
def after_tails(model, prefixes, tails):
    """Last hidden states (N, D) of prefix b + each of tails[b], in order: B lists of token ids, B lists of such
    lists, none empty. A prefix runs once. Its tails then share rows about half as long as the prefix: one row per tail
    would copy the prefix's keys too often, one row for all would waste attention on other tails."""
    tokens, real, lengths = _right_padded(prefixes, model.device)
    B, P = tokens.shape
    T, most = max(len(tail) for row in tails for tail in row), max(map(len, tails))
    _check_length(model, P + T)
    prefix = DynamicCache(config=model.config)
    model.get_decoder()(input_ids=tokens, attention_mask=real.long(), cache=prefix, use_cache=True)
    beside = min(most, max(1, P // (2 * T)))
    R = -(-most // beside)                                       # rows of a prefix
    tokens, _, size = _right_padded(
        [tail for row in tails for tail in [*row, *[[0] * T] * (R * beside - len(row))]], model.device)
    position = ((lengths[:, None] + torch.arange(T, device=model.device))
                .repeat_interleave(R, 0).repeat(1, beside))
    own = torch.block_diag(*[torch.ones(T, T, device=model.device).tril()] * beside).bool()
    mask = torch.cat([real.repeat_interleave(R, 0)[:, None].expand(-1, beside * T, -1),
                      own.expand(B * R, -1, -1)], -1)[:, None]
    hidden = _hidden(model, tokens.view(B * R, -1), position, mask,
                     _ForkedCache(prefix, R)).view(len(tokens), T, -1)
    there = torch.tensor([k < len(row) for row in tails for k in range(R * beside)], device=model.device)
    return hidden[torch.arange(len(tokens), device=model.device), size - 1][there]


def next_token_logits(model, prompts, ids):
    """Logits of a few tokens (such as Yes and No) right after each prompt: (B, len(ids)) fp32."""
    tokens, mask, lengths = _right_padded(prompts, model.device)
    hidden = _plain_hidden(model, tokens, mask)
    return few_logits(model, hidden[torch.arange(len(prompts), device=model.device), lengths - 1], ids)
