"""common/toy.py: the world must hold what the methods claim to find."""

import time

import numpy as np
import pytest

from common import data, toy

WORLD = toy.make()


def sequences(world):
    order = np.argsort(world.user, kind="stable")
    return np.split(world.item[order], np.cumsum(np.bincount(world.user, minlength=len(world.cold)))[:-1])


def test_the_default_size_is_met_in_a_second_and_the_seed_fixes_everything():
    start = time.time()
    again = toy.make()
    assert time.time() - start < 2
    assert len(again.cold) == 600 and len(again.titles) == 400 and abs(len(again.user) - 15000) < 300
    assert np.array_equal(again.item, WORLD.item) and np.array_equal(again.time, WORLD.time)
    other = toy.make(seed=1)
    assert other.titles == WORLD.titles and not np.array_equal(other.item[:100], WORLD.item[:100])


def test_worlds_that_differ_in_any_setting_have_different_fingerprints():
    changes = ({}, {"seed": 1}, {"catalogue_seed": 1}, {"misled": 0.2}, {"cold": 0.2}, {"n_users": 50}, {"n_items": 100}, {"n_interactions": 350})
    worlds = [toy.make(**dict(n_users=40, n_items=120, n_interactions=400) | change).data() for change in changes]
    assert len({w.fingerprint for w in worlds}) == len(changes)


def test_nobody_chooses_an_item_twice_and_time_runs_forward():
    assert all(len(set(s.tolist())) == len(s) for s in sequences(WORLD))
    assert (np.diff(WORLD.time) >= 0).all()


def test_a_description_reveals_genre_and_theme_and_no_other():
    words = {w: a for table in (toy.GENRES, toy.THEMES) for a, ws in table.items() for w in ws}
    for categories, text in zip(WORLD.categories, WORLD.texts):
        assert {a for w, a in words.items() if w in text.lower()} >= set(categories)


def test_popularity_has_a_head_and_a_tail_and_cold_users_have_fewer_than_three():
    count = np.sort(np.bincount(WORLD.item, minlength=400))[::-1]
    assert count[:80].sum() > 0.3 * count.sum() and count[0] > 8 * max(count[-40:].mean(), 1)
    length = np.bincount(WORLD.user, minlength=600)
    assert (length[WORLD.cold] < 3).all() and 20 < WORLD.cold.sum() < 90


def test_ratings_follow_the_taste_of_the_choices_that_were_drawn_last():
    """Ratings are drawn from s at the time; at the last choice that is nearly the final taste."""
    last = [np.flatnonzero(WORLD.user == u)[-1] for u in np.flatnonzero(~WORLD.cold & ~WORLD.misled)]
    users = WORLD.user[last]
    taste = WORLD.taste(users, np.ones(len(users)), WORLD._last_state(users))
    p = 1 / (1 + np.exp(7 - taste[np.arange(len(users)), WORLD.item[last]]))
    liked = WORLD.rating[last] >= 4
    assert abs(p.mean() - liked.mean()) < 0.06
    assert p[liked].mean() > p[~liked].mean() + 0.2


def rank_of_last(world, scores, users, seqs):
    ranks = []
    for row, u in enumerate(users):
        s = scores[row].copy()
        s[seqs[u][:-1]] = -np.inf
        ranks.append((s > s[seqs[u][-1]]).sum() + 1)
    return np.array(ranks)


def test_the_truth_ranks_better_than_popularity_and_than_the_truth_without_text_or_without_factors():
    seqs = sequences(WORLD)
    users = np.array([u for u in range(600) if len(seqs[u]) >= 5])
    length = np.array([len(seqs[u]) for u in users])
    ndcg = lambda scores: np.mean([1 / np.log2(r + 1) if r <= 10 else 0 for r in rank_of_last(WORLD, scores, users, seqs)])
    full = ndcg(WORLD.p_next(users, length - 1, length))
    popular = ndcg(np.tile(WORLD.bias, (len(users), 1)))
    collaborative = WORLD.bias + 0.8 * WORLD.factor_user[users] @ WORLD.factor_item.T / 2
    semantic = WORLD.p_next(users, length - 1, length) - 0.8 * WORLD.factor_user[users] @ WORLD.factor_item.T / 2
    assert full > ndcg(semantic) + 0.02 and full > ndcg(collaborative) + 0.1 and ndcg(collaborative) > popular
    assert full > 0.4


