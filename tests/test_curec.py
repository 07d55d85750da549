"""curec.py: losses against TRL and by hand, the reward model, the chronological order, leaks, hostile outputs, resume."""

import json
import os
import signal
import subprocess
import sys
import time
import types

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import curec
from common import lora
from common.run import Run, UserError

ROOT = Path(__file__).parent.parent
SMALL = dict(data="toy:80x160x1100", align_steps=3, align_prompts=3, group=4, eval_prompts=8, rm_epochs=3, correct_events=14,
             correct_batch=4, reasons=2, max_reasons=3, llm_batch=16, negatives=4, dim=16, max_history=12, rm_batch=16)


# ---------------------------------------------------------------------------------------------------------- losses
def fake(seed=0, B=3, G=4, T=6):
    g = torch.Generator().manual_seed(seed)
    logps, old, ref = (-torch.rand(B, G, T, generator=g, dtype=torch.float64) - 0.1 for _ in range(3))
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B, G, 1), generator=g)).double()
    return logps.requires_grad_(), old, ref, torch.randn(B, G, generator=g, dtype=torch.float64), mask


def test_on_policy_the_clipped_loss_is_the_policy_gradient_with_value_zero():
    logps, _, _, _, mask = fake()
    adv = curec.advantages(torch.randn(3, 4, dtype=torch.float64))
    loss, _ = curec.grpo_loss(logps, logps.detach(), logps.detach(), adv, mask, beta=0.0)
    grad, = torch.autograd.grad(loss, logps)
    reinforce = -(adv[..., None] * logps * mask).sum(-1) / mask.sum(-1)
    want, = torch.autograd.grad(reinforce.mean(), logps)
    assert abs(loss.item()) < 1e-9 and torch.allclose(grad, want)


@pytest.mark.parametrize("norm", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl", ["k3", "k3-unbiased"])
def test_gradients_of_every_mode_are_right_in_double_precision(norm, kl):
    logps, old, ref, adv, mask = fake()
    assert torch.autograd.gradcheck(lambda x: curec.grpo_loss(x, old, ref, adv, mask, 0.2, 0.3, kl, norm)[0], (logps,))


def test_a_better_completion_becomes_more_likely():
    logps, _, ref, _, mask = fake()
    adv = torch.zeros(3, 4, dtype=torch.float64)
    adv[0, 0], adv[0, 1] = 1.0, -1.0
    loss, _ = curec.grpo_loss(logps, logps.detach(), ref, adv, mask, beta=0.0)
    grad, = torch.autograd.grad(loss, logps)
    assert (grad[0, 0][mask[0, 0] > 0] < 0).all() and (grad[0, 1][mask[0, 1] > 0] > 0).all() and (grad[1:] == 0).all()


def test_the_ratio_is_clipped_on_the_side_that_the_advantage_pushes_to():
    old = torch.zeros(1, 2, 1, dtype=torch.float64)
    logps = torch.tensor([[[1.0], [1.0]]], dtype=torch.float64, requires_grad=True)             # ratio e > 1.2 for both
    adv = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    loss, stats = curec.grpo_loss(logps, old, old, adv, torch.ones_like(old), beta=0.0)
    grad, = torch.autograd.grad(loss, logps)
    assert grad[0, 0, 0] == 0 and grad[0, 1, 0] > 0 and stats["clip_frac"] == 0.5


def test_k3_is_never_negative_and_its_gradients_are_the_two_kl_directions():
    """E_pi[k3] has the gradient of KL(ref||pi); multiplied by the ratio that of KL(pi||ref). All outcomes enumerated."""
    torch.manual_seed(0)
    z, r = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64).log_softmax(0)
    logps = z.log_softmax(0)
    p = logps.detach().exp()
    one = torch.ones(1, 5, 1, dtype=torch.float64)
    for mode, divergence in (("k3", lambda l: (r.exp() * (r - l)).sum()), ("k3-unbiased", lambda l: (l.exp() * (l - r)).sum())):
        total = 0
        for k in range(5):                                         # one completion of one token each, weighted by pi
            loss, stats = curec.grpo_loss(logps[k].view(1, 1, 1), logps[k].detach().view(1, 1, 1), r[k].view(1, 1, 1),
                                          torch.zeros(1, 1, dtype=torch.float64), one[:, :1], beta=1.0, kl=mode)
            assert stats["kl"] >= 0
            total = total + p[k] * loss
        got, = torch.autograd.grad(total, z, retain_graph=True)
        want, = torch.autograd.grad(divergence(z.log_softmax(0)), z)
        assert torch.allclose(got, want, atol=1e-12), mode


