"""common/lora.py, by itself and against PEFT."""

import pytest
import torch

from common import lora
from common.run import UserError
from tests.test_llm import qwen, ragged

TOKENS = torch.tensor([[7, 8, 9, 10, 11]])


def adapted(seed=0, random=True):
    model = qwen()
    lora.inject(model, ("q_proj", "v_proj", "down_proj"), rank=4, alpha=8, seed=seed)
    if random:
        torch.manual_seed(9)
        for p in lora.parameters(model):
            torch.nn.init.normal_(p, std=0.2)
    return model


def test_a_fresh_adapter_changes_nothing_and_a_disabled_one_neither():
    base = qwen()(TOKENS).logits
    assert torch.equal(adapted(random=False)(TOKENS).logits, base)
    model = adapted()
    assert not torch.allclose(model(TOKENS).logits, base)
    with pytest.raises(KeyError), lora.disabled(model):
        with lora.disabled(model):
            pass
        assert torch.equal(model(TOKENS).logits, base)            # nested contexts restore the outer one
        raise KeyError
    assert not torch.allclose(model(TOKENS).logits, base)          # switched on again after an exception


def test_only_the_adapter_learns():
    model = adapted()
    model(TOKENS).logits.sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name), name


def test_the_layer_computes_w_x_plus_scaled_b_a_x():
    layer = lora.LoRALinear(torch.nn.Linear(3, 2), 2, 8, 0.0)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 3)
    want = x @ layer.base.weight.T + layer.base.bias + 4 * x @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer(x), want, atol=1e-6)


def test_merging_keeps_the_output_and_unmerging_restores_the_weights():
    model = adapted()
    before, weight = model(TOKENS).logits, model.model.layers[0].self_attn.q_proj.base.weight.clone()
    lora.merge(model)
    assert torch.allclose(model(TOKENS).logits, before, atol=1e-4)
    assert not torch.allclose(model.model.layers[0].self_attn.q_proj.base.weight, weight)
    lora.unmerge(model)
    assert torch.allclose(model.model.layers[0].self_attn.q_proj.base.weight, weight, atol=1e-6)
    lora.parameters(model)[0].data.fill_(torch.inf)
    with pytest.raises(RuntimeError, match="not finite"):
        lora.merge(model)


def test_a_base_in_bfloat16_keeps_its_dtype_and_the_adapter_stays_in_fp32():
    model = qwen().bfloat16()
    lora.inject(model, "all-linear", rank=2, alpha=4)
    assert model(TOKENS).logits.dtype == torch.bfloat16
    assert {p.dtype for p in lora.parameters(model)} == {torch.float32}


def test_the_output_head_is_never_a_target_and_unknown_targets_are_named():
    model = qwen()
    assert not any("lm_head" in name for name in lora.inject(model, "all-linear"))
    with pytest.raises(UserError, match="wq.*q_proj"):
        lora.inject(qwen(), ("wq",))


def test_a_swapped_snapshot_is_in_force_only_inside():
    model, other = adapted(), adapted()
    snapshot = {k: v + 0.1 for k, v in lora.state(model).items()}
    lora.load_state(other, snapshot)
    before = model(TOKENS).logits
    with lora.swapped(model, snapshot):
        assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)
    assert torch.equal(model(TOKENS).logits, before)


def test_what_is_saved_loads_again_and_a_wrong_or_missing_adapter_is_one_line(tmp_path):
    model = adapted()
    lora.save(model, tmp_path / "a", "base")
    other = qwen()
    lora.load(other, tmp_path / "a")
    assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)
    with pytest.raises(UserError, match="no readable LoRA adapter"):
        lora.load(qwen(), tmp_path)
    with pytest.raises(UserError, match="does not fit"):
        lora.load_state(model, {"x": torch.zeros(1)})


def test_peft_loads_our_adapter_with_equal_logits(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted()
    lora.save(model, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(qwen(), str(tmp_path))
    assert torch.allclose(theirs(TOKENS).logits, model(TOKENS).logits, atol=1e-5)


def test_we_load_pefts_adapter_with_equal_logits(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(qwen(), peft.LoraConfig(r=4, lora_alpha=16, target_modules=["k_proj", "up_proj"]))
    torch.manual_seed(3)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(str(tmp_path))
    ours = qwen()
    lora.load(ours, tmp_path)
    assert torch.allclose(theirs(TOKENS).logits, ours(TOKENS).logits, atol=1e-5)
    assert not torch.allclose(qwen()(TOKENS).logits, ours(TOKENS).logits, atol=1e-3)
