"""A causal LM from Hugging Face: load, tokenise, sample groups, score, encode.

ONE IDEA carries sampling and training: a packed row holds one prompt and its G completions, and `owner` says whose
each position is (-1 the prompt's, g completion g's, anything below nobody's). A query may look at the prompt and at
its own completion, and positions restart at the prompt's end:

    row       p0 p1 p2 p3 | a0 a1 a2 | b0 b1          keys that b1 sees:  p0 p1 p2 p3 . . . b0 b1
    owner     -1 -1 -1 -1    0  0  0    1  1
    position   0  1  2  3    4  5  6    4  5

So the prompt is computed once for its G completions, when they are sampled and when they are trained on. Models with
a sliding window or recurrent layers do not follow such a mask and are refused.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.run import UserError, progress

TINY = Path(__file__).parent / "tiny"


# --------------------------------------------------------------------------------------------------- load, tokenise
def load(name, device="cpu", dtype=torch.float32):
    """(model, tokenizer) of a Hugging Face causal LM by name or folder ("tiny" = the bundled one), frozen, in eval mode.

    Raises UserError, in one line, when it cannot be had or cannot be used here.
    """
    source = str(TINY) if name == "tiny" else str(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, attn_implementation="sdpa")
    except (OSError, ValueError, KeyError) as problem:
        reason = str(problem).strip().splitlines()[0][:200]
        raise UserError(f"--backbone {name}: cannot be loaded ({reason}); give a folder with config.json, the tokenizer and "
                        "model.safetensors, or a Hugging Face name where there is a network") from None
    config = model.config
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "logit_scale", 1) != 1:
        raise UserError(f"--backbone {name}: models that rescale their logits are not supported")
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise UserError(f"--backbone {name}: only models with full attention in every layer are supported "
                        f"(this one has {', '.join(sorted(set(config.layer_types)))})")
    return model.to(device).eval().requires_grad_(False), tokenizer


def eos_ids(model, tokenizer):
    """The tokens that end a text: the model's and the tokenizer's, sorted."""
    found = getattr(model.generation_config, "eos_token_id", None)
    found = [found] if isinstance(found, int) else list(found or [])
    return sorted({*found, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})


@functools.lru_cache(maxsize=8)
def _frame(tokenizer, system):
    """The token ids of the chat template before and after the user's text."""
    mark = "USERTEXT"
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": mark}]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = (tokenizer.bos_token or "") + "\n".join(m["content"] for m in messages) + "\n"
    before, after = text.split(mark)
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))


def chat(tokenizer, text, system=None):
    """One user message in the model's chat format -> token ids. A control token in `text` is tokenised as plain text:
    what users and titles say is data and can neither end the message nor open another."""
    before, after = _frame(tokenizer, system)
    return before + tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] + after


# ----------------------------------------------------------------------------------------------------- group rollouts
class SharedCache:
    """Keys and values of packed rows in one buffer per layer, (B, heads, capacity, head_dim), filled from the left.

    `dynamic` hands out the filled part; otherwise the whole buffer at a fixed address, as CUDA graphs need it.
    """

    def __init__(self, capacity, dynamic=True):
        self.capacity, self.dynamic, self.layers = capacity, dynamic, {}
        self.width, self.columns = 0, None

    def update(self, keys, values, layer, *_, **__):
        if layer not in self.layers:
            B, heads, _, dim = keys.shape
            self.layers[layer] = [x.new_zeros(B, heads, self.capacity, x.shape[-1]) for x in (keys, values)]
        end = self.width + keys.shape[2]
        for buffer, new in zip(self.layers[layer], (keys, values)):
            if self.columns is None:
                buffer[:, :, self.width:end] = new
            else:                                        # positions live in a tensor: the same graph serves every step
                buffer.index_copy_(2, self.columns, new)
        return [buffer[:, :, :end] if self.dynamic else buffer for buffer in self.layers[layer]]

    def get_seq_length(self, layer=0):
        return self.width

    def select(self, rows):
        for layer, buffers in self.layers.items():
            self.layers[layer] = [buffer[rows] for buffer in buffers]


