"""common/sequences.py and common/prompts.py on a few choices by hand."""

import types
from dataclasses import replace

import numpy as np
import pytest

from common.prompts import history_lines, item_line
from common.sequences import Logs, bayes, category_table, popularity
from tests.test_data import logs


def test_a_sequence_is_what_the_user_chose_in_the_order_of_the_data_also_where_many_times_tie():
    rng = np.random.default_rng(0)
    d = logs(*((u, i, 7) for i, u in enumerate(rng.permutation(np.repeat(np.arange(5), 60)))))
    found = Logs(d, 10)
    for u in range(5):
        assert found.sequence(u).tolist() == d.item[d.user == u].tolist()
    assert found.sequence(1).tolist() == sorted(found.sequence(1).tolist())


def test_training_events_run_in_time_order_ties_by_user_and_then_by_place():
    users, positions = Logs(logs((1, 0, 5), (0, 1, 5), (1, 2, 5), (0, 3, 5), (2, 4, 6)), 10).train_events()
    assert list(zip(users, positions)) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_targets_have_a_past_and_those_of_validation_and_test_are_the_last_two():
    found = Logs(logs(*((0, k) for k in range(5)), (1, 0), (1, 1)), 10).targets("x")
    assert [[part.tolist() for part in pair] for pair in found] == [[[0, 0, 1], [1, 2, 1]], [[0], [3]], [[0], [4]]]


def test_a_window_reads_nothing_before_its_start():
    found = Logs(logs(*((0, k) for k in range(6)), *((1, k) for k in range(6))), 10)
    windows = found.histories(np.array([0, 1]), np.array([4, 3]), 3, np.array([1, 2]))
    assert windows.tolist() == [[2, 3, 4], [3, 0, 0]]


def test_popularity_ranks_the_test_target_by_training_choices_among_what_was_not_had_before():
    d = logs(*((0, i) for i in (1, 2, 0, 3)), *((1, i) for i in (0, 4, 1)), (2, 0), (2, 3))
    # training chose 0 twice, 1, 2, 3 once, 4 never. User 0: 3 against 4, rank 1. User 1: 1 against 2 and 3, which tie: rank 3
    report = popularity(Logs(d, 10))
    assert report["n"] == 2 and report["ndcg@5"] == pytest.approx((1 + 1 / 2) / 2, abs=1e-6)


def test_the_bayes_optimal_ranker_asks_for_the_last_choice_and_finds_items_by_their_names():
    asked = []

    def p_next(users, before, length):
        asked.append((users.tolist(), before.tolist(), length.tolist()))
        return np.array([[9.0, 2, 9, 0, 9, 1]])                      # of the catalogue's i0 ... i5
    d = replace(logs((0, 0), (0, 1), (0, 2), (1, 3), n_users=2, n_items=4), users=["u4", "u1"], items=["i3", "i0", "i5", "i1"],
                world=types.SimpleNamespace(p_next=p_next))
    report = bayes(Logs(d, 10))                                      # i5 (1) against i1 (2): rank 2
    assert asked == [([4], [2], [3])] and report["ndcg@5"] == pytest.approx(1 / np.log2(3), abs=1e-6)


def test_the_table_of_categories_is_shifted_like_the_items_and_0_is_none():
    assert category_table([["b", "a"], [], ["c"]]).tolist() == [[0, 0], [2, 1], [0, 0], [3, 0]]


def test_a_history_is_written_oldest_first_and_a_long_title_ends_in_dots():
    assert history_lines(["a", "b"]) == "- a\n- b" and history_lines([]) == "- (nothing yet)"
    assert item_line("x" * 80, []) == "x" * 80 and item_line("x" * 81, ["c"]) == "c: " + "x" * 79 + "…"
