"""curec.py: losses against TRL and by hand, the reward model, the chronological order, leaks, hostile outputs, resume."""

import dataclasses
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
from safetensors.torch import load_file

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


def test_a_group_is_centred_and_scaled_by_its_own():
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0], [10.0, 30.0, 10.0, 30.0]])
    assert curec.advantages(rewards, "none").tolist() == [[-0.5, 0.5, -0.5, 0.5], [-10.0, 10.0, -10.0, 10.0]]
    assert torch.allclose(*curec.advantages(rewards), atol=1e-3)                      # 0.5 / 0.577 and 10 / 11.55


def test_clipping_on_both_sides_and_the_three_means_over_tokens_by_hand():
    e, zero, one = np.e, torch.zeros(1, 4, 1), torch.ones(1, 4, 1)
    logps, adv = torch.tensor([[[1.0], [1.0], [-1.0], [-1.0]]]), torch.tensor([[1.0, -1.0, 1.0, -1.0]])     # ratios e, e, 1 / e, 1 / e
    assert curec.grpo_loss(logps, zero, zero, adv, one, 0.2, 0.0)[0].item() == pytest.approx((-1.2 + e - 1 / e + 0.8) / 4)
    assert curec.grpo_loss(logps, zero, zero, torch.tensor([[1.0, -1.0, -1.0, -1.0]]), one, 0.2, 0.0)[1]["clip_frac"] == 0.75
    zero, mask = torch.zeros(1, 2, 4), torch.tensor([[[1.0, 0, 0, 0], [1, 1, 1, 0]]])                      # 1 token, and 3
    loss = {norm: curec.grpo_loss(zero, zero, zero, torch.tensor([[1.0, 3.0]]), mask, length_norm=norm)[0].item() for norm in ("grpo", "dapo", "dr_grpo")}
    assert loss == {"grpo": -(1 + 3) / 2, "dapo": -(1 + 9) / 4, "dr_grpo": -(1 + 9) / 8}


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


def test_a_thought_is_no_text():
    assert curec.clean_text("<think>\nOkay, a reason\n</think>\n\nThey like <answer>oceans</answer>.") == "They like oceans ."
    assert curec.clean_text("<think>\nOkay, the user wants") == "" and curec.clean_text("A - B") == "A - B"


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


def test_matching_and_score_by_hand_in_the_catalogue_and_as_a_reward():
    args, logs, texts, model = world()
    i = next(k for k, r in enumerate(texts.reason) if len(r) == 2)
    u = next(k for k in range(80) if k not in [r["author"] for r in texts.reason[i]] and logs.n_train[k] > 3)
    split = lambda x: x.view(-1, 2, 8).transpose(0, 1)                                # (heads, ., D / heads)
    keys, values = (torch.cat([none[None], layer(texts.reasons[i, :2])]) for none, layer in
                    ((model.no_reason_key, model.key), (model.no_reason_value, model.value)))
    m = F.scaled_dot_product_attention(split(model.query(texts.patterns[u])), split(keys), split(values)).flatten()
    z = model.join(torch.cat([model.item.weight[i + 1], m]))
    users, items, history = torch.tensor([u]), torch.tensor([[i + 1]]), torch.as_tensor(logs.sequence(u)[None, :3].astype(int)) + 1
    H, e = model.past(users, history, texts), model.user.weight[u] + model.of_user(texts.patterns[u])
    din = model.unit(z[None, None], H, torch.ones(1, 3))[0, 0] / np.sqrt(args.max_history)
    want = model.rest(model.first(torch.cat([e, z, e * z, din])))[0] + z @ H[0, -1] + model.bias.weight[i + 1, 0]
    assert torch.allclose(model(users, history, items, texts)[0, 0], want, atol=1e-4)
    assert torch.allclose(model.score_catalogue(users, history, texts)[0, i], want, atol=1e-4)
    extra = torch.randn(1, 2, 8)
    before, scores = model.rewards(logs, texts, np.array([u]), np.array([3]), np.array([i]), extra)
    assert torch.allclose(before[0], want, atol=1e-4)
    assert torch.allclose(scores, model(users, history, items.expand(1, 2), texts, extra=extra), atol=1e-4)


def test_ids_only_reads_no_text_content_only_no_id_and_past_items_bring_their_reasons_where_asked():
    for features, history_text in (("both", False), ("both", True), ("ids", False), ("text", False)):
        args, logs, texts, model = world(features, history_text=history_text)
        told = next(k for k, r in enumerate(texts.reason) if r and 0 not in [x["author"] for x in r])
        score = lambda: model(torch.tensor([0]), torch.tensor([[2, told + 1]]), torch.tensor([[1]]), texts)      # item 0 has no reason
        before = score()
        texts.reasons += 1
        assert torch.equal(score(), before) == (features != "text" and not history_text), (features, history_text)
        before = score()
        texts.patterns += 1
        assert torch.equal(score(), before) == (features == "ids")
        for table, row in ((model.user, 0), (model.item, 1), (model.item, 2)):
            before = score()
            table.weight.data[row] += torch.randn(16)
            assert torch.equal(score(), before) == (features == "text")


