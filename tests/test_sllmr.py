"""sllmr.py: gate, pairs, losses, scorers, data counts, resume, bad input."""

import dataclasses
import http.server
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import sllmr
from common import llm
from common.run import UserError, parse

ROOT = Path(__file__).parent.parent
TOY = "toy:150x160x1800"


def rows(**change):
    return sllmr.Rows(sllmr.Args(**{"data": TOY, "cold_users": 0.3, **change}), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------- gate and losses
def test_the_pairs_are_those_with_the_largest_gaps_of_one_user_and_never_ties_or_unknown_ones():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.5], [0.2, 0.8, 0.3, 0.0]])
    known = torch.tensor([[True, True, True, True], [True, True, False, False]])
    pairs = torch.stack(sllmr.pick_pairs(scores, known, 100), 1).tolist()
    assert pairs[0] == [0, 0, 1] and pairs[1] == [1, 1, 0]                       # gaps 0.8, 0.6
    assert sorted(pairs[2:]) == [[0, 0, 2], [0, 0, 3], [0, 2, 1], [0, 3, 1]]    # 0.4 each; 2 and 3 tie, no pair
    assert torch.stack(sllmr.pick_pairs(scores, known, 2), 1).tolist() == pairs[:2]
    assert not len(sllmr.pick_pairs(scores, torch.zeros_like(known), 5)[0])
    doubt = torch.tensor([0.1, 1.0])[:, None, None].expand(2, 4, 4)              # the first user's gaps count a tenth
    assert torch.stack(sllmr.pick_pairs(scores, known, 2, doubt), 1).tolist() == [[1, 1, 0], [0, 0, 1]]


def test_sampled_pairs_are_any_of_a_user_and_each_user_gives_as_many():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.21, 0.22], [0.4, 0.4, 0.4]])
    known, drawn = torch.ones(3, 3, dtype=torch.bool), set()
    for _ in range(50):
        u, i, j = sllmr.pick_pairs(scores, known, 3, pick="sample")
        assert u.tolist() == [0, 1] and (scores[u, i] > scores[u, j]).all()                   # user 2 has ties only
        drawn |= set(zip(u.tolist(), i.tolist(), j.tolist()))
    assert len(drawn) == 6                                                                    # all pairs of users 0 and 1
    assert len(sllmr.pick_pairs(scores, known, 10**6, pick="sample")[0]) == 6                 # each pair once
    weight = torch.zeros(3, 3, 3)
    weight[1, 2, 0] = 0.1
    assert torch.stack(sllmr.pick_pairs(scores, known, 30, weight, "sample"), 1).tolist() == [[1, 2, 0]]


def test_the_pair_loss_by_hand():
    s, alpha = torch.tensor([[2.0, 0.5, 1.0]]), torch.tensor([[0.2, 0.4, 0.8]])
    pairs = torch.tensor([0, 0]), torch.tensor([1, 0]), torch.tensor([0, 2])     # (1 over 0): 1 - (0.5 - 2) = 2.5; (0 over 2): 0
    loss = lambda gate, reduction="sum": float(sllmr.pair_loss(s, alpha, pairs, 1.0, gate, reduction, budget=(0.3, 2.0)))
    assert loss("paper") == pytest.approx(0.3 * 2.5) and loss("paper", "mean") == pytest.approx(0.3 * 2.5 / 2)
    assert loss("ones") == pytest.approx(2.5) and loss("fixed") == pytest.approx(0.75)
    assert loss("normalised") == pytest.approx(0.3 * 2.5 / 0.8)
    assert loss("budget") == pytest.approx(0.75 + 2 * (0.4 - 0.3) ** 2)
    none = torch.zeros(3, 0, dtype=torch.long)
    assert float(sllmr.pair_loss(s, alpha, none)) == 0


def test_the_gate_by_hand():
    gate, cold, tail = sllmr.Gate((1.0, 2.0, 4.0, -3.0)), torch.tensor([False, False, True, True]), torch.tensor([False, True, False, True])
    z = torch.tensor([-2.0, 0.0, -1.0, 1.0])                                             # cold + 2 tail + 4 / 4 - 3
    assert torch.allclose(gate(cold, tail, torch.full((4,), 0.25)), 1 / (1 + torch.exp(-z)))


@pytest.mark.parametrize("gate", ["paper", "agreement", "normalised", "budget", "fixed", "ones"])
def test_gradients_of_every_gate_are_right_in_double_precision(gate):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    pairs = sllmr.pick_pairs(torch.rand(3, 4), torch.ones(3, 4, dtype=torch.bool), 9)
    loss = lambda s, a: sllmr.pair_loss(s, torch.sigmoid(a), pairs, 1.0, gate)
    if gate in ("fixed", "agreement"):
        assert torch.autograd.gradcheck(lambda s: loss(s, x[1].detach()), x[0].detach().requires_grad_())
        assert not torch.autograd.grad(loss(x[0], x[1]), x)[0][1].any()
    else:
        assert torch.autograd.gradcheck(lambda x: loss(x[0], x[1]), x)


@pytest.mark.parametrize("wrong", [0.0, 0.5, 1.0])
def test_the_gate_as_published_can_only_fall_and_the_normalised_one_moves_both_ways(wrong):
    """However many pairs the model has wrong: no gradient of the four numbers is negative."""
    torch.manual_seed(1)
    scores = torch.rand(40, 6)
    s = (2 * scores - 1) * torch.where(torch.rand(40, 6) < wrong, -3.0, 3.0) + torch.randn(40, 6)
    cold, tail = torch.rand(40, 1).gt(0.5).expand(40, 6), torch.rand(40, 6) > 0.5
    pairs = sllmr.pick_pairs(scores, torch.ones(40, 6, dtype=torch.bool), 200)

    def gradient(kind):
        gate = sllmr.Gate((1.0, 1.0, 1.0, -1.0))
        sllmr.pair_loss(s, gate(cold, tail, sllmr.uncertainty(s)), pairs, gate=kind, budget=(0.9, 10.0)).backward()
        return torch.cat([gate.linear.weight.grad[0], gate.linear.bias.grad])
    assert (gradient("paper") >= 0).all()
    moved = gradient("normalised")
    assert (moved > 0).any() and (moved < 0).any() and (gradient("budget") < 0).any()


def test_the_normalised_gate_rises_where_the_llm_is_easier_to_follow():
    """Cold users' pairs agree with the model, the others are noise: descent must raise the weight of cold."""
    torch.manual_seed(0)
    scores, cold = torch.rand(60, 5), (torch.arange(60) < 30)[:, None].expand(60, 5)
    s = torch.where(cold, 4 * scores, torch.randn(60, 5))
    gate = sllmr.Gate((0.0, 0.0, 0.0, 0.0))
    pairs = sllmr.pick_pairs(scores, torch.ones(60, 5, dtype=torch.bool), 300)
    sllmr.pair_loss(s, gate(cold, torch.zeros(60, 5), sllmr.uncertainty(s)), pairs, gate="normalised").backward()
    assert gate.linear.weight.grad[0, 0] < 0


def test_the_gate_of_agreement_learns_how_often_model_and_llm_agree_and_gives_a_coin_nothing():
    """Cold users' scores agree with the model, the others' are noise: alpha must become 1 and 1/2, the weights 1 and 0."""
    torch.manual_seed(0)
    scores, cold = torch.rand(200, 5), (torch.arange(200) < 100)[:, None].expand(200, 5)
    s, known = torch.where(cold, 4 * scores, torch.randn(200, 5)), torch.ones(200, 5, dtype=torch.bool)
    gate = sllmr.Gate((0.0, 0.0, 0.0, 0.0))
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        sllmr.agreement_loss(s, gate(cold, torch.zeros(200, 5), torch.zeros(200, 5)), sllmr.pick_pairs(scores, known, 2000)).backward()
        optimizer.step()
    sure, coin = gate(torch.tensor([1.0, 0.0]), torch.zeros(2), torch.zeros(2)).tolist()
    assert sure > 0.97 and abs(coin - 0.5) < 0.06
    one = (torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))
    loss = lambda a: float(sllmr.pair_loss(torch.zeros(1, 2), torch.tensor([[a, a]]), one, gate="agreement"))
    assert loss(1.0) == 1 and loss(0.75) == 1 and loss(0.5) == 0 and loss(0.2) == 0
    assert loss(0.51) == pytest.approx(0.2, abs=1e-5)                         # fades out: 0.02 over the floor of 0.1
    two = (torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([1, 1]))
    s, alpha = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.75, 0.75]])
    assert float(sllmr.pair_loss(s, alpha, two, gate="agreement")) == pytest.approx((1 * 1 + 0.5 * 3) / 1.5)


