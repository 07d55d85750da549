"""coco.py: codebook, what texts may hold, judge, masked tuning, served vectors, resume, bad input."""

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

import coco
from common import llm, lora
from common.run import parse

ROOT = Path(__file__).parent.parent
SMALL = ["--data", "toy:40x200x700", "--dim", "8", "--mlp", "16,8", "--codes", "4", "--prompt-len", "2", "--base-epochs", "1", "--epochs", "1",
         "--eliminate-epochs", "1", "--rank-users", "5"]


def args(*flags):
    return parse(coco.Args, "", [*SMALL, *flags])


def built(*flags):
    a = args(*flags)
    rows = coco.Rows(a, torch.device("cpu"))
    return a, rows, coco.CoCo(a, rows)


# ------------------------------------------------------------------------------------------------------- codebook
def test_moving_averages_equal_vector_quantize_pytorchs_over_100_updates():
    vq = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    theirs = vq.VectorQuantize(dim=6, codebook_size=8, decay=0.9, commitment_weight=0.25, kmeans_init=False, threshold_ema_dead_code=0,
                               rotation_trick=False)
    ours, start = coco.Codebook(8, 6, "ema", 0.25, 0.9, kmeans=False), torch.randn(8, 6)
    theirs._codebook.embed.data.copy_(start[None])
    theirs._codebook.embed_avg.data.copy_(start[None])
    theirs._codebook.cluster_size.data.fill_(1)
    ours.codes.data.copy_(start)
    ours.total.copy_(start)
    for _ in range(100):
        z = torch.randn(64, 6) + 0.1 * torch.randn(6)
        want, index, loss = theirs(z[None])
        got, chosen, terms = ours(z)
        assert torch.equal(index[0], chosen) and torch.allclose(want[0], got, atol=1e-5) and torch.allclose(loss, terms, atol=1e-6)
        assert torch.allclose(theirs._codebook.embed[0], ours.codes, atol=1e-5)


@pytest.mark.parametrize("gradient,reaches_codes", [("both", True), ("ste", False), ("ema", False)])
def test_a_code_is_passed_on_as_it_is_and_learns_from_the_task_in_one_mode_only(gradient, reaches_codes):
    torch.manual_seed(0)
    book = coco.Codebook(8, 6, gradient, kmeans=False).eval()
    z = (1000 * torch.randn(16, 6)).requires_grad_()                         # so large that careless sums would show
    value, index, _ = book(z)
    if gradient == "both":
        assert torch.equal(value, book.codes[index])
    weight = torch.randn_like(value)
    (value * weight).sum().backward()
    assert torch.allclose(z.grad, weight)
    want = torch.zeros_like(book.codes).index_add_(0, index, weight)
    assert torch.allclose(book.codes.grad, want, atol=1e-5) if reaches_codes else book.codes.grad is None


def test_commitment_moves_the_state_only_and_the_codebook_term_the_codes_only():
    torch.manual_seed(0)
    for beta in (0.0, 0.5):
        book, z = coco.Codebook(4, 3, beta=beta, kmeans=False).eval(), torch.randn(10, 3, requires_grad=True)
        _, index, terms = book(z)
        terms.backward()
        far = (z - book.codes[index]).detach()
        assert torch.allclose(z.grad, beta * 2 * far / z.numel(), atol=1e-6)
        assert torch.allclose(book.codes.grad, torch.zeros(4, 3).index_add_(0, index, -2 * far / z.numel()), atol=1e-6)


def test_of_equally_near_codes_the_first_is_chosen():
    assert coco.Codebook.nearest(torch.zeros(1, 2), torch.tensor([[1.0, 0], [-1, 0], [0, 1]])).tolist() == [0]


def test_the_safeguards_keep_the_codes_in_use():
    def used(**change):
        torch.manual_seed(0)
        z = 5 + 0.1 * torch.randn(400, 4)                                     # far from where codes start at random
        book = coco.Codebook(16, 4, **change)
        for k in range(30):
            book(z[torch.randint(400, (64,))])
        return coco.usage(book.eval()(z)[1], 16)
    assert used(kmeans=False, dead=0)[0] == 1 / 16
    assert used(kmeans=True, dead=0)[0] > 0.9 and used(kmeans=False, dead=5)[0] > 0.5


def test_usage_and_perplexity_by_hand():
    share, perplexity = coco.usage(torch.tensor([0, 0, 1, 1]), 8)
    assert share == pytest.approx(0.25) and perplexity == pytest.approx(2)
    assert coco.usage(torch.arange(8), 8) == (1.0, pytest.approx(8))


# ------------------------------------------------------------------------------------------------------- rows and texts
def test_each_epoch_has_negatives_of_its_own(tmp_path, monkeypatch):
    redraw, seen = coco.Rows.redraw, []
    monkeypatch.setattr(coco.Rows, "redraw", lambda rows, *when: redraw(rows, *when) or seen.append((when, rows.train[4].tolist())))
    coco.train(args("--run", str(tmp_path / "r"), "--prompt", "none", "--base-epochs", "3"))
    assert [when for when, _ in seen] == [("base", 0), ("base", 1), ("base", 2)] and len({tuple(n) for _, n in seen}) == 3


def test_no_text_holds_what_it_is_to_predict_and_every_row_finds_its_own():
    _, rows, _ = built()
    for table in (rows.train, rows.valid, rows.test):
        u, place, text = table[:3]
        assert torch.equal(rows.text_user[text], u)
        assert (rows.text_place[text] <= place).all() and (place - rows.text_place[text] < 5).all() and (rows.text_place[text] >= 1).all()
    had = {(int(u), int(i)) for u, i in zip(rows.data.user, rows.data.item)}
    for u, _, _, target, *negatives in rows.test.T.tolist():
        assert (u, target) in had and not any((u, i) in had for i in negatives)
    held = {(u, t) for u, _, _, t in [*rows.valid.T[:, :4].tolist(), *rows.test.T[:, :4].tolist()]}
    drawn = {(u, i) for u, _, _, _, *negatives in rows.train.T.tolist() for i in negatives}
    assert drawn & had and drawn & had <= held                    # those may be drawn: to spare them would tell them
    first = rows.train.clone()
    rows.redraw("base", 0)
    again, other = rows.train.clone(), rows.redraw("base", 1) or rows.train
    assert torch.equal(other[:4], first[:4]) and torch.equal(again[:4], first[:4])
    assert (again[4] != first[4]).float().mean() > 0.9 < (other[4] != again[4]).float().mean()
    assert not {(u, i) for u, i in zip(*other[[0, 4]].tolist())} & (had - held)
    assert rows.redraw("base", 0) or torch.equal(rows.train, again)
    texts = torch.tensor([5, 0, 9])
    table, owner = rows.of_texts(texts)
    want = [r for t in texts.tolist() for r in rows.train.T.tolist() if r[2] == t]
    assert table.T.tolist() == want and torch.equal(texts[owner], table[2])