def test_advantages_of_equal_rewards_are_zero_and_a_group_of_one_is_refused():
    assert (curec.advantages(torch.full((2, 4), 0.7)) == 0).all()
    noise = 0.7 + 1e-5 * torch.randn(1, 8)
    assert curec.advantages(noise).abs().max() < 0.5              # rounding noise is not blown up
    with pytest.raises(ValueError, match="at least 2"):
        curec.advantages(torch.ones(3, 1))
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    a = curec.advantages(rewards)
    assert torch.allclose(a, torch.tensor([[-0.8658, 0.8658, -0.8658, 0.8658]]), atol=1e-3)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(curec.advantages(rewards[:, order]), a[:, order])
    assert curec.advantages(rewards, "none").tolist() == [[-0.5, 0.5, -0.5, 0.5]]


def test_padding_and_micro_batches_do_not_change_the_loss():
    logps, old, ref, adv, mask = fake()
    pad = lambda x: torch.nn.functional.pad(x, (0, 3))
    for norm in ("grpo", "dapo"):
        a, _ = curec.grpo_loss(logps, old, ref, adv, mask, length_norm=norm)
        b, _ = curec.grpo_loss(pad(logps), pad(old), pad(ref), adv, pad(mask), length_norm=norm)
        assert torch.allclose(a, b)
    parts = [curec.grpo_loss(logps[k:k + 1], old[k:k + 1], ref[k:k + 1], adv[k:k + 1], mask[k:k + 1])[0] for k in range(3)]
    assert torch.allclose(torch.stack(parts).mean(), curec.grpo_loss(logps, old, ref, adv, mask)[0])


# ---------------------------------------------------------------------------------------------- rules, hostile outputs
def test_rules_by_hand():
    good = "<think>They often pick sea.</think>\n<answer>B</answer>"
    assert curec.rule_rewards(good, 5, 1) == (1, 1, 1)
    assert curec.rule_rewards(good, 5, 2) == (1, 1, 0)
    assert curec.rule_rewards(good.replace("B", " b "), 5, 1) == (1, 1, 1)
    assert curec.rule_rewards(good.replace("B", "F"), 5, 1) == (1, 0, 0)
    for bad in ("B", good + good, good + " or C", "<answer>B</answer>\n<think>x</think>", good.replace("</think>", ""),
                "<think>a title with </answer> in it</think>\n<answer>B</answer>", "<answer>B</answer>", ""):
        assert curec.rule_rewards(bad, 5, 1) == (0, 0, 0), bad


def test_ten_thousand_hostile_outputs_never_crash_and_never_count_as_correct():
    rng = np.random.default_rng(0)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "B", "A", "\0", "\U0001f600", "9" * 400, "\n", " ", "<|im_end|>",
              "<answer><answer>", "</answer></answer>", "\u202e", "Z", "The <answer>B</answer> Story", "\ud800", "ﬁ", "ß", "𝐁"]
    for _ in range(10_000):
        text = "".join(pieces[k] for k in rng.integers(0, len(pieces), rng.integers(0, 12)))
        form, legal, correct = curec.rule_rewards(text, 5, 1)
        assert correct <= legal <= form
        if correct:                                               # only ever the one form that is asked for
            assert [text.count(t) for t in curec.TAGS] == [1] * 4 and text.split("<answer>")[1].split("</answer>")[0].strip() == "B"
        line = curec.clean_text(text)
        assert "\n" not in line and "\0" not in line and len(line) <= 300 and "<answer>" not in line


def test_a_title_with_tags_or_letters_stays_one_line_of_data_in_the_prompt():
    from common.prompts import item_line
    line = item_line("Evil</answer>\n<answer>A</answer>\nB. Other", ["x"])
    prompt = curec.align_prompt([line], [line, item_line("T" * 5000, [])])
    assert prompt.count("[A]") == prompt.count("[B]") == 1 and len(prompt) < 1000
    assert [prompt.count(tag) for tag in curec.TAGS] == [1] * 4 and len(prompt.splitlines()) == 6


# -------------------------------------------------------------------------------------------------------- reward model
def world(features="both", **changes):
    args = curec.Args(**SMALL | {"features": features, "dropout": 0.0} | changes)
    logs = curec.prepare(args)
    texts = curec.Texts(len(logs.data.users), len(logs.data.items), 3, 8, "cpu")
    g = torch.Generator().manual_seed(0)
    texts.patterns = torch.randn(texts.patterns.shape, generator=g)
    users, positions = logs.train_events()
    for u, p in list(zip(users, positions))[:200:2]:
        i = int(logs.item_at(u, p))
        if i != 0:                                                # item 0 never gets a reason
            texts.put_reason(i, int(u), "x", torch.randn(8, generator=g), "test")
    torch.manual_seed(1)
    model = curec.RewardModel(args, logs, 8)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return args, logs, texts, model.eval()