def test_the_order_of_items_is_that_before_the_last_two_choices_from_0_to_1():
    seqs = sequences(WORLD)
    users = np.array([u for u in range(600) if len(seqs[u]) >= 5])
    order, length = WORLD.order(users), np.array([len(seqs[u]) for u in users])
    assert np.allclose(np.sort(order, 1), np.linspace(0, 1, 400))
    next_ = WORLD.p_next(users, length - 2, length)
    assert (order.argmax(1) == next_.argmax(1)).all() and (order.argmin(1) == next_.argmin(1)).all()
    misled = WORLD.misled[users]                                   # their taste looks at the last choices
    assert (next_ != WORLD.p_next(users, length - 1, length))[misled].any(1).mean() > 0.5
    assert order[np.arange(len(users)), [seqs[u][-2] for u in users]].mean() > 0.85


def test_the_truth_of_a_choice_knows_the_choices_before_it_and_its_own_time():
    """The world's own law, by the sequences: before the k-th of n choices it is k / (n - 1), and the last 10 of the k are known."""
    seqs = sequences(WORLD)
    users = np.array([u for u in range(600) if len(seqs[u]) > 13])
    length = np.array([len(seqs[u]) for u in users])
    for back in (1, 3):
        recent = np.stack([seqs[u][len(seqs[u]) - back - 10:len(seqs[u]) - back] for u in users])
        want = WORLD.bias + WORLD.taste(users, (length - back) / (length - 1), recent)
        np.testing.assert_allclose(WORLD.p_next(users, length - back, length), want)


def test_more_of_the_same_is_right_for_most_users_and_wrong_for_the_misled():
    seqs = sequences(WORLD)

    def overlap(u):
        past, last = seqs[u][-11:-1], seqs[u][-1]
        return np.mean((WORLD.genre[past] == WORLD.genre[last]) * 1.0 + (WORLD.theme[past] == WORLD.theme[last]))
    groups = [[overlap(u) for u in range(600) if len(seqs[u]) > 11 and WORLD.misled[u] == m] for m in (False, True)]
    chance = 2 / 8
    assert np.mean(groups[0]) > 2.5 * chance and np.mean(groups[1]) < 0.7 * chance


def test_taste_drifts():
    user = np.flatnonzero(~WORLD.misled)[:1]
    nobody = np.full((1, 10), -1)
    early, late = (WORLD.taste(user, np.array([t]), nobody)[0] for t in (0.0, 1.0))
    kept, fading, coming = WORLD.liked[user[0], 0]
    assert early[WORLD.genre == fading].mean() > late[WORLD.genre == fading].mean() + 1
    assert late[WORLD.genre == coming].mean() > early[WORLD.genre == coming].mean() + 1


def test_impossible_sizes_are_refused():
    for sizes in (dict(n_users=1), dict(n_items=5), dict(n_interactions=10**6), dict(misled=2)):
        with pytest.raises(ValueError):
            toy.make(**sizes)


def test_the_data_name_gives_sizes_and_the_share_of_misled_users():
    world = data.load("toy:200x120x2000:0.5").world
    assert len(world.cold) == 200 and len(world.titles) == 120 and 0.4 < world.misled.mean() < 0.6
    assert data.load("toy:200x120x2000").fingerprint != world.name == data.load("toy:200x120x2000:.5").fingerprint
    for broken in ("toy:200x120x2000:2", "toy:200x120:0.3", "toy:0.3", "toy:200x120x2000:"):
        with pytest.raises(data.UserError, match="share of misled users"):
            data.load(broken)