# ------------------------------------------------------------------------------------------------------- model
def test_the_llm_is_frozen_and_the_codes_learn_through_it():
    a, rows, model = built()
    texts = torch.as_tensor(rows.train_texts[:6])
    prompt, index, terms = model.prompt(texts)
    loss, _ = coco.loss_of(a, model, texts, model.read(texts, prompt), terms * 0)
    loss.backward()
    assert all(p.grad is None for p in model.llm.parameters())
    grad = model.books[0].codes.grad
    chosen = torch.zeros(4, dtype=torch.bool).index_fill_(0, index, True)
    assert (grad[chosen].abs().sum(1) > 0).all() and (grad[~chosen] == 0).all()
    assert model.passes == 6


def test_a_code_says_which_share_of_its_texts_are_of_misled_users(monkeypatch):
    _, rows, model = built("--data", "toy:40x200x700:0.3")
    truth = coco.misled(rows)[rows.text_user]
    model.eval()
    lines, _ = coco.codes_view(model, torch.as_tensor(truth * 2))
    assert [line.get("misled") for line in lines] == [0, None, 1, None] and lines[2]["texts"] == truth.sum() > 0
    lines, _ = coco.codes_view(model, torch.zeros(len(truth), dtype=torch.long))
    assert lines[0]["misled"] == pytest.approx(truth.mean(), abs=1e-4)
    monkeypatch.setattr(coco, "misled", lambda rows: None)
    assert "misled" not in coco.codes_view(model, torch.zeros(len(truth), dtype=torch.long))[0][0]


@pytest.mark.parametrize("flags,learns", [((), False), (("--no-freeze-base",), True), (("--joint",), True)])
def test_phase_2_leaves_the_base_model_alone_unless_told_to(tmp_path, flags, learns):
    a, rows, model = built("--epochs", "2", "--run", str(tmp_path / "r"), *flags)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    coco.train_prompts(a, coco.Run(a, "coco", "f"), model)
    moved = {k.split(".")[0] for k, v in model.state_dict().items() if v.is_floating_point() and not torch.equal(v, before[k])}
    assert {"books", "to_query", "to_prompt", "extract", "gate", "to_item"} <= moved
    assert moved >= {"ctr", "to_state"} if learns else not moved & {"ctr", "to_state"}


def test_the_learning_rate_of_phase_2_falls_and_that_of_phase_1_stays(tmp_path, monkeypatch):
    a, rows, model = built("--base-epochs", "2", "--epochs", "4", "--run", str(tmp_path / "r"))
    made, rates, adam = [], [], coco.adam
    monkeypatch.setattr(coco, "adam", lambda *args: made.append(adam(*args)) or made[-1])
    seen = lambda *_: rates.append(made[-1].param_groups[0]["lr"]) or {"overall": 0.5}
    monkeypatch.setattr(coco, "evaluate_rows", seen)
    monkeypatch.setattr(coco, "valid_auc", lambda model: seen()["overall"])
    run = coco.Run(a, "coco", "f")
    coco.train_base(a, run, model)
    coco.train_prompts(a, run, model)
    assert rates == pytest.approx([a.lr, a.lr, a.lr, 0.75 * a.lr, 0.5 * a.lr, 0.25 * a.lr])


def test_state_extraction_and_fusion_by_hand():
    _, rows, model = built()
    model.eval()
    with torch.no_grad():
        for table in (model.ctr.user, model.ctr.item):
            table.weight[1:].normal_()
        u, place = rows.test[:2, :1]
        past = rows.logs.sequence(int(u))[:int(place)][-20:].astype(int) + 1
        h = model.to_state(torch.cat([model.ctr.user.weight[u[0]], model.ctr.item.weight[past].mean(0)]))
        assert torch.allclose(model.state(u, place)[0], h, atol=1e-5)

        p, o = torch.randn(model.m, 128), torch.randn(3, 128)                 # [4] m queries, three words
        e, norm = model.extract, torch.nn.functional.layer_norm
        weight = (e.query(norm(p, (128,))) @ e.key(norm(o, (128,))).T / 8 ** 0.5).softmax(-1)
        want = e.mlp((weight @ e.value(norm(o, (128,)))).flatten())
        padded = torch.cat([o, 100 * torch.ones(2, 128)])
        assert torch.allclose(e(p[None], padded[None], torch.tensor([[True] * 3 + [False] * 2]))[0], want, atol=1e-5)

        known = torch.randn(8)                                                # [5]
        k = torch.sigmoid(model.gate(torch.cat([h, known]))) * known
        items = rows.test[3:, :1].T
        s = model.ctr(u, items + 1, rows.history(u, place), state=(h + k)[None])[0] + model.to_item(model.items[items[0]]) @ k
        assert torch.allclose(model.score(rows.test[:, :1], known[None])[0], s, atol=1e-5)