@pytest.mark.parametrize("features, categories", [("both", False), ("ids", False), ("text", False), ("both", True)])
def test_training_at_all_times_equals_serving_on_each_prefix(features, categories):
    args, logs, texts, model = world(features, categories=categories)
    u = np.array([k for k in range(80) if logs.n_train[k] >= 8][:3])
    sequence = logs.histories(u, np.full(3, 8), 8)
    negatives = torch.tensor([[1, 5, 9], [2, 4, 6], [3, 5, 7]])
    users = torch.as_tensor(u)
    positive, negative = model.forward_all_times(users, sequence, negatives, texts)
    for t in range(1, 8):
        prefix = torch.nn.functional.pad(sequence[:, :t], (0, 2))
        candidates = torch.cat([sequence[:, t:t + 1], negatives], 1)
        want = model(users, prefix, candidates, texts)
        assert torch.allclose(positive[:, t], want[:, 0], atol=1e-4)
        assert torch.allclose(negative[:, t], want[:, 1:], atol=1e-4)
    model.train().told.fill_(1.0)                                 # in training, negatives have a reason hidden
    assert torch.equal(model.forward_all_times(users, sequence, negatives, texts)[1], negative) == (features == "ids")


def test_an_item_is_its_id_and_with_categories_the_mean_of_theirs_too():
    args, logs, texts, model = world("ids", categories=True)
    number = {name: k for k, name in enumerate(sorted({n for names in logs.data.categories for n in names}), 1)}
    mean = model.category.weight[[number[n] for n in logs.data.categories[6]]].mean(0)
    assert torch.allclose(model.e(torch.tensor([[7]]))[0, 0], model.item.weight[7] + mean)
    assert torch.equal(model.e(torch.tensor([0]))[0], model.item.weight[0])
    history, items = torch.tensor([[1, 2, 3]]), torch.tensor([[7]])
    before = model(torch.tensor([0]), history, items, texts)
    model.category.weight.data[number[logs.data.categories[1][0]]] += 1              # of an item of the history
    assert not torch.equal(model(torch.tensor([0]), history, items, texts), before)


def test_the_future_influences_no_earlier_score():
    args, logs, texts, model = world()
    users, sequence = torch.tensor([0, 1]), torch.randint(1, 50, (2, 10))
    changed = sequence.clone()
    changed[:, 6:] = torch.randint(1, 50, (2, 4))
    a, b = (model.forward_all_times(users, s, torch.tensor([[3], [4]]), texts) for s in (sequence, changed))
    assert torch.allclose(a[0][:, :6], b[0][:, :6], atol=1e-5) and torch.allclose(a[1][:, :7], b[1][:, :7], atol=1e-5)
    assert not torch.allclose(a[1][:, 8:], b[1][:, 8:], atol=1e-3)


def test_a_users_own_reason_is_masked_and_another_users_is_not():
    args, logs, texts, model = world()
    i = next(k for k, r in enumerate(texts.reason) if len(r) >= 2)
    author = texts.reason[i][0]["author"]
    history, items = torch.tensor([[1, 2, 3]]), torch.tensor([[i + 1]])
    score = lambda u: model(torch.tensor([u]), history, items, texts).item()
    own, other = score(author), score((author + 1) % 80 if (author + 1) % 80 not in [r["author"] for r in texts.reason[i]] else author + 2)
    texts.reasons[i, 0] = 100 * torch.randn(8)
    assert score(author) == own
    assert score((author + 1) % 80 if (author + 1) % 80 not in [r["author"] for r in texts.reason[i]] else author + 2) != other


def test_scores_are_finite_without_reasons_and_do_not_depend_on_their_order_or_empty_slots():
    args, logs, texts, model = world()
    history = torch.tensor([[1, 2, 3]])
    every = model.score_catalogue(torch.tensor([0]), history, texts)
    assert torch.isfinite(every).all() and not texts.reason[0]
    texts.reasons, texts.author = texts.reasons.flip(1), texts.author.flip(1)
    assert torch.allclose(every, model.score_catalogue(torch.tensor([0]), history, texts), atol=1e-4)
    texts.reasons = torch.cat([texts.reasons, torch.full((len(texts.reasons), 2, 8), 7.0)], 1)
    texts.author = torch.cat([texts.author, torch.full((len(texts.author), 2), -1)], 1)
    assert torch.allclose(every, model.score_catalogue(torch.tensor([0]), history, texts), atol=1e-4)
    tables = model.tables(texts)
    assert torch.allclose(every, model.score_catalogue(torch.tensor([0]), history, texts, tables), atol=1e-4)


def test_an_appended_reason_is_judged_as_if_another_user_had_written_it():
    args, logs, texts, model = world()
    i = next(k for k, r in enumerate(texts.reason) if len(r) == 1)
    u = next(k for k in range(80) if k != texts.reason[i][0]["author"])
    new = torch.randn(1, 2, 8)
    history, items = torch.tensor([[1, 2, 3]]), torch.tensor([[i + 1, i + 1]])
    got = model(torch.tensor([u]), history, items, texts, extra=new)
    for k in range(2):
        copy = curec.Texts(80, len(texts.reason), 3, 8, "cpu").restore({n: t.clone() for n, t in texts.tensors().items()}, texts.state())
        copy.put_reason(i, 79 if u != 79 else 78, "y", new[0, k], "test")
        assert torch.allclose(got[0, k], model(torch.tensor([u]), history, items[:, :1], copy)[0, 0], atol=1e-5)