def test_the_gate_of_truth_follows_no_pair_of_which_both_scores_are_noise():
    r = rows(gate="truth")
    wanted = sllmr.candidates(r)
    scored = sllmr.Scored(r, {(u, i): s for u, items, scores in sllmr.oracle(r, wanted) for i, s in zip(items, scores)})
    model = sllmr.Model(r.args, r)
    model.eval()
    asked = []
    model.forward = lambda users, place, items: asked.append(torch.zeros(items.shape, requires_grad=True)) or asked[-1]
    some = ((scored.tail | scored.cold) & scored.known).any(1)      # the others have noise only
    assert some.any() and not some.all()
    sllmr.regulariser(r.args, model, scored, torch.arange(len(some))).backward()
    assert asked[0].grad[some].any() and not asked[0].grad[~some].any()


def test_uncertainty_is_between_0_and_1_largest_at_a_half_finite_anywhere_and_without_gradient():
    logit = torch.tensor([0.0, 2.0, -2.0, 1e4, -1e4], requires_grad=True)
    for kind in ("maxprob", "entropy"):
        q = sllmr.uncertainty(logit, kind)
        assert not q.requires_grad and q[0] == 1 and q[1] == pytest.approx(float(q[2])) and 0 < q[1] < 1 and (q[3:] == 0).all()
    p = torch.sigmoid(torch.tensor(2.0))
    assert sllmr.uncertainty(logit)[1] == pytest.approx(float(2 * (1 - p)))
    assert sllmr.uncertainty(logit, "entropy")[1] == pytest.approx(float(-(p * p.log() + (1 - p) * (1 - p).log())) / math.log(2))
    draws = torch.tensor([[100.0, 1.0], [-100.0, 1.0]])
    assert sllmr.uncertainty(None, "dropout", draws).tolist() == [1.0, 0.0]


# ------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("name,reviews,cold", [("sports", 379_086, 190_756), ("beauty", 262_826, 119_854), ("toys", 218_722, 103_314)])
def test_the_rows_of_the_papers_table_1(name, reviews, cold):
    if not os.environ.get("LLMREC_DATA"):
        pytest.skip("LLMREC_DATA names no folder with the Amazon sets")
    r = rows(data=f"amazon-{name}", cold_users=0.0)
    assert 2 * r.train.shape[1] == reviews and 2 * int((r.train[1] <= 3).sum()) == cold


def test_a_row_reads_only_what_came_before_its_target_and_a_negative_to_judge_by_is_never_of_the_user():
    r = rows(max_history=4)
    for table in (r.train, r.valid, r.test):
        history = r.history(table[0], table[1])
        for k in range(0, table.shape[1], 17):
            u, p, target, negative = table[:, k].tolist()
            sequence = r.logs.sequence(u)
            want = (sequence[max(0, p - 4):p] + 1).tolist()
            assert history[k].tolist() == want + [0] * (4 - len(want)) and want
            assert target == sequence[p] and negative not in (sequence[:-2] if table is r.train else sequence)
    assert any(n in r.logs.sequence(u)[-2:] for u, n in r.train[[0, 3]].T.tolist())          # or a held-out item would be told by that
    assert (r.train[1] < torch.as_tensor(r.logs.n_train)[r.train[0]]).all()
    assert (r.valid[1] == torch.as_tensor(r.logs.n_train)[r.valid[0]]).all() and (r.test[1] == r.valid[1] + 1).all()


def test_cold_users_are_made_where_asked_and_tail_counts_training_only():
    plain, starved = rows(cold_users=0.0), rows(cold_users=0.5)
    assert plain.cold[plain.logs.held_out].mean() < 0.1 and 0.35 < starved.cold[starved.logs.held_out].mean() < 0.7
    assert starved.very_cold.sum() < starved.cold.sum()
    count = np.zeros(len(plain.data.items))
    for u in range(len(plain.data.users)):
        np.add.at(count, plain.logs.sequence(u)[:plain.logs.n_train[u]], 1)
    assert plain.tail.sum() == int(0.2 * len(count)) and count[plain.tail].max() <= count[~plain.tail].min()


# ------------------------------------------------------------------------------------------------------- scores
def test_candidates_come_from_the_pool_with_extras_for_cold_users_and_rare_items_and_nothing_had():
    r = rows(candidates=5, pool=10)
    found = sllmr.candidates(r)
    for u, items in found.items():
        assert not set(items) & set(r.logs.sequence(u)[:r.logs.n_train[u]].tolist()) and items == sorted(set(items))
    size = {cold: np.mean([len(items) for u, items in found.items() if r.cold[u] == cold]) for cold in (True, False)}
    assert size[True] > size[False]
    rare = set(np.flatnonzero(r.rank >= len(r.rank) - 6).tolist())
    assert rare <= {i for items in found.values() for i in items}
    assert found == sllmr.candidates(rows(candidates=5, pool=10))


def test_the_oracle_tells_the_truth_where_it_is_reliable_and_noise_elsewhere():
    r = rows(oracle=(0.0, 1.0, 1.0, 1.0))
    pairs = [(u, i, s) for u, items, scores in sllmr.oracle(r, sllmr.candidates(r)) for i, s in zip(items, scores)]
    truth = [r.data.world.order(np.array([int(r.data.users[u][1:])]))[0, int(r.data.items[i][1:])] for u, i, _ in pairs]
    same = np.array([abs(t - s) < 1e-9 for t, (_, _, s) in zip(truth, pairs)])
    known = np.array([r.cold[u] or r.tail[i] for u, i, _ in pairs])
    assert same[known].all() and not same[~known].any()


def test_scores_with_a_shared_history_equal_those_of_one_prompt_per_candidate():
    r = rows()
    model, tokenizer = llm.load("tiny")
    yes, no = (tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("Yes", "No"))
    users = [int(u) for u in r.logs.held_out[:3]]
    asked = [sllmr.ask(r, u, list(range(2 + 3 * k))) for k, u in enumerate(users)]
    shared = sllmr.score_shared(model, tokenizer, asked, yes, no)
    for prompts, got in zip(asked, shared):
        for (read, question), g in zip(prompts, got):
            ids = torch.tensor([llm.chat(tokenizer, read + question)])
            z = model(ids).logits[0, -1]
            assert float(z[yes] - z[no]) == pytest.approx(float(g), abs=1e-4)


def test_tuning_learns_from_training_choices_alone_and_tells_them_from_others(monkeypatch, capsys):
    r = rows(tune_steps=12)
    model, tokenizer = llm.load("tiny")
    yes, no = (llm.single_token(tokenizer, w) for w in ("Yes", "No"))
    asked, ask = [], sllmr.ask
    monkeypatch.setattr(sllmr, "ask", lambda rows, u, items, before=None: asked.append((int(u), items, before)) or ask(rows, u, items, before))
    first = r.train.T.numpy()[np.random.default_rng([r.args.seed, 79]).integers(0, r.train.shape[1], 16)]

    def gaps(questions):
        return torch.stack(sllmr.score_shared(model, tokenizer, [ask(r, *q) for q in questions], yes, no))
    untuned = gaps([(u, [i, j], place) for u, place, i, j in first])
    sllmr.tune(r, model, tokenizer, yes, no, asked=8)
    learned = asked[:12 * 16]
    assert len(asked) == 12 * 16 + 8
    for u, items, before in learned:
        mine = r.logs.sequence(u)[:r.logs.n_train[u]].tolist()
        assert before < len(mine) and items[0] == mine[before] and items[1] not in mine
    gap, tuned = gaps(learned[:40]), gaps(learned[:16])
    loss = lambda g: (torch.nn.functional.softplus(-g[:, 0]) + torch.nn.functional.softplus(g[:, 1])).mean()
    assert loss(tuned) < loss(untuned) and (tuned[:, 0] - tuned[:, 1]).mean() > (untuned[:, 0] - untuned[:, 1]).mean()
    assert (gap[:, 0] > gap[:, 1]).float().mean() > 0.6 and "on 16 validation rows" in capsys.readouterr().out


@pytest.fixture
def letters(monkeypatch):
    """In place of the optional package: an encoder that counts the letters of a text."""
    class WordLlama:
        load = classmethod(lambda cls, cache_dir, disable_download: cls())
        embed = lambda self, texts, norm: np.stack([np.bincount([ord(c) % 64 for c in t], minlength=64) / len(t) for t in texts])
    monkeypatch.setitem(sys.modules, "wordllama", types.SimpleNamespace(WordLlama=WordLlama, __file__="x/__init__.py"))


