"""A norm against itself, thinned: the full form is ``python tests/bench/null.py``."""

import pytest
from null import coverage, null_reports, power, trained


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("null") / "runs"
    return trained(folder, 40, ["data.limit=300", "epochs=4", "eval_every=4", "log_every=1000", "replicas=20"])


@pytest.mark.parametrize(("num_variants", "n"), [(1, 3), (1, 10), (4, 5)])
def test_a_norm_against_itself_is_seldom_judged(records, num_variants, n):
    found = null_reports(records, n, num_variants, draws=100)
    # 5% and 3% plus three standard errors of 100 draws
    assert found["false"] <= 0.05 + 0.065
    assert max(found["faster"], found["slower"]) <= 0.03 + 0.051
    assert 0.85 < found["ratio"] < 1.18


@pytest.mark.parametrize("num_variants", [1, 4])
def test_intervals_cover_what_is_true(num_variants):
    for share in coverage(5, num_variants, draws=1500).values():
        assert 0.93 - 0.015 <= share <= 0.97 + 0.015  # standard error of 1500 draws: 0.006


def test_seeds_as_planned_find_the_difference():
    n, share = power(1.0, draws=2000)
    assert n == 10 and abs(share - 0.8) < 0.03  # standard error: 0.009
