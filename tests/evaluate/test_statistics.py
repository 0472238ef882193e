"""Claims about the statistics: against closed forms, against scipy, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from helpers.evaluate import statistics


def paired(n, wins, losses, both):
    """Scores of a baseline and a candidate with so many wins and losses, `both` right on both sides."""
    a = np.r_[np.zeros(wins), np.ones(losses), np.ones(both), np.zeros(n - wins - losses - both)]
    b = np.r_[np.ones(wins), np.zeros(losses), np.ones(both), np.zeros(n - wins - losses - both)]
    return a.tolist(), b.tolist()


def test_mcnemar_is_the_exact_binomial_of_the_items_on_which_the_two_differ():
    for wins, losses in ((0, 0), (1, 0), (8, 1), (30, 12), (65, 9)):
        tail = (
            sum(math.comb(wins + losses, k) for k in range(max(wins, losses), wins + losses + 1)) / 2 ** (wins + losses)
            if wins + losses
            else 1
        )
        a, b = paired(100, wins, losses, 20)
        assert statistics.pair("a", "b", a, b)["p"] == pytest.approx(min(1, 2 * tail), rel=1e-9)


def test_a_paired_test_sees_what_an_unpaired_one_misses():
    a, b = paired(220, 24, 8, 100)
    one = statistics.settle([statistics.pair("base", "tuned", a, b)])[0]
    unpaired = stats.ttest_ind(a, b).pvalue
    assert one["p"] < 0.01 < 0.05 < unpaired
    assert one["verdict"] == "better"


def test_the_sentence_says_direction_points_interval_and_n():
    a, b = paired(180, 65, 9, 51)
    one = statistics.settle([statistics.pair("base", "tuned", a, b)])[0]
    assert one["sentence"].startswith("better by 31 points, 95 % interval 2") and one["sentence"].endswith("; n = 180")
    back = statistics.settle([statistics.pair("tuned", "base", b, a)])[0]
    assert (
        back["sentence"].startswith("worse by 31 points, 95 % interval 2") and back["difference"] == -one["difference"]
    )


def test_identical_candidates_come_out_identical_and_name_what_could_hide():
    a, _ = paired(150, 20, 10, 50)
    one = statistics.settle([statistics.pair("x", "y", a, a)])[0]
    assert (one["verdict"], one["p"], one["difference"], one["low"], one["high"]) == ("identical", 1.0, 0.0, 0.0, 0.0)
    assert 0 < one["detectable"] < 0.05 and "n = 150" in one["sentence"]


def test_a_small_difference_on_few_items_is_no_clear_difference():
    a, b = paired(40, 3, 1, 20)
    one = statistics.settle([statistics.pair("x", "y", a, b)])[0]
    assert one["verdict"] == "no clear difference" and one["detectable"] > 0.1
    assert "no clear difference" in one["sentence"] and "this sample shows differences from" in one["sentence"]


def test_the_bootstrap_interval_covers_the_truth_about_95_times_in_100():
    rng, covered = np.random.default_rng(3), 0
    for trial in range(200):
        low, high = statistics.middle(statistics.bootstrap(rng.random(120) < 0.3, trial, 1000))
        covered += low <= 0.3 <= high
    assert 178 <= covered <= 199


def test_wilson_has_width_at_zero_and_one_and_agrees_with_scipy():
    assert statistics.wilson(0, 100)[0] == 0 and 0.03 < statistics.wilson(0, 100)[1] < 0.05
    for right, n in ((0, 10), (3, 10), (77, 100), (100, 100)):
        expected = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
        assert statistics.wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_holm_orders_multiplies_and_never_decreases():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0] and statistics.holm([]) == []


def test_many_comparisons_of_equal_models_rarely_find_one_better():
    rng, found = np.random.default_rng(5), 0
    for trial in range(40):
        base = (rng.random(120) < 0.5).astype(float)
        others = [(rng.random(120) < 0.5).astype(float) for _ in range(6)]
        results = statistics.settle([statistics.pair("b", str(i), base, o, seed=trial) for i, o in enumerate(others)])
        found += any(r["verdict"] in ("better", "worse") for r in results)
    assert found <= 5  # 5 % of 40 expected at most; without correction about 10


def test_clusters_widen_the_standard_error_as_the_design_effect_says():
    rng = np.random.default_rng(1)
    levels = rng.normal(0, 1, 30)
    values, clusters = np.repeat(levels, 20), np.repeat([str(i) for i in range(30)], 20)
    plain, clustered = statistics.standard_error(values), statistics.standard_error(values, clusters.tolist())
    assert clustered / plain == pytest.approx(math.sqrt(20), rel=0.06)  # items of a cluster are copies: 20 count as one
    wide, narrow = (statistics.share(values, "nats", of) for of in (clusters.tolist(), None))
    assert (wide["high"] - wide["low"]) > 3 * (narrow["high"] - narrow["low"])


def test_clusters_that_are_single_items_change_nothing():
    x = np.random.default_rng(0).random(50)
    assert statistics.standard_error(x, [str(i) for i in range(50)]) == pytest.approx(statistics.standard_error(x))


def test_the_detectable_effect_is_detected_80_times_in_100():
    rng, n, seen = np.random.default_rng(9), 200, 0
    flips = rng.random(n) < 0.2
    one = statistics.detectable(np.where(flips, rng.choice([-1, 1], n), 0))
    for _ in range(300):
        up = 0.1 + one / 2
        draw = rng.random(n)
        difference = np.where(draw < up, 1, np.where(draw < 0.2, -1, 0))
        seen += stats.ttest_1samp(difference, 0).pvalue < 0.05
    assert 0.7 <= seen / 300 <= 0.9


def test_undefined_scores_are_left_out_of_both_sides():
    one = statistics.pair("a", "b", [1, None, 0, 1], [1, 1, None, 0])
    assert (one["n"], one["wins"], one["losses"], one["ties"]) == (2, 0, 1, 1)
    assert statistics.pair("a", "b", [None], [1]) is None
    assert statistics.share([None, float("nan")])["value"] is None and statistics.share([])["n"] == 0


def test_the_same_seed_gives_the_same_interval_and_another_does_not():
    x = np.random.default_rng(0).random(300)
    first, again, other = (statistics.share(x, seed=seed) for seed in (4, 4, 5))
    assert first == again != other
