"""lcft.py: objectives, pairs, measures, data, resume, bad input."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lcft
from common import llm, lora
from common.run import Run, UserError

ROOT = Path(__file__).parent.parent
KINDS = ("paper", "official", "jsd", "hinge", "swap", "follow")
ON_ANSWERS = ("hinge", "swap", "follow")


def random_logits(n=3, v=7, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, n, v, generator=g, dtype=torch.float64)).requires_grad_()


# ------------------------------------------------------------------------------------------------------- objectives
LABEL = torch.tensor([1, 0, 1])


@pytest.mark.parametrize("kind,ids", [(k, i) for k in KINDS for i in (None, [1, 4]) if k not in ON_ANSWERS or i])
def test_gradients_of_every_divergence_are_right_in_double_precision(kind, ids):
    x = random_logits()
    if kind in ("official", "follow"):                       # one branch is detached: only the other may move
        moves, stays = (x[k].detach() for k in ((0, 1) if kind == "official" else (1, 0)))
        order = 1 if kind == "official" else -1
        assert torch.autograd.gradcheck(lambda x: lcft.apart(*(x, stays)[::order], kind, 100.0, ids), moves.requires_grad_())
    else:
        assert torch.autograd.gradcheck(lambda x: lcft.apart(x[0], x[1], kind, 100.0, ids, LABEL), x)


@pytest.mark.parametrize("kind", ["answer", "yes"])
def test_gradients_of_the_hosts_losses_are_right_in_double_precision(kind):
    label = torch.tensor([1, 0, 1])
    x = random_logits()[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lcft.answer_loss(x[:, 1], x[:, 4], x.logsumexp(-1), label, kind), x)


def test_the_answer_loss_is_pytorchs_cross_entropy():
    x, label = random_logits()[0].detach(), torch.tensor([1, 0, 1])
    want = F.cross_entropy(x, torch.where(label.bool(), 1, 4), reduction="none")
    torch.testing.assert_close(lcft.answer_loss(x[:, 1], x[:, 4], x.logsumexp(-1), label), want)


def test_collms_loss_is_the_binary_cross_entropy_of_the_logit_of_yes():
    x, wrong = random_logits()[0].detach(), torch.tensor([-1.0, 1.0, -1.0])      # the label turns the sign of Yes
    torch.testing.assert_close(lcft.answer_loss(x[:, 1], x[:, 4], x.logsumexp(-1), LABEL, "yes"), F.softplus(wrong * x[:, 1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_at_gaps_of_ten_thousand(kind, dtype):
    pos = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    neg = torch.tensor([[0.0, 1e4, 0.0], [0.0, -1e4, 1e4]], dtype=dtype, requires_grad=True)
    far = lcft.apart(pos, neg, kind, 1e9, [0, 1] if kind in ON_ANSWERS else None, LABEL[:2])
    far.sum().backward()
    assert torch.isfinite(far).all()
    for side, still in ((pos, "follow"), (neg, "official")):
        assert side.grad is None if kind == still else torch.isfinite(side.grad).all()


def test_the_released_formula_gives_nan_where_ours_does_not():
    pos, neg = torch.tensor([[200.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 200.0]])
    theirs = F.kl_div(torch.log(torch.softmax(pos, -1)), torch.softmax(neg, -1), reduction="batchmean").clamp(max=1e4)
    assert torch.isnan(torch.autograd.grad(theirs, pos)[0]).any()
    assert torch.isfinite(torch.autograd.grad(lcft.apart(pos, neg, "official").sum(), pos)[0]).all()


def test_each_divergence_by_hand_and_against_pytorch():
    p, n = torch.tensor([[0.75, 0.25]]).double(), torch.tensor([[0.25, 0.75]]).double()
    kl = 0.5 * math.log(3)                                   # 3/4 log 3 - 1/4 log 3
    assert lcft.apart(p.log(), n.log(), "paper").item() == pytest.approx(kl)
    assert lcft.apart(p.log(), n.log(), "paper", cap=0.1).item() == pytest.approx(0.1)
    gap = 2 * math.log(3)                                    # log-odds log 3 and -log 3
    for label, cap, want in ((1, 9.0, gap), (0, 9.0, -gap), (1, 0.5, 0.5), (0, 0.5, -gap)):          # no bound below
        assert lcft.apart(p.log(), n.log(), "hinge", cap, [0, 1], torch.tensor([label])).item() == pytest.approx(want)
    assert lcft.apart(p.log(), n.log(), "jsd").item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    a, b = random_logits().detach()
    want = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(lcft.apart(a, b, "official"), want)       # F.kl_div(input, target) is KL(target || input)
    torch.testing.assert_close(lcft.apart(b, a, "paper", 100.0), want)
    assert (lcft.apart(1e3 * a, 1e3 * b, "jsd") <= math.log(2) + 1e-9).all()
    assert all(lcft.apart(a, a, kind, ids=[1, 4], label=LABEL).abs().max() < 1e-12 for kind in KINDS if kind not in ("swap", "follow"))
    assert lcft.apart(p.log(), n.log(), "swap", ids=[0, 1]).item() == pytest.approx(0, abs=1e-12)         # consistent
    assert lcft.apart(a, b, "swap", ids=[1, 4]).max() < 0
    assert torch.equal(lcft.apart(a, b, "follow", ids=[1, 4]), lcft.apart(a, b, "swap", ids=[1, 4]))


def test_the_officials_gradient_on_the_gap_is_the_identity_of_the_docstring():
    lam, n = 0.7, torch.tensor([0.2, 0.6, 0.99]).double()
    s = torch.tensor([-1.0, 0.5, 3.0]).double().requires_grad_()
    pos = torch.stack([s, torch.zeros_like(s)], -1)
    loss = -F.log_softmax(pos, -1)[:, 0] - lam * lcft.apart(pos, torch.stack([n, 1 - n], -1).log(), "official")
    got = -torch.autograd.grad(loss.sum(), s)[0]
    p = torch.sigmoid(s.detach())
    torch.testing.assert_close(got, (1 - p) + lam * (p - n))
    assert n[2] > p[2] and got[2] < (1 - p)[2] and n[0] < p[0] and got[0] > (1 - p)[0]     # where n > p it is pushed down


def test_a_capped_divergence_gives_no_gradient_beyond_its_cap():
    x = torch.tensor([[[3.0, 0.0, 0.0]], [[0.0, 3.0, 0.0]]], requires_grad=True)
    for kind in ("paper", "hinge"):
        far = lcft.apart(x[0], x[1], kind, 1e-3, [0, 1], torch.tensor([1]))
        assert torch.autograd.grad(far.sum(), x)[0].abs().max() == 0


def test_equal_answers_have_a_gradient_under_swap_follow_and_hinge_only():
    x = torch.tensor([[[3.0, 0.0, 0.0]], [[3.0, 0.0, 0.0]]], requires_grad=True)
    slope = lambda kind: torch.autograd.grad(lcft.apart(x[0], x[1], kind, 4.0, [0, 1], torch.tensor([1])).sum(), x)[0]
    assert slope("hinge").abs().max() == 1 and slope("swap").abs().max() > 0.01 and slope("jsd").abs().max() < 1e-6 and slope("paper").abs().max() < 1e-6
    assert torch.equal(slope("follow")[1], slope("swap")[1]) and slope("swap")[0].abs().max() > 0.01 and not slope("follow")[0].any()


# ------------------------------------------------------------------------------------------------------------ pairs
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small log of ratings whose users like what they liked, and one who likes nothing."""
    path, rng = tmp_path_factory.mktemp("log"), np.random.default_rng(0)
    rows = [f"u{u},i{i},{5 if (u + i) % 3 else 1},{t}" for t, (u, i) in enumerate((rng.integers(12), rng.integers(30)) for _ in range(300))]
    rows += [f"none,i{i},1,{30 * i}" for i in range(10)]
    (path / "interactions.csv").write_text("user,item,rating,timestamp\n" + "\n".join(dict.fromkeys(rows)) + "\n")
    (path / "items.csv").write_text("item,title,categories\n" + "".join(f"i{i},Film {i},comedy\n" for i in range(30)))
    return path


