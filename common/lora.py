"""LoRA (arXiv 2106.09685), by hand: y = W x + (alpha / r) B A x with W frozen and only A, B trained.

The contract, which is PEFT's: the base computes in its own dtype, the adapter lives and computes in fp32; at
the start the adapter adds exactly nothing (B = 0); switched off, the model is the base. Files are PEFT's.
"""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.cuda import Dropout
from common.run import UserError, write_atomically

PEFT_PREFIX = "base_model.model."
# PEFT can write more than this file computes. {key of adapter_config.json: the value of a plain LoRA}
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "lora_bias": False,
         "fan_in_fan_out": False, "init_lora_weights": (True, False, "gaussian"),
         "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [], "alora_invocation_tokens": (),
         "use_qalora": False, "use_bdlora": (), "kasa_config": (), "monteclora_config": (),
         "layer_replication": (), "trainable_token_indices": ()}


class _Down(torch.autograd.Function):
    """x A^T in A's fp32. Autograd would keep the fp32 copy of x, one per layer; this keeps x, which layers
    beside each other share: a third less memory in a bf16 model (with dropout on x there is a copy all the
    same)."""

    @staticmethod
    def forward(ctx, x, A):
        ctx.save_for_backward(x, A)
        return x.to(A.dtype) @ A.T

    @staticmethod
    def backward(ctx, g):
        x, A = ctx.saved_tensors
        return ((g @ A).to(x.dtype) if ctx.needs_input_grad[0] else None,
                g.flatten(0, -2).T @ x.flatten(0, -2).to(A.dtype) if ctx.needs_input_grad[1] else None)


