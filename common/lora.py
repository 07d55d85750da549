"""LoRA (arXiv 2106.09685), by hand: y = W x + (alpha / r) B A x with W frozen and only A, B trained.

The contract, which is PEFT's: the base computes in its own dtype, the adapter lives and computes in fp32, at the start
the adapter adds exactly nothing (B = 0), switched off the model is the base again. Files are PEFT's too.
"""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from common.run import UserError, write_atomically

PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Module):
    """A frozen nn.Linear of any dtype with a low-rank fp32 adapter: A (r, in), B (out, r)."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base, self.scale, self.dropout = base.requires_grad_(False), alpha / rank, nn.Dropout(dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        self.enabled, self.merged = True, False

    def forward(self, x):
        y = self.base(x)
        if not self.enabled or self.merged:
            return y
        low = self.dropout(x.float()) @ self.lora_A.T                          # (..., r)
        return y + ((low @ self.lora_B.T) * self.scale).to(y.dtype)

    def delta(self):
        """(alpha / r) B A in fp32, (out, in)."""
        return self.lora_B @ self.lora_A * self.scale


def layers(model):
    """{path: LoRALinear} in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(model, targets="all-linear", rank=16, alpha=32.0, dropout=0.0, seed=0):
    """Replace linear layers by LoRA layers, in place; returns their paths. Everything else is frozen.

    targets: layer names such as ("q_proj", "v_proj"), or "all-linear" = every linear layer but the output head.
    Raises UserError when a target is no linear layer of this model.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if targets != "all-linear":
        last = {name: name.rsplit(".", 1)[-1] for name in linear}
        missing = sorted(set(targets) - set(last.values()))
        if missing:
            raise UserError(f"--lora-targets {','.join(missing)}: no such linear layer; this model has "
                            f"{', '.join(sorted(set(last.values())))}")
        linear = {name: m for name, m in linear.items() if last[name] in targets}
    generator = torch.Generator().manual_seed(seed)
    for name, base in linear.items():
        layer = LoRALinear(base, rank, alpha, dropout)
        with torch.no_grad():                       # Kaiming-uniform with a = sqrt(5), drawn on the CPU: same anywhere
            bound = 1 / math.sqrt(base.in_features)
            layer.lora_A.copy_(torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return list(linear)


def parameters(model):
    """The adapter's tensors, the only trainable ones."""
    return [p for layer in layers(model).values() for p in (layer.lora_A, layer.lora_B)]


@contextmanager
def disabled(model):
    """Within, the model is the base: the usual reference policy."""
    found = list(layers(model).values())
    before = [layer.enabled for layer in found]
    for layer in found:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in zip(found, before):
            layer.enabled = enabled


@contextmanager
def swapped(model, tensors):
    """Within, the adapter has these tensors (a snapshot): a reference policy or a frozen encoder at no memory."""
    own = state(model)
    load_state(model, tensors)
    try:
        yield model
    finally:
        load_state(model, own)


@torch.no_grad()
def merge(model):
    """Add the adapters into the weights, summed in fp32. Raises RuntimeError if a weight would not be finite."""
    _add_delta(model, +1)


@torch.no_grad()
def unmerge(model):
    """Subtract them again: exact in fp32 up to rounding; a bf16 weight keeps its rounding of the merge."""
    _add_delta(model, -1)


def _add_delta(model, sign):
    for name, layer in layers(model).items():
        if layer.merged == (sign > 0):
            continue
        weight = layer.base.weight.float() + sign * layer.delta()
        if not torch.isfinite(weight).all():
            raise RuntimeError(f"{name}: the merged weight is not finite")
        layer.base.weight.copy_(weight)
        layer.merged = sign > 0


def state(model):
    """{path.lora_A.weight: tensor}: copies of the adapter's tensors and nothing of the base."""
    return {f"{name}.{part}.weight": getattr(layer, part).detach().clone()
            for name, layer in layers(model).items() for part in ("lora_A", "lora_B")}


@torch.no_grad()
def load_state(model, tensors):
    """Copy tensors as `state` gives them into the adapter. Raises UserError if names or shapes do not fit."""
    found = layers(model)
    wanted = {f"{name}.{part}.weight": getattr(layer, part) for name, layer in found.items() for part in ("lora_A", "lora_B")}
    if set(wanted) != set(tensors) or any(wanted[k].shape != tensors[k].shape for k in wanted):
        odd = sorted(set(wanted) ^ set(tensors)) or [k for k in wanted if wanted[k].shape != tensors[k].shape]
        raise UserError(f"this adapter is of another model, rank or --lora-targets: {odd[0]} does not fit")
    for key, parameter in wanted.items():
        parameter.copy_(tensors[key])


def save(model, folder, base_name):
    """Write PEFT's adapter_config.json and adapter_model.safetensors, then re-open and check what was written."""
    folder, tensors, found = Path(folder), state(model), layers(model)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(found.values()))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "bias": "none",
              "r": first.lora_A.shape[0], "lora_alpha": first.scale * first.lora_A.shape[0],
              "lora_dropout": first.dropout.p, "target_modules": sorted(found), "inference_mode": True}
    beside = folder / "adapter_model.safetensors.tmp"
    save_file({PEFT_PREFIX + k: t.cpu().contiguous() for k, t in tensors.items()}, beside, metadata={"format": "pt"})
    written = load_file(beside)
    if len(written) != len(tensors) or not all(torch.isfinite(t).all() for t in written.values()):
        raise RuntimeError(f"{beside}: the adapter is incomplete or not finite")
    os.replace(beside, folder / "adapter_model.safetensors")
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=1))


def load(model, folder):
    """Inject and load an adapter that this module or PEFT saved. Raises UserError naming the file that is wrong."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, ValueError) as problem:
        raise UserError(f"{folder}: no readable LoRA adapter there ({problem})") from None
    tensors = {k.removeprefix(PEFT_PREFIX): t.float() for k, t in tensors.items()}
    names = sorted({k.split(".lora_A")[0].rsplit(".", 1)[-1] for k in tensors if ".lora_A" in k})
    inject(model, tuple(names), config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    load_state(model, tensors)
