"""common/metrics.py against fractions worked out by hand and against scikit-learn."""

import math

import numpy as np
import pytest

from common import metrics

# four users, five items: the target's rank is 1, 2, 3 (one item of better score is excluded), 5 (all tie)
SCORES = np.array([[9, 1, 2, 3, 4], [5, 6, 1, 2, 3], [7, 6, 5, 4, 8], [1, 1, 1, 1, 1]], dtype=float)
TARGETS = np.array([0, 0, 2, 3])
EXCLUDE = np.zeros((4, 5), dtype=bool)
EXCLUDE[2, 4] = True


def test_ranks_on_four_users_are_those_worked_out_by_hand():
    assert metrics.ranks_of(SCORES, TARGETS, EXCLUDE).tolist() == [1, 2, 3, 5]


def test_recall_and_ndcg_are_the_fractions_worked_out_by_hand():
    report = metrics.ranking_report([1, 2, 3, 5], ks=(2, 5))
    assert report["recall@2"] == 2 / 4 and report["recall@5"] == 1
    assert report["ndcg@2"] == pytest.approx((1 + 1 / math.log2(3)) / 4, abs=1e-6)
    assert report["ndcg@5"] == pytest.approx((1 + 1 / math.log2(3) + 1 / 2 + 1 / math.log2(6)) / 4, abs=1e-6)
    assert report["ndcg@2_ci"][0] <= report["ndcg@2"] <= report["ndcg@2_ci"][1]


def test_a_constant_scorer_gets_the_worst_rank_in_any_order_of_candidates():
    for target in range(5):
        assert metrics.ranks_of(np.zeros((1, 5)), np.array([target])).tolist() == [5]


def test_scores_that_are_not_a_number_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        metrics.ranks_of(np.array([[np.nan, 1]]), np.array([0]))


def test_auc_by_hand_ties_count_half_and_one_class_or_nan_has_none():
    assert metrics.auc([1, 0, 1, 0], [3, 1, 2, 2]) == (1 + 1 + 1 + 0.5) / 4
    assert math.isnan(metrics.auc([1, 1], [1, 2])) and math.isnan(metrics.auc([1, 0], [math.nan, 5.0]))


def test_uauc_weighs_users_or_impressions():
    user, label, score = [0, 0, 1, 1, 1, 2], [1, 0, 1, 0, 0, 1], [1, 2, 3, 1, 2, 1]
    assert metrics.uauc(user, label, score) == 1 / 2                              # (0 + 1) / 2, user 2 has one class
    assert metrics.uauc(user, label, score, "impressions") == 3 / 5               # (2 * 0 + 3 * 1) / 5


def test_auc_log_loss_and_calibration_agree_with_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    label, logit = rng.integers(0, 2, 500), np.round(rng.normal(size=500), 1) + 0.01
    p = 1 / (1 + np.exp(-logit))
    assert metrics.auc(label, logit) == pytest.approx(sk.roc_auc_score(label, logit))
    assert metrics.log_loss(label, logit) == pytest.approx(sk.log_loss(label, p))
    assert metrics.log_loss([0], [1e4]) == pytest.approx(1e4)
    from sklearn.calibration import calibration_curve
    true, predicted = calibration_curve(label, p, n_bins=10)
    _, rows = metrics.calibration(label, p)
    assert np.allclose([r[0] for r in rows], predicted) and np.allclose([r[1] for r in rows], true)


def test_calibration_error_by_hand():
    error, _ = metrics.calibration([1, 0, 1, 1], [0.25, 0.25, 0.75, 0.75], bins=2)
    assert error == pytest.approx((2 * abs(0.25 - 0.5) + 2 * abs(0.75 - 1.0)) / 4)


def test_bins_of_the_calibration_weigh_by_their_rows_and_certainty_is_in_the_last():
    error, rows = metrics.calibration([1, 0, 1], [0.25, 0.25, 0.5], bins=2)
    assert error == pytest.approx((2 * 0.25 + 1 * 0.5) / 3) and rows == [(0.25, 0.5, 2), (0.5, 1.0, 1)]
    assert metrics.calibration([0, 1], [1.0, 0.5], bins=2)[1] == [(0.75, 0.5, 2)]


def test_the_interval_of_a_fair_coin_is_1_96_standard_errors_on_either_side():
    low, high = metrics.ranking_report([1] * 100 + [99] * 100, draws=4000)["recall@5_ci"]
    assert [low, high] == pytest.approx([0.5 - 1.96 * 0.5 / 200**0.5, 0.5 + 1.96 * 0.5 / 200**0.5], abs=0.008)


def test_shuffled_labels_give_an_auc_of_one_half():
    rng = np.random.default_rng(0)
    assert abs(metrics.auc(rng.integers(0, 2, 20000), rng.normal(size=20000)) - 0.5) < 0.02


def test_the_deviation_over_seeds_is_the_samples_and_of_one_seed_unknown():
    assert metrics.mean_std([1, 2, 3]) == (2, 1)
    assert math.isnan(metrics.mean_std([1])[1])