def test_an_items_bias_starts_at_the_log_of_its_popularity():
    args, logs, texts, model = world()
    model.set_priors(texts, logs)
    count = np.zeros(len(logs.data.items))
    for u in range(80):
        for i in logs.sequence(u)[:logs.n_train[u]]:
            count[i] += 1
    want = np.log((count + 1) / (count.mean() + 1)) - np.log(args.negatives)
    assert model.bias.weight.detach()[1:, 0].numpy() == pytest.approx(want, abs=1e-5)


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
    (["--data", "toy", "--negatives", "390"], 1, "--negatives 390"), (["--ablations", "--variants", "w/o update"], 2, "w/o update: needs full too"), (["--variants", "half"], 2, "half: among full,ids only"),
    (["--ablations", "--no-update"], 2, "--update itself"), (["--features", "ids", "--history-text"], 2, "--history-text"), (["--no-correct", "--shuffled-order"], 2, "phase 4"),
    (["--recommend", ""], 2, "needs --run"), (["--recommend", "", "--run", "nowhere"], 1, "no finished run")])
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


def test_an_alignment_that_has_nothing_to_learn_from_says_so(tmp_path, monkeypatch, capsys):
    args, policy = small_policy(align_steps=2, align_tokens=2, align_prompts=2, group=2, run=str(tmp_path / "r"))
    logs = curec.prepare(args)
    curec.align(args, Run(args, "curec", "x"), policy, logs)
    assert capsys.readouterr().out.count("no answer of the first step names a candidate") == 1


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


def test_texts_come_back_to_their_prompts_every_batch_draws_anew_and_the_seed_counts(monkeypatch):
    args, policy = small_policy(llm_batch=2)
    prompts = ["A much longer question: which of these will it be?", "Which one of these?", "Sea?"]
    alone = [policy.write([p], 8, "k")[0] for p in prompts]
    assert policy.write(prompts, 8, "k") == alone and len(set(alone)) == 3
    assert len(set(policy.write(["Sea?"] * 6, 8, "k", sample=True))) > 2
    draw = lambda *key: policy.sample(["Sea?"], 8, key)[2][0]
    first = draw("a", 1)
    assert draw("a", 1) == first != draw("a", 2)
    policy.args.seed = 1
    assert draw("a", 1) != first
    policy.args.temperature = 1e-4
    assert len(set(draw("a", 1))) == 1
    other = curec.Policy(curec.Args(**SMALL, seed=1, lora_rank=4), torch.device("cpu"))
    one, two = (lora.parameters(p.model)[0] for p in (curec.Policy(curec.Args(**SMALL, lora_rank=4), torch.device("cpu")), other))
    assert not torch.equal(one, two) and other.lr == 2e-3
    out = curec.llm.Rollout(torch.tensor([[[40, 41, 42, 43]]]), torch.tensor([[2]]), None, None)
    monkeypatch.setattr(curec.llm, "rollout", lambda *_, **__: out)
    assert policy.write(["x"], 8, "k") == policy.sample(["x"], 8, "k")[2][0] == [policy.tokenizer.decode([40, 41])]      # no padding


@pytest.mark.parametrize("kl, norm", [("k3", "dapo"), ("exact", "dr_grpo")])
def test_a_step_minimises_what_its_flags_say(kl, norm):
    """Sampled once, so that ρ is 1; the group of equal rewards is left out; log-probabilities by Hugging Face."""
    args, policy = small_policy(temperature=0.5, beta=0.5, kl=kl, length_norm=norm, advantage_scale="none", zero_std="drop", max_grad_norm=1e9, micro_batch=1)
    tokens, out, _ = policy.sample(["Which one?", "Left out.", "A longer question: which of these?"], 6, ("t",))
    out.lengths[0] = torch.tensor([1, 2, 1, 2])                    # of another length than the other group's
    rewards, reference = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 2, 0, 0]]), {k: v / 2 for k, v in lora.state(policy.model).items()}
    policy.optimizer.step = lambda: None
    policy.step(tokens, out, rewards, reference, lr_scale=0.25)
    assert policy.optimizer.param_groups[0]["lr"] == policy.lr / 4
    found = [p.grad.clone() for p in lora.parameters(policy.model)]
    policy.optimizer.zero_grad()

    def logps(prompt, completion):
        return (policy.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1] / 0.5).log_softmax(-1)
    texts = [(tokens[b], out.tokens[b, g, :out.lengths[b, g]].tolist()) for b in (0, 2) for g in range(4)]
    with lora.swapped(policy.model, reference), torch.no_grad():
        refs = [logps(*text) for text in texts]
    total = 0.0
    for (prompt, completion), ref, a in zip(texts, refs, [0.75, -0.25, -0.25, -0.25, -0.5, 1.5, -0.5, -0.5]):
        new = logps(prompt, completion)
        mine, its = (x[range(len(completion)), completion] for x in (new, ref))
        divergence = (its - mine).exp() - (its - mine) - 1 if kl == "k3" else (new.exp() * (new - ref)).sum(-1)
        total = total + (-a * mine + 0.5 * divergence).sum()
    (total / (sum(len(c) for _, c in texts) if norm == "dapo" else 2 * out.tokens[0].numel())).backward()
    for ours, p in zip(found, lora.parameters(policy.model)):
        assert (ours - p.grad).abs().max() < 1e-3 * p.grad.abs().max()
    policy.args.max_grad_norm = 1e-4
    policy.step(tokens, out, rewards, reference)
    assert sum(p.grad.square().sum() for p in lora.parameters(policy.model)).sqrt() == pytest.approx(1e-4, rel=1e-2)