class LoRALinear(nn.Module):
    """A frozen nn.Linear of any dtype with a low-rank fp32 adapter: A (r, in), B (out, r)."""

    def __init__(self, base, rank, alpha, dropout, generator=None):
        super().__init__()
        self.base, self.scale, self.dropout = base.requires_grad_(False), alpha / rank, Dropout(dropout)
        # Kaiming-uniform, a = sqrt(5), drawn on the CPU: the same anywhere
        bound = 1 / math.sqrt(base.in_features)
        drawn = torch.zeros(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(drawn.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        self.enabled, self.merged = True, False

    def forward(self, x):
        y = self.base(x)
        if not self.enabled or self.merged:
            return y
        A = self.lora_A
        if self.training and self.dropout.p:
            x = self.dropout(x.to(A.dtype))
        low = x @ A.T if x.dtype == A.dtype else _Down.apply(x, A)             # (..., r)
        return (y + (low * self.scale) @ self.lora_B.T).to(y.dtype)            # added in fp32, rounded once

    def delta(self):
        """(alpha / r) B A in fp32, (out, in)."""
        return self.lora_B @ self.lora_A * self.scale


def layers(model):
    """{path: LoRALinear} in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(model, targets="all-linear", rank=16, alpha=32.0, dropout=0.0, seed=0):
    """Replace linear layers by LoRA layers, in place; returns their paths. Everything else is frozen.

    targets: ends of layer paths such as ("q_proj", "v_proj") or "q_proj,v_proj", or "all-linear" = every linear
    layer but the output head. Raises UserError when a target is no linear layer of this model.
    """
    if layers(model):
        raise ValueError("this model has LoRA layers already")
    head = model.get_output_embeddings()
    # the router of a mixture of experts is a subclass with a forward of its own, and none of these
    plain = lambda m: isinstance(m, nn.Linear) and (type(m).forward is nn.Linear.forward
                                                    or type(m).__name__ == "FalconLinear")
    linear = {name: m for name, m in model.named_modules() if plain(m) and m is not head}
    if targets == "all-linear":
        chosen, missing = linear, [] if linear else [targets]
    else:
        targets = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else targets
        ends = {t: [name for name in linear if f".{name}".endswith(f".{t}")] for t in targets}
        missing = sorted(t for t, names in ends.items() if not names)
        chosen = {name: m for name, m in linear.items() if any(name in names for names in ends.values())}
    if missing or not chosen:
        there = (", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
                 or "none (GPT-2's Conv1D is not one)")
        raise UserError(f"--lora-targets {','.join(missing)}: no such linear layer; this model has {there}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, base in chosen.items():
        layer = LoRALinear(base, rank, alpha, dropout, generator)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.train(base.training))
    return list(chosen)


def parameters(model):
    """The adapter's tensors, the only trainable ones."""
    return [p for layer in layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def _unmerged(model):
    """{path: LoRALinear}. Raises RuntimeError while merged: the base is not the base then."""
    found = layers(model)
    if any(layer.merged for layer in found.values()):
        raise RuntimeError("the adapter is merged into the weights; unmerge it first")
    return found


@contextmanager
def disabled(model):
    """Within, the model is the base: the usual reference policy. May be nested."""
    before = {layer: layer.enabled for layer in _unmerged(model).values()}
    for layer in before:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


@contextmanager
def swapped(model, tensors):
    """Within, the adapter has these tensors (a snapshot from `state`): a reference policy or a frozen encoder
    at an adapter's memory, no second model. In place, so not between a forward pass and its backward."""
    own = state(model)
    load_state(model, tensors)
    try:
        yield model
    finally:
        load_state(model, own)


@torch.no_grad()
def merge(model):
    """Add the adapters into the weights, summed in fp32. RuntimeError where one would not be finite."""
    _add_delta(model, +1)


@torch.no_grad()
def unmerge(model):
    """Subtract them again: exact in fp32 up to rounding; a bf16 weight keeps its rounding of the merge."""
    _add_delta(model, -1)


def _add_delta(model, sign):
    todo = {name: layer for name, layer in layers(model).items() if layer.merged != (sign > 0)}
    for name, layer in todo.items():                # all are checked before one is touched
        if not torch.isfinite(layer.base.weight.float() + sign * layer.delta()).all():
            raise RuntimeError(f"{name}: the merged weight is not finite")
    for layer in todo.values():
        layer.base.weight.copy_(layer.base.weight.float() + sign * layer.delta())
        layer.merged = sign > 0


def _named(model):
    return {f"{name}.{part}.weight": getattr(layer, part)
            for name, layer in layers(model).items() for part in ("lora_A", "lora_B")}


def state(model):
    """{path.lora_A.weight: tensor}: copies of the adapter's tensors and nothing of the base."""
    return {key: p.detach().clone() for key, p in _named(model).items()}


@torch.no_grad()
def load_state(model, tensors):
    """Copy tensors as `state` gives them into the adapter. Raises UserError if names or shapes do not fit."""
    _unmerged(model)
    wanted = _named(model)
    odd = sorted(set(wanted) ^ set(tensors)) or [k for k in wanted if wanted[k].shape != tensors[k].shape]
    if odd:
        raise UserError(f"this adapter is of another model, rank or --lora-targets: {odd[0]} does not fit")
    for key, parameter in wanted.items():
        parameter.copy_(tensors[key])


def save(model, folder, base_name):
    """Write PEFT's adapter_config.json and adapter_model.safetensors; what was written is re-opened and
    checked before it takes its place. Raises RuntimeError without an adapter or where it is not finite."""
    folder, found = Path(folder), layers(model)
    if not found:
        raise RuntimeError(f"{folder}: the model has no adapter to save")
    tensors = {PEFT_PREFIX + key: t.cpu().contiguous() for key, t in state(model).items()}
    first = next(iter(found.values()))
    rank = first.lora_A.shape[0]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name),
              "bias": "none", "r": rank, "lora_alpha": first.scale * rank, "lora_dropout": first.dropout.p,
              "target_modules": list(found), "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "adapter_model.safetensors.tmp"
    save_file(tensors, beside, metadata={"format": "pt"})
    written = load_file(beside)                     # the famous 443-byte file without a single tensor
    if set(written) != set(tensors) or not all(torch.isfinite(t).all() for t in written.values()):
        raise RuntimeError(f"{beside}: the adapter is incomplete or not finite")
    os.replace(beside, folder / "adapter_model.safetensors")
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=1))


def load(model, folder):
    """Inject and load an adapter that this module or PEFT saved. Raises UserError saying what is wrong."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        rank, alpha, dropout = config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
        raise UserError(f"{folder}: no readable LoRA adapter there ({problem!r})") from None
    other = [f"{key}={config[key]!r}" for key, plain in PLAIN.items()
             if config.get(key) not in (None, *(plain if isinstance(plain, tuple) else (plain,)))]
    if other:
        raise UserError(f"{folder}/adapter_config.json: only plain LoRA can be loaded, not "
                        f"{', '.join(other)}; save one without these options")
    tensors = {key.removeprefix(PEFT_PREFIX): t.float() for key, t in tensors.items()}
    if not tensors or not all(torch.isfinite(t).all() for t in tensors.values()):
        raise UserError(f"{folder}/adapter_model.safetensors: empty or not finite; save the adapter again")
    paths = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    inject(model, paths, rank, alpha, dropout)
    load_state(model, tensors)