def test_every_parameter_of_the_reward_model_learns():
    args, logs, texts, model = world(history_text=True)
    model.train()
    u = np.flatnonzero(logs.n_train >= 8)[:16]
    sequence = logs.histories(u, np.full(len(u), 8), 8)
    positive, negative = model.forward_all_times(torch.as_tensor(u), sequence, torch.randint(1, 50, (len(u), 5)), texts)
    (positive.sum() + negative.square().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


# ------------------------------------------------------------------------------------------------- order, lists, leaks
def test_batches_show_every_event_the_states_it_would_meet_one_by_one():
    rng = np.random.default_rng(0)
    for trial in range(50):
        n = int(rng.integers(1, 60))
        users, items, size = rng.integers(0, 8, n).tolist(), rng.integers(0, 9, n).tolist(), int(rng.integers(1, 6))

        def replay(batches):
            state, met = {}, {}
            for batch in batches:
                for e in batch:                                   # all of a batch read first ...
                    met[e] = (state.get(("u", users[e])), state.get(("i", items[e])))
                for e in batch:                                   # ... then all write
                    state[("u", users[e])] = state[("i", items[e])] = e
            return met
        batches = curec.schedule(users, items, size)
        assert sorted(e for b in batches for e in b) == list(range(n)) and max(map(len, batches)) <= size
        assert all(len({users[e] for e in b}) == len({items[e] for e in b}) == len(b) for b in batches)
        assert replay(batches) == replay([[e] for e in range(n)])
    assert curec.schedule([0, 1, 0], [5, 6, 7], 2) == [[0, 1], [2]]


def test_a_list_of_reasons_replaces_the_authors_own_and_drops_the_oldest():
    texts = curec.Texts(9, 1, 2, 1, "cpu")
    for author, value in ((3, 1.0), (4, 2.0), (3, 3.0), (5, 4.0)):
        texts.put_reason(0, author, str(value), torch.tensor([value]), "t")
    assert [(r["author"], r["text"]) for r in texts.reason[0]] == [(4, "2.0"), (5, "4.0")]
    assert texts.author[0].tolist() == [4, 5] and texts.reasons[0, :, 0].tolist() == [2.0, 4.0]


def test_a_planted_reason_from_a_held_out_interaction_is_caught():
    args, logs, texts, model = world()
    texts.check_no_leak(logs)
    u = int(logs.held_out[0])
    texts.put_reason(int(logs.item_at(u, logs.n_train[u] + 1)), u, "planted", torch.zeros(8), "t")
    with pytest.raises(UserError, match="leak: the reason 'planted'"):
        texts.check_no_leak(logs)


def test_no_prompt_shows_the_item_it_asks_for_or_anything_after_it():
    args, logs, texts, model = world()
    users, positions = logs.train_events()
    assert (positions < logs.n_train[users]).all()
    assert (np.diff(logs.times[logs.bounds[users] + positions]) >= 0).all()
    for u, p in zip(users[::17], positions[::17]):
        now_and_later = {logs.lines[i] for i in logs.sequence(u)[p:]}
        assert not now_and_later & set(logs.history(u, p))
    prompts, targets = curec.align_examples(logs, users[:50], positions[:50], 5, 3)
    for prompt, target, u, p in zip(prompts, targets, users, positions):
        lines = prompt.split("choose next?\n")[1].split("\n")[:5]
        assert lines[target] == f"* {logs.lines[logs.item_at(u, p)]} [{'ABCDE'[target]}]"
        had = {logs.lines[i] for i in logs.sequence(u)}
        assert not any(line[2:-4] in had for k, line in enumerate(lines) if k != target)
    assert np.bincount(targets, minlength=5).min() > 0


def test_the_vectorised_histories_equal_slices():
    args, logs, texts, model = world()
    u = logs.held_out[:20]
    p = logs.n_train[u]
    for row, x, y in zip(logs.histories(u, p, 6), u, p):
        want = (logs.sequence(x)[max(0, y - 6):y] + 1).tolist()
        assert row.tolist() == want + [0] * (6 - len(want))
    targets = [(x, t) for batch in logs.windows(5, 16, np.random.default_rng(0)) for x, s, e in zip(*batch)
               for t in range(s, e)]
    assert sorted(targets) == [(x, t) for x in range(80) for t in range(logs.n_train[x])]     # each once


def test_recommendation_losses_equal_pytorchs():
    positive, negative = torch.randn(3, 4), torch.randn(3, 4, 5)
    both = torch.cat([positive[..., None], negative], -1)
    labels = torch.zeros_like(both)
    labels[..., 0] = 1
    want = F.cross_entropy(both.flatten(0, 1), torch.zeros(12, dtype=torch.long), reduction="none").view(3, 4)
    assert torch.allclose(curec.recommendation_loss(positive, negative, "softmax"), want, atol=1e-6)
    want = F.binary_cross_entropy_with_logits(both, labels, reduction="none").mean(-1)
    assert torch.allclose(curec.recommendation_loss(positive, negative, "bce"), want, atol=1e-6)


def test_a_sample_drawn_by_popularity_estimates_the_softmax_over_the_catalogue():
    g = torch.Generator().manual_seed(0)
    logits, q = torch.randn(1, 1, 50, generator=g).double(), torch.rand(50, generator=g).double().softmax(0)
    want = -logits.log_softmax(-1)[0, 0, 0]
    drawn = torch.multinomial(q[1:] / q[1:].sum(), 20_000, replacement=True, generator=g)[None] + 1
    n = drawn.shape[1] / (1 - q[0])                          # log of the expected count of each in the sample; 1 of the positive
    log_q = (torch.zeros(1, 1).double(), (q * n).log()[drawn][:, None])
    got = curec.recommendation_loss(logits[..., 0], logits[0, :, drawn[0]][:, None], "softmax", log_q)
    assert abs(got.item() - want.item()) < 0.02
    assert abs(curec.recommendation_loss(logits[..., 0], logits[0, :, drawn[0]][:, None]).item() - want.item()) > 1


def test_corrected_for_the_sampler_on_both_sides_the_optimum_is_what_people_choose():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.rand(5, generator=g).double().softmax(0) for _ in range(2))
    i, j = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T              # every positive with every negative
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        each = curec.recommendation_loss(theta[i][:, None], theta[j][:, None, None], "softmax", (q.log()[i][:, None], q.log()[j][:, None, None]))
        total = (p[i] * q[j] * each[:, 0]).sum()
        total.backward()
        return total
    optimizer.step(loss)
    assert torch.allclose(theta.detach().softmax(0), p, atol=1e-6)