@dataclass
class Rollout:
    """tokens (B, G, T) right-padded with 0, lengths (B, G) with the end token, logps (B, G, T) fp32 as sampled,
    truncated (B, G) bool. `fed`: how many token positions went through the model, the prompts' included."""
    tokens: torch.Tensor
    lengths: torch.Tensor
    logps: torch.Tensor
    truncated: torch.Tensor
    fed: int = 0

    def select(self, rows):
        return Rollout(self.tokens[rows], self.lengths[rows], self.logps[rows], self.truncated[rows], self.fed)


def _pick(logits, uniform, temperature, greedy):
    """logits (N, V), uniform (N,) -> (token (N,), its log-probability (N,)), in fp32. Sampling inverts the cumulative
    distribution at `uniform`, so a row's draw does not depend on which other rows are still there."""
    logps = F.log_softmax(logits.float() / temperature, dim=-1)
    if greedy:
        token = logits.argmax(-1)
    else:
        precise = torch.float32 if logits.device.type == "mps" else torch.float64
        cdf = logps.to(precise).exp().cumsum(-1)
        token = torch.searchsorted(cdf, uniform.to(precise)[:, None] * cdf[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logps.gather(1, token[:, None])[:, 0]


@torch.no_grad()
def rollout(model, prompts, n, max_new_tokens, temperature=1.0, greedy=False, eos_ids=(), generator=None, static=None):
    """Sample n completions of each prompt (lists of token ids). The prompts are prefilled once; a decoding step feeds
    (B, A) tokens, one per unfinished completion, into the cache that the group shares. Finished ones leave.

    static (default: on CUDA): fixed shapes, one CUDA graph for all steps; nobody leaves until all are finished.
    Returns a Rollout; a pure function of weights, arguments and the generator's state.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("rollout needs at least one prompt, and no empty one")
    device, decoder, head = model.device, model.get_decoder(), model.get_output_embeddings()
    static = device.type == "cuda" if static is None else static
    B, P = len(prompts), max(map(len, prompts))
    uniform = torch.rand(B, n, max_new_tokens, generator=generator, device=generator.device if generator else device)
    uniform, stop = uniform.to(device), torch.tensor(list(eos_ids), device=device, dtype=torch.long)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.tensor([list(p) + [0] * (P - len(p)) for p in prompts], device=device)
    owner = torch.full((B, P + max_new_tokens * n), -2, device=device)
    owner[:, :P] = torch.where(torch.arange(P, device=device) < lengths[:, None], -1, -2)
    cache = SharedCache(P + max_new_tokens * n, dynamic=True)
    # Padding sees the prompt too: a query that sees nothing would be NaN, and 0 x NaN is NaN for everybody else.
    mask = (owner[:, None, None, :P] == -1) & torch.ones(P, P, dtype=torch.bool, device=device).tril()
    hidden = decoder(input_ids=tokens, attention_mask=mask, position_ids=torch.arange(P, device=device)[None].expand(B, P),
                     past_key_values=cache, use_cache=True).last_hidden_state
    cache.width = P
    logits = head(hidden[torch.arange(B, device=device), lengths - 1])[:, None].expand(B, n, -1)      # (B, A, V)

    out = Rollout(torch.zeros(B, n, max_new_tokens, dtype=torch.long, device=device),
                  torch.zeros(B, n, dtype=torch.long, device=device),
                  torch.zeros(B, n, max_new_tokens, device=device),
                  torch.ones(B, n, dtype=torch.bool, device=device), fed=B * P)
    rows = torch.arange(B, device=device)                                 # which prompt each remaining row is
    who = torch.arange(n, device=device).expand(B, n).contiguous()        # (rows, A) completion in each slot, -3 = empty
    graph = _StaticStep(model, cache, owner, n) if static else None
    for t in range(max_new_tokens):
        b, a = (who >= 0).nonzero(as_tuple=True)
        g = who[b, a]
        token, logp = _pick(logits[b, a], uniform[rows[b], g, t], temperature, greedy)
        out.tokens[rows[b], g, t], out.logps[rows[b], g, t] = token, logp
        out.lengths[rows[b], g] = t + 1
        ended = torch.isin(token, stop)
        out.truncated[rows[b], g] = ~ended
        if t + 1 == max_new_tokens or bool(ended.all()):
            break
        fed = torch.zeros_like(who)
        fed[b, a] = token
        if bool(ended.any()):
            who[b[ended], a[ended]] = -3
            if not static:                                                # close ranks: fewer slots, fewer rows
                count = (who >= 0).sum(1)
                keep = count.nonzero()[:, 0]
                slots = (who[keep] < 0).int().argsort(dim=1, stable=True)[:, :int(count.max())]
                who, fed = who[keep].gather(1, slots), fed[keep].gather(1, slots)
                if len(keep) < len(rows):
                    rows, owner = rows[keep], owner[keep]
                    cache.select(keep)
        position = (lengths[rows] + t)[:, None].expand_as(who)
        end = cache.width + who.shape[1]
        owner[:, cache.width:end] = who
        out.fed += who.numel()
        if static:
            logits = graph(fed, position, who)
        else:
            seen = (owner[:, None, :end] == -1) | (owner[:, None, :end] == who[:, :, None])           # (rows, A, end)
            hidden = decoder(input_ids=fed, attention_mask=seen[:, None], position_ids=position,
                             past_key_values=cache, use_cache=True).last_hidden_state
            logits = head(hidden)
        cache.width = end
    longest = int(out.lengths.max())
    return Rollout(out.tokens[..., :longest], out.lengths, out.logps[..., :longest], out.truncated, out.fed)


class _StaticStep:
    """One decoding step at fixed shapes and addresses; on CUDA it is captured once as a graph and replayed."""

    def __init__(self, model, cache, owner, n):
        B, S, device = *owner.shape, owner.device
        self.decoder, self.head, self.cache, self.owner = model.get_decoder(), model.get_output_embeddings(), cache, owner
        cache.dynamic = False
        self.fed, self.position = (torch.zeros(B, n, dtype=torch.long, device=device) for _ in range(2))
        self.mask = torch.zeros(B, 1, n, S, dtype=torch.bool, device=device)
        self.columns, self.graph, self.logits = torch.zeros(n, dtype=torch.long, device=device), None, None

    def forward(self):
        self.cache.columns = self.columns
        return self.head(self.decoder(input_ids=self.fed, attention_mask=self.mask, position_ids=self.position,
                                      past_key_values=self.cache, use_cache=True).last_hidden_state)

    def __call__(self, fed, position, who):
        self.fed.copy_(fed)
        self.position.copy_(position)
        self.mask.copy_(((self.owner[:, None] == -1) | (self.owner[:, None] == who[:, :, None]))[:, None])
        self.columns.copy_(torch.arange(self.cache.width, self.cache.width + fed.shape[1], device=fed.device))
        if fed.device.type != "cuda":
            return self.forward()
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                                # warm-up outside the capture, as CUDA asks
                self.forward()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.forward()
        self.graph.replay()
        return self.logits


# ------------------------------------------------------------------------------------------ log-probabilities, packed
@dataclass
class Packed:
    """Prompts with their completions in packed rows. tokens, position, owner (B, S); labels (B, G, T); valid (B, G, T)
    bool; source (B, G, T): flat index into (B * S) of the position that predicts each completion token."""
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

    The first token of each completion is predicted by the prompt's last position; the last token of a completion
    predicts nothing and is left out.
    """
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


class _ChunkedLogp(torch.autograd.Function):
    """log softmax(h W^T / temperature)[label], a few rows at a time: no (N, V) tensor in either direction.

    The gradient of a row's log-probability, (W[label] - softmax W) / temperature, is found in the forward pass while
    its softmax is at hand; the backward pass only scales it. Exact, and the head is computed once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, temperature):
        rows = max(16, 2**24 // weight.shape[0])
        logps, entropy = hidden.new_empty(len(hidden), dtype=torch.float32), hidden.new_empty(len(hidden), dtype=torch.float32)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for s in range(0, len(hidden), rows):
            h, y = hidden[s:s + rows], labels[s:s + rows]
            z = F.linear(h, weight, bias).float() / temperature
            lse = torch.logsumexp(z, -1)
            logps[s:s + rows] = z.gather(1, y[:, None])[:, 0] - lse
            p = torch.exp(z - lse[:, None])
            entropy[s:s + rows] = lse - (p * z).sum(-1)
            if slope is not None:
                slope[s:s + rows] = (weight[y].float() - (p.to(weight.dtype) @ weight).float()).to(h.dtype) / temperature
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        slope, = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None, None


@dataclass
class Scored:
    """logps, entropy (B, G, T) fp32, 0 beyond each completion; hidden (N, D) of the valid positions if asked for."""
    logps: torch.Tensor
    entropy: torch.Tensor
    hidden: torch.Tensor | None = None


def packed_hidden(model, packed):
    """Last hidden states that predict the completion tokens, (N, D), in the order of packed.valid's True entries."""
    owner = packed.owner
    S = owner.shape[1]
    seen = (owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None])             # (B, S, S)
    seen &= torch.ones(S, S, dtype=torch.bool, device=owner.device).tril()
    hidden = model.get_decoder()(input_ids=packed.tokens, attention_mask=seen[:, None], position_ids=packed.position,
                                 use_cache=False).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[packed.source[packed.valid]]


def completion_logps(model, packed, temperature=1.0, hidden=False):
    """log pi(completion token | prompt, earlier tokens) -> Scored; differentiable in the adapters."""
    head = model.get_output_embeddings()
    h = packed_hidden(model, packed)
    logps, entropy = _ChunkedLogp.apply(h, head.weight, head.bias, packed.labels[packed.valid], temperature)
    shape = packed.valid.shape
    return Scored(torch.zeros(shape, device=h.device).masked_scatter(packed.valid, logps),
                  torch.zeros(shape, device=h.device).masked_scatter(packed.valid, entropy), h if hidden else None)


def exact_kl(model, packed, hidden, ref_hidden, temperature=1.0):
    """KL(pi || ref) over the whole vocabulary at each completion position, (B, G, T), in chunks, differentiable."""
    head = model.get_output_embeddings()

    def part(h, r):
        p = F.log_softmax(head(h).float() / temperature, -1)
        q = F.log_softmax(head(r).float() / temperature, -1)
        return (p.exp() * (p - q)).sum(-1)
    rows = max(16, 2**24 // head.weight.shape[0])
    parts = [checkpoint(part, hidden[s:s + rows], ref_hidden[s:s + rows], use_reentrant=False)
             for s in range(0, len(hidden), rows)]
    return torch.zeros(packed.valid.shape, device=hidden.device).masked_scatter(packed.valid, torch.cat(parts))


# --------------------------------------------------------------------------------------------------- encode and score
def _right_padded(batch, device):
    lengths = torch.tensor([len(x) for x in batch], device=device)
    tokens = torch.tensor([list(x) + [0] * (int(lengths.max()) - len(x)) for x in batch], device=device)
    return tokens, (torch.arange(tokens.shape[1], device=device) < lengths[:, None]), lengths


@torch.no_grad()
def encode(model, tokenizer, texts, batch_size=64, max_tokens=256, desc=None):
    """Mean of the last hidden layer over a text's tokens -> (N, D) fp32 on the model's device. An empty text is the
    end token alone. Independent of padding: a padded position is neither seen nor averaged."""
    empty = [(eos_ids(model, tokenizer) or [0])[0]]
    ids = [tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"][:max_tokens] or empty for t in texts]
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    vectors = torch.zeros(len(ids), model.config.hidden_size, device=model.device)
    for start in progress(range(0, len(ids), batch_size), desc, -(-len(ids) // batch_size)):
        part = order[start:start + batch_size]
        tokens, mask, _ = _right_padded([ids[k] for k in part], model.device)
        hidden = model.get_decoder()(input_ids=tokens, attention_mask=mask.long(), use_cache=False).last_hidden_state
        vectors[part] = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return vectors


def next_token_logits(model, prompts, ids):
    """Logits of a few tokens (such as Yes and No) right after each prompt: (B, len(ids)) fp32."""
    tokens, mask, lengths = _right_padded(prompts, model.device)
    hidden = model.get_decoder()(input_ids=tokens, attention_mask=mask.long(), use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(prompts), device=model.device), lengths - 1]
    return (last.float() @ model.get_output_embeddings().weight[ids].float().T)
