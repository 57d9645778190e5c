"""Scores, standard errors and intervals: against formulas, brute force and planted dependence."""

import itertools
import json
import math

import numpy as np
import pytest

from prefopt.errors import UserError
from prefopt.evaluate.results import (
    Results,
    chance_sentences,
    plain,
    text_table,
    write_results,
)
from prefopt.evaluate.scores import (
    RESAMPLES,
    auc_of,
    bootstrap,
    difference_of_means,
    mean_of,
    share,
    share_change,
    wins,
)
from prefopt.report.score import BASE, CHANGE, RUN, Score, number, with_error
from prefopt.report.statistics import wilson

LABELS = {"task": "t", "metric": "m"}


def test_a_share_has_the_binomial_error_and_the_score_test_decides_about_chance():
    score = share([1.0] * 30 + [0.0] * 70, model=RUN, chance=0.25, **LABELS)
    assert (score.value, score.n) == (0.3, 100)
    assert score.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99), rel=1e-12)
    # Wilson's interval holds p0 exactly where |p - p0| <= 1.96 sqrt(p0 (1 - p0) / n)
    assert score.at_chance
    for chance in (0.2, 0.22, 0.25, 0.39, 0.4, 0.41):
        inside = abs(0.3 - chance) <= 1.959964 * math.sqrt(chance * (1 - chance) / 100)
        again = share([1.0] * 30 + [0.0] * 70, model=RUN, chance=chance, **LABELS)
        assert again.at_chance is inside, chance


def test_one_outcome_has_no_error():
    assert share([1.0], model=RUN, **LABELS).stderr is None
    alone = bootstrap(mean_of(np.array([3.0])), [0], seed=0, model=RUN, **LABELS)
    assert (alone.value, alone.stderr, alone.low, alone.high) == (3.0, None, -math.inf, math.inf)


@pytest.mark.parametrize(("value", "ends"), [(1.0, (0.7225, 1.0)), (0.0, (0.0, 0.2775))])
def test_equal_outcomes_have_wilsons_interval_and_no_error(value, ends):
    outcomes, groups = np.full(10, value), range(10)
    one = share(outcomes, model=RUN, **LABELS)
    other = bootstrap(mean_of(outcomes), groups, seed=0, model=RUN, **LABELS)
    for score in (one, other):
        assert (score.value, score.stderr) == (value, None)
        assert (score.low, score.high) == pytest.approx(ends, abs=5e-5)
    # four answers to each of ten prompts are ten outcomes, not forty
    outcomes, groups = np.full(40, value), np.repeat(range(10), 4)
    assert bootstrap(mean_of(outcomes), groups, seed=0, model=RUN, **LABELS).low == other.low


def test_a_perfect_ranking_rests_on_the_rarer_label():
    labels = np.array([True] * 4 + [False] * 12)
    statistic = auc_of(np.arange(16.0)[::-1], labels)
    score = bootstrap(statistic, range(16), seed=0, independent=4, model=RUN, **LABELS)
    assert (score.value, score.stderr) == (1.0, None)
    assert score.low == pytest.approx(4 / (4 + 1.959964**2), abs=1e-6)  # Wilson at 4 of 4


@pytest.mark.parametrize("labels", [{"model": RUN, "unit": "nats"}, {"model": CHANGE}])
def test_what_is_no_share_has_an_unknown_interval_where_nothing_varies(labels):
    score = bootstrap(mean_of(np.zeros(10)), range(10), seed=0, **LABELS, **labels)
    assert (score.value, score.stderr) == (0.0, None)
    assert (score.low, score.high) == (-math.inf, math.inf)


def test_no_change_at_all_has_no_error_and_an_interval():
    outcomes = [1.0] * 5 + [0.0] * 5
    score = share_change(outcomes, outcomes, **LABELS)
    assert (score.value, score.stderr) == (0.0, None)
    assert -score.low == pytest.approx(score.high) and score.high == pytest.approx(0.1666, abs=5e-5)