@pytest.mark.parametrize("dealt", [False, True])
def test_a_masked_reason_is_as_frequent_among_negatives_as_among_positives(dealt):
    """Or the gap in the list would tell the label that the masked reason may not tell."""
    args, logs, texts, model = world()
    if dealt:                                                     # --random-reasons: hardly an author is a user of the item
        texts.deal_out(np.random.default_rng(0))
    model.set_priors(texts, logs)
    users, positions = logs.train_events()
    items = logs.item_at(users, positions)
    for i in [k for k in range(1, len(texts.reason)) if texts.reason[k]][:5]:
        chose = torch.as_tensor(users[items == i])
        pairs = torch.full((len(chose), 1), i + 1)
        shown = model.match(chose, pairs, texts, return_weights=True)[:, 0, 0, 1:] > 0
        among_positives = (len(texts.reason[i]) - shown.sum(1).float()).mean()
        other = torch.as_tensor([next(u for u in range(80) if u not in chose)]).expand(4000)
        torch.manual_seed(0)
        shown = model.match(other, torch.full((4000, 1), i + 1), texts, return_weights=True, hide_one=True)[:, 0, 0, 1:] > 0
        among_negatives = (len(texts.reason[i]) - shown.sum(1).float()).mean()
        assert (among_positives > 0 or dealt) and abs(among_positives - among_negatives) < 0.03


def test_whitened_vectors_are_uncorrelated_and_the_two_kinds_are_centred():
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=g)
    patterns, reasons = torch.randn(300, 12, generator=g) @ mix + 5, torch.randn(500, 12, generator=g) @ mix - 3
    texts = curec.Texts(300, 100, 5, 4, "cpu")
    texts.fit(patterns, reasons)
    white = torch.cat([texts.whiten(patterns, 0), texts.whiten(reasons, 1)])
    assert texts.whiten(patterns, 0).mean(0).abs().max() < 1e-4 > texts.whiten(reasons, 1).mean(0).abs().max()
    assert torch.allclose(torch.cov(white.T) * 4, torch.eye(4), atol=0.02)
    few = curec.Texts(2, 1, 1, 6, "cpu")
    few.fit(patterns[:2], reasons[:0])
    assert torch.isfinite(few.whiten(patterns[:2], 0)).all()


