"""common/recommenders.py against the literal formula, and against DeepCTR-Torch on copied weights."""

import pytest
import torch
import torch.nn.functional as F

from common.recommenders import DIN, AttentionUnit


def test_the_factored_activation_unit_equals_the_concatenation_it_stands_for():
    torch.manual_seed(0)
    unit = AttentionUnit(6, 5).double()
    q, k = torch.randn(2, 3, 6).double().requires_grad_(), torch.randn(2, 4, 6).double().requires_grad_()
    a, b = q[:, :, None].expand(2, 3, 4, 6), k[:, None].expand(2, 3, 4, 6)
    want = unit.second(F.relu(unit.first(torch.cat([a, b, a - b, a * b], -1))))[..., 0]
    got = unit.weights(q, k)
    assert torch.allclose(got, want, atol=1e-10)
    g = torch.randn_like(got)
    for x, y in zip(torch.autograd.grad(got, (q, k, unit.first.weight), g), torch.autograd.grad(want, (q, k, unit.first.weight), g)):
        assert torch.allclose(x, y, atol=1e-10)
    with torch.no_grad():                                                        # the serving path, in blocks
        assert torch.allclose(unit.weights(q, k), want, atol=1e-10)


def test_padding_changes_no_score_and_the_catalogue_equals_single_candidates():
    torch.manual_seed(0)
    model = DIN(3, 20, dim=8)
    users, history = torch.tensor([0, 2]), torch.tensor([[3, 5, 0], [1, 0, 0]])
    every = model.score_catalogue(users, history, chunk=7)
    longer = model.score_catalogue(users, torch.cat([history, torch.zeros(2, 4, dtype=torch.long)], 1))
    assert every.shape == (2, 20) and torch.allclose(every, longer, atol=1e-5)
    one = model(users, torch.tensor([[5], [18]]), history)[:, 0]
    assert torch.allclose(one, every[[0, 1], [4, 17]], atol=1e-5)
    assert not torch.allclose(one, model(users, torch.tensor([[5], [18]]), torch.zeros_like(history))[:, 0])


def test_the_activation_unit_equals_deepctr_torchs_on_copied_weights():
    pytest.importorskip("deepctr_torch")
    from deepctr_torch.layers.sequence import AttentionSequencePoolingLayer
    torch.manual_seed(0)
    theirs = AttentionSequencePoolingLayer(att_hidden_units=(5,), att_activation="relu", embedding_dim=6)
    linears = [m for m in theirs.modules() if isinstance(m, torch.nn.Linear)]
    unit = AttentionUnit(6, 5)
    with torch.no_grad():
        unit.first.weight.copy_(linears[0].weight)
        unit.first.bias.copy_(linears[0].bias)
        unit.second.weight.copy_(linears[1].weight)
        unit.second.bias.copy_(linears[1].bias)
        q, k, n = torch.randn(3, 1, 6), torch.randn(3, 4, 6), torch.tensor([[4], [2], [1]])
        mask = (torch.arange(4) < n).float()
        assert torch.allclose(theirs(q, k, n), unit(q, k, mask), atol=1e-5)