def test_wins_are_the_paired_change_on_another_scale():
    before, after = [1.0] * 20 + [0.0] * 20, [1.0] * 24 + [0.0] * 16
    change = share_change(before, after, **LABELS)
    score = wins(before, after, **LABELS)
    assert (score.model, score.chance, score.value) == (RUN, 0.5, pytest.approx(0.55))
    assert score.stderr == pytest.approx(change.stderr / 2)
    assert (score.low, score.high) == ((1 + change.low) / 2, (1 + change.high) / 2)
    tied = wins([1.0] * 8, [1.0] * 8, **LABELS)
    assert tied.value == 0.5 and tied.low < 0.4 < 0.6 < tied.high


def test_ties_count_half():
    score = share([1.0, 1.0, 0.5, 0.0], model=RUN, **LABELS)
    assert (score.value, score.n) == (0.625, 4)
    assert (score.low, score.high) == wilson(2.5, 4)


def test_small_numbers_and_shares_of_1_are_shown_with_what_is_known():
    assert [number(one) for one in (0.00002, -0.0004, 0.0005, 0.0)] == [
        "2.0e-05",
        "-4.0e-04",
        "0.001",
        "0.000",
    ]
    assert with_error(share([1.0] * 10, model=RUN, **LABELS)) == "1.000 (0.722 to 1.000)"
    nothing = bootstrap(mean_of(np.zeros(3)), range(3), seed=0, model=CHANGE, **LABELS)
    assert with_error(nothing) == "0.000"


def test_a_change_is_paired():
    before, after = [1.0] * 20 + [0.0] * 20, [1.0] * 24 + [0.0] * 16
    score = share_change(before, after, **LABELS)
    assert (score.model, score.chance) == (CHANGE, 0.0)
    assert score.value == pytest.approx(0.1, rel=1e-12)
    same_answers = score.high - score.low
    other = share_change(before, after[20:] + after[:20], **LABELS)  # same shares, other questions
    assert other.high - other.low > 1.5 * same_answers
    differences = np.subtract(after, before)
    assert score.stderr == pytest.approx(differences.std(ddof=1) / math.sqrt(40), rel=1e-12)


def test_the_bootstrap_has_the_error_of_a_mean():
    values = np.random.default_rng(1).normal(size=500)
    score = bootstrap(mean_of(values), range(500), seed=0, model=RUN, **LABELS)
    exact = values.std() / math.sqrt(500)  # of the distribution that is drawn from
    # the error of a standard deviation from R draws is 1 / sqrt(2 R) of it; five of them
    assert abs(score.stderr / exact - 1) < 5 / math.sqrt(2 * RESAMPLES)
    # the ends are quantiles of R draws, each known to about 2.7 / sqrt(R) standard errors; five of them
    slack = 5 * 2.7 / math.sqrt(RESAMPLES) * exact
    assert score.low == pytest.approx(values.mean() - 1.96 * exact, abs=slack)
    assert score.high == pytest.approx(values.mean() + 1.96 * exact, abs=slack)
    assert score == bootstrap(mean_of(values), range(500), seed=0, model=RUN, **LABELS)
    assert score != bootstrap(mean_of(values), range(500), seed=1, model=RUN, **LABELS)


def test_rows_of_a_group_count_once():
    values = np.random.default_rng(2).normal(size=60)
    once = bootstrap(mean_of(values), range(60), seed=0, model=RUN, **LABELS)
    groups = list(range(60)) * 9
    copies = bootstrap(mean_of(np.tile(values, 9)), groups, seed=0, model=RUN, **LABELS)
    assert copies.stderr == pytest.approx(once.stderr, rel=1e-9)
    alone = bootstrap(mean_of(np.tile(values, 9)), range(540), seed=0, model=RUN, **LABELS)
    assert alone.stderr < 0.5 * once.stderr  # what would be wrong


def test_a_mean_per_token_weighs_by_tokens():
    sums, sizes = np.array([-4.0, -30.0]), np.array([2.0, 10.0])
    assert mean_of(sums, sizes)(np.array([1, 1])) == pytest.approx(-34 / 12)
    assert mean_of(sums, sizes)(np.array([2, 0])) == -2.0
    assert math.isnan(mean_of(sums)(np.array([0, 0])))