def test_the_encoder_scores_what_reads_like_the_past_higher_and_the_same_whatever_else_is_asked(letters, capsys):
    r = rows(prompt_history=1)
    users = [int(u) for u in r.logs.held_out[:5]]
    last = {u: int(r.logs.sequence(u)[r.logs.n_train[u] - 1]) for u in users}
    every = list(range(len(r.data.items)))
    found = {u: s for u, _, s in sllmr.by_encoder(r, {u: every for u in users})}
    assert all(found[u][last[u]] == max(found[u]) and 0 < min(found[u]) and max(found[u]) < 1 for u in users)
    (u, items, scores), = sllmr.by_encoder(r, {users[0]: every[:9]})
    assert (u, items) == (users[0], every[:9]) and scores == pytest.approx(found[u][:9], abs=1e-12)
    assert f"on {2 * r.valid.shape[1]} validation rows" in capsys.readouterr().out


def test_the_brand_is_the_first_word_of_the_title_and_one_category_more(tmp_path):
    (tmp_path / "interactions.csv").write_text("user,item\n" + "".join(f"u{u},i{(u + k) % 5}\n" for u in range(6) for k in range(4)))
    (tmp_path / "items.csv").write_text('item,title,categories\ni0,"OPI, red",nail|opi\ni1,opi blue,\ni2,,nail\ni3,Olay cream,\ni4,x y,\n')
    without, r = (rows(data=str(tmp_path), cold_users=0.0, brand=brand) for brand in (False, True))
    kinds = {item: set(r.categories[i + 1][r.categories[i + 1] > 0].tolist()) for i, item in enumerate(r.data.items)}
    assert len(kinds["i0"]) == 3 and kinds["i1"] < kinds["i0"] and len(kinds["i1"]) == 1
    assert len(kinds["i3"]) == 1 and not kinds["i3"] & kinds["i0"] and kinds["i2"] & kinds["i0"]
    assert without.categories.shape[1] == 2 and without.categories.max() == 2 and not r.categories[0].any()


def test_the_encoder_reads_no_validation_or_test_choice(letters):
    r = rows()
    wanted = {int(u): list(range(10)) for u in r.logs.held_out}
    before = list(sllmr.by_encoder(r, wanted))
    for u in wanted:
        r.logs.sequence(u)[r.logs.n_train[u]:] = 0
    assert before == list(sllmr.by_encoder(r, wanted)) and len({tuple(s) for _, _, s in before}) > 1


def test_the_real_encoder_knows_which_texts_are_alike():
    pytest.importorskip("wordllama", reason="pip install wordllama")
    r = rows()
    r.logs.lines = [("a nail lacquer in red", "a robot fights in space")[i % 2] for i in range(len(r.data.items))]
    for u in r.logs.held_out:
        r.logs.sequence(u)[:r.logs.n_train[u]] = 1
    u = int(r.logs.held_out[0])
    (_, _, (lacquer, robot)), = sllmr.by_encoder(r, {u: [2, 3]})
    assert lacquer < 0.5 < robot


def test_without_the_encoders_package_a_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(SystemExit) as stop:
        sllmr.main(sllmr.Args, sllmr.train, sllmr.__doc__, [*SMALL, "--run", str(tmp_path / "r"), "--scorer", "encoder"])
    assert stop.value.code == 1 and "pip install wordllama" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("text,message", [
    ("not json\n", ":1: not"), ('{"user": "u0", "item": "i0"}\n', ":1: not"), ('{"user": "u0", "item": "i1", "score": "x"}\n', ":1: score"),
    ('{"user": "u0", "item": "i1", "score": 0.5}\n{"user": "u0", "item": "i1", "score": NaN}\n', ":2: score"),
    ('{"user": "u0", "item": "i1", "score": true}\n', ":1: score"), ('{"user": "nobody", "item": "i1", "score": 1}\n', "no score of a user")])
def test_a_broken_scores_file_is_one_line_with_its_place(tmp_path, text, message):
    path = tmp_path / "scores.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        sllmr.read_scores(path, rows().data)
    path.write_bytes('{"user": "u0", "item": "caf\u00e9", "score": 1}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="scores.jsonl"):
        sllmr.read_scores(path, rows().data)


GOOD = json.dumps({"scores": [{"id": 1, "score": 0.5}, {"id": 2, "score": 1}]})


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{" * 5000, GOOD[:-5], GOOD.replace("2", "3"), GOOD.replace('"id": 2', '"id": 1'),
                                  GOOD.replace("0.5", "1.5"), GOOD.replace("0.5", "NaN"), GOOD.replace("0.5", '"0.5"'), GOOD.replace("0.5", "true"),
                                  '{"scores": [{"id": 1, "score": 0.5}]}', '{"scores": [1, 2]}', '{"scores": {"1": 0.5}}', None])
def test_answers_that_lie_are_refused(text):
    with pytest.raises((ValueError, RecursionError)):
        sllmr.parse_scores(text, 2)


def test_a_good_answer_may_have_words_around_it():
    assert sllmr.parse_scores(f"Sure! ```json\n{GOOD}\n``` done", 2) == [0.5, 1.0]