def make(folder, **change):
    args = lcft.Args(**{"data": str(folder), "users": None, "prompt_history": 4, "lora_dropout": 0.0, **change})
    return lcft.Host(args, torch.device("cpu"), lcft.Rows(args))


def double(host):
    host.model.double()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():                                    # an adapter that does something
        for p in lora.parameters(host.model):
            p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return host


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))


def plain(host, row, g):
    """Logits (V,) after one prompt of a pair, from a pass of its own."""
    prompts = lcft.pair_prompts(*host.rows.before(row), host.rows.lines[host.rows.item[row]], host.args.template, host.args.flip)
    return host.model(torch.tensor([llm.chat(host.tokenizer, "".join(prompts[g]))])).logits[0, -1].detach()


def test_the_two_prompts_of_a_pair_word_for_word():
    told = "The user liked these titles, oldest first:\n- A\nThe user disliked these titles:\n- B\n- C\nThe user now sees this title:\n- D\n"
    questions = ["Will the user like it?", "Will the user dislike it?"]
    shared, tallrec = (["".join(p) for p in lcft.pair_prompts(["A"], ["B", "C"], "D", template)] for template in ("shared", "tallrec"))
    assert shared == [f"{told}{question} Answer Yes or No." for question in questions]
    assert tallrec == [f"Given the user's taste, say: {question} Answer Yes or No.\n{told}Will the user like it?" for question in questions]
    *slots, context, _ = lcft.pair_prompts(["A"], ["B", "C"], "D", vectors=True)[1]
    assert slots == ["What other users chose says this of the user: ", 0, ", and this of the title: ", 1, "\n"] and context == told


def test_the_adapter_is_the_one_that_the_flags_ask_for(folder):
    flags = {"lora_targets": "o_proj", "lora_rank": 3, "lora_alpha": 6.0, "lora_dropout": 0.1}
    one, other = (lora.layers(make(folder, **flags, seed=seed).model) for seed in (0, 1))
    for name, layer in one.items():
        assert name.endswith("o_proj") and layer.lora_A.shape[0] == 3 and layer.scale == 2 and layer.dropout.p == 0.1
        assert not torch.equal(layer.lora_A, other[name].lora_A)


def test_losses_and_divergences_of_a_pair_are_those_of_two_plain_passes_by_hand(folder):
    host = double(make(folder, neg_ce=0.5))
    rows, args, (yes, no) = [next(r for r in host.rows.train if host.rows.label[r] == k) for k in (1, 0)], host.args, host.ids
    logits = [(plain(host, row, 0), plain(host, row, 1)) for row in rows]
    kl = lambda p, n: float((p.exp() * (p - n)).sum())
    middle = lambda p, n: torch.log((p.exp() + n.exp()) / 2)
    jsd = lambda p, n: (kl(p, middle(p, n)) + kl(n, middle(p, n))) / 2
    sides = {"like": 1, "dislike": -1}
    for flags, lam, far in (({"kl": "paper"}, 0.1, lambda p, n, _: kl(p.log_softmax(0), n.log_softmax(0))),
                            ({"kl": "paper", "kl_vocab": "answers", "ce": "yes"}, 0.1, lambda p, n, _: kl(p[[yes, no]].log_softmax(0), n[[yes, no]].log_softmax(0))),
                            ({"bound": "jsd"}, 1.0, lambda p, n, _: jsd(p[[yes, no]].log_softmax(0), n[[yes, no]].log_softmax(0))),
                            ({"bound": "jsd", "kl_vocab": "full", "lam": 0.0}, 0.0, lambda p, n, _: jsd(p.log_softmax(0), n.log_softmax(0))),
                            *(({"bound": bound}, 1.0, lambda p, n, _: -jsd(p[[yes, no]].log_softmax(0), n[[no, yes]].log_softmax(0))) for bound in ("follow", "swap")),
                            ({"bound": "hinge"}, 1.0, lambda p, n, z: z * float(p[yes] - p[no] - n[yes] + n[no]))):
        host.args = dataclasses.replace(args, **flags)
        loss, stats = lcft.train_pairs(host, rows, host.args.kl)
        for k, ((pos, neg), z) in enumerate(zip(logits, sides.values())):
            right, flipped = (yes, no) if z > 0 else (no, yes)
            want = ((F.softplus(-z * pos[yes]), F.softplus(z * neg[yes])) if host.args.ce == "yes"
                    else (-pos.log_softmax(0)[right], -neg.log_softmax(0)[flipped]))
            got = [stats[name][k].item() for name in ("ce", "neg_ce", "apart")] + [loss[k].item()]
            terms = [float(x) for x in want] + [far(pos, neg, z)]
            assert got == pytest.approx([*terms, terms[0] + 0.5 * terms[1] - lam * terms[2]], abs=1e-7), flags


def test_the_default_caps_bound_a_pair_as_a_whole(folder):
    host = double(make(folder))
    with torch.no_grad():
        host.model.get_decoder().norm.weight.mul_(1e7)       # logits so large that every divergence is
    for kl, bound, cap in (("paper", "swap", 10.0), ("official", "swap", 1e4), ("bounded", "hinge", 4.0)):
        host.args = dataclasses.replace(host.args, kl=kl, bound=bound)
        assert lcft.train_pairs(host, host.rows.train[:6], kl)[1]["apart"].max() == cap


def test_yes_and_no_of_a_bfloat16_model_are_not_rounded_to_it(folder):
    host = make(folder, dtype="bfloat16")
    yes = host.look(host.rows.train[:2], None, 1.0).yes
    assert not torch.equal(yes, yes.bfloat16().float())


