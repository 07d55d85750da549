"""common/lora.py against its own contract and against PEFT, in both directions."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from common import lora
from common.run import UserError

TOKENS = torch.tensor([[7, 8, 9, 10, 11], [20, 21, 22, 23, 24]])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def qwen(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
                         initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=5)
    return Qwen2ForCausalLM(config).to(dtype).eval()


def trained(targets=("q_proj", "v_proj"), rank=4, alpha=6.0, **kwargs):
    """A model whose adapter really does something."""
    model = qwen(**kwargs)
    lora.inject(model, targets, rank, alpha)
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in lora.parameters(model):
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_leaves_every_logit_exactly_as_it_was(dtype):
    model = qwen(dtype=dtype)
    before = logits(model)
    lora.inject(model, "all-linear", rank=4, alpha=8)
    assert torch.equal(logits(model), before)
    assert all(p.dtype == torch.float32 for p in lora.parameters(model))


def test_the_update_is_alpha_over_r_times_b_a_worked_by_hand():
    base = torch.nn.Linear(2, 1)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0]]))
        base.bias.fill_(0.5)
        layer = lora.LoRALinear(base, rank=1, alpha=3.0, dropout=0.0)
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.fill_(2.0)
        # W x + b = 1*5 + 2*1 + 0.5 = 7.5;   3/1 * 2 * (5 - 1) = 24
        assert layer(torch.tensor([5.0, 1.0])).item() == 31.5


def test_a_bf16_base_gets_its_update_in_fp32_and_is_rounded_once():
    torch.manual_seed(0)
    base = torch.nn.Linear(16, 8).to(torch.bfloat16)
    layer = lora.LoRALinear(base, rank=2, alpha=2.0, dropout=0.0)
    torch.nn.init.normal_(layer.lora_B)
    torch.nn.init.normal_(layer.lora_A)
    x = torch.randn(5, 16).to(torch.bfloat16)
    want = (base(x).float() + x.float() @ layer.lora_A.T @ layer.lora_B.T).to(torch.bfloat16)
    assert torch.equal(layer(x), want) and layer(x).dtype == torch.bfloat16


def test_only_the_adapter_gets_gradients_and_every_part_of_it_does():
    model = trained("all-linear")
    model(TOKENS).logits.square().sum().backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_grad == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {id(p) for p in lora.parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_gradient_of_the_layer_is_the_one_worked_by_hand():
    torch.manual_seed(0)
    base = torch.nn.Linear(3, 2).double()
    x = torch.randn(4, 3).double()
    layer = lora.LoRALinear(base, rank=2, alpha=3.0, dropout=0.0)
    torch.nn.init.normal_(layer.lora_B)
    layer(x).sum().backward()
    scale = 1.5                                          # d sum(y) / dB = scale * 1 (A x summed over rows)
    want = scale * (x.float() @ layer.lora_A.T).sum(0).expand(2, 2)
    assert torch.allclose(layer.lora_B.grad, want, atol=1e-5)
    want = scale * torch.outer(layer.lora_B.sum(0), x.float().sum(0))
    assert torch.allclose(layer.lora_A.grad, want, atol=1e-5)


def test_switched_off_the_model_is_exactly_the_base_also_nested_and_after_an_exception():
    base, model = logits(qwen()), trained()
    on = logits(model)
    assert (on - base).abs().max() > 0.1                     # or nothing is shown
    with lora.disabled(model):
        with lora.disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), on)
    with pytest.raises(KeyError):
        with lora.disabled(model):
            raise KeyError
    assert torch.equal(logits(model), on)


def test_merged_is_unmerged_and_unmerging_brings_the_base_back():
    model, base = trained("all-linear"), qwen()
    on = logits(model)
    lora.merge(model)
    lora.merge(model)                                        # a second time adds nothing
    assert torch.allclose(logits(model), on, atol=1e-5)
    with pytest.raises(RuntimeError, match="unmerge it first"), lora.disabled(model):
        pass
    with pytest.raises(RuntimeError, match="unmerge it first"):
        lora.load_state(model, lora.state(model))
    lora.unmerge(model)
    theirs, ours = (dict(m.named_parameters()) for m in (base, model))
    for path in lora.layers(model):
        assert torch.allclose(ours[path + ".base.weight"], theirs[path + ".weight"], atol=1e-6)
    assert torch.allclose(logits(model), on, atol=1e-5)
    with lora.disabled(model):
        assert torch.allclose(logits(model), logits(base), atol=1e-5)


def test_a_merge_that_would_not_be_finite_touches_no_weight():
    model = trained()
    before = {name: p.clone() for name, p in model.named_parameters() if "base.weight" in name}
    with torch.no_grad():
        lora.parameters(model)[-1].fill_(float("inf"))
    with pytest.raises(RuntimeError, match="v_proj: the merged weight is not finite"):
        lora.merge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_snapshot_stands_in_for_the_adapter_and_goes_again_even_after_an_exception():
    model = trained()
    old, old_logits = lora.state(model), logits(model)
    with torch.no_grad():
        for p in lora.parameters(model):
            p.add_(0.1)
    new_logits = logits(model)
    assert not torch.allclose(new_logits, old_logits)        # and the snapshot is a copy, no view
    with pytest.raises(KeyError):
        with lora.swapped(model, old):
            assert torch.equal(logits(model), old_logits)
            raise KeyError
    assert torch.equal(logits(model), new_logits)


def test_the_same_seed_draws_the_same_adapter_whatever_the_global_random_state():
    first, second, other = (qwen() for _ in range(3))
    lora.inject(first, seed=3)
    torch.manual_seed(123)
    lora.inject(second, seed=3)
    lora.inject(other, seed=4)
    a, b, c = (torch.cat([p.flatten() for p in lora.parameters(m)]) for m in (first, second, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert lora.parameters(first)[0].abs().max() <= 32 ** -0.5   # Kaiming, a = sqrt(5): 1 / sqrt(fan in)


def test_targets_are_ends_of_paths_and_all_linear_leaves_the_output_head_alone():
    assert lora.inject(qwen(), ("q_proj",)) == [f"model.layers.{k}.self_attn.q_proj" for k in range(2)]
    assert lora.inject(qwen(), ("layers.1.self_attn.v_proj",)) == ["model.layers.1.self_attn.v_proj"]
    assert len(lora.inject(qwen(), "all-linear")) == 2 * 7 and len(lora.inject(qwen(), " q_proj, v_proj")) == 2 * 2
    with pytest.raises(UserError, match="--lora-targets c_attn: no such .* has down_proj, gate_proj, k_proj"):
        lora.inject(qwen(), ("q_proj", "c_attn"))
    with pytest.raises(ValueError, match="already"):
        lora.inject(trained(), ("q_proj",))


def test_dropout_acts_in_training_only_and_only_on_the_adapter():
    model, base = qwen(), logits(qwen())
    lora.inject(model, dropout=0.5)
    assert torch.equal(logits(model.train()), base)                         # B = 0: nothing to drop yet
    with torch.no_grad():
        for p in lora.parameters(model):
            p.fill_(0.1)
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))


def test_put_into_a_model_in_eval_mode_an_adapter_drops_nothing():
    model = qwen()
    lora.inject(model, dropout=0.5)
    with torch.no_grad():
        for p in lora.parameters(model):
            p.fill_(0.1)
    assert torch.equal(logits(model), logits(model))


def test_an_adapter_comes_back_with_its_dropout_and_one_with_a_scale_for_each_layer_is_refused(tmp_path):
    model = qwen()
    lora.inject(model, dropout=0.25)
    lora.save(model, tmp_path, "tiny")
    again = qwen()
    lora.load(again, tmp_path)
    assert {layer.dropout.p for layer in lora.layers(again).values()} == {0.25}
    path = tmp_path / "adapter_config.json"
    plain = json.loads(path.read_text())
    for option, value in (("alpha_pattern", {"q_proj": 64}), ("alora_invocation_tokens", [5]), ("use_qalora", True)):
        path.write_text(json.dumps(plain | {option: value}))
        with pytest.raises(UserError, match=f"{option}="):
            lora.load(qwen(), tmp_path)


def test_a_saved_adapter_comes_back_and_holds_nothing_but_the_adapter(tmp_path):
    model = trained()
    lora.save(model, tmp_path / "a", "tiny")
    files = {p.name for p in (tmp_path / "a").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    keys = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert len(keys) == 8 and "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    again = qwen()
    lora.load(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_that_is_empty_or_not_finite_is_never_saved_over_a_good_one(tmp_path):
    model = trained()
    lora.save(model, tmp_path, "tiny")
    good = (tmp_path / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        lora.parameters(model)[0][0, 0] = float("nan")
    for broken in (model, qwen()):
        with pytest.raises(RuntimeError, match="not finite|no adapter"):
            lora.save(broken, tmp_path, "tiny")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == good


def test_an_adapter_that_does_not_fit_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no readable LoRA adapter"):
        lora.load(qwen(), tmp_path)
    with pytest.raises(UserError, match="x does not fit"):
        lora.load_state(trained(), {"x": torch.zeros(1)} | lora.state(trained()))
    lora.save(trained(), tmp_path, "tiny")
    config_file, tensor_file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, whole = json.loads(config_file.read_text()), tensor_file.read_bytes()
    config_file.write_text(json.dumps(config | {"use_rslora": True, "rank_pattern": {"q_proj": 2}}))
    with pytest.raises(UserError, match="use_rslora=True, rank_pattern="):
        lora.load(qwen(), tmp_path)
    config_file.write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))       # it changed the base's weights
    with pytest.raises(UserError, match="init_lora_weights='pissa"):
        lora.load(qwen(), tmp_path)
    config_file.write_text(json.dumps(config | {"r": 2}))
    with pytest.raises(UserError, match="another model, rank or --lora-targets"):
        lora.load(qwen(), tmp_path)
    config_file.write_text(json.dumps(config))
    tensor_file.write_bytes(whole[:443])
    with pytest.raises(UserError, match="no readable LoRA adapter"):
        lora.load(qwen(), tmp_path)
    save_file({}, tensor_file)
    with pytest.raises(UserError, match="empty or not finite"):
        lora.load(qwen(), tmp_path)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear", ("layers.1.self_attn.k_proj",)])
def test_peft_loads_what_we_save_and_computes_the_same_logits(tmp_path, targets):
    peft = pytest.importorskip("peft")
    model = trained(targets)
    lora.save(model, tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(qwen(), str(tmp_path)).eval()
    assert (logits(model) - logits(qwen())).abs().max() > 1e-2
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)


@pytest.mark.parametrize("extra", [{}, {"layers_to_transform": [1]}])
def test_we_load_what_peft_saves_and_compute_the_same_logits(tmp_path, extra):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], **extra)
    theirs = peft.get_peft_model(qwen(), config).eval()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    theirs.save_pretrained(str(tmp_path))
    ours = qwen()
    lora.load(ours, tmp_path)
    assert (logits(ours) - logits(qwen())).abs().max() > 1e-2
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-5)


def test_peft_computes_the_same_in_bf16_bit_for_bit(tmp_path):
    peft = pytest.importorskip("peft")
    model = trained(dtype=torch.bfloat16)
    lora.save(model, tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(qwen(dtype=torch.bfloat16), str(tmp_path)).eval()
    assert torch.equal(logits(theirs), logits(model))


def test_a_deep_copy_trains_apart():
    model = trained()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        lora.parameters(twin)[0].add_(1.0)
    assert not torch.equal(lora.parameters(twin)[0], lora.parameters(model)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_read_the_same_input_keep_it_once_and_its_gradient_is_the_plain_one(dtype):
    torch.manual_seed(0)
    both = [lora.LoRALinear(torch.nn.Linear(8, 5).to(dtype), 2, 4, 0.0) for _ in range(2)]
    for layer in both:
        torch.nn.init.normal_(layer.lora_B)
    x, kept = torch.randn(2, 3, 8).to(dtype).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = sum(layer(x) for layer in both)
    big = {t.data_ptr() for t in kept if t.numel() == x.numel()}
    assert big == {x.data_ptr()}
    got = torch.autograd.grad(y.float().square().sum(), [x, *(p for layer in both for p in (layer.lora_A, layer.lora_B))])
    y = sum((layer.base(x) + (x.float() @ layer.lora_A.T * layer.scale) @ layer.lora_B.T).to(dtype) for layer in both)
    want = torch.autograd.grad(y.float().square().sum(), [x, *(p for layer in both for p in (layer.lora_A, layer.lora_B))])
    assert all(torch.allclose(a, b, rtol=1e-5 if dtype is torch.float32 else 2e-2) for a, b in zip(got, want))