class Faulty(http.server.BaseHTTPRequestHandler):
    """An endpoint that fails in 30 % of the calls: 429, 500, closed line, a stall, truncated JSON, or lies."""
    rng, calls, good, partly, stall, lock = None, None, 0, 0, 0.0, threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        items = [line for line in body["messages"][0]["content"].splitlines() if line.split(".")[0].isdigit()]
        with self.lock:
            fault = self.rng.random()
            self.calls.append(self.headers["Authorization"])
        if fault < 0.05:
            return self.close_connection
        if fault < 0.1:
            return self.send_error(429)
        if fault < 0.15:
            return self.send_error(503)
        if fault < 0.2:
            time.sleep(self.stall)
        scores = [{"id": k + 1, "score": round(len(line) % 11 / 10, 1)} for k, line in enumerate(items)]
        scores = scores[:-1] if 0.2 <= fault < 0.25 else scores
        content = json.dumps({"scores": scores})
        with self.lock:
            Faulty.good += 0.15 <= fault < 0.2 or fault >= 0.3
            Faulty.partly += 0.2 <= fault < 0.25
        reply = json.dumps({"choices": [{"message": {"content": content[:-7] if 0.25 <= fault < 0.3 else content}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    Faulty.rng, Faulty.calls, Faulty.good, Faulty.partly, Faulty.stall = np.random.default_rng(0), [], 0, 0, 0.5
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


SMALL = ["--data", TOY, "--cold-users", "0.3", "--dim", "8", "--mlp", "16,8", "--epochs", "1", "--rank-users", "5"]


def start(*flags, **env):
    return subprocess.Popen([sys.executable, str(ROOT / "sllmr.py"), *SMALL, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def run(*flags, **env):
    child = start(*flags, **env)
    out, err = child.communicate()
    return subprocess.CompletedProcess(flags, child.returncode, out, err)


def test_an_endpoint_with_faults_and_two_kills_scores_everything_once(endpoint, tmp_path):
    flags = ("--scorer", "api", "--api-base", endpoint, "--api-timeout", "0.3", "--api-tries", "20", "--api-pause", "0.01", "--api-parallel", "4", "--run", str(tmp_path / "r"), "--resume")
    path, key = tmp_path / "r" / "scores.jsonl", "sk-secret-of-the-test"
    for most in (300, 900):
        child = start(*flags, OPENAI_API_KEY=key)
        while child.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > most):
            time.sleep(0.02)
        assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.communicate()
    before = path.read_text().splitlines()
    done = run(*flags, OPENAI_API_KEY=key)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    r = rows()
    wanted = {(r.data.users[u], r.data.items[i]) for u, items in sllmr.candidates(r).items() for i in items}
    assert len(lines) >= 1000 and len(lines) == len(wanted) and {(x["user"], x["item"]) for x in lines} == wanted
    assert len([x for x in before if x in set(path.read_text().splitlines())]) >= len(before) - 60        # at most one user's lines were cut
    assert set(Faulty.calls) == {f"Bearer {key}"}
    written = b"".join(p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file())
    assert key.encode() not in written and key not in done.stdout + done.stderr


def test_an_endpoint_that_refuses_or_never_answers_is_one_line_and_what_was_paid_for_is_kept(endpoint, tmp_path, capsys, monkeypatch):
    def fails(name, *flags):
        with pytest.raises(SystemExit) as stop:
            sllmr.main(sllmr.Args, sllmr.train, sllmr.__doc__, [*SMALL, "--scorer", "api", "--api-base", endpoint, "--run", str(tmp_path / name), *flags])
        assert stop.value.code == 1
        return capsys.readouterr().err.strip().splitlines()[-1]
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert fails("a").startswith("error: --scorer api: set OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    problem = fails("b", "--api-tries", "1", "--api-timeout", "30")
    assert problem.startswith("error: ") and "--resume goes on" in problem
    kept = [json.loads(line)["user"] for line in (tmp_path / "b" / "scores.jsonl").read_text().splitlines() if json.loads(line)["score"] is not None]
    assert len(set(kept)) == Faulty.good + Faulty.partly > 0                      # every good answer is there, also those on their way at the end


def test_an_interrupt_keeps_the_answers_that_are_on_their_way(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    r = rows(scorer="api", api_base=endpoint, api_tries=20, api_pause=0.0, api_parallel=3)
    Faulty.rng = types.SimpleNamespace(random=lambda: time.sleep(0.05) or 0.9)                # good, and never at once
    answers = sllmr.by_api(r, {u: [1, 2] for u in range(30)})
    got = [next(answers)[0]]
    with pytest.raises(KeyboardInterrupt):
        got.append(answers.throw(KeyboardInterrupt)[0])
        got.extend(u for u, *_ in answers)
    assert sorted(got) == sorted(set(got)) and len(got) == Faulty.good == len(Faulty.calls) < 30


def test_another_file_of_scores_is_no_resume_and_an_ablation_overwrites_its_scores(tmp_path, capsys):
    def fails(*flags):
        with pytest.raises(SystemExit):
            sllmr.main(sllmr.Args, sllmr.train, "", [*SMALL, *flags])
        return capsys.readouterr().err.strip().splitlines()[-1]
    r, file = rows(), tmp_path / "scores.jsonl"
    line = lambda score: "".join(json.dumps({"user": u, "item": i, "score": score * k}) + "\n" for u in r.data.users[:9] for k, i in enumerate(r.data.items[:3]))
    file.write_text(line(0.1))
    flags = ("--scores", str(file), "--run", str(tmp_path / "r"))
    sllmr.main(sllmr.Args, sllmr.train, "", [*SMALL, *flags])
    file.write_text(line(0.2))
    assert "other settings (data_fingerprint" in fails(*flags, "--resume")
    flags = ("--ablations", "--variants", "ones", "--lams", "0.1", "--run", str(tmp_path / "all"))
    sllmr.main(sllmr.Args, sllmr.train, "", [*SMALL, *flags])
    before = (tmp_path / "all" / "scores-s0" / "scores.jsonl").read_bytes()
    for wrong in (("--data", "toy:1x1x1"), ("--scorer", "api")):                              # what is wrong costs no scores
        fails(*flags, *wrong, "--overwrite")
        assert (tmp_path / "all" / "scores-s0" / "scores.jsonl").read_bytes() == before
    flags = (*flags, "--variants", "ones,agreement")                                         # the second takes the first one's
    sllmr.main(sllmr.Args, sllmr.train, "", [*SMALL, *flags, "--candidates", "5", "--overwrite"])
    assert len((tmp_path / "all" / "scores-s0" / "scores.jsonl").read_bytes()) < len(before)


@pytest.mark.parametrize("damaged", ["{bro", "[]x", "[]", "[1]"])
def test_a_damaged_record_of_how_scores_were_made_is_one_line(tmp_path, damaged):
    r = rows()
    sllmr.score(r.args, tmp_path, r)
    (tmp_path / "scores-args.json").write_text(damaged)
    for change in ({}, {"scores": str(tmp_path / "scores.jsonl")}):
        with pytest.raises(UserError, match="scores-args.json is not readable"):
            sllmr.score(dataclasses.replace(r.args, **change), tmp_path, r)


def test_scores_of_another_toy_world_or_of_the_run_that_is_to_go_are_refused(tmp_path, capsys):
    sllmr.main(sllmr.Args, sllmr.train, "", [*SMALL, "--run", str(tmp_path / "r")])
    for run, flags, message in (("b", ("--seed", "1"), "another toy world"), ("r", ("--overwrite",), "of the run that --overwrite removes")):
        with pytest.raises(SystemExit):
            sllmr.main(sllmr.Args, sllmr.train, "", [*SMALL, "--run", str(tmp_path / run), "--scores", str(tmp_path / "r" / "scores.jsonl"), *flags])
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    sllmr.main(sllmr.Args, sllmr.train, "", [*SMALL, "--run", str(tmp_path / "b"), "--scores", str(tmp_path / "r" / "scores.jsonl")])


def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(tmp_path, monkeypatch, capsys, endpoint):
    for key in ("sk-sec\nret", "sk-sec\u00e9ret"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(SystemExit):
            sllmr.main(sllmr.Args, sllmr.train, sllmr.__doc__, [*SMALL, "--scorer", "api", "--api-base", endpoint, "--run", str(tmp_path / "r")])
        said = "".join(capsys.readouterr())
        assert "OPENAI_API_KEY" in said and "sk-sec" not in said and not Faulty.calls and not (tmp_path / "r").exists()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\r\n")                                     # a file with the line ends of Windows
    r = rows(scorer="api", api_base=endpoint, api_tries=20, api_pause=0.0)
    assert len(list(sllmr.by_api(r, {0: [1, 2], 1: [3]}))) == 2 and set(Faulty.calls) == {"Bearer sk-secret"}


def test_a_score_that_the_llm_always_forgets_is_unknown_and_not_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    asked = []

    def call(args, key, prompt):                                  # forgets the first id of the second user
        n, forgets = prompt.count("\n") - prompt.split("titles?")[0].count("\n") - 2, prompt.startswith(forgetful)
        asked.append(prompt)
        return json.dumps({"scores": [{"id": k, "score": 0.5} for k in range(1 + forgets, n + 1)]})
    monkeypatch.setattr(sllmr, "call", call)
    r = rows(scorer="api", api_tries=3, api_pause=0.0)
    wanted = {u: items for u, items in sllmr.candidates(r).items() if items}
    forgetful = sllmr.rank_prompt(r, 1, wanted[1])
    table = sllmr.score(r.args, tmp_path, r)
    assert [pair for pair, s in table.items() if s is None] == [(1, wanted[1][0])] and asked.count(forgetful) == 3
    scored = sllmr.Scored(r, table)
    assert scored.known.sum() == len(table) - 1
    seen = len(asked)
    assert sllmr.score(r.args, tmp_path, r) == table and len(asked) == seen


def test_a_user_whom_the_llm_declines_to_score_is_unknown_and_stops_nobody_but_an_llm_that_scores_nobody_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    r = rows(scorer="api", api_tries=2, api_pause=0.05, api_parallel=2)
    wanted = sllmr.candidates(r)
    declined = sllmr.rank_prompt(r, 1, wanted[1])

    def call(args, key, prompt):
        n = prompt.count("\n") - prompt.split("titles?")[0].count("\n") - 2
        return "I'm sorry" if prompt == declined else json.dumps({"scores": [{"id": k, "score": 0.5} for k in range(1, 1 + n)]})
    monkeypatch.setattr(sllmr, "call", call)
    table = sllmr.score(r.args, tmp_path / "a", r)
    assert {pair for pair, s in table.items() if s is None} == {(1, i) for i in wanted[1]} and len(table) == sum(map(len, wanted.values()))
    monkeypatch.setattr(sllmr, "call", lambda *_: "I'm sorry")
    with pytest.raises(UserError, match="failed 2 times"):
        sllmr.score(r.args, tmp_path / "b", r)


def test_the_truths_scores_are_the_same_after_a_kill_and_never_those_of_other_settings(tmp_path):
    r = rows()
    straight = sllmr.score(r.args, tmp_path / "a", r)
    path = tmp_path / "a" / "scores.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:len(lines) // 2])[:-5])
    assert sllmr.score(r.args, tmp_path / "a", r) == straight
    with pytest.raises(UserError, match="oracle: .*remove it"):
        sllmr.score(rows(oracle=(1.0, 1.0, 1.0, 1.0)).args, tmp_path / "a", r)


def test_a_dry_run_costs_nothing_and_writes_nothing(endpoint, tmp_path, capsys):
    flags = ["--scorer", "api", "--api-base", endpoint, "--dry-run", "--run", str(tmp_path / "r")]
    sllmr.main(sllmr.Args, sllmr.train, sllmr.__doc__, [*SMALL, *flags])
    out = capsys.readouterr().out
    assert "requests, about" in out and "$" in out and "Answer with JSON only" in out
    assert not Faulty.calls and not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------------------------- what is reported
@pytest.mark.parametrize("many", [1, 3])
def test_both_evaluations_by_hand_on_every_cell(many):
    r = rows(rank_users=10**6, test_negatives=many)
    n, guess = len(r.data.items), np.random.default_rng(0).random((len(r.data.users), len(r.data.items)))
    asked = []

    def model(users, place, items):
        asked.extend(zip(users.tolist(), place.tolist()))
        return torch.as_tensor(guess[users[:, None].numpy(), items.expand(len(users), -1).numpy()])
    model.eval = lambda: None
    sequences = [list(map(int, r.logs.sequence(u))) for u in range(len(guess))]
    judged = [u for u, had in enumerate(sequences) if len(had) >= 3]
    count = np.bincount([i for u, had in enumerate(sequences) for i in (had[:-2] if u in judged else had)], minlength=n)
    tail = set(sorted(range(n), key=lambda i: (-count[i], i))[n - int(0.2 * n):])
    targets = {u: len(sequences[u]) - 3 for u in judged}                                      # the first choice is no target, nor are the last two
    cells = {"overall": lambda u, i: True, "cold": lambda u, i: targets[u] <= 3, "very_cold": lambda u, i: targets[u] < 3,
             "tail": lambda u, i: i in tail, "dense": lambda u, i: targets[u] > 3 and i not in tail}

    found, negative = sllmr.evaluate_rows(model, r, r.test), dict(zip(r.test[0].tolist(), r.test[3:].T.tolist()))
    assert len(r.train) == 4 and {len(items) for items in negative.values()} == {many}
    for cell, inside in cells.items():
        yes = [guess[u, sequences[u][-1]] for u in judged if inside(u, sequences[u][-1])]
        no = [guess[u, i] for u in judged for i in negative[u] if inside(u, i)]
        assert found[cell] == pytest.approx(np.mean([a > b for a in yes for b in no]), abs=1e-6)
    asked.clear()
    found = sllmr.evaluate_ranking(model, r)
    assert asked == [(u, len(sequences[u]) - 1) for u in judged]                              # all that came before the target
    for cell, inside in cells.items():
        auc, ndcg = [], []
        for u in judged:
            *had, target = sequences[u]
            if inside(u, target):
                rivals = [i for i in range(n) if i not in had and i != target]
                better = sum(guess[u, i] > guess[u, target] for i in rivals)
                auc.append(1 - better / len(rivals))
                ndcg.append(1 / math.log2(better + 2) if better < 10 else 0)
        assert found[cell] == {"n": len(auc), "auc": pytest.approx(np.mean(auc), abs=1e-6), "ndcg@10": pytest.approx(np.mean(ndcg), abs=1e-6)}


# ------------------------------------------------------------------------------------------------------- end to end
@pytest.mark.parametrize("flags", [("--llm-loss", "none"), ("--llm-loss", "kd"), ("--llm-loss", "pointwise"), ("--llm-loss", "kar"),
                                   ("--gate", "paper", "--uncertainty", "entropy", "--reduction", "sum"), ("--gate", "budget", "--uncertainty", "dropout"),
                                   ("--recommender", "din", "--gate", "agreement"), ("--scorer", "backbone", "--scored-users", "20", "--candidates", "4", "--tune-steps", "2")])
def test_every_way_of_using_the_scores_ends_with_a_result(tmp_path, capsys, flags):
    sllmr.main(sllmr.Args, sllmr.train, sllmr.__doc__, [*SMALL, "--run", str(tmp_path / "r"), *flags])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("RESULT "))
    assert 0 < result["test"]["overall"] < 1 and {"overall", "cold", "dense"} <= set(result["test"]) and "overall" in result["ranking"]


@pytest.mark.parametrize("how", [("--gate", "ones"), ("--gate", "agreement"), ("--llm-loss", "pointwise"), ("--llm-loss", "kd")])
def test_every_llm_loss_moves_the_model_towards_the_llm(tmp_path, how):
    def near(name, *flags):
        args = parse(sllmr.Args, "", [*SMALL, "--oracle", "1,1,1,1", "--lr", "1e-2", "--epochs", "5", "--patience", "9", "--run", str(tmp_path / name), *flags])
        rows_ = sllmr.Rows(args, torch.device("cpu"))
        scored = sllmr.Scored(rows_, sllmr.score(args, tmp_path / "scores", rows_))
        model, _ = sllmr.fit(args, sllmr.Run(args, "sllmr", "x"), rows_, scored if flags else None, None)
        model.eval()
        s, known = sllmr.logits_of(model, scored, torch.arange(len(scored.users))), scored.known
        if "--llm-loss" in how:                                   # they follow the scores, the pair loss their order
            return -float((torch.sigmoid(s.detach()) - scored.scores)[known].abs().mean())
        u, i, j = sllmr.pick_pairs(scored.scores, known, 10**6)
        return float((s[u, i] > s[u, j]).float().mean())
    assert near("with", "--lam", "10", *how) > near("without") + 0.05


def test_redrawn_negatives_are_new_in_each_epoch_and_never_what_the_user_had_in_training():
    r = rows()
    first, had = r.train.clone(), set(zip(*r.train[[0, 2]].tolist()))
    for epoch in (0, 1):
        before = r.train.clone()
        r.redraw(epoch)
        assert torch.equal(r.train[:3], first[:3]) and (r.train[3] != before[3]).float().mean() > 0.9
        assert not set(zip(*r.train[[0, 3]].tolist())) & had
    r.redraw(0)
    assert torch.equal(r.train[3], before[3])


def test_a_run_that_is_killed_resumes_to_the_same_result_to_the_bit(tmp_path):
    flags = ["--epochs", "4", "--patience", "9", "--redraw", "--decay", "--run"]
    straight, child = start(*flags, str(tmp_path / "a")), start(*flags, str(tmp_path / "b"))
    log = tmp_path / "b" / "metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.communicate()
    resumed = run(*flags, str(tmp_path / "b"), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    want = straight.communicate()[0].strip().splitlines()[-1]
    assert resumed.stdout.strip().splitlines()[-1] == want and want.startswith("RESULT {")
    assert log.read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("flags,status,message", [
    (("--oracle", "1,2,3"), 2, "--oracle takes four shares"), (("--min-rating", "3"), 1, "leave --min-rating out"), (("--scorer", "file"), 2, "--scorer file needs --scores"), (("--prompt-history", "0"), 2, "--prompt-history"),
    (("--gate", "truth", "--scorer", "file", "--scores", "x"), 1, "--gate truth"), (("--tune-steps", "-1"), 2, "--tune-steps"), (("--tune-lr", "0"), 2, "--tune-lr"),
    (("--scorer", "oracle", "--scores", "x"), 2, "--scores"), (("--scores", "nothing.jsonl"), 1, "nothing.jsonl"), (("--lr", "1e30"), 1, "lower --lr"),
    (("--recommender", "autoint", "--dim", "7"), 2, "--dim"), (("--mlp", "0"), 2, "--mlp"), (("--scored-users", "-1"), 2, "--scored-users"),
    (("--ablations", "--recommenders", "dcnv3"), 2, "dcnv3"), (("--ablations", "--lams", "-1"), 2, "--lams"),
    (("--ablations", "--variants", "truth", "--scorer", "api"), 1, "--variants truth"), (("--lam", "-1"), 2, "--lam"), (("--recommender", "ncf"), 2, "ncf"), (("--scorer", "file", "--scores", "nothing.jsonl"), 1, "nothing.jsonl"),
    (("--lams", "0.5"), 2, "--lams goes with --ablations"), (("--lrs", "0.5"), 2, "--lrs goes with --ablations"), (("--ablations", "--lrs", "0.5", "--variants", "KD"), 2, "the variant none"),
    (("--ablations", "--lrs", "0.5", "--lr", "0.1"), 2, "without --lr"), (("--test-negatives", "0"), 2, "--test-negatives"), (("--ablations", "--reduction", "sum"), 2, "leave --reduction sum out"), (("--dry-run",), 2, "--dry-run"), (("--scores", "x", "--llm-loss", "none"), 2, "takes no --scores"),
    (("--uncertainty", "dropout", "--dropout", "0"), 2, "--uncertainty"), (("--tune-steps", "5"), 1, "--tune-steps"),
    (("--candidates", "1", "--pool", "1", "--extra", "0", "--cold-users", "0", "--cold", "0", "--scored-users", "1", "--seed", "6", "--data", "toy:120x100x1300"), 1, "new to them")])
def test_a_users_mistake_is_one_line(tmp_path, capsys, flags, status, message):
    with pytest.raises(SystemExit) as stop:
        sllmr.main(sllmr.Args, sllmr.train, sllmr.__doc__, [*SMALL, "--run", str(tmp_path / "r"), *flags])
    assert stop.value.code == status and message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_table_of_all_variants_is_printed_and_the_gates_are_drawn(tmp_path, capsys):
    flags = [*SMALL, "--ablations", "--seeds", "0,1", "--recommenders", "dcn", "--scored-users", "30", "--run", str(tmp_path / "all")]
    sllmr.main(sllmr.Args, sllmr.train, sllmr.__doc__, flags)
    out = capsys.readouterr().out
    table = json.loads(out.strip().splitlines()[-1].removeprefix("RESULT "))["ablations"]
    assert {row.split(", ")[1].rpartition(" ")[0] for row in table} == set(sllmr.VARIANTS) and all(row["overall"]["std"] is not None for row in table.values())
    assert (tmp_path / "all" / "scores-s0" / "scores.jsonl").exists() and "mean ± std over 2 seeds" in out
    valid = [json.loads((tmp_path / "all" / "dcn" / s / "none-0" / "result.json").read_text())["valid"]["overall"] for s in ("s0", "s1")]
    assert table["dcn, none 0"]["validation"]["values"] == valid


def test_the_bins_of_the_gates_map_do_not_overlap():
    rows = types.SimpleNamespace(logs=types.SimpleNamespace(n_train=np.array([1, 2, 3, 9]), item_counts=lambda: np.array([5, 6])))
    scored = types.SimpleNamespace(users=torch.arange(4), items=torch.tensor([[0, 1]] * 4), known=torch.ones(4, 2, dtype=torch.bool))
    found = sllmr.gate_map(rows, scored, np.arange(8) / 8, bins=2)
    assert found == {"history": ["1", "2–9"], "popularity": ["5–6"], "alpha": [[0.0625], [0.5625]]}


# ------------------------------------------------------------------------------------------------- training, by hand
def regularised(r, answer, **change):
    """(scored, what was asked of the model, the model) after a backward pass of the regulariser over all users, whom the model
    answers with answer(U, M)."""
    args = dataclasses.replace(r.args, **change)
    scored = sllmr.Scored(r, {(u, i): s for u, items, scores in sllmr.oracle(r, sllmr.candidates(r)) for i, s in zip(items, scores)})
    model, asked = sllmr.Model(args, r), []
    model.eval()

    def forward(users, place, items):
        asked.append((users, place, items, answer(items).requires_grad_()))
        return asked[-1][-1]
    model.forward = forward
    sllmr.regulariser(args, model, scored, torch.arange(len(scored.users))).backward()
    return scored, asked, model


def noise(items):
    return torch.randn(items.shape, generator=torch.Generator().manual_seed(3))


def test_what_is_set_aside_teaches_the_gate_and_nothing_else_does():
    r = rows(gate="agreement", pairs=10**6, gate_init=(1.0, 1.0, 1.0, 1.0))
    scored, asked, model = regularised(r, noise)
    (users, place, items, s), = asked
    assert torch.equal(users, scored.users) and place.tolist() == [int(r.logs.n_train[u]) for u in users] and torch.equal(items, scored.items)
    assert s.grad[~scored.aside].any() and not s.grad[scored.aside].any()
    learned = model.gate.linear.weight.grad
    _, _, again = regularised(r, lambda items: torch.where(scored.aside, noise(items), -noise(items)))      # q depends on |s| alone
    assert learned.any() and torch.allclose(again.gate.linear.weight.grad, learned, atol=1e-6)


def test_a_gate_that_trusts_no_pair_asks_for_nothing():
    r = rows(gate="agreement", pairs=10**6, gate_init=(0.0, 0.0, 0.0, -1.0))
    _, ((*_, s),), model = regularised(r, noise)
    assert not s.grad.any()                                      # alpha below a half everywhere: no pair, not even reversed


@pytest.mark.parametrize("oracle, more, less", [((0.0, 0.0, 1.0, 1.0), 0, 1), ((0.0, 1.0, 0.0, 1.0), 1, 0)])
def test_from_nothing_the_gate_learns_whether_cold_users_or_tail_items_are_told_right(oracle, more, less):
    """The model orders by the truth; where the scores are noise they agree by chance."""
    r = rows(gate="agreement", oracle=oracle, gate_init=(0.0, 0.0, 0.0, 0.0), pairs=10**6)
    scored = sllmr.Scored(r, {(u, i): s for u, items, scores in sllmr.oracle(r, sllmr.candidates(r)) for i, s in zip(items, scores)})
    order = r.data.world.order(np.array([int(r.data.users[u][1:]) for u in scored.users.tolist()]))
    number = np.array([int(name[1:]) for name in r.data.items])
    truth = torch.as_tensor(np.take_along_axis(order, number[scored.items.numpy()], 1)).float()
    model = sllmr.Model(r.args, r)
    model.forward = lambda users, place, items: truth
    optimizer = torch.optim.Adam(model.gate.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        sllmr.regulariser(r.args, model, scored, torch.arange(len(scored.users))).backward()
        optimizer.step()
    w = torch.cat([p.detach().flatten() for p in model.gate.parameters()])
    assert w[more] > w[less] + 0.1


def test_lambda_weighs_the_llms_loss_and_the_epoch_that_validation_likes_best_stays(tmp_path, monkeypatch):
    told, seen, asked = iter((0.6, 0.5, 0.4)), [], []
    r = rows(epochs=3, llm_loss="kd", lam=0.5, run=str(tmp_path / "r"), lr=1e-2)

    def judged(model, rows, table):
        asked.append(table)
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"overall": next(told)}
    monkeypatch.setattr(sllmr, "evaluate_rows", judged)
    scored = sllmr.Scored(r, {(u, i): s for u, items, scores in sllmr.oracle(r, sllmr.candidates(r)) for i, s in zip(items, scores)})
    model, report = sllmr.fit(r.args, sllmr.Run(r.args, "sllmr", "x"), r, scored, None)
    assert report["valid_auc"] == 0.6 and all(torch.equal(v, seen[0][k]) for k, v in model.state_dict().items())
    assert any(not torch.equal(v, seen[1][k]) for k, v in model.state_dict().items()) and all(table is r.valid for table in asked)
    losses = []
    for lam in (0.5, 5.0):
        told = iter((0.6, 0.5, 0.4))
        args = dataclasses.replace(r.args, lam=lam, epochs=1, run=str(tmp_path / f"l{lam}"))
        sllmr.fit(args, sllmr.Run(args, "sllmr", "x"), r, scored, None)
        losses.append(json.loads((tmp_path / f"l{lam}" / "metrics.jsonl").read_text())["llm_loss"])
    assert losses[1] < losses[0]                                 # the more it weighs, the further it falls


def test_lambda_is_chosen_by_validation(tmp_path, monkeypatch, capsys):
    def train(args, shared):
        path = Path(args.run)
        path.mkdir(parents=True)
        (path / "header.json").write_text("{}")
        (path / "result.json").write_text(json.dumps({"script": "sllmr", "test": {"overall": 1 - args.lam}}))
        return {"valid": {"overall": args.lam}, "test": {"overall": 1 - args.lam}}
    monkeypatch.setattr(sllmr, "train", train)
    table = sllmr.ablations(sllmr.Args(data=TOY, ablations=True, variants=("KD",), lams=(0.1, 0.3), run=str(tmp_path / "a")))
    assert set(table) == {"dcnv2, KD 0.3"}


def test_of_several_learning_rates_validation_of_none_chooses_one_for_every_row(tmp_path, monkeypatch):
    """KD would like the larger one better."""
    seen = []

    def train(args, shared):
        path = Path(args.run)
        path.mkdir(parents=True)
        (path / "header.json").write_text("{}")
        seen.append((args.llm_loss, args.lr, args.seed))
        valid = 1 - args.lr if args.llm_loss == "none" else args.lr
        record = {"script": "sllmr", "valid": {"overall": valid}, "test": {"overall": args.lr}}
        (path / "result.json").write_text(json.dumps(record))
        return record
    monkeypatch.setattr(sllmr, "train", train)
    table = sllmr.ablations(sllmr.Args(data=TOY, ablations=True, variants=("none", "KD"), lams=(0.3,), lrs=(0.02, 0.01), seeds=(4, 5), run=str(tmp_path / "a")))
    assert set(table) == {"dcnv2 (0.01), none 0", "dcnv2 (0.01), KD 0.3"}
    assert seen == [("none", 0.02, 4), ("none", 0.02, 5), ("none", 0.01, 4), ("none", 0.01, 5), ("kd", 0.01, 4), ("kd", 0.01, 5)]


# ------------------------------------------------------------------------------------------- what a run is made of
def of_the_truth(r):
    """The scores of the toy's truth, all of them, as the regulariser reads them."""
    return sllmr.Scored(r, {(u, i): s for u, items, scores in sllmr.oracle(r, sllmr.candidates(r)) for i, s in zip(items, scores)})


def test_no_row_to_judge_by_has_a_negative_that_the_user_chose_and_one_drawn_anew_may_be_held_out():
    r = rows()
    had = [set(r.logs.sequence(u).tolist()) for u in range(len(r.data.users))]
    assert not any(n in had[u] for table in (r.valid, r.test) for u, n in table[[0, 3]].T.tolist())
    r.redraw(0)
    assert any(n in r.logs.sequence(u)[-2:] for u, n in r.train[[0, 3]].T.tolist())          # to spare those would tell them


def test_candidates_may_be_held_out_and_those_of_cold_users_are_of_the_whole_catalogue():
    r = rows(candidates=20, pool=20, extra=0.0)
    found = sllmr.candidates(r)
    assert any(set(items) & set(r.logs.sequence(u)[r.logs.n_train[u]:].tolist()) for u, items in found.items())
    assert all((r.rank[items] >= 20).any() == r.cold[u] for u, items in found.items())


def test_made_cold_a_user_keeps_the_last_five_or_six_choices_and_a_rare_item_is_scored_for_few():
    plain, starved = rows(cold_users=0.0), rows(cold_users=0.5)
    names = lambda r, u: [r.data.items[i] for i in r.logs.sequence(u)]
    had = {name: names(plain, u) for u, name in enumerate(plain.data.users)}
    left = {name: names(starved, u) for u, name in enumerate(starved.data.users)}
    assert all(left[name] in (had[name], had[name][-5:], had[name][-6:]) for name in had)
    assert 0.3 < np.mean([left[name] != had[name] for name in had]) < 0.6
    r = rows(candidates=5, pool=50, extra=0.2, cold_users=0.0)
    warm = {u: items for u, items in sllmr.candidates(r).items() if not r.cold[u]}
    share = np.mean([(r.rank[items] >= 160 - 32).sum() / 32 for items in warm.values()])
    assert len(r.rank) == 160 and 0.07 < share < 0.13             # M / N of the users, less those who had it


def test_an_answer_may_tell_its_scores_in_any_order():
    text = json.dumps({"scores": [{"id": 3, "score": 0.3}, {"id": 1, "score": 0.1}]})
    assert sllmr.parse_scores(text, 3, some=True) == [0.1, None, 0.3]


def test_no_prompt_for_a_score_shows_a_held_out_title():
    r = rows(prompt_history=3)
    for u in map(int, r.logs.held_out[:20]):
        mine = r.logs.sequence(u)[:r.logs.n_train[u]]
        shown = "\n".join(f"- {r.logs.lines[i]}" for i in mine[-3:])
        (read, question), = sllmr.ask(r, u, [5])
        assert f"first:\n{shown}\nWill" in read and question == f"- {r.logs.lines[5]}"
        assert f"first:\n{shown}\n\nHow" in sllmr.rank_prompt(r, u, [5])
        assert f"first:\n- {r.logs.lines[mine[0]]}\nWill" in sllmr.ask(r, u, [5], 1)[0][0]


def test_the_backbones_score_is_the_probability_of_yes_and_a_single_candidate_is_scored_like_any_other(monkeypatch):
    r = rows()
    model, tokenizer = llm.load("tiny")
    yes, no = (llm.single_token(tokenizer, word) for word in ("Yes", "No"))
    asked = [sllmr.ask(r, int(u), items) for u, items in zip(r.logs.held_out, ([7], [7, 8, 9]))]
    for prompts, got in zip(asked, sllmr.score_shared(model, tokenizer, asked, yes, no)):
        z = model(torch.tensor([llm.chat(tokenizer, "".join(prompts[0]))])).logits[0, -1]
        assert float(z[yes] - z[no]) == pytest.approx(float(got[0]), abs=1e-4)
    told = []
    monkeypatch.setattr(sllmr, "score_shared", lambda *_: told.append(_[3:]) or [torch.tensor([2.0, -1.0])])
    (u, items, scores), = sllmr.by_backbone(r, {3: [5, 6]})
    assert (u, items) == (3, [5, 6]) and scores == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]) and told == [(yes, no)]
    assert not list(sllmr.by_backbone(r, {3: [5, 6]}, missing={4: [5]})) and len(told) == 1


def test_what_the_llm_is_worth_alone_is_told_of_validation_rows(letters, capsys):
    sllmr.print_auc([[1, 0], [3, 2], [2, 0]])                    # 7.5 of 9 pairs
    assert "AUC 0.8333 on 6 validation rows" in capsys.readouterr().out
    r = rows(tune_steps=1)
    r.test = None                                                # nobody reads those
    list(sllmr.by_encoder(r, {0: [1]}))
    model, tokenizer = llm.load("tiny")
    sllmr.tune(r, model, tokenizer, *(llm.single_token(tokenizer, word) for word in ("Yes", "No")), batch=2, asked=2)
    assert "on 4 validation rows" in capsys.readouterr().out


def test_a_refused_key_is_not_asked_with_again_and_a_redirect_carries_it_nowhere():
    asked = []

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.send_response(301 if "moved" in self.path else 401)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
        do_GET = do_POST
        log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for path, says in (("v1", "401"), ("moved", "301")):
        with pytest.raises(UserError, match=f"the server says {says}"):
            sllmr.call(sllmr.Args(api_base=f"http://127.0.0.1:{server.server_port}/{path}"), "k", "hello")
    server.shutdown()
    assert asked == ["/v1/chat/completions", "/moved/chat/completions"]


def test_a_user_whose_scores_were_cut_short_has_each_once_in_the_file(tmp_path):
    r = rows()
    table = sllmr.score(r.args, tmp_path, r)
    path = tmp_path / "scores.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert sllmr.score(r.args, tmp_path, r) == table and len(path.read_text().splitlines()) == len(table)


def test_scores_are_taken_over_only_where_all_that_they_depend_on_is_the_same():
    r = rows()
    every = {"seed": 1, "cold": 2, "tail": 0.3, "candidates": 7, "pool": 9, "extra": 0.3, "scored_users": 5}
    for kind, own in {"oracle": {"oracle": (1.0, 1.0, 1.0, 1.0)}, "encoder": {"prompt_history": 3},
                      "backbone": {"backbone": "x", "dtype": "float32", "tune_steps": 3, "tune_lr": 1.0, "prompt_history": 3},
                      "api": {"api_base": "http://x", "api_model": "x", "prompt_history": 3}}.items():
        made = lambda **change: sllmr.made_by(dataclasses.replace(r.args, **change), kind, r.data)
        assert all(made(**{name: value}) != made() for name, value in (every | own).items()) and made(lam=7.0) == made()


def test_the_price_of_a_dry_run_by_hand(monkeypatch, capsys):
    monkeypatch.setattr(sllmr, "candidates", lambda rows: {3: [5, 6]})
    r = rows(api_price=(3e6, 5e6))
    sllmr.estimate(r)
    given = len(sllmr.rank_prompt(r, 3, [5, 6])) / 4
    assert f"{given:,.0f} tokens in and 34 out: ${3 * given + 5 * 34:,.2f}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- the loss, as flags ask for it
def test_margin_reduction_and_budget_are_those_that_were_asked_for():
    r = rows(gate="budget")
    args = dataclasses.replace(r.args, margin=0.2, reduction="sum", budget=0.7, budget_weight=3.0, pairs=10**6)
    scored, model, pick = of_the_truth(r), sllmr.Model(args, r), torch.arange(9)
    s = noise(scored.items[pick])
    model.forward = lambda users, place, items: s
    alpha = sllmr.alphas(args, model, scored, pick, s)
    pairs = sllmr.pick_pairs(scored.scores[pick], scored.known[pick], 10**6)
    want = sllmr.pair_loss(s, alpha, pairs, 0.2, "budget", "sum", (0.7, 3.0))
    assert float(sllmr.regulariser(args, model, scored, pick).detach()) == pytest.approx(float(want.detach()))


def test_pairs_are_of_whom_the_gate_trusts_and_as_they_were_asked_for(monkeypatch):
    r = rows(gate="agreement", gate_init=(20.0, 0.0, 0.0, -10.0))
    real, seen = sllmr.pair_loss, []
    monkeypatch.setattr(sllmr, "pair_loss", lambda s, alpha, pairs, *rest: seen.append(pairs) or real(s, alpha, pairs, *rest))
    scored, _, _ = regularised(r, noise, pairs=8)
    assert len(seen[0][0]) == 8 and scored.cold[seen[0][0], 0].all() and not scored.cold[:, 0].all()
    regularised(r, noise, pairs=len(scored.users), pick="sample")
    assert len(seen[1][0]) == len(seen[1][0].unique()) > 8       # one of each


def test_nothing_is_set_aside_but_for_the_gate_of_agreement():
    assert not any(of_the_truth(rows(gate=gate, gate_share=0.5)).aside.any() for gate in ("paper", "ones", "truth"))
    assert 0.45 < of_the_truth(rows(gate="agreement", gate_share=0.5)).aside.float().mean() < 0.55


def test_kd_and_pointwise_by_hand_on_what_was_scored_alone():
    r = rows()
    scored = sllmr.Scored(r, {(0, 3): 0.9, (0, 4): 0.2, (1, 5): 0.5})
    for how, of in (("pointwise", lambda p, y: (p - y) ** 2), ("kd", lambda p, y: -y * math.log(p) - (1 - y) * math.log(1 - p))):
        args = dataclasses.replace(r.args, llm_loss=how)
        model = sllmr.Model(args, r)
        model.forward = lambda users, place, items: torch.tensor([[1.0, -1.0], [2.0, 3.0]])
        p = [1 / (1 + math.exp(-s)) for s in (1.0, -1.0, 2.0)]
        want = sum(map(of, p, (0.9, 0.2, 0.5))) / 3
        assert float(sllmr.regulariser(args, model, scored, torch.arange(2))) == pytest.approx(want)


def test_kar_reads_the_text_of_the_item_and_the_mean_of_the_past_ones(monkeypatch):
    r = rows(llm_loss="kar", max_history=3)
    v = torch.randn(len(r.data.items), 4)
    monkeypatch.setattr(sllmr.llm, "encode", lambda *_, **__: v)
    vectors = sllmr.text_vectors(r)
    w = (v - v.mean(0)) / v.std(0)
    w = w / w.norm(dim=1, keepdim=True)
    assert torch.allclose(vectors[1:], w, atol=1e-4) and not vectors[0].any()
    model, seen = sllmr.Model(r.args, r, vectors), []
    monkeypatch.setattr(model.ctr, "forward", lambda users, items, history, extra: seen.append(extra))
    users, place = r.test[:2, :5]
    model(users, place, torch.tensor([[8, 9]] * 5))
    for k, (u, p) in enumerate(zip(users.tolist(), place.tolist())):
        past = w[torch.as_tensor(r.logs.sequence(u)[max(0, p - 3):p].astype(int))].mean(0)
        assert torch.allclose(seen[0][k], torch.stack([torch.cat([w[i], past]) for i in (8, 9)]), atol=1e-4)


# ------------------------------------------------------------------------------------------- training and results
def test_negatives_are_drawn_anew_where_asked_and_the_second_sampler_draws_other_users_in_each_epoch(tmp_path, monkeypatch):
    drawn, picked = [], []
    monkeypatch.setattr(sllmr.Rows, "redraw", lambda rows, epoch: drawn.append(epoch))
    monkeypatch.setattr(sllmr, "regulariser", lambda args, model, scored, pick: picked.append(sorted(pick.tolist())) or model.ctr.out.weight.sum() * 0)
    for redraw in (False, True):
        r = rows(epochs=2, llm_loss="kd", redraw=redraw, run=str(tmp_path / str(redraw)), batch=10**6)
        sllmr.fit(r.args, sllmr.Run(r.args, "sllmr", "x"), r, of_the_truth(r), None)
        assert drawn == [0, 1] * redraw
    assert picked[:2] == picked[2:] and picked[0] != picked[1]   # a batch is an epoch here


def test_the_gate_has_a_learning_rate_of_its_own_and_does_not_decay(tmp_path, monkeypatch):
    real, made = torch.optim.Adam, []
    monkeypatch.setattr(torch.optim, "Adam", lambda *groups, **flags: made.append(real(*groups, **flags)) or made[-1])
    r = rows(epochs=1, llm_loss="none", lr=3e-3, gate_lr=5e-2, weight_decay=0.1, run=str(tmp_path / "r"))
    model, _ = sllmr.fit(r.args, sllmr.Run(r.args, "sllmr", "x"), r, None, None)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in made[0].param_groups for p in group["params"]}
    assert {rates[id(p)] for p in model.gate.parameters()} == {(5e-2, 0.0)} and {rates[id(p)] for p in model.ctr.parameters()} == {(3e-3, 0.1)}


def test_the_rate_falls_linearly_to_nothing_where_asked_and_the_gates_stays(tmp_path, monkeypatch):
    real, rates = torch.optim.Adam.step, []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a, **k: rates.append([g["lr"] for g in self.param_groups]) or real(self, *a, **k))
    for decay in (False, True):
        r = rows(epochs=2, llm_loss="none", lr=4e-3, gate_lr=5e-2, decay=decay, run=str(tmp_path / str(decay)))
        r.args.batch = r.train.shape[1]                      # a batch is half of the rows: 2 of an epoch
        sllmr.fit(r.args, sllmr.Run(r.args, "sllmr", "x"), r, None, None)
    assert np.array(rates).T.tolist() == [pytest.approx([4e-3] * 4 + [4e-3, 3e-3, 2e-3, 1e-3]), [5e-2] * 8]


@pytest.mark.parametrize("told", [(0.6, 0.5, 0.4), (0.6, 0.5, None, 0.4)])
def test_training_stops_where_patience_ends_and_a_kill_does_not_renew_it(tmp_path, monkeypatch, telling, told):
    monkeypatch.setattr(sllmr, "evaluate_rows", telling(told))
    r = rows(epochs=9, patience=2, llm_loss="none", run=str(tmp_path / "r"), resume=True)
    fit = lambda: sllmr.fit(r.args, sllmr.Run(r.args, "sllmr", "x"), r, None, None)[1]
    if None in told:
        with pytest.raises(KeyboardInterrupt):
            fit()
    assert fit() == {"epochs": 3, "valid_auc": 0.6}


def test_a_result_tells_validation_from_test_and_a_run_resumed_after_training_has_the_same(tmp_path, monkeypatch):
    told = iter((0.9, 0.1))
    monkeypatch.setattr(sllmr, "evaluate_rows", lambda model, rows, table: {"overall": 0.25 if table is rows.test else next(told, 0.75)})
    args = parse(sllmr.Args, "", [*SMALL, "--llm-loss", "none", "--epochs", "2", "--lr", "0.05", "--run", str(tmp_path / "r")])
    first = sllmr.train(args)
    assert (first["valid"], first["test"]) == ({"overall": 0.75}, {"overall": 0.25})
    phases = tmp_path / "r" / "phases.json"
    phases.write_text(json.dumps({k: v for k, v in json.loads(phases.read_text()).items() if k != "result"}))
    assert sllmr.train(dataclasses.replace(args, resume=True)) == first                      # of the best epoch, not of the last


def test_what_is_told_of_the_gate_is_what_it_says_of_such_pairs(tmp_path):
    """Cold users' scores are right, and the gate trusts these: alpha is sigmoid(9) for them, and 1/2 for the others."""
    result = sllmr.train(parse(sllmr.Args, "", [*SMALL, "--gate", "fixed", "--gate-init", "9,0,0,0", "--oracle", "0,0,1,1", "--run", str(tmp_path / "r")]))
    log = json.loads((tmp_path / "r" / "metrics.jsonl").read_text())
    assert result["gate_auc"] == 1 and result["gate_is"] == {"cold": 9, "tail": 0, "unsure": 0, "b": 0}
    for cell in ("cold_head", "cold_tail", "warm_head", "warm_tail"):
        assert log[f"alpha_{cell}"] == pytest.approx(1 / (1 + math.exp(-9)) if "cold" in cell else 0.5, abs=1e-5)


def test_doubt_under_dropout_is_there_where_the_gate_is_looked_at():
    r = rows(gate="fixed", uncertainty="dropout", gate_init=(0.0, 0.0, 1e8, 0.0), dropout=0.5)
    scored, model = of_the_truth(r), sllmr.Model(r.args, r)
    assert (sllmr.gate_view(r.args, model, scored)[0] > 0.5).all() and not model.training


def test_each_row_of_the_table_is_what_its_name_says_and_each_seed_its_own(tmp_path, monkeypatch, capsys):
    gates = sllmr.Args.__annotations__["gate"].__args__
    pairwise = {g: {"llm_loss": "pairwise", "gate": g} for g in gates} | {
        "no prior": {"llm_loss": "pairwise", "gate": "agreement", "gate_init": (0.0, 0.0, 0.0, 0.0)}}
    assert sllmr.VARIANTS == pairwise | {name: {"llm_loss": name.lower()} for name in ("none", "KAR", "KD", "pointwise")}
    asked = []

    def train(args, shared):
        asked.append((args.seed, args.llm_loss, args.lam, Path(args.run).parent.name, shared.name))
        Path(args.run).mkdir(parents=True)
        (Path(args.run) / "header.json").write_text("{}")
        (Path(args.run) / "result.json").write_text(json.dumps({"script": "sllmr", "test": {"overall": 0.5}}))
        return {"valid": {"overall": 0.5}, "test": {"overall": 0.5}}
    monkeypatch.setattr(sllmr, "train", train)
    sllmr.ablations(sllmr.Args(data=TOY, ablations=True, variants=("none", "KD"), lams=(0.3,), seeds=(4, 5), run=str(tmp_path / "a")))
    assert asked == [(seed, how, lam, f"s{seed}", f"scores-s{seed}") for how, lam in (("none", 0.0), ("kd", 0.3)) for seed in (4, 5)]