def test_alignment_learns_from_training_is_judged_by_validation_and_told_of_test(tmp_path, monkeypatch):
    args, policy = small_policy(align_steps=20, eval_prompts=80, run=str(tmp_path / "r"))
    logs, made, judged, scales = curec.prepare(args), [], [], []
    real, layer = curec.align_examples, next(iter(lora.layers(policy.model).values()))

    def watched(logs, users, positions, candidates, seed, seen=None):
        prompts, targets = real(logs, users, positions, candidates, seed, seen)
        made.append((users, positions, seed, seen, prompts))
        return prompts, targets
    monkeypatch.setattr(curec, "align_examples", watched)
    monkeypatch.setattr(policy, "write", lambda prompts, *_, **__: judged.append((prompts, layer.enabled)) or ["<think></think><answer>A</answer>"] * len(prompts))
    monkeypatch.setattr(policy, "sample", lambda prompts, *_: ([], None, [["x"] * 4 for _ in prompts]))
    monkeypatch.setattr(policy, "step", lambda tokens, out, rewards, lr_scale: scales.append(lr_scale) or {})
    found = curec.align(args, Run(args, "curec", "x"), policy, logs)
    valid, *training, test = made
    for (users, positions, _, seen, _), place in ((valid, 0), (test, 1)):
        assert sorted(users) == logs.held_out.tolist() and (positions == logs.n_train[users] + place).all() and seen is None
    assert judged == [(valid[-1], True), (test[-1], False), (test[-1], True)]                      # before: without the adapter
    assert all((0 < p).all() and (p < logs.n_train[u]).all() and np.array_equal(seen, logs.train_keys()) for u, p, _, seen, _ in training)
    assert len({seed for _, _, seed, _, _ in training}) == len({tuple(u) for u, *_ in training}) == 20
    assert [scales[k] for k in (0, 4, 9, 10, 19)] == pytest.approx([0.1, 0.5, 0.55, 0.5, 0.05])
    assert found["after"]["format"] == found["after"]["legal"] == 1 > found["after"]["correct"] > 0


def test_processes_share_a_steps_prompts_each_with_its_own_target_and_draws(tmp_path, monkeypatch):
    args, policy = small_policy(align_prompts=6, run=str(tmp_path / "r"))
    logs = curec.prepare(args)
    monkeypatch.setattr(policy, "step", lambda *_, **__: {})
    monkeypatch.setattr(curec, "evaluate_alignment", lambda *_, **__: dict(format=1.0, legal=1.0, correct=0.5))

    def asked(rank, world):
        prompts, targets, keys = [], [], []
        monkeypatch.setattr(curec.cuda, "join", lambda device: (rank, world))
        monkeypatch.setattr(policy, "sample", lambda some, n, key: prompts.append(some) or keys.append(key) or ([], None, [["x"] for _ in some]))
        monkeypatch.setattr(curec, "rule_rewards", lambda text, n, target: targets.append(target) or (0, 0, 0))
        curec.align(args, Run(dataclasses.replace(args, run=str(tmp_path / f"{rank}{world}")), "curec", "x"), policy, logs)
        return np.array(prompts), np.array(targets).reshape(3, -1), keys
    (prompts, targets, _), *both = asked(0, 1), asked(0, 2), asked(1, 2)
    for rank, (some, its, keys) in enumerate(both):
        assert np.array_equal(some, prompts[:, rank::2]) and np.array_equal(its, targets[:, rank::2])
    assert len({*both[0][2], *both[1][2]}) == 6


def test_alignment_that_was_killed_goes_on_with_its_best_adapter_and_its_optimiser(tmp_path, monkeypatch):
    def last_checkpoint(name, kill):
        args, policy = small_policy(align_steps=80, align_prompts=1, lora_targets="q_proj", run=str(tmp_path / name))
        logs, run, steps, rates = curec.prepare(args), Run(args, "curec", "x"), [], [0.9, 0.4, 0.5, 0.5]
        monkeypatch.setattr(curec, "evaluate_alignment", lambda *_, **__: dict(format=1.0, legal=1.0, correct=rates.pop(0)))
        for stop in ([55, None] if kill else [None]):

            def step(tokens, out, rewards, lr_scale):
                steps.append(lr_scale)
                if len(steps) == stop:
                    raise KeyboardInterrupt
                for p in lora.parameters(policy.model):
                    p.grad = p.detach() + lr_scale
                policy.optimizer.step()
                return {}
            monkeypatch.setattr(policy, "sample", lambda prompts, *_: ([], None, [["x"] * 4 for _ in prompts]))
            monkeypatch.setattr(policy, "step", step)
            try:
                curec.align(args, run, policy, logs)
            except KeyboardInterrupt:
                policy = small_policy(lora_targets="q_proj")[1]    # as a new process would have it
        return run.load("align")[0] | {"aligned/" + k: v for k, v in run.load("aligned")[0].items()}
    straight, resumed = last_checkpoint("a", False), last_checkpoint("b", True)
    assert set(straight) == set(resumed) and all(torch.equal(v, resumed[k]) for k, v in straight.items())
    assert any(k.startswith("opt/") for k in straight) and not all(torch.equal(v, straight["now/" + k[5:]]) for k, v in straight.items() if k.startswith("best/"))