def test_code_and_prompt_by_hand():
    _, rows, model = built()
    model.eval()
    texts, norm, book = torch.as_tensor(rows.train_texts[:50:10]), model.to_query[1], model.books[0]
    norm.running_mean.normal_(std=0.1)
    norm.running_var.uniform_(0.01, 0.1)
    with torch.no_grad():
        h = model.state(rows.text_user[texts], rows.text_place[texts])
        z = (model.to_query[0](h) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        book.codes.copy_(z[:4])                                                           # the fifth gets the code of another
        nearest = [min(range(4), key=lambda k: float((z[t] - book.codes[k]).norm())) for t in range(5)]
        words = model.llm.get_input_embeddings().weight[list(llm.plain_ids(model.tokenizer, model.args.static_prompt))[:2]]
        prompt, index, _ = model.prompt(texts)
        for t, k in enumerate(nearest):
            assert torch.allclose(prompt[t], words + words.std() * model.to_prompt(book.codes[k]).view(2, -1), atol=1e-5)
    assert index.tolist() == nearest and nearest[:4] == [0, 1, 2, 3]


def test_codes_are_served_as_they_are_trained_from_the_first_batch_on():
    _, rows, model = built("--codes", "8")
    texts = torch.as_tensor(rows.train_texts)
    trained = model.train().prompt(texts)[1]
    assert len(trained.unique()) >= 6 and (model.codes(texts) == trained).float().mean() > 0.95


def test_what_is_read_does_not_depend_on_who_else_is_in_the_batch():
    _, rows, model = built()
    model.eval()
    texts = torch.as_tensor(rows.train_texts[:8])
    with torch.no_grad():
        model.books[0].start(torch.randn(20, 8))
        together = coco.knowledge(model, texts)
        alone = torch.cat([coco.knowledge(model, texts[k:k + 1]) for k in range(8)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_other_prompts_read_other_things():
    _, rows, model = built()
    texts = torch.as_tensor(rows.train_texts[:2])
    with torch.no_grad():
        prompt = model.prompt(texts)[0]
        assert not torch.allclose(model.read(texts, prompt), model.read(texts, prompt + torch.randn_like(prompt)), atol=1e-3)


@pytest.mark.parametrize("prompt", ["mixture", "shared", "static"])
def test_the_other_prompts(prompt):
    a, rows, model = built("--prompt", prompt)
    texts = torch.as_tensor(rows.train_texts[:6])
    found, index, _ = model.prompt(texts)
    assert found.requires_grad == (prompt != "static") and (index == 0).all()
    assert torch.equal(found[0], found[1]) == (prompt != "mixture")


# ------------------------------------------------------------------------------------------------------- judge
def test_without_knowledge_nobody_is_contradicted_and_a_knowledge_that_hurts_is_found():
    a, rows, model = built("--no-match", "--margin", "0", "--judge-least", "1", "--judge-level", "text")
    texts = torch.as_tensor(rows.train_texts)
    nothing = torch.zeros(len(texts), 8)
    assert not coco.contradicted(a, model, texts, nothing).any()
    table, owner = rows.of_texts(texts)
    torch.manual_seed(0)
    known = 30 * torch.randn(len(texts), 8)
    model.eval()
    with torch.no_grad():
        worse = coco.rec_loss(model.score(table, known[owner]), "bce") - coco.rec_loss(model.score(table), "bce")
    want = torch.tensor([worse[owner == t].mean() > 0 for t in range(len(texts))])
    assert 0 < want.sum() < len(texts) and torch.equal(coco.contradicted(a, model, texts, known), want)
    few = coco.contradicted(args("--no-match", "--margin", "0", "--judge-level", "text", "--judge-least", "5"), model, texts, known)
    assert torch.equal(few, want & (torch.bincount(owner, minlength=len(texts)) >= 5))


def test_confidence_counts_a_negative_the_other_way_round_and_agrees_with_the_loss_under_nce():
    better, worse = torch.tensor([[2.0, -2.0]]), torch.tensor([[2.0, 2.0]])
    assert coco.confidence(better, "bce") > coco.confidence(worse, "bce")
    assert float(coco.confidence(better, "bce")) == pytest.approx(1 / (1 + np.exp(-2)))
    s = torch.randn(50, 5)
    order = lambda x: x.argsort().tolist()
    assert order(coco.confidence(s, "nce")) == order(-coco.rec_loss(s, "nce"))


def test_losses_by_hand():
    s = torch.tensor([[np.log(3.0), 0.0, 0.0]], dtype=torch.double)
    assert float(coco.rec_loss(s, "nce")) == pytest.approx(-np.log(3 / 5))
    assert float(coco.rec_loss(s, "bce")) == pytest.approx((np.log(4 / 3) + np.log(2)) / 2)


def test_both_phases_losses_by_hand():
    a, rows, model = built()
    model.eval()
    texts, known, judged = torch.as_tensor(rows.train_texts[:6]), 3 * torch.randn(6, 8), torch.arange(6) < 2
    read = coco.knowledge(model, texts)

    def by_hand(known):
        """The mean over all choices of these texts, with what is known and without."""
        each = [[coco.rec_loss(model.score(row[:, None], k), "bce") for k in (known[t][None], None)]
                for t, text in enumerate(texts) for row in rows.train.T if row[2] == text]
        return sum(map(sum, each)) / len(each)
    with torch.no_grad():
        assert torch.allclose(coco.loss_of(a, model, texts, known, torch.tensor(0.5))[0], by_hand(known) + 0.5, atol=1e-5)
        assert torch.allclose(coco.judged_loss(a, model, texts, known, judged)[0],                   # the judged are read anew
                              by_hand(torch.where(judged[:, None], read, known)), atol=1e-5)


@pytest.mark.parametrize("head", ["bce", "nce"])
def test_steps_on_the_loss_make_both_branches_better(head):
    a, rows, model = built("--head", head)
    texts = torch.as_tensor(rows.train_texts[:20])
    known = torch.randn(20, 8)
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(5):
        loss, parts = coco.loss_of(a, model.eval(), texts, known, torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append((parts["with_llm"], parts["without"]))
    assert all(after < before for before, after in zip(seen[0], seen[-1]))


def test_the_alignment_by_hand():
    known, h = torch.tensor([[3.0, 0.0], [0.0, 5.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    judged = torch.tensor([True, True, False])
    found = [float(coco.align_loss(known, states, judged, tau=0.5)) for states in (h, h[[1, 0, 2]])]
    assert found == pytest.approx([np.log(1 + np.exp(-2)), np.log(1 + np.exp(2))])         # cosines 1 and 0: aligned is less
    assert float(coco.align_loss(known, h, judged & False)) == 0.0


def test_the_judge_of_confidence_is_that_of_the_loss_where_a_text_serves_one_choice():
    flags = ("--head", "nce", "--no-match", "--margin", "0", "--judge-least", "1", "--judge-level", "text", "--text-every", "1")
    a, rows, model = built(*flags)
    texts = torch.as_tensor(rows.train_texts)
    assert len(rows.of_texts(texts)[1]) == len(texts)
    torch.manual_seed(0)
    known = 30 * torch.randn(len(texts), 8)
    by_loss = coco.contradicted(a, model, texts, known)
    assert 0 < by_loss.sum() < len(texts) and torch.equal(by_loss, coco.contradicted(args(*flags, "--judge", "confidence"), model, texts, known))


def test_a_text_that_is_not_judged_gives_the_llm_exactly_no_gradient_and_the_recommender_its_own():
    a, rows, model = built()
    model.eval()
    coco.train_adapter(model.llm, True)
    for p in lora.parameters(model.llm):
        p.data.normal_(std=0.1)
    texts = torch.as_tensor(rows.train_texts[:6])
    known = coco.knowledge(model, texts)

    def gradients(part, judged):
        for p in [*model.parameters(), *lora.parameters(model.llm)]:
            p.grad = None
        coco.judged_loss(a, model, texts[part], known[part], judged)[0].backward()
        rows_ = len(rows.of_texts(texts[part])[1])
        return [None if p.grad is None else p.grad * rows_ for p in lora.parameters(model.llm)], model.gate.weight.grad.abs().sum()
    yes = torch.tensor([True, True, False, False, False, False])
    none, gate = gradients(slice(2, 6), yes[2:])
    assert all(g is None for g in none) and gate > 0
    both, _ = gradients(slice(0, 6), yes)
    alone, _ = gradients(slice(0, 2), yes[:2])
    assert any(g.abs().sum() > 0 for g in alone) and all(torch.allclose(x, y, atol=1e-6) for x, y in zip(both, alone))


@pytest.mark.parametrize("rate", ["0", "1e-3"])
def test_phase_4_moves_the_adapter_and_if_asked_the_recommender_but_no_state_code_or_prompt(rate, tmp_path, monkeypatch):
    a, rows, model = built("--eliminate-epochs", "2", "--lora-lr", "1e-2", "--eliminate-lr", rate, "--align", "0.1", "--run", str(tmp_path / "r"))
    texts = torch.as_tensor(rows.train_texts)
    known, mask = coco.knowledge(model, texts), torch.arange(len(texts)) % 4 == 0
    rising = iter(range(9))
    monkeypatch.setattr(coco, "valid_auc", lambda model: next(rising) / 10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.ctr.requires_grad_(False)                                                                   # as phase 2 leaves it
    coco.eliminate(a, coco.Run(a, "coco", "x"), model, known, mask)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    still = ("to_state.", "to_query.", "to_prompt.", "extract.", "books.", "ctr.user.", "ctr.item.")
    assert not [k for k in moved if k.startswith(still)] and ({"gate.weight", "ctr.out.weight"} <= moved if float(rate) else not moved)
    assert all(t.abs().sum() > 0 for name, t in lora.state(model.llm).items() if "lora_B" in name)


def test_the_alignment_reaches_the_adapter():
    losses = []
    for weight in ("0", "1"):
        a, rows, model = built("--align", weight)
        coco.train_adapter(model.llm, True)
        texts = torch.as_tensor(rows.train_texts[:8])
        loss, parts = coco.judged_loss(a, model, texts, coco.knowledge(model, texts), torch.ones(8, dtype=torch.bool))
        losses.append(float(loss.detach()))
    assert float(parts["align"]) > 0 and losses[1] == pytest.approx(losses[0] + float(parts["align"]), abs=1e-4)


def test_the_epoch_that_does_best_on_validation_is_kept_and_test_rows_choose_nothing(tmp_path, monkeypatch):
    a, rows, model = built("--base-epochs", "3", "--run", str(tmp_path / "r"))
    told, seen, asked = iter((0.6, 0.5, 0.4)), [], []

    def judged(model, table, known=None):
        asked.append(table)
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"overall": next(told)}
    monkeypatch.setattr(coco, "evaluate_rows", judged)
    run = coco.Run(a, "coco", "x")
    report, _ = coco.train_base(a, run, model)
    now = model.state_dict()
    assert report["valid_auc"] == 0.6 and all(torch.equal(v, seen[0][k]) for k, v in now.items())
    assert any(not torch.equal(v, seen[1][k]) for k, v in now.items())
    told = iter((0.7,))
    coco.valid_auc(model)
    assert len(asked) == 4 and all(table is rows.valid for table in asked)


def test_both_evaluations_by_hand():
    a, rows, model = built("--rank-users", "1000")
    guess = np.random.default_rng(0).random((len(rows.data.users), len(rows.data.items)))
    model.score = lambda table, known=None: torch.as_tensor(guess[table[0][:, None].numpy(), table[3:].T.numpy()])
    truth = rows.data.world.misled[[int(name[1:]) for name in rows.data.users]]
    found = coco.evaluate_rows(model, rows.test)
    for cell, inside in {"overall": lambda u: True, "misled": lambda u: truth[u], "rest": lambda u: not truth[u]}.items():
        table = [r for r in rows.test.T.tolist() if inside(r[0])]
        yes, no = [guess[r[0], r[3]] for r in table], [guess[r[0], i] for r in table for i in r[4:]]
        assert found[cell] == pytest.approx(np.mean([x > y for x in yes for y in no]), abs=1e-6)
    ranks = []
    for u, place, _, target, *_ in rows.test.T.tolist():
        had = set(rows.logs.sequence(u)[:place].tolist())
        ranks.append(1 + sum(guess[u, i] > guess[u, target] for i in range(len(rows.data.items)) if i not in had))
    want = np.mean([1 / np.log2(1 + r) if r <= 10 else 0 for r in ranks])
    assert coco.evaluate_ranking(model)["ndcg@10"] == pytest.approx(want, abs=1e-4)


def test_trained_in_one_phase_the_adapter_learns_from_what_is_judged(tmp_path, monkeypatch):
    a, rows, model = built("--joint", "--judge", "all", "--run", str(tmp_path / "r"))
    monkeypatch.setattr(coco, "valid_auc", lambda model: 0.5)
    coco.train_prompts(a, coco.Run(a, "coco", "x"), model)
    assert all(t.abs().sum() > 0 for name, t in lora.state(model.llm).items() if "lora_B" in name)


def test_of_several_levels_the_state_has_the_tasks_gradient_once():
    _, rows, model = built("--levels", "3")
    z = torch.randn(6, model.books[0].codes.shape[1], requires_grad=True)
    model.eval().to_query.register_forward_hook(lambda *_: z)
    model.prompt(torch.as_tensor(rows.train_texts[:6]))[0].sum().backward()
    assert torch.allclose(z.grad, (model.scale * model.to_prompt.weight.sum(0)).expand(6, -1), atol=1e-5)


def test_only_judged_users_are_read_with_the_adapter(tmp_path):
    _, rows, model = built("--run", str(tmp_path / "r"))
    model.eval()
    texts = torch.as_tensor(rows.train_texts)
    user = rows.text_user[texts]
    before = coco.knowledge(model, texts)
    for p in lora.parameters(model.llm):
        p.data.normal_(std=0.1)
    everybody = coco.knowledge(model, texts)
    model.adapted = torch.arange(len(rows.data.users)) % 3 == 0
    mine = model.adapted[user]
    some = coco.knowledge(model, texts)
    assert torch.allclose(some[~mine], before[~mine], atol=1e-5)
    assert torch.allclose(some[mine], everybody[mine], atol=1e-5) and not torch.allclose(some[mine], before[mine], atol=1e-3)
    store = coco.Store(coco.Run(args("--run", str(tmp_path / "r")), "coco", "x"), model)      # what is written down tells them apart
    first, _ = store.get(texts)
    model.adapted = ~model.adapted
    assert not torch.allclose(store.get(texts)[0][mine], first[mine], atol=1e-3)


def test_the_judge_is_measured_against_the_truth():
    _, rows, _ = built()
    texts = torch.as_tensor(rows.train_texts)
    right = torch.as_tensor(coco.misled(rows)[rows.text_user[texts].numpy()])
    report = coco.judge_report(rows, texts, torch.ones(len(texts), 4), right)
    assert report["precision"] == report["recall"] == 1.0 and report["knowledge"] == report["knowledge_others"] == 2.0
    assert coco.judge_report(rows, texts, torch.ones(len(texts), 4), ~right)["recall"] == 0.0


# ------------------------------------------------------------------------------------------------------- serving
def test_what_was_read_once_is_never_read_again(tmp_path):
    a, rows, model = built("--run", str(tmp_path / "r"))
    run, texts = coco.Run(a, "coco", "x"), rows.test[2]
    store = coco.Store(run, model)
    first, codes = store.get(texts)
    distinct = {(tuple(model.tokens(t)), k) for t, k in zip(texts.tolist(), codes.tolist())}
    assert model.passes == len(distinct) <= len(texts.unique()) * a.codes
    assert torch.allclose(first, coco.knowledge(model, texts), atol=1e-5)
    passes = model.passes
    again = coco.Store(run, model)
    assert torch.equal(again.get(texts)[0], first) and model.passes == passes


# ------------------------------------------------------------------------------------------------------- end to end
@pytest.mark.parametrize("flags", [("--prompt", "none"), ("--head", "nce", "--levels", "2", "--recommender", "dcnv2", "--joint"),
                                   ("--prompt", "static", "--judge", "all", "--align", "0.1"), ("--prompt", "mixture", "--judge", "confidence", "--margin", "-1"),
                                   ("--margin", "-10", "--adapt", "all", "--lora-lr", "0", "--eliminate-lr", "1e-3")])
def test_every_kind_of_run_ends_with_a_result(tmp_path, capsys, flags):
    coco.main(coco.Args, coco.train, "", [*SMALL, "--run", str(tmp_path / "r"), *flags])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("RESULT "))
    assert 0 < result["test"]["overall"] < 1 and {"misled", "rest"} <= set(result["test"]) and "ndcg@10" in result["ranking"]
    if "all" in flags:                                                        # no others
        assert result["judged"]["knowledge"] > 0 == result["judged"]["knowledge_others"]
    assert (tmp_path / "r" / "adapter").exists() == ("none" not in flags and "--lora-lr" not in flags)


def test_a_run_that_is_killed_resumes_to_the_same_result_to_the_bit(tmp_path):
    def start(name, *flags):
        return subprocess.Popen([sys.executable, str(ROOT / "coco.py"), *SMALL, "--epochs", "2", "--margin", "-10", "--run",
                                 str(tmp_path / name), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
    a, b = start("a"), start("b")
    log = tmp_path / "b" / "metrics.jsonl"
    while b.poll() is None and not (tmp_path / "b" / "collaborate.safetensors").exists():     # between two epochs of phase 2
        time.sleep(0.005)
    assert b.poll() is None
    b.send_signal(signal.SIGKILL)
    b.communicate()
    b = start("b", "--resume")
    last = [p.communicate()[0].strip().splitlines()[-1] for p in (a, b)]
    assert last[0] == last[1] and last[0].startswith("RESULT {")
    assert log.read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()
    codes = [json.loads(line) for line in (tmp_path / "a" / "codes.jsonl").read_text().splitlines()]
    assert len(codes) == 4 and all(len(c["nearest_tokens"]) == 2 for c in codes) and sum(c["texts"] for c in codes) > 0


def test_the_table_of_variants_shares_what_is_the_same(tmp_path, capsys):
    coco.main(coco.Args, coco.train, "", [*SMALL, "--ablations", "--variants", "full,codebook,no LLM", "--run", str(tmp_path / "all")])
    table = json.loads(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("RESULT "))["ablations"]
    assert set(table) == {"no LLM", "codebook", "full"} and "recall" in table["full"] and "codes used" not in table["no LLM"]
    path = tmp_path / "all" / "s0"
    assert table["full"]["validation"]["mean"] == json.loads((path / "full" / "result.json").read_text())["valid"]["overall"]
    assert (path / "full" / "collaborate.safetensors").read_bytes() == (path / "codebook" / "collaborate.safetensors").read_bytes()


@pytest.mark.parametrize("flags,status,message", [
    (("--prompt", "poem"), 2, "--prompt is"), (("--prompt", "group:gender"), 1, "no user fields"), (("--group-prompt", "{x}"), 2, "--group-prompt"),
    (("--variants", "best"), 2, "--variants best"), (("--tau", "0"), 2, "--tau"), (("--batch", "1"), 2, "--batch"),
    (("--static-prompt", " "), 2, "--static-prompt"), (("--group-prompt", "{field.x}"), 2, "--group-prompt"), (("--eliminate-lr", "-1"), 2, "--eliminate-lr"),
    (("--recommender", "autoint", "--dim", "7"), 2, "--dim"), (("--vq", "ema", "--prompt", "mixture"), 2, "--vq ema"), (("--users", "0"), 2, "--users"),
    (("--lora-targets", "nothing"), 1, "no such linear layer"), (("--dim", "1"), 2, "--dim"), (("--levels", "99"), 2, "--levels"),
    (("--group-prompt", " "), 2, "--group-prompt"), (("--lora-lr", "0"), 2, "--eliminate-lr"), (("--judge", "off", "--align", "1"), 2, "--align"),
    (("--ablations", "--no-match"), 2, "--match"), (("--ablations", "--variants", "age"), 1, "--variants age")])
def test_a_users_mistake_is_one_line(tmp_path, capsys, flags, status, message):
    with pytest.raises(SystemExit) as stop:
        coco.main(coco.Args, coco.train, "", [*SMALL, "--run", str(tmp_path / "r"), *flags])
    assert stop.value.code == status and message in capsys.readouterr().err.strip().splitlines()[-1]


def test_groups_of_users_get_their_own_text(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    lines = ["user,item,time,title"] + [f"u{u},i{i},{t},Title {i}" for u in range(12) for t, i in enumerate(rng.permutation(40)[:8])]
    (data / "interactions.csv").write_text("\n".join(lines) + "\n")
    a = args("--data", str(data), "--prompt", "group:gender")
    rows = coco.Rows(a, torch.device("cpu"))
    rows.data.user_fields["gender"] = ["F" if u % 2 else "M" for u in range(len(rows.data.users))]
    model = coco.CoCo(a, rows)
    texts = torch.as_tensor(rows.train_texts)
    prompt, group, _ = model.prompt(texts)
    assert set(group.tolist()) == {0, 1} and torch.equal(group == 0, rows.text_user[texts] % 2 == 1)
    said = model.tokenizer.decode(list(llm.plain_ids(model.tokenizer, "This user's gender is F. What does this user like?")))
    near = (prompt[group == 0][0] @ model.llm.get_input_embeddings().weight.T - (model.llm.get_input_embeddings().weight ** 2).sum(1) / 2).argmax(-1)
    assert model.tokenizer.decode(near.tolist()).startswith(said)


def test_a_user_is_judged_by_the_mean_of_all_choices_and_by_no_fewer_than_asked():
    a, rows, model = built("--judge-least", "14", "--margin", "0")
    texts = torch.as_tensor(rows.train_texts)
    known, table, owner = coco.knowledge(model, texts), *rows.of_texts(texts)
    model.eval()
    with torch.no_grad():
        worse = (coco.rec_loss(model.score(table, known[owner]), a.head, a.tau) - coco.rec_loss(model.score(table), a.head, a.tau)).numpy()
    user = rows.text_user[texts].numpy()
    want = {u: (user[owner.numpy()] == u).sum() >= 14 and worse[user[owner.numpy()] == u].mean() > 0 for u in set(user.tolist())}
    found = coco.contradicted(a, model, texts, known)
    assert found.tolist() == [bool(want[u]) for u in user.tolist()] and 0 < found.sum() < len(found)
    a.margin = -10.0                                             # everybody who has enough
    few = {u for u in want if (user[owner.numpy()] == u).sum() < 14}
    assert coco.contradicted(a, model, texts, known).tolist() == [u not in few for u in user.tolist()] and few


def test_the_judge_takes_the_mean_over_draws_of_the_negatives():
    a, rows, model = built("--no-match", "--margin", "0", "--judge-least", "1", "--judge-level", "text")
    texts = torch.as_tensor(rows.train_texts)
    torch.manual_seed(0)
    model.ctr.item.weight.data.normal_()                         # items that differ, so that negatives do
    known, mean = torch.randn(len(texts), 8), 0
    model.eval()
    with torch.no_grad():
        for draw in range(4):
            rows.redraw("judge", draw)
            table, owner = rows.of_texts(texts)
            mean = mean + (coco.rec_loss(model.score(table, known[owner]), a.head) - coco.rec_loss(model.score(table), a.head)) / 4
    want = torch.stack([mean[owner == t].mean() > 0 for t in range(len(texts))])
    assert torch.equal(coco.contradicted(a, model, texts, known, 4), want)
    assert not torch.equal(coco.contradicted(a, model, texts, known, 1), want)


def test_in_one_phase_a_text_that_is_not_judged_gives_the_llm_no_gradient(tmp_path, monkeypatch):
    a, rows, model = built("--joint", "--judge", "off", "--run", str(tmp_path / "r"))
    monkeypatch.setattr(coco, "valid_auc", lambda model: 0.5)
    before = lora.state(model.llm)
    coco.train_prompts(a, coco.Run(a, "coco", "x"), model)
    assert all(torch.equal(before[name], t) for name, t in lora.state(model.llm).items())


def test_another_code_for_the_same_text_is_another_vector(tmp_path, monkeypatch):
    a, rows, model = built("--run", str(tmp_path / "r"))
    store, texts = coco.Store(coco.Run(a, "coco", "x"), model), torch.arange(6)
    model.eval()
    first, codes = store.get(texts)
    assert torch.equal(store.get(texts)[0], first) and len(store.keys) <= 6
    size = len(store.keys)
    monkeypatch.setattr(model, "codes", lambda texts: codes + 1)
    store.get(texts)
    assert len(store.keys) == 2 * size


def test_codes_of_several_levels_are_digits_of_one_number():
    a, rows, model = built("--levels", "2")
    model.eval().ctr.user.weight.data.normal_(std=9)             # users apart
    texts = torch.arange(40)
    z = model.to_query(model.state(rows.text_user[texts], rows.text_place[texts]))
    first = ((z[:, None] - model.books[0].codes) ** 2).sum(-1).argmin(1)
    second = ((z - model.books[0].codes[first])[:, None] - model.books[1].codes).pow(2).sum(-1).argmin(1)
    assert torch.equal(model.codes(texts), 4 * first + second) and torch.equal(coco.first_level(model, texts), first) and len(set(second.tolist())) > 1


def test_a_code_that_is_moved_forgets_what_it_was_the_average_of():
    torch.manual_seed(0)
    book = coco.Codebook(4, 3, "ema", dead=1, kmeans=False)
    book.codes.data[3] = 1e3                                     # nobody chooses it
    z = torch.randn(16, 3)
    book(z)
    moved = (z == book.codes[3]).all(1)
    assert moved.sum() == 1 and torch.allclose(book.total[3] / book.size[3], z[moved][0])


def test_phase_4_ends_with_what_it_began_with_where_no_epoch_is_better(tmp_path, monkeypatch):
    a, rows, model = built("--judge", "all", "--eliminate-epochs", "2", "--run", str(tmp_path / "r"))
    told = iter((0.6, 0.5, 0.4, 0.3))
    monkeypatch.setattr(coco, "valid_auc", lambda model, *_: next(told))
    model.adapted[:] = True
    before = {k: v.clone() for k, v in (model.state_dict() | lora.state(model.llm)).items()}
    known = coco.knowledge(model, torch.as_tensor(rows.train_texts))
    report, _ = coco.eliminate(a, coco.Run(a, "coco", "x"), model, known, torch.ones(len(known), dtype=torch.bool))
    now = model.state_dict() | lora.state(model.llm)
    assert report["valid_auc"] == 0.6 and all(torch.equal(v, before[k]) for k, v in now.items())


# ------------------------------------------------------------------------------------------- what a run is made of
@pytest.fixture
def quick(monkeypatch):
    """In place of the LLM: a number of the text, the prompt and, for users of the adapter, what that has learned."""
    def read(model, texts, prompt):
        learned = model.adapted[model.rows.text_user[texts]].float()[:, None] * lora.parameters(model.llm)[1].sum(1)[:8]
        return torch.sin(texts[:, None] * torch.arange(1.0, 9.0)) + prompt.mean((1, 2))[:, None] + 10 * learned
    monkeypatch.setattr(coco.CoCo, "read", read)


def test_a_text_shows_the_titles_before_its_place_and_none_after(monkeypatch):
    _, rows, model = built("--prompt-history", "3")
    monkeypatch.setattr(coco.llm, "chat", lambda tokenizer, parts: parts)
    for t in range(0, len(rows.text_user), 7):
        u, place = int(rows.text_user[t]), int(rows.text_place[t])
        shown = "\n".join(f"- {rows.logs.lines[i]}" for i in rows.logs.sequence(u)[:place][-3:])
        assert model.tokens(t) == [0, 1, f"\nThe user chose these titles, oldest first:\n{shown}\nAnswer in one line."]


def test_a_negative_that_is_drawn_anew_may_be_held_out():
    _, rows, _ = built("--prompt", "none")
    rows.redraw("base", 0)
    assert any(n in rows.logs.sequence(u)[-2:] for u, n in rows.train[[0, 4]].T.tolist())    # to spare those would tell them


def test_codes_in_use_stay_and_one_that_nobody_chose_is_moved():
    torch.manual_seed(0)
    book = coco.Codebook(4, 3, dead=3, kmeans=False)
    before = book.codes.detach().clone()
    for _ in range(10):
        book(before)
    assert torch.equal(book.codes, before)
    for _ in range(3):
        assert torch.equal(book.codes, before)
        book(before[:3])
    assert torch.equal(book.codes[:3], before[:3]) and (book.codes[3] == before[:3]).all(1).any()


def test_a_mixture_does_not_depend_on_who_else_is_in_the_batch():
    _, rows, model = built("--prompt", "mixture")
    texts = torch.as_tensor(rows.train_texts[:5])
    together = model.eval().prompt(texts)[0]
    assert torch.allclose(model.prompt(texts[:1])[0], together[:1], atol=1e-6)
    z, codes = model.to_query(model.state(rows.text_user[texts], rows.text_place[texts])), model.books[0].codes
    value = (z @ codes.T / 8 ** 0.5).softmax(1) @ codes
    assert torch.allclose(together.flatten(1), model.words[0].flatten() + model.scale * model.to_prompt(value), atol=1e-6)


def test_the_mean_of_the_output_is_that_of_its_words():
    e, o = coco.Extract(6, 4, "mean", 2), torch.randn(3, 6)
    found = e(torch.randn(1, 2, 6), torch.cat([o, 100 * torch.ones(2, 6)])[None], torch.tensor([[True] * 3 + [False] * 2]))
    assert torch.allclose(found[0], e.mlp(e.value(torch.nn.functional.layer_norm(o, (6,))).mean(0)), atol=1e-5)


@pytest.mark.parametrize("judge", ["loss", "confidence"])
def test_the_temperature_divides_wherever_a_loss_is_taken(judge):
    s = torch.tensor([[2 * np.log(3.0), 0.0, 0.0]])
    assert float(coco.rec_loss(s, "nce", 2.0)) == pytest.approx(-np.log(3 / 5), abs=1e-6) == -np.log(float(coco.confidence(s, "nce", 2.0)))
    a, rows, model = built("--head", "nce", "--tau", "0.05", "--no-match", "--judge", judge, "--judge-level", "text", "--judge-least", "1", "--margin", "0")
    model.eval()
    model.ctr.item.weight.data.normal_()
    texts, known = torch.as_tensor(rows.train_texts), torch.randn(len(rows.train_texts), 8)
    table, owner = rows.of_texts(texts)
    with torch.no_grad():
        both = model.score(table, known[owner]), model.score(table)
        loss, parts = coco.loss_of(a, model, texts, known, torch.tensor(0.5))
        means = [float(coco.rec_loss(s / 0.05, "nce").mean()) for s in both]
        assert [parts["with_llm"], parts["without"]] == pytest.approx(means) and float(loss) == pytest.approx(sum(means) + 0.5)
        bad = lambda s: coco.rec_loss(s, "nce") if judge == "loss" else -coco.confidence(s, "nce")
        judged = [torch.stack([(bad(both[0] / tau) - bad(both[1] / tau))[owner == t].mean() > 0 for t in range(len(texts))]) for tau in (0.05, 1.0)]
    assert torch.equal(coco.contradicted(a, model, texts, known), judged[0]) and not torch.equal(*judged)


def test_the_alignment_is_weighted_by_its_flag(quick):
    a, rows, model = built()
    model.eval()
    texts, judged = torch.as_tensor(rows.train_texts[:8]), torch.ones(8, dtype=torch.bool)
    loss = {w: coco.judged_loss(dataclasses.replace(a, align=w), model, texts, torch.zeros(8, 8), judged) for w in (0.0, 1.0, 3.0)}
    term = float(loss[1.0][1]["align"])
    assert term > 0 and [float(loss[w][0].detach() - loss[0.0][0].detach()) for w in (1.0, 3.0)] == pytest.approx([term, 3 * term], abs=1e-4)


def test_the_judges_margin_is_that_of_one_choice_however_many_draws_and_it_leaves_the_model_in_training():
    a, rows, model = built("--no-match", "--margin", "0.05", "--judge-least", "1", "--judge-level", "text")
    texts, mean = torch.as_tensor(rows.train_texts), 0
    known = 30 * torch.randn(len(texts), 8)
    model.eval()
    with torch.no_grad():
        for draw in range(4):
            rows.redraw("judge", draw)
            table, owner = rows.of_texts(texts)
            mean = mean + (coco.rec_loss(model.score(table, known[owner]), "bce") - coco.rec_loss(model.score(table), "bce")) / 4
    mean = torch.stack([mean[owner == t].mean() for t in range(len(texts))])
    assert torch.equal(coco.contradicted(a, model.train(), texts, known, 4), mean > 0.05) and not torch.equal(mean > 0.05, 4 * mean > 0.05)
    assert model.training and model.books.training


def test_the_judges_report_by_hand_of_users_whom_it_could_judge_and_whom_a_filter_left():
    world = types.SimpleNamespace(misled=np.array([1, 0, 1, 1, 1]) > 0)
    rows = types.SimpleNamespace(text_user=torch.tensor([4, 0, 0, 1, 2, 3]), data=types.SimpleNamespace(users=[f"u{k}" for k in range(5)], world=world))
    texts = torch.tensor([1, 2, 3, 4, 5])                                                    # user 4 has no training choice
    known, judged = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 1.0], [6.0, 8.0], [0.0, 4.0]]), torch.tensor([1, 0, 1, 0, 0]) > 0
    report = {"texts": 0.4, "knowledge": 3.0, "knowledge_others": 5.0}
    assert coco.judge_report(rows, texts, known, judged) == report | {"judged": 0.5, "precision": 0.5, "recall": 0.3333}
    rows.data.world = None
    assert coco.judge_report(rows, texts, known, judged) == report
    world = types.SimpleNamespace(misled=np.array([False, True, True]))
    assert coco.misled(types.SimpleNamespace(data=types.SimpleNamespace(users=["u2", "u0"], world=world))).tolist() == [True, False]


def test_the_full_ranking_with_what_is_known_of_each():
    _, rows, model = built("--prompt", "none", "--rank-users", "1000")
    guess, known = torch.randn(len(rows.data.items)), torch.where(torch.arange(rows.test.shape[1]) % 3 == 0, -1.0, 1.0)[:, None]
    model.score = lambda table, known=None: known * guess[table[3:].T]
    ranks = []
    for (u, place, _, target, *_), sign in zip(rows.test.T.tolist(), known[:, 0]):
        had = rows.logs.sequence(u)[:place].tolist()
        ranks.append(1 + sum(bool(sign * guess[i] > sign * guess[target]) for i in range(len(guess)) if i not in had))
    assert coco.evaluate_ranking(model, known)["recall@20"] == pytest.approx(np.mean(np.array(ranks) <= 20), abs=1e-6)


def test_validation_reads_what_the_llm_knows_of_each_row(quick, monkeypatch):
    _, rows, model = built()
    asked = []
    monkeypatch.setattr(coco, "evaluate_rows", lambda model, table, known=None: asked.append((table, known)) or {"overall": 0.5})
    coco.valid_auc(model)
    (table, known), = asked
    assert table is rows.valid and torch.equal(known, coco.knowledge(model, rows.valid[2]))


def test_two_users_with_the_same_text_of_a_mixture_have_a_vector_each(quick, tmp_path, monkeypatch):
    _, rows, model = built("--prompt", "mixture", "--run", str(tmp_path / "r"))
    monkeypatch.setattr(model, "tokens", lambda text: [1, 2, 3])
    texts = rows.test[2][:5]
    assert torch.allclose(coco.Store(coco.Run(model.args, "coco", "x"), model).get(texts)[0], coco.knowledge(model, texts), atol=1e-6)


@pytest.mark.parametrize("told", [(0.6, 0.5, 0.4), (0.6, 0.5, None, 0.4)])
def test_a_phase_stops_where_patience_ends_and_a_kill_does_not_renew_it(tmp_path, monkeypatch, telling, told):
    a, _, model = built("--prompt", "none", "--base-epochs", "9", "--patience", "2", "--run", str(tmp_path / "r"), "--resume")
    monkeypatch.setattr(coco, "evaluate_rows", telling(told))
    train = lambda: coco.train_base(a, coco.Run(a, "coco", "x"), model)[0]
    if None in told:
        with pytest.raises(KeyboardInterrupt):
            train()
    batches = -(-model.rows.train.shape[1] // a.base_batch)
    assert train() == {"valid_auc": 0.6, "steps": 3 * batches}


def test_phase_4_reads_as_many_others_as_judged_texts(tmp_path, monkeypatch):
    a, rows, model = built("--eliminate-batch", "4", "--run", str(tmp_path / "r"))
    mask, seen = torch.arange(len(rows.train_texts)) % 5 == 0, []
    monkeypatch.setattr(coco, "valid_auc", lambda model: 0.5)
    monkeypatch.setattr(coco, "judged_loss", lambda args, model, texts, known, judged: seen.append((texts, judged)) or (model.gate.weight.sum(), {}))
    coco.eliminate(a, coco.Run(a, "coco", "x"), model, torch.zeros(len(mask), 8), mask)
    texts, judged = (torch.cat(x) for x in zip(*seen))
    assert sorted(texts[judged].tolist()) == rows.train_texts[mask.numpy()].tolist()
    assert (~judged).sum() == mask.sum() and all(len(x) <= 8 and 0 < y.sum() <= 4 for x, y in seen)


def test_everything_is_judged_as_it_is_served_also_by_a_run_resumed_after_phase_4(quick, tmp_path, monkeypatch, capsys):
    asked, seen, told = [], [], iter(range(99))
    real = coco.evaluate_rows

    def judge(args, model, texts, known, draws=0):
        asked.append(draws)
        return model.rows.text_user[texts] % 2 == 0

    def judged(model, table, known=None):
        seen.append((model, {id(model.rows.valid): "valid", id(model.rows.test): "test"}[id(table)], known, real(model, table, known)))
        return seen[-1][-1]
    monkeypatch.setattr(coco, "contradicted", judge)
    monkeypatch.setattr(coco, "evaluate_rows", judged)
    monkeypatch.setattr(coco, "valid_auc", lambda model: next(told) / 100)
    a = args("--judge-draws", "7", "--lora-lr", "0.1", "--run", str(tmp_path / "r"))
    result = coco.train(a)
    (model, _, valid, _), (_, _, test, _), (_, _, none, _) = seen[-3:]
    rows, first = model.rows, [found for *_, found in seen[-3:]]
    assert asked == [7] and [where for _, where, _, _ in seen[-3:]] == ["valid", "test", "test"] and none is None
    assert first == [result["valid"], result["test"], result["test_without_llm"]]
    even = torch.arange(len(rows.data.users)) % 2 == 0
    there = torch.bincount(rows.train[0], minlength=len(even)) > 0
    assert torch.equal(model.adapted, even & there)              # those whom the judge named
    for table, known in ((rows.valid, valid), (rows.test, test)):
        assert torch.allclose(known, coco.knowledge(model, table[2]), atol=1e-5)
    assert lora.parameters(model.llm)[1].any() and not torch.equal(valid, test)
    phases = tmp_path / "r" / "phases.json"
    phases.write_text(json.dumps({k: v for k, v in json.loads(phases.read_text()).items() if k != "result"}))
    (tmp_path / "r" / "knowledge.safetensors").unlink()
    again = coco.train(dataclasses.replace(a, resume=True))
    assert torch.equal(seen[-2][2], test) and again["test"] == result["test"] and again["judged"] == result["judged"]
    assert asked == [7]                                          # the judgement is kept: no text is read for it again


def test_the_best_epoch_of_each_phase_goes_on_to_the_next(quick, tmp_path, monkeypatch, capsys):
    states, told = [], iter((0.9, 0.1))
    state = lambda model: {k: v.clone() for k, v in model.state_dict().items()}
    monkeypatch.setattr(coco, "valid_auc", lambda model: states.append(state(model)) or next(told))
    monkeypatch.setattr(coco, "evaluate_ranking", lambda model, known: states.append(state(model)) or {"ndcg@10": 0.0})
    coco.train(args("--judge", "off", "--epochs", "2", "--run", str(tmp_path / "r")))
    best, last, served = states
    assert all(torch.equal(v, best[k]) for k, v in served.items()) and any(not torch.equal(v, last[k]) for k, v in served.items())


def test_each_row_of_the_table_differs_and_takes_over_only_what_it_does_not_change_and_each_seed_is_its_own(tmp_path, monkeypatch, capsys):
    changes = [change for change, _ in coco.VARIANTS.values()]
    assert all(changes.count(change) == 1 for change in changes)
    # phase 1 reads the categories alone of what they change, phase 2 none of what these do
    assert {name for change in changes for name in change} == {
        "prompt", "categories", "judge", "adapt", "eliminate_lr", "joint", "extract", "match", "vq", "dead", "kmeans"}
    for change, base in coco.VARIANTS.values():
        assert base is None or set(change) <= {"judge", "adapt", "eliminate_lr"} and coco.VARIANTS[base] == ({"judge": "off"}, None)
    asked = []

    def train(args, shared):
        asked.append((Path(args.run).relative_to(tmp_path).parts, {k: v.relative_to(tmp_path).parts for k, v in shared.items()}))
        Path(args.run).mkdir(parents=True)
        (Path(args.run) / "header.json").write_text("{}")
        (Path(args.run) / "result.json").write_text(json.dumps({"script": "coco", "test": {"overall": 0.5}}))
        return {"test": {"overall": 0.5}, "ranking": {"ndcg@10": 0.5}}
    monkeypatch.setattr(coco, "train", train)
    coco.ablations(args("--ablations", "--variants", "no LLM but categories,static,codebook,codebook and categories,full",
                        "--seeds", "4,5", "--run", str(tmp_path)))
    assert asked == [((seed, name), {phase: (seed, other) for phase, other in shared.items()}) for seed in ("s4", "s5") for name, shared in (
        ("no-LLM-but-categories", {}), ("static", {}), ("codebook", {"base": "static"}),
        ("codebook-and-categories", {"base": "no-LLM-but-categories"}), ("full", {"base": "static", "collaborate": "codebook"}))]


def test_phase_1_is_the_same_whatever_prompt_follows(quick, tmp_path):
    for prompt in ("none", "static", "codebook"):
        coco.train(args("--prompt", prompt, "--judge", "off", "--run", str(tmp_path / prompt)))
    for other in ("none", "static"):
        coco.train(args("--prompt", "codebook", "--judge", "off", "--run", str(tmp_path / f"from-{other}")),
                   {"base": tmp_path / other})
        own, taken = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("codebook", f"from-{other}"))
        assert all(own[key] == taken[key] for key in ("base", "valid", "test", "ranking"))