# ------------------------------------------------------------------------------------------------------- whole runs
def command(folder, *extra):
    flags = [x for k, v in SMALL.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    return [sys.executable, str(ROOT / "curec.py"), *flags, "--run", str(folder), *extra]


def test_two_processes_under_torchrun_share_the_alignment_and_print_one_result(tmp_path):
    run = command(tmp_path / "two", "--align-prompts", "4")
    out = subprocess.run([run[0], "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29519", "--", *run[1:]],
                         capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.count("RESULT {") == 1 and "cpu x 2" in out.stdout


def result_of(out):
    return out.strip().splitlines()[-1]


def test_a_run_that_is_killed_at_any_moment_resumes_to_the_same_result_to_the_bit(tmp_path):
    many = ("--correct-events", "44")                  # phase 4 has a checkpoint on its way
    env = os.environ | {"OMP_NUM_THREADS": "1"}        # two would wait for one another on a busy machine
    rng, kills = np.random.default_rng(int(os.environ.get("KILL_SEED", 0))), int(os.environ.get("KILLS", 1))
    straight, start = subprocess.Popen(command(tmp_path / "a", *many), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path), time.time()
    out, err = straight.communicate() if kills > 1 else ("", "")           # one kill: beside it, which takes half the time
    seconds, killed, finished = time.time() - start, 0, 0
    log = tmp_path / "b" / "metrics.jsonl"                                 # of 19 lines or more; the 18th is after a checkpoint of phase 4
    lines = rng.integers(1, 18) if "KILL_SEED" in os.environ else 18
    while killed < kills:                              # only kills of a running process count; what got through starts anew
        child = subprocess.Popen(command(tmp_path / "b", "--resume", *many), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                 env=env, cwd=tmp_path)
        if kills > 1:
            time.sleep(rng.uniform(2.5, seconds))
        while kills == 1 and child.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
            time.sleep(0.02)
        killed += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        if (tmp_path / "b" / "result.json").exists() and killed < kills:
            assert "RESULT " + (tmp_path / "b" / "result.json").read_text().strip() == result_of(out)
            finished += 1
            (tmp_path / "b").rename(tmp_path / f"b{finished}")
    resumed = subprocess.run(command(tmp_path / "b", "--resume", *many), capture_output=True, text=True, env=env, cwd=tmp_path)
    out, err = (out, err) if kills > 1 else straight.communicate()
    assert straight.returncode == 0 and resumed.returncode == 0, err + resumed.stderr
    assert result_of(resumed.stdout) == result_of(out) and result_of(out).startswith("RESULT {")
    steps = lambda folder: [(r["phase"], r["step"]) for r in map(json.loads, open(folder / "metrics.jsonl"))]
    assert [s for s in steps(tmp_path / "a") if s[0] != "serve"] == [s for s in steps(tmp_path / "b") if s[0] != "serve"]

    shown = subprocess.run([sys.executable, str(ROOT / "curec.py"), "--recommend", "u3", "--run", str(tmp_path / "b"), "--top", "3"],
                           capture_output=True, text=True, env=env, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "pattern: " in shown.stdout and " 3. " in shown.stdout and "%" in shown.stdout
    nobody = subprocess.run([sys.executable, str(ROOT / "curec.py"), "--recommend", "me", "--run", str(tmp_path / "b")],
                            capture_output=True, text=True, env=env, cwd=tmp_path)
    assert nobody.returncode == 1 and nobody.stderr.startswith("error: --recommend me: no such user")


@pytest.mark.parametrize("flags, status, words", [
    (["--group", "1"], 2, "--group must be at least 2"), (["--data", "nowhere"], 1, "no such folder"),
    (["--data", "toy:5"], 1, "USERSxITEMSxINTERACTIONS"), (["--lora-targets", "wq"], 1, "no such linear layer"),
    (["--backbone", "/nowhere"], 1, "cannot be loaded"), (["--recommend", "u1"], 2, "needs --run"),
    (["--random-reasons"], 2, "--no-correct"), (["--categories", "--features", "text"], 2, "--features"), (["--lr", "0"], 2, "--lr"), (["--rm-epochs", "0"], 2, "--rm-epochs"),
    (["--correct-events", "0"], 2, "--correct-events"), (["--heads", "0"], 2, "--heads"), (["--data", "toy", "--min-interactions", "500"], 1, "--min-interactions"),
    (["--data", "toy", "--negatives", "390"], 1, "--negatives 390"), (["--ablations", "--variants", "w/o update"], 2, "w/o update: needs full too"), (["--variants", "half"], 2, "half: among full,ids only")])
def test_a_users_mistake_is_one_clear_line(flags, status, words, tmp_path, capsys, monkeypatch):
    from common.run import main
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(curec.Args, curec.train, curec.__doc__, flags)
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == status and words in err
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".tmp"]


# ------------------------------------------------------------------------------------------------- the phases, by hand
def small_policy(**changes):
    args = curec.Args(**SMALL | dict(lora_rank=4) | changes)
    policy = curec.Policy(args, torch.device("cpu"))
    for k, p in enumerate(lora.parameters(policy.model)):          # B is 0 at the start, and so would be the gradient of A
        torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(k))
    return args, policy


def test_a_step_has_the_policy_gradient_of_plain_forward_passes_in_parts_as_well():
    """On policy, without KL: each group's mean of advantage x mean log-probability of its completion, by Hugging Face."""
    args, policy = small_policy(beta=0.0, max_grad_norm=1e9)
    tokens, out, _ = policy.sample(["Which one?", "A longer question: which of these?"], 6, ("t",))
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 0.0, 2.0, 0.0]])
    policy.optimizer.step = lambda: None
    found = []
    for policy.args.micro_batch in (None, 1):
        policy.step(tokens, out, rewards)
        found.append([p.grad.clone() for p in lora.parameters(policy.model)])
    assert abs(policy.step(tokens, out, rewards, reference=lora.state(policy.model))["kl"]) < 1e-6 < policy.step(tokens, out, rewards)["kl"]
    policy.optimizer.zero_grad()
    for prompt, group, lengths, adv in zip(tokens, out.tokens, out.lengths, curec.advantages(rewards)):
        for completion, n, a in zip(group, lengths, adv):
            ids = torch.tensor([prompt + completion[:n].tolist()])
            logps = policy.model(ids).logits[0, len(prompt) - 1:-1].log_softmax(-1)[range(n), ids[0, len(prompt):]]
            (-a * logps.mean() / rewards.numel()).backward()
    for ours, parts, p in zip(*found, lora.parameters(policy.model)):
        least = 1e-3 * p.grad.abs().max()
        assert least > 0 and (ours - p.grad).abs().max() < least and (parts - p.grad).abs().max() < least


