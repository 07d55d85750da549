"""common/recommenders.py against the literal formula, and against DeepCTR-Torch on copied weights."""

import pytest
import torch
import torch.nn.functional as F

from common.recommenders import CIN, CTR, FM, AttentionUnit, CrossNet, InteractingLayer


@pytest.mark.parametrize("candidates", [3, 7])                    # fewer and more than hidden units: two paths
def test_the_factored_activation_unit_equals_the_concatenation_it_stands_for(candidates):
    torch.manual_seed(0)
    C = candidates
    unit = AttentionUnit(6, 5).double()
    q, k = torch.randn(2, C, 6).double().requires_grad_(), torch.randn(2, 4, 6).double().requires_grad_()
    a, b = q[:, :, None].expand(2, C, 4, 6), k[:, None].expand(2, C, 4, 6)
    want = unit.second(F.relu(unit.first(torch.cat([a, b, a - b, a * b], -1))))[..., 0]
    got = unit.weights(q, k)
    assert torch.allclose(got, want, atol=1e-10)
    g = torch.randn_like(got)
    for x, y in zip(torch.autograd.grad(got, (q, k, unit.first.weight), g), torch.autograd.grad(want, (q, k, unit.first.weight), g, retain_graph=True)):
        assert torch.allclose(x, y, atol=1e-10)
    with torch.no_grad():                                                        # the serving path, in blocks
        assert torch.allclose(unit.weights(q, k), want, atol=1e-10)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]])
    got, want = unit(q, k, mask), (want * mask[:, None]) @ k
    g = torch.randn_like(got)
    assert torch.allclose(got, want, atol=1e-10) and not got[1].any()
    for x, y in zip(torch.autograd.grad(got, (q, k, unit.first.weight), g), torch.autograd.grad(want, (q, k, unit.first.weight), g)):
        assert torch.allclose(x, y, atol=1e-10)


def test_padding_changes_no_score_and_the_catalogue_equals_single_candidates():
    torch.manual_seed(0)
    model = CTR("din", 3, 20, torch.zeros(21, 1), dim=8).eval()
    for table in (model.user, model.item):                        # larger than at the start, so that a difference shows
        table.weight.data[1:].normal_()
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


# ---------------------------------------------------------------------------------------------------- CTR models
KINDS = ("deepfm", "xdeepfm", "autoint", "dcn", "dcnv2", "din")
CATEGORIES = [[0, 0], [1, 0], [2, 3], [1, 3], [2, 0], [2, 1], [0, 0]]


def test_the_factorisation_machine_is_the_sum_over_pairs():
    e = torch.randn(3, 5, 4, dtype=torch.float64)
    want = sum((e[:, i] * e[:, j]).sum(-1) for i in range(5) for j in range(i))
    torch.testing.assert_close(FM()(e), want)


def test_the_crossings_equal_deepctr_torchs_on_copied_weights():
    layers = pytest.importorskip("deepctr_torch.layers.interaction")
    torch.manual_seed(0)
    e, x = torch.randn(4, 5, 8), torch.randn(4, 12)
    with torch.no_grad():
        torch.testing.assert_close(FM()(e), layers.FM()(e)[:, 0], atol=1e-5, rtol=1e-5)
        theirs, ours = layers.CIN(5, (6, 4), activation="linear", split_half=False), CIN(5, 6, 4)
        for o, t in zip((ours.first, ours.second), theirs.conv1ds):
            o.weight.copy_(t.weight[..., 0])
            t.bias.zero_()                                     # equation 6 has none
        torch.testing.assert_close(ours(e), theirs(e), atol=1e-5, rtol=1e-5)
        theirs, ours = layers.InteractingLayer(8, 2), InteractingLayer(8, 2)
        for o, t in zip((ours.query, ours.key, ours.value, ours.skip), (theirs.W_Query, theirs.W_key, theirs.W_Value, theirs.W_Res)):
            o.weight.copy_(t.T)
        torch.testing.assert_close(ours(e), theirs(e), atol=1e-5, rtol=1e-5)
        for matrix, name in ((False, "vector"), (True, "matrix")):
            theirs, ours = layers.CrossNet(12, 3, name), CrossNet(12, 3, matrix)
            for k in range(3):
                torch.nn.init.normal_(theirs.bias[k])
                ours.weight[k].weight.copy_(theirs.kernels[k] if matrix else theirs.kernels[k].T)
                (ours.weight[k].bias if matrix else ours.bias[k]).copy_(theirs.bias[k][:, 0])
            torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_click_model_reads_all_its_inputs_and_no_padding(kind):
    torch.manual_seed(0)
    model = CTR(kind, 3, 6, CATEGORIES, dim=8, hidden=(12, 6), dropout=0.5).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    users, items, history = torch.tensor([0, 2]), torch.tensor([[1, 4], [5, 2]]), torch.tensor([[2, 4, 0], [3, 0, 0]])
    s = model(users, items, history)
    assert s.shape == (2, 2)
    torch.testing.assert_close(s, model(users, items, torch.cat([history, torch.zeros(2, 3, dtype=torch.long)], 1)))
    torch.testing.assert_close(s[1:, :1], model(users[1:], items[1:, :1], history[1:, :1]))
    for other in ((users + torch.tensor([1, -1]), items, history), (users, items + 1, history), (users, items, history.roll(1, 0))):
        assert (s - model(*other)).abs().min() > 1e-6
    empty = model(users, items, torch.zeros_like(history))
    assert empty.isfinite().all()
    s.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for name, p in model.named_parameters())
    assert not any(table.weight.grad[0].any() for table in (model.item, model.category, *model.first_order[1:]))


def test_a_click_model_drops_in_training_only_and_begins_with_small_embeddings():
    torch.manual_seed(0)
    model = CTR("dcn", 50, 6, CATEGORIES, dim=32, dropout=0.5)
    assert all(0.008 < table.weight.std() < 0.012 for table in (model.user, model.item))
    score = lambda: model(torch.tensor([0]), torch.tensor([[1, 4]]), torch.tensor([[2, 0]]))
    assert not torch.equal(score(), score())
    model.eval()
    assert torch.equal(score(), score())


@pytest.mark.parametrize("kind", KINDS)
def test_a_click_model_learns_a_rule_that_only_its_crossing_or_mlp_can_hold(kind):
    """Users 0-3 like items of category 1, users 4-7 of category 2: neither user nor item alone tells."""
    torch.manual_seed(0)
    users, items = (x.flatten() for x in torch.meshgrid(torch.arange(8), torch.arange(1, 13), indexing="ij"))
    label = ((users < 4) == (items <= 6)).float()
    model = CTR(kind, 8, 12, [[0]] + [[1]] * 6 + [[2]] * 6, dim=8, hidden=(16, 8), dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        loss = F.binary_cross_entropy_with_logits(model(users, items[:, None], torch.zeros(96, 4, dtype=torch.long))[:, 0], label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
