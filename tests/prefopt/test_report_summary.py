"""Each kind of run gets its verdict, with the figures of the run."""

from pathlib import Path

import pytest

from prefopt.report.read import Run
from prefopt.report.summary import judgement, summarize


def run_with(margins=(), losses=(), record=None, summary=None, samples=()):
    logs = [{"step": i + 1, "rewards/margins": value} for i, value in enumerate(margins)]
    logs += [{"step": i + 1, "loss": value} for i, value in enumerate(losses)]
    return Run(Path("run"), record=record or {}, logs=logs, summary=summary or {}, samples=list(samples))


def samples(before: int, after: int, n: int):
    """n samples; the first ``before`` were good before, the first ``after`` after."""
    return [
        {"prompt": "?", "before": "b", "after": "a", "before_ok": i < before, "after_ok": i < after} for i in range(n)
    ]


@pytest.mark.parametrize(
    ("margins", "tone", "words"),
    [
        ([0.0, 0.1, 0.5, 0.9, 1.0, 1.1, 1.0, 1.1], "good", "learned to prefer desirable"),
        ([0.0, 1e-4, -1e-4, 2e-4, 1e-4], "bad", "learned next to nothing"),
        ([0.0, -0.4, -0.5, -0.5, -0.6], "bad", "learned the opposite"),
        ([0.0, 0.9, -0.7, 0.8, -0.6], "unclear", "smaller than it varies from log to log"),
        ([0.0, 0.3, 0.3, 0.3, 0.3], "good", "learned to prefer desirable"),
        ([0.5, 0.6, 0.7], "unclear", "Too little was logged"),
        ([], "unclear", "Too little was logged"),
    ],
)
def test_verdict_from_the_margin(margins, tone, words):
    summary = summarize(run_with(margins))
    assert summary.tone == tone and words in summary.verdict


@pytest.mark.parametrize(
    ("before", "after", "tone", "words"),
    [
        (40, 80, "good", "became better: +40.0 points"),
        (80, 40, "bad", "became worse: -40.0 points"),
        (40, 42, "unclear", "No clear change in the answers (+2.0 points"),
    ],
)
def test_verdict_from_the_samples_comes_first(before, after, tone, words):
    summary = summarize(run_with([0.0, 1.0, 1.0, 1.1, 1.0], samples=samples(before, after, 100)))
    assert summary.tone == tone and words in summary.verdict


def test_sentences_have_the_intervals():
    # 40 and 80 of 100 by Wilson's formula: 0.3094 to 0.4980, and 0.7112 to 0.8666
    sentences = " ".join(summarize(run_with(samples=samples(40, 80, 100))).sentences)
    assert "40.0 % before (30.9 % to 49.8 %) and 80.0 % after (71.1 % to 86.7 %), n = 100" in sentences
    assert "change of +40.0 points" in sentences


def test_logs_of_training_have_a_spread_and_no_interval():
    # of the last four, 1.0, 1.1, 1.0 and 1.1: mean 1.05, standard deviation 0.1 / sqrt(3)
    sentences = " ".join(summarize(run_with([0.0, 0.5, 1.0, 1.1, 1.0, 1.1])).sentences)
    assert "was on average 1.05 above an undesirable one's" in sentences
    assert "varied with a standard deviation of 0.0577" in sentences
    assert "interval" not in sentences


def test_separated_rewards_without_better_answers_get_a_warning():
    learned = [0.0, 1.0, 1.0, 1.1, 1.0]
    remark = "sampled answers are not clearly better"
    assert remark in " ".join(summarize(run_with(learned, samples=samples(40, 41, 100))).sentences)
    assert remark not in " ".join(summarize(run_with(learned, samples=samples(40, 80, 100))).sentences)


def test_shares_without_samples_have_no_paired_interval():
    summary = {"metric": "share", "kind": "share", "before": 0.25, "after": 0.5, "n": 40}
    judged = judgement(run_with(summary=summary))
    assert judged.before[0] == 0.25 and judged.after[0] == 0.5 and judged.difference is None


@pytest.mark.parametrize("wrong", [{"n": 0}, {"after": 1.2}, {"before": None}, {"kind": "margin"}])
def test_values_that_are_no_share_give_no_judgement(wrong):
    summary = {"metric": "share", "kind": "share", "before": 0.25, "after": 0.5, "n": 40} | wrong
    assert judgement(run_with(summary=summary)) is None


def test_another_metric_has_its_own_sentence():
    summary = {"metric": "reward margin on held-out rows", "before": 0.0, "after": 1.234, "n": 50}
    sentences = summarize(run_with(summary=summary)).sentences
    assert "Reward margin on held-out rows: 0 before, 1.23 after (50 rows)." in sentences


def test_a_stopped_run_has_its_reason():
    record = {"status": "stopped", "stopped_by": "NonFiniteError: loss is NaN at step 7"}
    assert "NaN at step 7" in summarize(run_with(record=record)).sentences[0]


def test_loss_is_compared_between_quarters():
    sentences = summarize(run_with(losses=[0.5, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.1])).sentences
    assert sentences == ["The loss went from 0.5000 (first 2 logs) to 0.1500 (last 2 logs)."]


def test_held_out_rows_overrule_a_margin_on_the_training_rows():
    logs = [{"step": i, "rewards/margins": 1.0 + 0.01 * (i % 2)} for i in range(1, 7)]
    good = summarize(Run(Path("run"), logs=logs))
    assert good.tone == "good"
    assert "In the last 4 of 6 logs a desirable row's reward was on average 1 above" in good.sentences[0]
    held_out = {"step": 6, "eval_rewards/margins": -0.13}
    summary = summarize(Run(Path("run"), logs=[*logs, held_out]))
    assert summary.tone == "bad"
    assert summary.verdict.endswith("but not on the held-out rows, where the margin is -0.1300.")
    fine = summarize(Run(Path("run"), logs=[*logs, held_out | {"eval_rewards/margins": 0.4}]))
    assert fine.tone == "good"


def test_rewards_without_a_reference_model_are_not_compared_with_one():
    logs = [{"step": i, "rewards/chosen": -9.0, "rewards/rejected": -12.0} for i in (1, 2)]
    remark = "less likely than under the reference model"
    assert remark in " ".join(summarize(Run(Path("run"), logs=logs)).sentences)
    alone = Run(Path("run"), logs=logs, record={"reference": {"kind": "none"}})
    assert remark not in " ".join(summarize(alone).sentences)


@pytest.mark.parametrize(
    ("losses", "tone", "words"),
    [
        ([6.5, 6.4, 5.0, 4.0, 3.0, 2.5, 2.1, 2.0], "good", "the loss fell from 6.45 to 2.05"),
        ([2.0, 2.1, 2.0, 2.0, 2.0, 2.0, 2.1, 2.2], "bad", "The model learned nothing"),
        ([2.0, 3.0, 2.5, 2.5, 2.5, 2.5, 1.9, 2.9], "unclear", "fell by less than it varies"),
        ([2.0, 1.0, 0.5, 0.1], "unclear", "Too little was logged"),
    ],
)
def test_a_run_without_margins_is_judged_by_its_loss(losses, tone, words):
    summary = summarize(run_with(losses=losses))
    assert summary.tone == tone and words in summary.verdict