@pytest.mark.parametrize("template", ["shared", "tallrec"])
@pytest.mark.parametrize("flip", ["like", "enjoy"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_packed_pair_gives_the_answers_of_two_separate_padded_passes(folder, template, flip, side):
    host = double(make(folder, template=template, flip=flip))
    rows = host.rows.train[5:9]
    seen = host.look(rows, "jsd", 1.0)
    for g in (0, 1):
        ids = []
        for row in rows:
            prompts = lcft.pair_prompts(*host.rows.before(row), host.rows.lines[host.rows.item[row]], template, flip)
            ids.append(llm.chat(host.tokenizer, "".join(prompts[g])))
        width = max(map(len, ids)) + 3                       # three more than needed
        pad = lambda x: [0] * (width - len(x)) + list(x) if side == "left" else list(x) + [0] * (width - len(x))
        mask = torch.tensor([pad([1] * len(x)) for x in ids])
        position = (mask.cumsum(1) - 1).clamp(min=0)
        logits = host.model(input_ids=torch.tensor([pad(x) for x in ids]), attention_mask=mask, position_ids=position).logits
        last = logits[torch.arange(len(ids)), [width - 1 if side == "left" else len(x) - 1 for x in ids]]
        torch.testing.assert_close(torch.stack([seen.yes[:, g], seen.no[:, g]], 1), last[:, host.ids], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kl", ["paper", "official", "bounded", "off"])
def test_micro_batches_do_not_change_the_loss_or_its_gradient(folder, kl):
    host = double(make(folder, kl=kl, neg_ce=0.5, flip="enjoy"))
    rows, grads, values = host.rows.train[:6], [], []
    for size in (6, 2, 1):
        host.model.zero_grad()
        total = 0.0
        for part in np.split(rows, range(size, 6, size)):
            loss, _ = lcft.train_pairs(host, part, kl)
            (loss.sum() / 6).backward()
            total += loss.sum().item() / 6
        values.append(total)
        grads.append(torch.cat([p.grad.flatten() for p in lora.parameters(host.model)]).clone())
    assert values[1:] == pytest.approx(values[:1] * 2, abs=1e-6)
    for g in grads[1:]:
        torch.testing.assert_close(g, grads[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kl,bound", [("paper", "swap"), ("official", "swap"), ("bounded", "follow"), ("bounded", "swap"), ("bounded", "jsd"), ("bounded", "hinge")])
def test_a_step_against_the_loss_moves_the_answers_the_way_each_objective_says(folder, kl, bound):
    """Or a wrong sign before lambda would pass unseen. A large lambda: the step is the divergence's."""
    host = double(make(folder, kl=kl, bound=bound, lam=1e3, cap=1e9))
    rows, optimizer = host.rows.train[:6], torch.optim.SGD(lora.parameters(host.model), lr=1e-6)
    loss, before = lcft.train_pairs(host, rows, kl)
    torch.testing.assert_close(loss, before["ce"] - 1e3 * before["apart"])
    loss.mean().backward()
    optimizer.step()
    assert lcft.train_pairs(host, rows, kl)[1]["apart"].mean() > before["apart"].mean()


def test_a_step_on_the_flipped_answer_makes_the_opposite_of_the_label_likelier(folder):
    host = double(make(folder, kl="off", neg_ce=1e3))
    rows, optimizer = host.rows.train[:6], torch.optim.SGD(lora.parameters(host.model), lr=1e-6)
    right = torch.as_tensor(1 - 2 * host.rows.label[rows])   # +1: the flipped question of a dislike wants Yes
    gap = lambda: (seen := host.look(rows, None, 1.0)).yes[:, 1] - seen.no[:, 1]
    before = (right * gap()).mean()
    lcft.train_pairs(host, rows, "off")[0].mean().backward()
    optimizer.step()
    assert (right * gap()).mean() > before


def test_the_shared_template_shares_the_context_and_the_flip_changes_the_question_only(folder):
    host = make(folder)
    packed, _ = host.pack(host.rows.train[5:6])
    assert packed.tokens.shape[0] == 1 and make(folder, template="tallrec").pack(host.rows.train[5:6])[0].tokens.shape[0] == 2
    assert int((packed.owner == -1).sum()) > 0.7 * int((packed.owner == -1).sum() + (packed.owner == 0).sum())
    pos, neg = lcft.pair_prompts(["A"], [], "B")
    assert pos[:-1] == neg[:-1] and pos[-1].replace("like", "dislike") == neg[-1]


def test_the_officials_divergence_is_the_sum_over_positions_from_the_first_difference_aligned_at_the_answer(folder):
    host = double(make(folder, flip="enjoy", kl="official", lam=1.0, cap=1e9))
    row = host.rows.train[7:8]
    _, stats = lcft.train_pairs(host, row, "official")
    prompts = lcft.pair_prompts(*host.rows.before(row[0]), host.rows.lines[host.rows.item[row[0]]], flip="enjoy")
    tokens = [llm.chat(host.tokenizer, p) for p in prompts]
    logits = [host.model(torch.tensor([t])).logits[0] for t in tokens]
    same = next(k for k, (a, b) in enumerate(zip(*tokens)) if a != b)
    assert same > 20 and len(tokens[0]) != len(tokens[1])        # a context that would be compared with its neighbours
    n = min(map(len, logits)) - same
    want = lcft.apart(logits[0][-n:], logits[1][-n:], "official").sum()
    torch.testing.assert_close(stats["apart"][0], want, rtol=1e-5, atol=1e-5)


def test_collms_vectors_reach_the_answer_and_only_the_mapping_learns_in_its_stage(folder):
    host = make(folder, host="collm", mf_dim=4)
    for p in lora.parameters(host.model):
        p.requires_grad_(False)
    rows = host.rows.train[3:6]
    loss, _ = lcft.train_pairs(host, rows, "bounded", vectors=True)
    loss.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in host.mapping.parameters())
    assert all(p.grad is None for p in host.mf.parameters()) and all(p.grad is None for p in lora.parameters(host.model))
    before = host.look(rows, None, 1.0, vectors=True).yes
    with torch.no_grad():
        host.mf.item.weight.mul_(-3)
    assert not torch.equal(before, host.look(rows, None, 1.0, vectors=True).yes)


def test_an_embedded_slot_is_exactly_its_vector(folder):
    host = make(folder)
    soft = torch.randn(1, 2, host.model.config.hidden_size)
    tokens = torch.tensor([[5, -2, 7, -1]])
    vectors = llm.embed(host.model, tokens, soft)
    words = host.model.get_input_embeddings().weight
    assert torch.equal(vectors[0], torch.stack([words[5], soft[0, 1], words[7], soft[0, 0]]))


# --------------------------------------------------------------------------------------------------------- measures
def test_the_measures_of_four_answers_by_hand():
    logit = lambda p: np.log(np.array(p) / (1 - np.array(p)))
    p, n, label = [0.8, 0.6, 0.3, 0.9], [0.1, 0.7, 0.4, 0.2], np.array([1, 0, 0, 1])
    got = lcft.report(np.array([0, 0, 1, 1]), label, logit(p), logit(n), np.array([0, 0.5, 0, 0]), np.zeros(4))
    assert got["contradiction"] == 0.5                                        # rows 1 (Yes, Yes) and 2 (No, No)
    assert got["soft_inconsistency"] == pytest.approx((0.1 + 0.3 + 0.3 + 0.1) / 4)
    assert got["joint_accuracy"] == 0.5 and got["auc"] == 1.0 and got["uauc_user"] == 1.0
    assert got["flip_auc"] == 1.0 and got["neg_auc"] == 1.0                   # P-: likes 0.1 and 0.2, dislikes 0.7 and 0.4
    assert got["invalid"] == 0.125
    assert got["ece"] == pytest.approx((0.2 + 0.6 + 0.3 + 0.1) / 4)


def test_users_weigh_alike_or_by_their_rows_and_the_log_loss_is_of_the_question_itself():
    p, label = np.array([0.75, 0.15, 0.65, 0.95, 0.35]), np.array([1, 0, 1, 0, 0])
    got = lcft.report(np.array([0, 0, 1, 1, 1]), label, np.log(p / (1 - p)), np.zeros(5), np.zeros(5), np.arange(5) / 10)
    assert got["uauc_user"] == 0.75 and got["uauc_impressions"] == 0.7        # AUCs of 1 and 1/2, of 2 and 3 rows
    assert got["log_loss"] == pytest.approx(-np.log([0.75, 0.85, 0.65, 0.05, 0.65]).mean(), abs=1e-6) and got["divergence"] == 0.2
    assert got["reliability"] == [[0.15, 0, 1], [0.35, 0, 1], [0.65, 1, 1], [0.75, 1, 1], [0.95, 0, 1]]


def test_both_questions_are_asked_without_dropout_and_answered_in_the_order_of_the_rows(folder):
    host = double(make(folder, min_history=0, prompt_history=2, eval_batch=2, lora_dropout=0.5, kl_vocab="full"))
    rows = np.array([next(r for r in host.rows.train[k:] if host.rows.place[r] == place) for k, place in ((0, 1), (0, 2), (0, 0), (20, 2), (9, 1))])
    host.model.train()
    found = lcft.ask(host, rows)
    for k, row in enumerate(rows):
        pair = [plain(host, row, g) for g in (0, 1)]
        p, n = (x[host.ids].softmax(0).numpy() for x in pair)
        jsd = sum((x * np.log(2 * x / (p + n))).sum() / 2 for x in (p, n))
        invalid = np.mean([int(x.argmax()) not in host.ids for x in pair])
        want = [float(x[host.ids[0]] - x[host.ids[1]]) for x in pair] + [jsd, invalid]
        assert [found[name][k] for name in ("gap", "flipped", "jsd", "invalid")] == pytest.approx(want, abs=1e-6)


def test_an_evaluation_of_collm_is_with_vectors_and_by_user(folder):
    host = make(folder, host="collm", mf_dim=4)
    rows = host.rows.train[:40]
    told, found = lcft.evaluate(host, rows, True)
    with torch.no_grad():
        seen, without = host.look(rows, None, 1.0, True), host.look(rows, None, 1.0)
    np.testing.assert_allclose(found["gap"], (seen.yes - seen.no)[:, 0], atol=1e-4)
    assert (seen.yes - without.yes).abs().min() > 1e-3
    assert told["uauc_user"] == pytest.approx(lcft.metrics.uauc(host.rows.user[rows], host.rows.label[rows], found["gap"]), abs=1e-6)


def test_the_worst_contradictions_are_the_surest_and_tell_both_answers(folder):
    rows, logit = make(folder).rows, lambda p: np.log(np.array(p) / (1 - np.array(p)))
    index = np.array([next(r for r in rows.test[k:] if rows.label[r] == label) for k, label in enumerate((1, 0, 1, 0))])
    lines = lcft.worst(rows, index, {"gap": logit([0.9, 0.6, 0.2, 0.7]), "flipped": logit([0.8, 0.6, 0.3, 0.2])}, most=2)
    assert [x["asked"] for x in lines] == [{"Will the user like it?": "Yes 0.900", "Will the user dislike it?": "Yes 0.800"},
                                           {"Will the user like it?": "No 0.800", "Will the user dislike it?": "No 0.700"}]
    lines += lcft.worst(rows, index, {"gap": logit([0.1, 0.6, 0.1, 0.1]), "flipped": logit([0.9, 0.6, 0.9, 0.9])})
    for x, k, truth in zip(lines, (0, 2, 1), ("like", "like", "dislike"), strict=True):
        assert x["title"] == rows.lines[rows.item[index[k]]] and x["truth"] == truth and (x["liked"], x["disliked"]) == rows.before(index[k])


def test_lambda_is_chosen_by_contradiction_among_those_that_keep_the_auc():
    runs = lambda auc, wrong: [{"valid": {"auc": auc, "contradiction": wrong}}]
    found = {0.1: runs(0.70, 0.5), 0.3: runs(0.698, 0.2), 1.0: runs(0.60, 0.0)}
    assert lcft.choose(found, floor=0.695) == 0.3
    assert lcft.choose(found, floor=0.9) == 0.1
    assert lcft.choose({1.0: runs(0.7, 0.0) + runs(0.7, 0.8), 3.0: runs(0.7, 0.3) + runs(0.7, 0.3)}, floor=0.7) == 3.0            # all seeds count


def test_the_ablations_run_what_their_rows_say_and_show_what_validation_chose(tmp_path, monkeypatch):
    runs, told = [], {0.3: (0.699, (0.05, 0.75)), 1.0: (0.697, (0.1, 0.3)), 3.0: (0.69, (0.0, 0.0))}   # of swap: AUC, contradictions by seed

    def train(args):
        runs.append((args.kl, args.bound if args.kl == "bounded" else None, args.lam, args.neg_ce, args.seed))
        auc, wrong = told[args.lam] if args.kl == "bounded" and args.bound == "swap" else (0.7, (0.5, 0.5))
        same = {"soft_inconsistency": 0.5, "joint_accuracy": 0.5, "ece": 0.5}
        return {"valid": {"auc": auc, "contradiction": wrong[args.seed], **same}, "test": {"auc": auc - 0.1, "contradiction": 0.6, **same}}
    monkeypatch.setattr(lcft, "train", train)
    monkeypatch.setattr(lcft, "plot", lambda *_: None)
    monkeypatch.setattr(lcft, "write_table", lambda root, args, table, folders: table)
    table = lcft.ablations(lcft.Args(ablations=True, seeds=(0, 1), neg_ce=0.7, run=str(tmp_path)))
    want = {("off", None, 0.0, 0.0), ("official", None, 1e-4, 0.0), ("official", None, 1e-2, 0.0), *(("paper", None, lam, 0.0) for lam in (0.03, 0.1, 0.3)),
            *(("bounded", bound, lam, 0.0) for bound in ("swap", "hinge") for lam in (0.3, 1.0, 3.0)),
            *(("bounded", "follow", lam, 0.0) for lam in (1.0, 3.0)), ("off", None, None, 0.3), ("off", None, None, 1.0)}
    assert len(runs) == 2 * len(want) and set(runs) == {(*row, seed) for row in want for seed in (0, 1)}
    assert list(table) == ["off 0", "official 0.0001", "paper 0.03", "swap 1", "follow 1", "hinge 0.3", "neg-ce 0.3"]
    assert table["swap 1"]["AUC"]["mean"] == pytest.approx(0.597) and table["swap 1"]["contradiction"]["values"] == [0.6, 0.6]


# ------------------------------------------------------------------------------------------------------------- data
def test_a_row_shows_what_was_rated_before_it_split_by_label_and_nothing_later(folder):
    host = make(folder)
    rows = host.rows
    for row in (*rows.train[:20], *rows.test[-5:]):
        earlier = [r for r in range(row) if rows.user[r] == rows.user[row]][-4:]
        assert rows.before(row) == tuple([rows.lines[rows.item[r]] for r in earlier if rows.label[r] == k] for k in (1, 0))
    assert rows.train.max() < rows.valid.min() and rows.valid.max() < rows.test.min()


def test_few_shots_are_balanced_seeded_and_from_the_training_rows(folder):
    all_rows = make(folder).rows
    few = [lcft.Rows(lcft.Args(data=str(folder), shots=16, seed=s)) for s in (0, 0, 1)]
    assert np.array_equal(few[0].train, few[1].train) and not np.array_equal(few[0].train, few[2].train)
    assert few[0].label[few[0].train].sum() == 8 and set(few[0].train) <= set(all_rows.train)
    half = min(np.bincount(all_rows.label[all_rows.train]))
    most = lcft.Rows(lcft.Args(data=str(folder), shots=2 * half))
    assert len(set(most.train)) == 2 * half and most.label[most.train].sum() == half          # nobody is drawn twice


def test_a_sample_of_users_keeps_so_many(folder):
    assert len(make(folder, users=8).rows.data.users) == 8


def test_a_like_is_above_the_threshold_and_movielens_1m_is_split_by_months(tmp_path):
    second = lambda month: (np.datetime64("2000-01") + month).astype("datetime64[s]").astype(int)
    (tmp_path / "interactions.csv").write_text("user,item,rating,timestamp\n" + "".join(f"a,i{k},{(5, 3, 4)[k % 3]},{second(k)}\n" for k in range(30)))
    rows, strict = (lcft.Rows(lcft.Args(data=str(tmp_path), **change)) for change in ({}, {"like_above": 4.0}))
    assert rows.label[:3].tolist() == [1, 0, 1] and strict.label[:3].tolist() == [1, 0, 0]
    rows.args.data = "ml1m"                                  # one rating a month: the last 20 months, 10 / 5 / 5
    assert [part.tolist() for part in rows.split(np.arange(30))] == [list(range(10, 20)), list(range(20, 25)), list(range(25, 30))]


def test_movielens_100k_has_the_published_sizes():
    if not os.environ.get("LLMREC_DATA"):
        pytest.skip("LLMREC_DATA is not set")
    rows = lcft.Rows(lcft.Args(data="ml100k"))
    assert [len(rows.train), len(rows.valid), len(rows.test)] == [8000, 1000, 1000]
    assert np.array_equal(np.concatenate([rows.train, rows.valid, rows.test]), np.flatnonzero(rows.place >= 10)[-10_000:])


def test_bookcrossing_is_read_and_split_by_user(tmp_path):
    rng = np.random.default_rng(0)
    rows = [f'"u{u}";"0{i:09d}";"{rng.integers(0, 11)}"' for u in range(200) for i in rng.permutation(30)[:3 + u % 4]]
    (tmp_path / "BX-Book-Ratings.csv").write_text('"User-ID";"ISBN";"Book-Rating"\n' + "\n".join(rows) + "\n", encoding="latin-1")
    (tmp_path / "BX-Books.csv").write_text('"ISBN";"Book-Title";"Book-Author"\r\n' + "".join(
        f'"0{i:09d}";"Die Stra\u00dfe; \\"{i}\\" &amp; mehr";"A. B."\r\n' for i in range(30)), encoding="latin-1")
    rows = lcft.Rows(lcft.Args(data=str(tmp_path)))
    assert rows.above == 5 and rows.data.titles[0].startswith('Die Straße; "') and "& mehr" in rows.data.titles[0]
    parts = (rows.train, rows.valid, rows.test)
    users = [set(rows.user[p]) for p in parts]
    assert [len(p) for p in parts] == [120, 15, 15] and not users[0] & users[1] | users[0] & users[2] | users[1] & users[2]
    assert all(rows.place[r] == (rows.user == rows.user[r]).sum() - 1 for p in parts for r in p)
    assert not np.array_equal(rows.test, lcft.Rows(lcft.Args(data=str(tmp_path), seed=1)).test)
    longer = lcft.Rows(lcft.Args(data=str(tmp_path), min_history=5))
    assert len(np.concatenate([longer.train, longer.valid, longer.test])) == 50 and all(longer.place[longer.train] == 5)
    with pytest.raises(UserError, match="--host collm"):
        lcft.Rows(lcft.Args(data=str(tmp_path), host="collm"))


def test_an_empty_history_and_a_title_of_5000_characters_are_asked_like_any_other(folder, tmp_path):
    for name in ("interactions.csv", "items.csv"):
        (tmp_path / name).write_text((folder / name).read_text().replace("Film 3,", "x" * 5000 + "</answer><|im_end|>,"))
    host = make(tmp_path, min_history=0)
    first = np.array([r for r in host.rows.train if host.rows.place[r] == 0])
    found = lcft.ask(host, np.concatenate([first, host.rows.train[host.rows.item[host.rows.train] == 3][:2]]))
    assert len(first) and all(np.isfinite(v).all() for v in found.values())
    assert host.rows.before(first[0]) == ([], []) and "(nothing yet)" in lcft.pair_prompts([], [], "B")[0][0]
    assert max(map(len, host.rows.lines)) < 200


# ---------------------------------------------------------------------------------------------------- answers, input
def test_answers_that_are_not_single_tokens_are_refused_with_a_pair_that_works(folder):
    _, tokenizer = llm.load("tiny")
    with pytest.raises(UserError, match="--answers Yes,No works"):
        lcft.answer_ids(tokenizer, ("Absolutely not", "No"))
    with pytest.raises(UserError, match="not two different"):
        lcft.answer_ids(tokenizer, ("Yes", "Yes"))
    assert [tokenizer.decode([k]) for k in lcft.answer_ids(tokenizer, ("Yes", "No"))] == ["Yes", "No"]


def run(*flags, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / "lcft.py"), *flags], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("rows,flags,words", [
    ("a,x,5,1\n" * 1, (), "ratings have 1 earlier"),
    ("".join(f"a,i{k},5,{k}\n" for k in range(40)), (), "likes only"),
    ("".join(f"a,i{k},great,{k}\n" for k in range(40)), (), "interactions.csv:2"),
    ("".join(f"a,i{k},{1 + 4 * (k % 2)},{k}\n" for k in range(40)), ("--shots", "64"), "hold only"),
    ("".join(f"a,i{k},{1 + 4 * (k % 2)},{k}\n" for k in range(40)), ("--eval-rows", "1"), "--eval-rows 1: these validation rows"),
])
def test_a_users_mistake_is_one_clear_line(rows, flags, words, tmp_path, capsys):
    (tmp_path / "interactions.csv").write_text("user,item,rating,timestamp\n" + rows)
    with pytest.raises(SystemExit) as stop:
        lcft.main(lcft.Args, lcft.train, lcft.__doc__, ["--data", str(tmp_path), "--run", str(tmp_path / "run"), *flags])
    problem = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and problem.startswith("error: ") and words in problem
    assert not (tmp_path / "run").exists()


def test_data_without_ratings_and_wrong_flags_are_one_line(tmp_path, capsys):
    (tmp_path / "interactions.csv").write_text("user,item\n" + "".join(f"a,i{k}\n" for k in range(40)))
    for flags, status, words in ((["--data", str(tmp_path)], 1, "no ratings"), (["--flip", "hate"], 2, "one of like, enjoy"),
                                 (["--shots", "7"], 2, "even"), (["--kl", "none"], 2, "invalid choice"), (["--lam-ramp", "2"], 2, "--lam-ramp"),
                                 (["--variants", "off,hinge:x"], 2, "NAME:VALUE"), (["--variants", "off,hinge:-1"], 2, "hinge:-1"),
                                 (["--variants", "off:2"], 2, "off has no value"), (["--variants", "off,hedge:1"], 2, "hedge:1"), (["--variants", "hinge"], 2, "needs off"),
                                 (["--host", "collm", "--kl", "official"], 2, "TALLRec's"), (["--ce", "yes", "--kl", "official"], 2, "TALLRec's"),
                                 (["--lr", "-1"], 2, "--lr"), (["--warmup", "-5"], 2, "--warmup"), (["--seeds", "1,1"], 2, "--seeds"),
                                 (["--seeds", "1,x"], 2, "comma-separated int"), (["--ablations", "--lam", "5"], 2, "--lam itself"), (["--device", "cpu:foo"], 1, "no such device")):
        with pytest.raises(SystemExit) as stop:
            lcft.main(lcft.Args, lcft.train, lcft.__doc__, flags)
        assert stop.value.code == status and words in capsys.readouterr().err


def test_settings_that_do_not_go_together_are_refused_in_ablations_too():
    for flags, words in (({"host": "collm", "ablations": True}, "TALLRec's"), ({"kl_vocab": "full"}, "compares Yes and No")):
        with pytest.raises(ValueError, match=words):
            lcft.Args(**flags).check()
    for changes in ({"cap": 1.0}, {"kl_vocab": "full"}):
        with pytest.raises(ValueError, match="swap.*needs --bound"):
            lcft.Args(ablations=True, variants=("off", "swap"), **changes).check()
        lcft.Args(ablations=True, variants=("off", "swap", "paper"), **changes).check()
    lcft.Args(host="collm", ablations=True, variants=("off", "swap")).check()


SMALL = ("--steps", "6", "--batch", "8", "--eval-every", "2", "--eval-rows", "20", "--prompt-history", "3", "--lora-dropout", "0.1")


def test_a_user_with_no_likes_trains_and_the_worst_contradictions_can_be_read(folder, tmp_path):
    out = run("--data", str(folder), "--run", str(tmp_path / "a"), *SMALL, "--host", "collm", "--mf-epochs", "3", "--mf-dim", "8")
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert 0 <= result["test"]["contradiction"] <= 1 and {"mf", "lora", "map"} <= set(result)
    rows = [json.loads(line) for line in (tmp_path / "a" / "contradictions.jsonl").read_text().splitlines()]
    assert len(rows) <= 50 and all({"title", "liked", "disliked", "truth", "asked"} <= set(r) for r in rows)
    assert (tmp_path / "a" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("flags", ["--bound jsd --kl-vocab full", "--bound hinge --flip enjoy", "--kl official --neg-ce 0.5 --micro-batch 3",
                                   "--host collm --ce yes --kl-stages lora", "--host collm --kl-stages map --template tallrec"])
def test_every_objective_and_host_runs_to_its_result(folder, tmp_path, capsys, flags):
    few = ("--steps", "2", "--batch", "4", "--eval-rows", "10", "--prompt-history", "2", "--mf-epochs", "2", "--mf-dim", "4")
    lcft.main(lcft.Args, lcft.train, lcft.__doc__, ["--data", str(folder), "--run", str(tmp_path / "a"), *few, *flags.split()])
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert 0 <= result["test"]["auc"] <= 1 and result["test"]["divergence"] >= 0 and ("map" in result) == ("collm" in flags)


def test_lambda_may_grow_and_the_last_step_be_kept(folder, tmp_path, capsys):
    host = double(make(folder, kl="bounded", neg_ce=0.5, lam=2.0))
    rows = host.rows.train[:6]
    none, stats = lcft.train_pairs(host, rows, "bounded", grown=0.0)
    half, _ = lcft.train_pairs(host, rows, "bounded", grown=0.5)
    torch.testing.assert_close(none, stats["ce"])
    torch.testing.assert_close(half, stats["ce"] - stats["apart"] + 0.25 * stats["neg_ce"])
    few = ("--data", str(folder), "--batch", "4", "--eval-every", "1", "--eval-rows", "10", "--prompt-history", "2", "--patience", "1")
    for keep, steps in (("last", 4), ("best", None)):
        lcft.main(lcft.Args, lcft.train, "", [*few, "--steps", "4", "--lam-ramp", "1", "--keep", keep, "--run", str(tmp_path / keep)])
        result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
        log = [json.loads(line) for line in (tmp_path / keep / "metrics.jsonl").read_text().splitlines()]
        want = log[-1]["valid_auc"] if keep == "last" else max(r["valid_auc"] for r in log)
        assert result["lora"]["valid_auc"] == pytest.approx(want, abs=1e-4) and (steps is None or result["lora"]["steps"] == steps)


def test_the_ablation_of_chosen_variants(folder, tmp_path, capsys):
    few = ("--data", str(folder), "--batch", "4", "--eval-rows", "10", "--prompt-history", "2", "--steps", "1")
    lcft.main(lcft.Args, lcft.train, "", [*few, "--ablations", "--variants", "off,hinge:0.5,hinge:1", "--run", str(tmp_path / "all")])
    found = json.loads((tmp_path / "all" / "table.json").read_text())
    assert {name.split()[0] for name in found["ablations"]} == {"off", "hinge"} and found["seeds"] == [0]
    assert {p.name for p in (tmp_path / "all" / "s0").iterdir()} == {"off-0", "hinge-0.5", "hinge-1"}
    assert "<svg" in (tmp_path / "all" / "report.html").read_text()


def test_with_collms_loss_the_score_is_the_logit_that_was_trained(folder):
    one, both = make(folder, ce="yes"), make(folder)
    seen = both.look(both.rows.test, None, 1.0)
    np.testing.assert_allclose(lcft.ask(one, one.rows.test)["gap"], seen.yes[:, 0].detach(), atol=1e-4)
    np.testing.assert_allclose(lcft.ask(both, both.rows.test)["gap"], (seen.yes - seen.no)[:, 0].detach(), atol=1e-4)


def test_a_run_that_is_killed_resumes_to_the_same_result_to_the_bit(folder, tmp_path):
    flags, lines = ("--data", str(folder), *SMALL), lambda name: (tmp_path / name / "metrics.jsonl").read_bytes().count(b"\n")
    want = run(*flags, "--run", str(tmp_path / "whole")).stdout.splitlines()[-1]
    rng, killed = np.random.default_rng(0), 0
    for _ in range(int(os.environ.get("KILLS", 1))):
        process = subprocess.Popen([sys.executable, str(ROOT / "lcft.py"), *flags, "--run", str(tmp_path / "cut"), "--resume"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        last = rng.integers(1, lines("whole"))                   # the log's line after which it is killed
        while process.poll() is None and not ((tmp_path / "cut" / "metrics.jsonl").exists() and lines("cut") >= last):
            time.sleep(0.02)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed and run(*flags, "--run", str(tmp_path / "cut"), "--resume").stdout.splitlines()[-1] == want


# ---------------------------------------------------------------------------------------------------- the stages, by hand
def trained(folder, tmp_path, change=lambda host: None, **flags):
    """The adapter after a few steps of stage 1, and the run's folder."""
    host = make(folder, **{"kl": "bounded", "steps": 6, "batch": 8, "eval_every": 2, "eval_rows": 20, "warmup": 2, "run": str(tmp_path), **flags})
    change(host)
    part = (lambda: lora.state(host.model), lambda t: lora.load_state(host.model, t), lora.parameters(host.model))
    lcft.stage(host.args, Run(host.args, "lcft", "x"), host, "lora", part, 2e-3, host.args.kl)
    return torch.cat([p.data.flatten() for p in lora.parameters(host.model)])


def test_two_steps_of_a_stage_are_adamws_on_the_clipped_mean_gradient_of_a_batch(folder, tmp_path, monkeypatch, train_pairs=lcft.train_pairs):
    flags, seen = {"steps": 2, "batch": 4, "warmup": 1, "max_grad_norm": 1e-3, "prompt_history": 1, "eval_rows": 10, "neg_ce": 0.5}, []
    monkeypatch.setattr(lcft, "train_pairs", lambda host, rows, *more: seen.append(rows) or train_pairs(host, rows, *more))
    got = trained(folder, tmp_path / "r", double, **flags, micro_batch=3, keep="last")
    assert list(map(len, seen)) == [3, 1, 3, 1]
    host = double(make(folder, **flags))
    parameters = lora.parameters(host.model)
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    for rows in (np.concatenate(seen[:2]), np.concatenate(seen[2:])):
        optimizer.zero_grad()
        train_pairs(host, rows, "bounded")[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
        optimizer.step()
    torch.testing.assert_close(got, torch.cat([p.data.flatten() for p in parameters]), atol=1e-7, rtol=0)


def test_a_stage_draws_new_rows_and_dropout_for_each_step_and_is_judged_on_a_few_validation_rows(folder, tmp_path, monkeypatch, train_pairs=lcft.train_pairs):
    host, steps, judged = make(folder, host="collm", mf_dim=4, steps=4, batch=2, micro_batch=1, prompt_history=1, eval_every=3, eval_rows=5, lam_ramp=0.5,
                               run=str(tmp_path / "r")), [], []

    def watched(host, rows, kl, vectors, grown):
        loss, stats = train_pairs(host, rows, kl, vectors, grown)
        steps.append((rows.item(), kl, vectors, grown, host.model.training, torch.initial_seed(), loss.item()))
        return loss, stats
    monkeypatch.setattr(lcft, "train_pairs", watched)
    told = dict.fromkeys(["auc", "contradiction", "soft_inconsistency", "ece"], 0.5)
    monkeypatch.setattr(lcft, "evaluate", lambda host, rows, vectors: judged.append((rows.tolist(), vectors)) or (told, None))
    part = (host.mapping.state_dict, host.mapping.load_state_dict, list(host.mapping.parameters()))
    lcft.stage(host.args, Run(host.args, "lcft", "x"), host, "map", part, 1e-3, "bounded", True)
    rows, kl, vectors, grown, training, seeds, losses = zip(*steps)
    assert len(set(rows)) == 8 and set(rows) <= set(host.rows.train) and {*zip(kl, vectors, training)} == {("bounded", True, True)}
    assert grown == (0.5, 0.5, 1, 1, 1, 1, 1, 1) and len(set(seeds)) == 4
    assert [vectors for _, vectors in judged] == [True, True] and len(judged[0][0]) == 5 and set(judged[0][0]) <= set(host.rows.valid)
    log = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in log] == [(3, pytest.approx(np.mean(losses[:6]), abs=1e-5)), (4, pytest.approx(np.mean(losses[6:]), abs=1e-5))]


def test_a_stage_that_is_cut_goes_on_with_its_best_its_patience_and_its_optimiser(folder, tmp_path, monkeypatch):
    def cut(name, aucs, resume=False):
        left = iter(aucs)

        def evaluate(*_):
            if (auc := next(left)) is None:
                raise KeyboardInterrupt
            return dict.fromkeys(["auc", "contradiction", "soft_inconsistency", "ece"], auc), None
        monkeypatch.setattr(lcft, "evaluate", evaluate)
        host = make(folder, steps=9, batch=2, prompt_history=1, eval_every=1, patience=2, run=str(tmp_path / name), resume=resume)
        part = (lambda: lora.state(host.model), lambda t: lora.load_state(host.model, t), lora.parameters(host.model))
        run = Run(host.args, "lcft", "x")
        return lcft.stage(host.args, run, host, "lora", part, 2e-3, "bounded"), run.load("lora")[0], lora.state(host.model)
    done, saved, adapter = cut("whole", [0.5, 0.9, 0.6, 0.7, 0.1])
    assert done == {"steps": 4, "valid_auc": 0.9}            # the second is the best, and after two that are not it stops
    assert all(torch.equal(adapter[k], saved["best/" + k]) for k in adapter) and not all(torch.equal(adapter[k], saved["now/" + k]) for k in adapter)
    with pytest.raises(KeyboardInterrupt):
        cut("cut", [0.5, 0.9, 0.6, None])
    again, resumed, adapter_again = cut("cut", [0.7, 0.1], resume=True)
    assert again == done and all(torch.equal(saved[k], resumed[k]) for k in saved) and all(torch.equal(adapter[k], adapter_again[k]) for k in adapter)


def test_training_reads_no_label_of_test_rows_and_parts_of_a_batch_do_not_matter(folder, tmp_path):
    def other_test(host):
        host.rows.label[host.rows.test] = 1 - host.rows.label[host.rows.test]
    plain = trained(folder, tmp_path / "a")
    assert torch.equal(plain, trained(folder, tmp_path / "b", other_test))
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    parts = trained(folder, tmp_path / "c", micro_batch=7)
    far = lambda x: (x - plain).abs().mean()                 # Adam makes a step of every rounding error where there is no gradient
    assert far(parts) < 0.01 * far(torch.cat([p.data.flatten() for p in lora.parameters(make(folder).model)]))


def test_matrix_factorisation_reads_no_label_of_test_rows_and_keeps_its_best_epoch(folder, tmp_path):
    found = []
    for k in range(2):
        torch.manual_seed(0)
        host = make(folder, host="collm", mf_dim=4, run=str(tmp_path / f"r{k}"))
        if k:
            host.rows.label[host.rows.test] = 1 - host.rows.label[host.rows.test]
        done = lcft.train_mf(host.args, Run(host.args, "lcft", "x"), host)
        found.append(torch.cat([p.data.flatten() for p in host.mf.parameters()]))
    assert torch.equal(*found)
    for name in ("valid", "test"):
        rows = getattr(host.rows, name)
        score = host.mf(torch.as_tensor(host.rows.user[rows]), torch.as_tensor(host.rows.item[rows])).detach().numpy()
        assert lcft.metrics.auc(host.rows.label[rows], score) == pytest.approx(done[name + "_auc"], abs=1e-4)
    assert done["valid_auc"] > 0.5


def test_matrix_factorisation_learns_from_training_rows_at_its_rate_and_stops_after_five_epochs_in_vain(folder, tmp_path, monkeypatch):
    found = []
    for k in range(2):
        torch.manual_seed(0)
        host = make(folder, host="collm", mf_dim=4, mf_epochs=1, mf_lr=0.03, run=str(tmp_path / f"r{k}"))
        if k:
            for rows in (host.rows.valid, host.rows.test):
                host.rows.label[rows] = 1 - host.rows.label[rows]
        lcft.train_mf(host.args, Run(host.args, "lcft", "x"), host)
        found.append(torch.cat([p.data.flatten() for p in host.mf.parameters()]))
        assert abs(host.mf.bias.item()) == pytest.approx(0.03, rel=1e-3)     # Adam's first step, the epoch's only one
    assert torch.equal(*found)
    told = iter([0.5, 0.9, *[0.8] * 5, 0.7])
    monkeypatch.setattr(lcft.metrics, "auc", lambda label, score: next(told))
    host.args.mf_epochs = 100
    assert lcft.train_mf(host.args, Run(dataclasses.replace(host.args, run=str(tmp_path / "s")), "lcft", "x"), host) == {"valid_auc": 0.9, "test_auc": 0.7, "epochs": 7}


def test_matrix_factorisation_is_a_product_and_three_biases_by_hand():
    mf = lcft.MF(2, 3, 2)
    with torch.no_grad():
        for table, row, values in ((mf.user, 1, [1.0, 2.0]), (mf.item, 0, [3.0, 4.0]), (mf.of_user, 1, [0.5]), (mf.of_item, 0, [0.25])):
            table.weight[row] = torch.tensor(values)
        mf.bias.fill_(0.125)
    assert mf(torch.tensor([1]), torch.tensor([0])).item() == 11.875


def test_the_rate_rises_to_its_value_and_falls_to_nearly_nothing(folder, tmp_path, monkeypatch):
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            return super().step()
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    trained(folder, tmp_path / "r")
    assert rates == pytest.approx([1e-3, 2e-3, 2e-3, 1.5e-3, 1e-3, 0.5e-3])


def test_officials_cross_entropy_is_hugging_faces_loss_on_the_row_and_defaults_are_the_documented_ones(folder):
    for kl, lam, cap in (("official", 1e-4, 1e4), ("paper", 0.1, 10.0)):
        host = double(make(folder, kl=kl))
        rows = host.rows.train[5:9]
        loss, stats = lcft.train_pairs(host, rows, kl)
        torch.testing.assert_close(loss, stats["ce"] - lam * stats["apart"])
        assert stats["apart"].min() > 1e-6
        host.args.cap = cap
        assert torch.equal(lcft.train_pairs(host, rows, kl)[1]["apart"], stats["apart"])
        for row, ce in zip(rows, stats["ce"]) if kl == "official" else ():
            prompt = "".join(lcft.pair_prompts(*host.rows.before(row), host.rows.lines[host.rows.item[row]])[0])
            ids = torch.tensor([[*llm.chat(host.tokenizer, prompt), host.ids[0 if host.rows.label[row] else 1]]])
            assert ce.item() == pytest.approx(host.model(ids, labels=ids).loss.item(), abs=1e-5)


def test_collms_slots_get_the_users_vector_and_then_the_titles(folder):
    host = make(folder, host="collm", mf_dim=4)
    rows = host.rows.train[:3]
    user, item = host.mf.user.weight[host.rows.user[rows]], host.mf.item.weight[host.rows.item[rows]]
    assert torch.equal(host.soft(rows), host.mapping(user, item)) and not torch.equal(host.mapping(user, item), host.mapping(item, user))
    tokens, other, words = host.soft(rows), host.mapping(user, -item), host.model.get_input_embeddings().weight
    assert torch.equal(tokens[:, 0], other[:, 0]) and not torch.equal(tokens[:, 1], other[:, 1])      # slot 0 is of the user, 1 of the title
    torch.testing.assert_close(tokens.std(-1, correction=0), words.std().expand(3, 2), rtol=1e-3, atol=0)     # as long as a word
    host.args.template = "tallrec"                           # a row for each question
    assert torch.equal(host.pack(rows, vectors=True)[1], tokens[[0, 0, 1, 1, 2, 2]])


@pytest.mark.parametrize("host, stages, kinds", [("collm", "lora", ["bounded", "off"]), ("collm", "map", ["off", "bounded"]),
                                                 ("collm", "both", ["bounded", "bounded"]), ("tallrec", "map", ["bounded"])])
def test_stages_have_the_divergence_where_they_were_told_to_and_their_best_is_judged(folder, tmp_path, monkeypatch, capsys, host, stages, kinds,
                                                                                     evaluate=lcft.evaluate):
    seen, kept, judged = [], {}, []

    def stage(args, run, host, name, part, lr, kl, vectors=False):
        assert torch.initial_seed() == 3
        seen.append((name, kl, lr, vectors))
        kept[name] = {k: v + 0.01 for k, v in part[0]().items()}             # what was best is not what was last
        run.save(name, {"best/" + k: v for k, v in kept[name].items()} | {"now/" + k: v for k, v in part[0]().items()}, {})
        return {"steps": 1, "valid_auc": 0.5}

    def watched(host, rows, vectors, desc):
        for name, now in (("lora", lora.state(host.model)), ("map", host.mapping and host.mapping.state_dict()), ("mf", host.mf and host.mf.state_dict())):
            first = kept.setdefault(name, now)
            assert first is now or all(torch.equal(first[k], now[k]) for k in now)
        judged.append((desc, rows.tolist(), vectors))
        return evaluate(host, rows, vectors)
    monkeypatch.setattr(lcft, "stage", stage)
    monkeypatch.setattr(lcft, "evaluate", watched)
    flags = ["--data", str(folder), "--host", host, "--kl-stages", stages, "--mf-epochs", "1", "--prompt-history", "2", "--lr", "0.004", "--seed", "3",
             "--run", str(tmp_path / "r")]
    lcft.main(lcft.Args, lcft.train, "", flags)
    rows, collm = lcft.Rows(lcft.Args(data=str(folder))), host == "collm"
    assert seen == [(name, kl, lr, name == "map") for name, kl, lr in zip(("lora", "map"), kinds, (0.004, 1e-3))]
    assert judged == [("evaluate valid", rows.valid.tolist(), collm), ("evaluate test", rows.test.tolist(), collm)]
    wrong = [json.loads(line) for line in (tmp_path / "r" / "contradictions.jsonl").read_text().splitlines()]
    assert bool(wrong) == collm and {(x["user"], x["title"]) for x in wrong} <= {(rows.data.users[rows.user[r]], rows.lines[rows.item[r]]) for r in rows.test}
    if stages == "both":                                     # killed before its last lines: what is done comes from the folder
        phases = tmp_path / "r" / "phases.json"
        phases.write_text(json.dumps({k: v for k, v in json.loads(phases.read_text()).items() if k != "result"}))
        first = capsys.readouterr().out.splitlines()[-1]
        lcft.main(lcft.Args, lcft.train, "", [*flags, "--resume"])
        assert capsys.readouterr().out.splitlines()[-1] == first and len(seen) == 2 and len(judged) == 4