def test_difference_and_auc_against_every_pair():
    random = np.random.default_rng(3)
    values, labels = random.integers(6, size=40).astype(float), random.random(40) < 0.4
    weights = random.integers(4, size=40)
    drawn = np.repeat(np.arange(40), weights)  # rows as often as they weigh
    up, down = values[drawn][labels[drawn]], values[drawn][~labels[drawn]]
    expected = np.mean([(a > b) + (a == b) / 2 for a, b in itertools.product(up, down)])
    assert auc_of(values, labels)(weights) == pytest.approx(expected, rel=1e-12)
    assert difference_of_means(values, labels)(weights) == pytest.approx(up.mean() - down.mean())
    assert math.isnan(auc_of(values, labels)(weights * labels))


def score(model=RUN, value=0.5, low=0.4, high=0.6, chance=None, **more) -> Score:
    return Score("task", "metric", model, value, 0.05, low, high, 100, chance, **more)


def test_what_is_said_about_chance():
    said = chance_sentences(
        [
            score(chance=0.45),
            score(chance=0.25),
            score(chance=0.9),
            score(model=BASE, chance=0.45),
            score(model=CHANGE, value=0.01, low=-0.1, high=0.1, chance=0.0),
            score(value=0.2, low=0.1, chance=0.0),
            score(value=0.0, low=-0.1, high=0.1, chance=0.0, unit="reward"),
        ]
    )
    assert [sentence.partition(": ")[2] for sentence in said] == [
        "0.500 is indistinguishable from chance (0.450); its 95 % interval is 0.400 to 0.600.",
        "0.500 is below chance (0.900): guessing would do better, so look at how the answers are scored before the "
        "model.",
        "the change from base to run is indistinguishable from 0 (95 % interval -0.100 to 0.100).",
        "0.000 is indistinguishable from 0 (95 % interval -0.100 to 0.100).",
    ]


def test_the_table_shows_every_score():
    table = text_table([score(), score(model=BASE, low=-math.inf, high=math.inf, n_shot=5)])
    lines = table.splitlines()
    assert lines[2].split() == "task metric run 0.500 0.050 0.400 to 0.600 100".split()
    assert lines[3].split() == "task, 5-shot metric base 0.500 0.050 unknown 100".split()
    assert "task, temperature 0.7" in text_table([score(temperature=0.7)])


def entry(*scores) -> dict:
    return plain({"scores": [one.as_dict() for one in scores], "details": {"x": math.nan}})


def test_suites_stand_beside_each_other_and_replace_themselves(tmp_path):
    write_results(tmp_path, "benchmarks", entry(score(low=-math.inf)))
    write_results(tmp_path, "classify", entry(score(), score(model=BASE)))
    path = write_results(tmp_path, "benchmarks", entry(score(value=0.75)))
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["format"] == 1 and set(content["suites"]) == {"benchmarks", "classify"}
    assert content["suites"]["benchmarks"]["details"] == {"x": None}
    lines = (tmp_path / "eval_summary.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "suite,task,metric,model,value,stderr,low,high,n,n_shot,unit,chance,at_chance"
    assert len(lines) == 4 and "benchmarks,task,metric,run,0.75,0.05,0.4,0.6,100,,share,,False" in lines
    assert sorted(file.name for file in tmp_path.iterdir()) == ["eval.json", "eval_summary.csv"]


def test_a_strange_eval_json_is_left_alone(tmp_path):
    (tmp_path / "eval.json").write_text('{"mine": 1}', encoding="utf-8")
    with pytest.raises(UserError, match="is not a file of `prefopt eval`"):
        write_results(tmp_path, "benchmarks", entry(score()))
    assert (tmp_path / "eval.json").read_text(encoding="utf-8") == '{"mine": 1}'


def test_a_write_that_fails_leaves_the_earlier_results(tmp_path, monkeypatch):
    import prefopt.evaluate.results as results

    path = write_results(tmp_path, "benchmarks", entry(score()))
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_results(tmp_path, "benchmarks", entry(score(value=0.9)))
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["eval.json", "eval_summary.csv"]
    assert Results([]).warnings == []