@pytest.mark.parametrize("source", ["llm", "data"])
def test_every_item_and_user_gets_the_texts_and_the_vectors_of_its_own_training_choices(source, tmp_path, monkeypatch):
    args, policy = small_policy(run=str(tmp_path / "r"), correct=False, texts=source)
    logs, asked, sampled = curec.prepare(args), {}, {}
    vector = lambda text: torch.randn(16, generator=torch.Generator().manual_seed(sum(map(ord, text))))

    def write(prompts, max_tokens, key, sample=False, desc=None):
        sampled[key] = sample
        texts = [f"{key} {k}" if k % 9 else "" for k in range(len(prompts))]          # every ninth came to nothing
        asked.update(zip(texts, prompts))
        return texts
    monkeypatch.setattr(policy, "write", write)
    monkeypatch.setattr(curec.llm, "encode", lambda model, tokenizer, texts, size: torch.stack([vector(t) for t in texts]))
    run = Run(args, "curec", "x")
    curec.write_texts(args, run, policy, logs)
    texts = curec.restore_texts(args, logs, "cpu", *run.load("texts"))
    count, order = logs.item_counts(), {event: k for k, event in enumerate(zip(*map(np.ndarray.tolist, logs.train_events())))}
    for u, pattern in enumerate(texts.pattern):
        past = logs.history(u, logs.n_train[u])
        assert pattern == "; ".join(past) if source == "data" else pattern == "" or asked[pattern] == curec.pattern_prompt(past)
        assert torch.allclose(texts.patterns[u], (vector(pattern) - texts.mean[0]) @ texts.basis)
    for i, entries in enumerate(texts.reason):
        place = [logs.sequence(r["author"]).tolist().index(i) for r in entries]
        events = [order[r["author"], p] for r, p in zip(entries, place)]
        assert len(entries) <= min(2, count[i]) and events == sorted(events) and (source == "llm" or len(entries) == min(2, count[i]))
        for k, (r, p) in enumerate(zip(entries, place)):
            assert r["text"] and torch.allclose(texts.reasons[i, k], (vector(r["text"]) - texts.mean[1]) @ texts.basis)
            if source == "llm":
                pattern = texts.pattern[r["author"]]
                assert asked[r["text"]] == curec.reason_prompt(logs.history(r["author"], p), pattern, logs.lines[i])
                assert f"\nInterests: {pattern or 'not known yet'}\n" in asked[r["text"]]
    assert sampled == ({"pattern": False, "reason": True} if source == "llm" else {})


def test_the_share_of_named_attributes_that_an_item_lacks_by_hand():
    texts = curec.Texts(3, 2, 2, 1, "cpu")
    for i, author, text, by in ((0, 0, "Sea and city, but dead calm", "write"), (0, 1, "the sea, again", "write"), (1, 2, "Hills: by the sea, a fantasy.", "correct")):
        texts.put_reason(i, author, text, torch.zeros(1), by)
    logs = types.SimpleNamespace(data=types.SimpleNamespace(categories=[["Sea", "Dead  Calm"], ["City", "&"], ["Hills", "Sci-Fi & Fantasy"]]))
    found = curec.text_report(texts, logs)
    assert (found["hallucinated"], found["hallucinated_corrected"]) == (0.25, 1.0)     # city, of 4; hills and sea, of 2


def test_reasons_that_are_dealt_out_keep_their_vectors_and_authors():
    texts = curec.Texts(9, 20, 2, 1, "cpu")
    for i in range(15):
        for author in range(1 + i % 2):
            texts.put_reason(i, author, f"{i}.{author}", torch.tensor([i + author / 10]), "t")
    texts.deal_out(np.random.default_rng(0))
    assert all([r["text"] for r in entries] == [f"{v:.1f}" for v, a in zip(texts.reasons[i, :, 0].tolist(), texts.author[i]) if a >= 0]
               for i, entries in enumerate(texts.reason)) and sum(map(len, texts.reason)) == 22
    assert sum(entries[0]["text"].startswith(f"{i}.") for i, entries in enumerate(texts.reason) if entries) < 5