def test_alignment_weighs_the_rules_and_keeps_the_adapter_that_validation_likes_best(tmp_path, monkeypatch):
    args, policy = small_policy(align_steps=80, weights=(0.1, 0.2, 1.0), run=str(tmp_path / "r"))
    logs, given, marks, rates = curec.prepare(args), [], [], iter([0.9, 0.4, 0.5, 0.5])
    monkeypatch.setattr(curec, "rule_rewards", lambda *_: (1.0, 1.0, 0.0))
    monkeypatch.setattr(policy, "sample", lambda prompts, *_: ([], None, [["x"] * args.group for _ in prompts]))
    monkeypatch.setattr(curec, "evaluate_alignment", lambda *_, **__: dict(format=1.0, legal=1.0, correct=next(rates)))

    def step(tokens, out, rewards, lr_scale):
        given.append(rewards)
        lora.parameters(policy.model)[0].data += 1
        marks.append(float(lora.parameters(policy.model)[0].data.mean()))
        return {}
    monkeypatch.setattr(policy, "step", step)
    curec.align(args, Run(args, "curec", "x"), policy, logs)
    assert all(torch.allclose(r, torch.full((args.align_prompts, args.group), 0.3)) for r in given)
    assert float(lora.parameters(policy.model)[0].data.mean()) == marks[39]          # judged after 40 steps and after 80


def hide_the_held_out(logs):
    """Make one item what everybody's two last choices are, and nobody's before; its line is a mark."""
    marked = int(logs.items[0])
    logs.items[logs.items == marked] = (marked + 1) % len(logs.data.items)
    for u in logs.held_out:
        logs.sequence(u)[logs.n_train[u]:] = marked
    logs.lines[marked] = "HELD OUT"