def test_the_reward_model_learns_each_training_choice_once_an_epoch_against_what_was_drawn(tmp_path, monkeypatch):
    args = curec.Args(**SMALL | dict(features="ids", rm_epochs=2, negative_power=0.5))
    logs, drawn, seen, losses, starts, rates, cuts = curec.prepare(args), [], [], [], [], [], []
    texts, count = curec.Texts(len(logs.n_train), len(logs.data.items), 3, 8, "cpu"), logs.item_counts()
    real, draw, windows = curec.recommendation_loss, curec.datasets.negatives, logs.windows

    class Watched(curec.RewardModel):
        def set_priors(self, *given):
            starts.append(self.position.weight[0, 0].item())
            super().set_priors(*given)

        def forward_all_times(self, users, sequence, negatives, texts):
            seen.append((users, sequence, negatives))
            return super().forward_all_times(users, sequence, negatives, texts)

    def negatives(data, users, n, seed, seen=None, weights=None):
        drawn.append((seed, weights, draw(data, users, n, seed, seen, weights)))
        return drawn[-1][-1]

    def loss(positive, negative, kind, log_q):
        found = real(positive, negative, kind, log_q)
        losses.append((found.detach(), log_q))
        return found
    monkeypatch.setattr(curec, "RewardModel", Watched)
    monkeypatch.setattr(curec.datasets, "negatives", negatives)
    monkeypatch.setattr(curec, "recommendation_loss", loss)
    monkeypatch.setattr(logs, "windows", lambda length, size, rng: cuts.append(rng.random()) or windows(length, size, rng))
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_: rates.append(self.param_groups[0]["lr"]) or step(self))
    for seed in (0, 1):
        changed = dataclasses.replace(args, seed=seed, run=str(tmp_path / str(seed)))
        curec.train_reward_model(changed, Run(changed, "curec", "x"), logs, texts, torch.device("cpu"))
    assert len({seed for seed, *_ in drawn}) == len(seen) and len(set(cuts)) == 4 and len(set(starts)) == 2
    per_epoch, log_q = len(seen) // 4, 0.5 * np.log(count + 1.0)
    targets = sorted((u, i) for users, sequence, _ in seen[:per_epoch] for u, row in zip(users.tolist(), sequence.tolist()) for i in row if i)
    assert targets == sorted((u, i + 1) for u in range(80) for i in logs.sequence(u)[:logs.n_train[u]].tolist())
    told = [json.loads(line)["loss"] for line in (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()]
    assert told[0] == pytest.approx(np.mean([float(x[s > 0].mean()) for (x, _), (_, s, _) in zip(losses[:per_epoch], seen)]), abs=1e-5)
    for (_, weights, items), (_, sequence, given), (_, (of_positive, of_negative)) in zip(drawn, seen, losses):
        assert weights == pytest.approx((count + 1) ** 0.5) and np.array_equal(given, items + 1)
        of_negative, of_positive = of_negative[:, 0] - torch.as_tensor(log_q[items]), of_positive - torch.as_tensor(log_q[sequence.clamp(min=1) - 1])
        assert of_negative.max() - of_negative.min() < 1e-4 and (of_positive[sequence > 0] - of_negative[0, 0]).abs().max() < 1e-4
    assert rates[0] == pytest.approx(args.rm_lr / 100) and rates[2 * per_epoch - 1] < args.rm_lr * 0.1


class Ranker(torch.nn.Linear):
    """A reward model that scores the catalogue as it is told: score(users, history) -> (B, n_items)."""

    def __init__(self, score):
        super().__init__(1, 1)
        self.score = score

    def tables(self, texts):
        return None

    def score_catalogue(self, users, history, texts, tables):
        return self.score(users, history)


@pytest.mark.parametrize("which", ["valid", "test"])
def test_the_ranking_reads_what_came_before_its_target_and_nothing_else(which):
    args = curec.Args(**SMALL)
    logs, seen = curec.prepare(args), []

    def score(users, history):
        seen.extend(zip(users.tolist(), history))
        return torch.nn.functional.one_hot(torch.as_tensor([logs.sequence(u)[logs.n_train[u] + (which == "test")] for u in users.tolist()]).long(), len(logs.data.items)).float()
    report = curec.rank_all(args, Ranker(score), logs, None, which)
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


def test_a_reward_model_that_was_killed_goes_on_with_its_best_epoch_its_optimiser_and_its_dropout(tmp_path, monkeypatch):
    args = curec.Args(**SMALL | dict(data="toy:40x100x400", features="ids", rm_epochs=3))
    logs = curec.prepare(args)
    texts = curec.Texts(len(logs.n_train), len(logs.data.items), 3, 8, "cpu")

    def last_checkpoint(name, told):
        changed = dataclasses.replace(args, run=str(tmp_path / name))

        def rank_all(*_, **__):
            if (ndcg := told.pop(0)) is None:
                raise KeyboardInterrupt
            return {"ndcg@10": ndcg, "recall@10": 0.0}
        monkeypatch.setattr(curec, "rank_all", rank_all)
        run = Run(changed, "curec", "x")
        while told:
            try:
                curec.train_reward_model(changed, run, logs, texts, torch.device("cpu"))
            except KeyboardInterrupt:
                torch.rand(7)
        return run.load("reward")[0]
    straight, resumed = last_checkpoint("a", [0.9, 0.6, 0.7]), last_checkpoint("b", [0.9, 0.6, None, 0.7])
    assert set(straight) == set(resumed) and all(torch.equal(v, resumed[k]) for k, v in straight.items())
    assert any(k.startswith("opt/") for k in straight)


@pytest.mark.parametrize("flags", [{}, {"update": False}, {"shuffled_order": True, "correct_batch": 1}])
def test_each_corrected_choice_gets_the_texts_and_vectors_that_were_written_for_it(flags, tmp_path, monkeypatch):
    args, policy = small_policy(**dict(run=str(tmp_path / "r"), group=2, correct_events=30, correct_batch=8) | flags)
    logs, asked, keys, scales, rewards, states, written = curec.prepare(args), [], [], [], [], [], {}
    texts = curec.Texts(len(logs.n_train), len(logs.data.items), 9, 64, "cpu")
    texts.pattern = ["old"] * len(logs.n_train)
    vector = lambda text: torch.randn(64, generator=torch.Generator().manual_seed(sum(map(ord, text))))
    plain = lambda prompt: "".join(line for line in prompt.splitlines() if not line.startswith("Interests: "))
    policy.optimizer.state[lora.parameters(policy.model)[0]] = {"step": torch.tensor(9.0)}                 # of phase 1

    def sample(prompts, n, key):
        asked.append([plain(p) for p in prompts]), keys.append(key)
        return [], types.SimpleNamespace(truncated=torch.zeros(len(prompts), 2, dtype=torch.bool)), [["", "two"] for _ in prompts]

    def write(prompts, *_, **__):
        found = [f"text {k}" if k % 5 else "" for k in range(len(written), len(written) + len(prompts))]
        written.update((plain(p), w) for p, w in zip(prompts, found))
        return found

    def step(tokens, out, given, reference, lr_scale):
        rewards.extend(given.tolist()), scales.append(lr_scale), states.append(len(policy.optimizer.state))
        return {}
    for name, fake in (("sample", sample), ("write", write), ("step", step)):
        monkeypatch.setattr(policy, name, fake)
    monkeypatch.setattr(curec.llm, "encode", lambda model, tokenizer, some, size: torch.stack([vector(t) for t in some]))
    model = types.SimpleNamespace(rewards=lambda logs, texts, u, p, i, extra: (torch.ones(len(u)), torch.full(extra.shape[:2], 5.0)))
    curec.correct(args, Run(args, "curec", "x"), policy, logs, model, texts)
    users, positions = (x[-30:] for x in logs.train_events())
    prompts = [plain(curec.reason_prompt(logs.history(u, p), "", logs.lines[logs.item_at(u, p)])) for u, p in zip(users, positions)]
    order = [prompts.index(p) for batch in asked for p in batch]
    assert sorted(order) == list(range(30)) and (order != sorted(order) or not args.shuffled_order)
    for u, p, prompt in zip(users, positions, prompts):
        i, text = int(logs.item_at(u, p)), written[prompt] if args.update else "two"
        mine = [k for k, r in enumerate(texts.reason[i]) if r["author"] == u and r["text"] == text]
        assert len(mine) == (text != "") == sum(r["author"] == u for r in texts.reason[i]) and all(torch.equal(texts.reasons[i, k], vector(text)) for k in mine)
    for u in set(users.tolist()) if args.update else ():
        told = [w for p in positions[users == u] if (w := written[plain(curec.pattern_prompt(logs.history(u, p + 1)))])]
        assert texts.pattern[u] in told if told else texts.pattern[u] == "old"         # nothing written: the old one stays
        assert not told or torch.equal(texts.patterns[u], vector(texts.pattern[u])) and (args.shuffled_order or texts.pattern[u] == told[-1])
    assert rewards == [[0.0, 5.0]] * 30 and set(states) == {0} and len(set(keys)) == len(keys)
    assert scales == pytest.approx([0.3 * len(batch) / args.correct_batch for batch in asked]) and (args.correct_batch == 1 or min(scales) < max(scales))
    assert {json.loads(line)["gain"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()} == {4.0}


def test_correction_that_was_killed_goes_on_with_its_texts_and_its_optimiser(tmp_path, monkeypatch):
    def last_checkpoint(name, *stops):
        args, policy = small_policy(run=str(tmp_path / name), group=2, correct_batch=1, lora_targets="q_proj")
        logs, run, steps = curec.prepare(args), Run(args, "curec", "x"), []
        model = types.SimpleNamespace(rewards=lambda logs, texts, u, p, i, extra: (torch.ones(len(u)), extra[..., 0]))
        monkeypatch.setattr(curec.llm, "encode", lambda model, tokenizer, some, size: torch.tensor([[float(len(t))] * 64 for t in some]))
        for stop in stops:

            def step(tokens, out, given, reference, lr_scale):
                steps.append(given)
                if len(steps) == stop:
                    raise KeyboardInterrupt
                for p in lora.parameters(policy.model):
                    p.grad = p.detach() + len(steps[-1])
                policy.optimizer.step()
                return {}
            cut = types.SimpleNamespace(truncated=torch.zeros(1, 2, dtype=torch.bool))
            for method, fake in (("step", step), ("write", lambda prompts, *_: [f"of {len(p)}" for p in prompts]), ("sample", lambda prompts, *_: ([], cut, [["a", "b"]]))):
                monkeypatch.setattr(policy, method, fake)
            try:
                curec.correct(args, run, policy, logs, model, curec.Texts(len(logs.n_train), len(logs.data.items), 3, 64, "cpu"))
            except KeyboardInterrupt:
                policy = small_policy(lora_targets="q_proj")[1]    # as a new process would have it
        return run.load("correct")
    (straight, state), (resumed, again) = last_checkpoint("a", None), last_checkpoint("b", 12, None)               # saved after 10 of 14
    assert set(straight) == set(resumed) and all(torch.equal(v, resumed[k]) for k, v in straight.items()) and any(k.startswith("opt/") for k in straight)
    assert (state["pattern"], state["reason"]) == (again["pattern"], again["reason"]) and sum(map(len, state["reason"])) >= 12


@pytest.mark.parametrize("which, ndcg", [("valid", 0.63093), ("test", 1.0)])
def test_what_was_chosen_before_does_not_compete_and_what_comes_after_does(which, ndcg):
    args = curec.Args(**SMALL)
    logs, asked = curec.prepare(args), []

    def score(users, history):
        scores = torch.zeros(len(users), len(logs.data.items))
        for row, u in zip(scores, users.tolist()):
            asked.append(u)
            row[logs.sequence(u)] = torch.arange(len(logs.sequence(u)), 0.0, -1)               # the earlier, the better,
            row[logs.sequence(u)[-1]] = 2.5 if which == "valid" else 1.0                       # but the test item before the validation item
        return scores
    assert curec.rank_all(args, Ranker(score), logs, None, which)["ndcg@5"] == pytest.approx(ndcg, abs=1e-4)
    asked.clear()
    curec.rank_all(args, Ranker(score), logs, None, which, limit=30)
    assert asked == logs.held_out[::-(-len(logs.held_out) // 30)].tolist() and len(asked) > 15


def test_the_attentions_entropy_is_1_where_flat_and_of_the_test_choices():
    args = curec.Args(**SMALL)
    logs, asked = curec.prepare(args), []

    class Model(torch.nn.Linear):
        def match(self, users, items, texts, return_weights):
            asked.extend(zip(users.tolist(), items[:, 0].tolist()))
            self.weights = torch.zeros(len(users), 1, 2, 4)
            self.weights[..., :2] = 0.5
            self.weights[0, ..., :2], self.weights[1, ..., :2] = torch.tensor([0.9, 0.1]), torch.tensor([1.0, 0.0])      # the second has no choice
            return self.weights
    found = curec.attention_entropy(Model(1, 1), logs, None)
    assert asked == [(u, logs.sequence(u)[-1] + 1) for u in logs.held_out] and len(asked) > 20
    assert found["mean"] == pytest.approx(1 - (1 - 0.4690) / (len(asked) - 1), abs=1e-3) and found["q90"] == 1


def test_what_a_user_is_shown_is_new_to_them_and_every_reason_has_its_own_weight():
    args, logs, texts, model = world()
    texts.pattern = [f"pattern {u}" for u in range(80)]
    for i, entries in enumerate(texts.reason):
        for k, r in enumerate(entries):
            r["text"] = f"{i}.{k}"
    u = int(logs.held_out[5])
    found, number = curec.explain(args, model, logs, texts, u, 200), {line: i for i, line in enumerate(logs.lines)}
    items = [number[x["title"]] for x in found["top"]]
    assert len(number) == len(items) + len(logs.sequence(u)) == len(logs.lines) and not {*items} & {*logs.sequence(u).tolist()}
    scores = model.score_catalogue(torch.tensor([u]), torch.as_tensor(logs.sequence(u)[None, -args.max_history:].astype(int)) + 1, texts)[0]
    assert [x["score"] for x in found["top"]] == pytest.approx(scores[items].tolist(), abs=1e-3) and scores[items].diff().max() <= 0
    assert found["pattern"] == f"pattern {u}" and found["history"] == [logs.lines[i] for i in logs.sequence(u)[-5:]]
    several = [(i, x) for i, x in zip(items, found["top"]) if len(x["reasons"]) > 1]
    for i, x in several:
        w = model.match(torch.tensor([u]), torch.tensor([[i + 1]]), texts, return_weights=True)[0, 0].mean(0).tolist()
        assert {r["text"]: r["weight"] for r in x["reasons"]} == pytest.approx({f"{i}.{k}": v for k, v in enumerate(w[1:1 + len(x["reasons"])])}, abs=1e-4)
        assert x["no_reason"] == pytest.approx(w[0], abs=1e-4) and x["reasons"][0]["weight"] == max(r["weight"] for r in x["reasons"])
    assert several


@pytest.mark.parametrize("changes", [{"refit": True}, {"random_reasons": True, "correct": False}, {"align": False, "correct": False}])
def test_every_phase_gets_what_the_one_before_it_left_and_what_is_served_is_shown(changes, tmp_path, monkeypatch, capsys):
    """The phases are stand-ins that leave a mark each: the way between them is what is looked at. Phase 1 is another run's."""
    met, adapter = {}, lambda policy: lora.parameters(policy.model)[0].data.sum().item()
    args = curec.Args(**SMALL | dict(lora_targets="q_proj", run=str(tmp_path / "r")) | changes)

    def align(args, run, policy, logs):
        marked = {k: v + 1 for k, v in lora.state(policy.model).items()}
        met["aligned"] = next(iter(marked.values())).sum().item()
        run.save("aligned", marked, {})
        return met.setdefault("align", {"chance": 0.2, "before": dict(correct=0.1, legal=1.0), "after": dict(correct=0.3, legal=1.0)})

    def texts_of(run, name, logs, word, before=""):
        texts = curec.Texts(len(logs.n_train), len(logs.data.items), 3, 64, "cpu")
        texts.pattern = [f"{word} pattern"] * len(logs.n_train)
        for u, p in zip(*logs.train_events()):
            texts.put_reason(int(logs.item_at(u, p)), int(u), f"{word} {logs.item_at(u, p)}", torch.full((64,), 0.1 if word == "first" else 9.0), "write")
        run.save(name, {before + k: v for k, v in texts.tensors().items()}, texts.state())

    def write_texts(args, run, policy, logs):
        met["adapter"] = adapter(policy)
        texts_of(run, "texts", logs, "first")
        return {}

    def train_reward_model(args, run, logs, texts, device, name="reward"):
        met[name] = [r[0]["text"] if r else "" for r in texts.reason]
        model = curec.RewardModel(args, logs, 64)
        torch.nn.init.constant_(model.bias.weight, {"reward": 1.0, "refit": 2.0}[name])
        run.save(name, {"best/" + k: v for k, v in model.state_dict().items()}, {})
        return {}

    def correct(args, run, policy, logs, model, texts):
        met["asked"] = model.bias.weight[0, 0].item(), texts.pattern[0], adapter(policy)
        texts_of(run, "correct", logs, "last", "texts/")
        return {}
    for fake in (align, write_texts, train_reward_model, correct):
        monkeypatch.setattr(curec, fake.__name__, fake)
    figures = lambda which: {f"{k}@10": {"valid": 0.1, "test": 0.2}[which] for k in ("recall", "ndcg")} | {"ndcg@10_ci": [0.0, 1.0], "ms_per_user": 1.0}
    monkeypatch.setattr(curec, "rank_all", lambda args, model, logs, texts, which, limit=None: figures(which))
    result = curec.train(args)
    shown = capsys.readouterr().out
    assert (result["valid"]["ndcg@10"], result["test"]["ndcg@10"]) == (0.1, 0.2) and "0.2000    0.2000" in shown and "0.1000    0.1000" not in shown
    first = [f"first {i}" if r else "" for i, r in enumerate(met["reward"])]
    assert sorted(met["reward"]) == sorted(first) and (met["reward"] != first) == ("random_reasons" in changes) and ("align" in met) == args.align and met["adapter"] == met.get("aligned", met["adapter"])
    served = load_file(tmp_path / "r" / "served.safetensors")
    assert served["bias.weight"][0] == (2 if args.refit else 1)
    before = (tmp_path / "r" / "args.json").read_bytes()
    curec.train(curec.Args(recommend="u3", run=str(tmp_path / "r"), top=1, data_dir=str(tmp_path)))
    assert (tmp_path / "r" / "args.json").read_bytes() == before
    with pytest.raises(curec.UserError, match="trained on other data"):
        curec.train(curec.Args(recommend="u3", run=str(tmp_path / "r"), data="toy:200x100x2000"))
    page = capsys.readouterr().out
    assert f"pattern: {'last' if args.correct else 'first'} pattern" in page and ("last " in page) == args.correct
    best = {r["user"]: r for r in map(json.loads, (tmp_path / "r" / "examples.jsonl").read_text().splitlines())}["u3"]["top"][0]
    assert f"1. {best['title']}   score {best['score']:.2f}" in page
    if not args.refit:
        return
    assert met["asked"] == (1.0, "first pattern", met["adapter"]) and met["refit"][:5] == [x.replace("first", "last") for x in first[:5]]
    heir, before = dataclasses.replace(args, run=str(tmp_path / "heir")), dict(met)
    met.clear()
    curec.train(heir, (tmp_path / "r", ("align",), curec.ALIGNED))                     # phase 1 is taken over, and its adapter with it
    assert "align" not in met and met["adapter"] == before["aligned"]


def test_each_row_of_the_table_differs_and_takes_over_only_what_it_does_not_change_and_each_seed_is_its_own(tmp_path, monkeypatch, capsys):
    reads, files, so_far = {}, {"align": "aligned", "write": "texts", "reward": "reward", "correct": "correct"}, {"backbone"}
    for phase, more in (("align", "align"), ("write", "texts"), ("reward", "features random_reasons categories"),
                        ("correct", "correct update shuffled_order correct_lr_scale")):
        reads[phase] = so_far = so_far | set(more.split())
    changes = [change for change, *_ in curec.VARIANTS.values()]
    assert all(changes.count(change) == 1 for change in changes) and all(getattr(curec.Args(), k) != v for change in changes for k, v in change.items())
    for name, (change, phases, taken) in curec.VARIANTS.items():
        assert not any(set(change) & reads[phase] for phase in phases) and {f"{files[phase]}.safetensors" for phase in phases} <= set(taken), name
        curec.Args(**change).check()
    asked = []

    def train(args, shared):
        asked.append((args.seed, args.update, args.run, str(shared[0]), shared[1]))
        Path(args.run).mkdir(parents=True)
        (Path(args.run) / "header.json").write_text("{}")
        figures = {f"{k}@{n}": 0.5 for k in ("ndcg", "recall") for n in (10, 20)}
        record = {"script": "curec", "valid": dict.fromkeys(figures, 0.1), "test": figures | {"ndcg@10": args.seed / 10}, "popularity": figures,
                  "attention_entropy": {"mean": 0.7}, "align": {"before": {"correct": 0.2}, "after": {"correct": 0.3}}}
        (Path(args.run) / "result.json").write_text(json.dumps(record))
        return record
    monkeypatch.setattr(curec, "train", train)
    rows = curec.ablations(curec.Args(ablations=True, variants=("w/o update", "full"), seeds=(4, 5), run=str(tmp_path)))
    of = lambda seed, name: str(tmp_path / f"s{seed}" / name)
    assert asked == [x for s in (4, 5) for x in ((s, True, of(s, "full"), of(s, "full"), ()),
                                                 (s, False, of(s, "w-o-update"), of(s, "full"), ("align", "write", "reward")))]
    assert {k: v["mean"] for k, v in rows["w/o update"].items()} == pytest.approx({"NDCG@10": 0.45, "Recall@10": 0.5, "NDCG@20": 0.5, "attention": 0.7, "aligned": 0.3, "validation": 0.1})
    assert set(rows) == {"full", "w/o update", "popularity"}


def test_the_data_are_those_that_the_flags_ask_for(tmp_path):
    prepare = lambda **changes: curec.prepare(curec.Args(**SMALL | changes))
    assert prepare().data.rating.min() < 4 <= prepare(min_rating=4.0, negatives=1).data.rating.min()
    assert len(prepare(users=20).data.users) == 20 and prepare(users=20).data.users != prepare(users=20, seed=1).data.users
    assert len(prepare(prompt_history=3).history(0, 9)) == 3
    rows = [f"u{n},i{n}-{k},{k}" for n in (29, 30, 31) for k in range(n)]
    (tmp_path / "interactions.csv").write_text("\n".join(["user,item,time", *rows]) + "\n")
    assert prepare(data=str(tmp_path)).data.users == ["u30", "u31"]                    # the paper's 30