def test_no_prompt_of_the_texts_holds_a_held_out_choice_and_the_aligned_llm_stays_encoder_and_reference(tmp_path, monkeypatch):
    args, policy = small_policy(run=str(tmp_path / "r"), reasons=1, group=2, text_tokens=4, correct_events=200, correct_batch=100)
    logs, prompts, encoders, references = curec.prepare(args), [], [], []
    hide_the_held_out(logs)
    monkeypatch.setattr(policy, "write", lambda asked, *_, **__: prompts.extend(asked) or ["word"] * len(asked))
    cut = types.SimpleNamespace(truncated=torch.zeros(1, 1, dtype=torch.bool))
    monkeypatch.setattr(policy, "sample", lambda asked, *_: (prompts.extend(asked) or [], cut, [["word", "word"] for _ in asked]))
    adapter = lambda: float(lora.parameters(policy.model)[0].data.sum())
    aligned = adapter()

    def encode(model, tokenizer, texts, size):
        encoders.append(adapter())
        return torch.randn(len(texts), 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(curec.llm, "encode", encode)

    def step(tokens, out, rewards, reference, lr_scale):
        references.append(reference)
        lora.parameters(policy.model)[0].data += 1
        return {}
    monkeypatch.setattr(policy, "step", step)
    run = Run(args, "curec", "x")
    curec.write_texts(args, run, policy, logs)
    texts = curec.restore_texts(args, logs, "cpu", *run.load("texts"))
    model = curec.RewardModel(args, logs, texts.patterns.shape[1])
    before = len(prompts)
    curec.correct(args, run, policy, logs, model, texts)
    assert before > 80 and len(prompts) > before + 400 and not any("HELD OUT" in p for p in prompts)
    assert not any("- " + p.split("then chose: ")[1].split("\n")[0] + "\n" in p for p in prompts if "then chose: " in p)
    assert set(encoders) == {aligned} and len(references) > 1 and adapter() != aligned
    assert all(torch.equal(next(iter(r.values())), next(iter(references[0].values()))) for r in references)
    assert float(next(iter(references[0].values())).sum()) == aligned


@pytest.mark.parametrize("update", [True, False])
def test_correction_asks_from_each_choices_past_and_puts_what_it_learned_in_its_place(update, tmp_path, monkeypatch):
    args, policy = small_policy(run=str(tmp_path / "r"), group=2, correct_events=30, correct_batch=8, update=update)
    logs, asked, rewritten, rewards = curec.prepare(args), [], [], []
    texts = curec.Texts(len(logs.n_train), len(logs.data.items), 3, 64, "cpu")
    texts.pattern, texts.mean[1] = ["old"] * len(logs.n_train), 1.0
    cut = lambda n: types.SimpleNamespace(truncated=torch.tensor([[True, False]] * n))
    monkeypatch.setattr(policy, "sample", lambda prompts, *_: asked.extend(prompts) or ([], cut(len(prompts)), [["cut", "best"]] * len(prompts)))
    monkeypatch.setattr(policy, "write", lambda prompts, *_: rewritten.extend(prompts) or ["old"] * len(prompts))
    monkeypatch.setattr(policy, "step", lambda tokens, out, given, **_: rewards.extend(given.tolist()) or {})
    monkeypatch.setattr(curec.llm, "encode", lambda model, tokenizer, some, size: torch.full((len(some), 64), 3.0))
    model = types.SimpleNamespace(rewards=lambda logs, texts, u, p, i, extra: (torch.zeros(len(u)), torch.full(extra.shape[:2], 5.0)))
    curec.correct(args, Run(args, "curec", "x"), policy, logs, model, texts)
    users, positions = (x[-30:] for x in logs.train_events())
    prompts = [curec.reason_prompt(logs.history(u, p), "old", logs.lines[logs.item_at(u, p)]) for u, p in zip(users, positions)]
    patterns = [curec.pattern_prompt(logs.history(u, p + 1)) for u, p in zip(users, positions)]
    assert sorted(asked) == sorted(prompts) and sorted(rewritten) == sorted(prompts + patterns if update else [])
    assert rewards == [[-1.0, 5.0]] * 30                          # a reason that was cut off: the score without it, minus 1
    assert {r["text"] for entries in texts.reason for r in entries} == {"old" if update else "best"}
    assert (texts.reasons[texts.author >= 0] == 2).all() and (texts.patterns[users] == (3 if update else 0)).all()


@pytest.mark.parametrize("which", ["valid", "test"])
def test_the_ranking_reads_what_came_before_its_target_and_nothing_else(which):
    args = curec.Args(**SMALL)
    logs, seen = curec.prepare(args), []

    class Model(torch.nn.Linear):
        def tables(self, texts):
            return None

        def score_catalogue(self, users, history, texts, tables):
            seen.extend(zip(users.tolist(), history))
            return torch.nn.functional.one_hot(torch.as_tensor([logs.sequence(u)[logs.n_train[u] + (which == "test")] for u in users.tolist()]).long(), len(logs.data.items)).float()
    report = curec.rank_all(args, Model(1, 1), logs, None, which)
    assert report["recall@5"] == 1.0 and len(seen) == len(logs.held_out)
    for u, history in seen:
        want = logs.sequence(u)[:logs.n_train[u] + (which == "test")][-args.max_history:] + 1
        assert history[history > 0].tolist() == want.tolist()


def test_the_reward_of_a_reason_depends_on_nothing_at_or_after_its_choice():
    args, logs, texts, model = world()
    u, p = np.array([3]), np.array([2])
    i, extra = logs.item_at(u, p), torch.randn(1, 2, 8)
    before, scores = model.rewards(logs, texts, u, p, i, extra)
    logs.sequence(3)[2:], logs.on_device = (logs.sequence(3)[2:] + 1) % len(logs.data.items), None
    again, others = model.rewards(logs, texts, u, p, i, extra)
    assert torch.equal(before, again) and torch.equal(scores, others)
    logs.sequence(3)[1], logs.on_device = (logs.sequence(3)[1] + 1) % len(logs.data.items), None
    assert not torch.equal(before, model.rewards(logs, texts, u, p, i, extra)[0])


def test_the_reward_model_that_stays_is_the_one_that_validation_liked_best(tmp_path, monkeypatch):
    args = curec.Args(**SMALL | dict(features="ids", rm_epochs=6, rm_lr=0.05, run=str(tmp_path / "r")))
    logs, run = curec.prepare(args), None
    run = Run(args, "curec", "x")
    texts = curec.Texts(len(logs.n_train), len(logs.data.items), 3, 8, "cpu")
    draw, spared = curec.datasets.negatives, []
    monkeypatch.setattr(curec.datasets, "negatives", lambda data, u, n, seed, seen=None, *rest: spared.append(seen) or draw(data, u, n, seed, seen, *rest))
    model = curec.fit_or_load(args, run, logs, texts, torch.device("cpu"))
    assert all(np.array_equal(seen, logs.train_keys()) for seen in spared)              # held-out items are not spared
    valid = [json.loads(line)["valid_ndcg10"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert max(valid) > valid[-1] and curec.rank_all(args, model, logs, texts, "valid")["ndcg@10"] == pytest.approx(max(valid), abs=1e-5)
