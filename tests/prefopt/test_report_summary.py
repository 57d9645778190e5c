"""Each kind of run gets its verdict, with the figures of the run."""

from pathlib import Path

import pytest

from prefopt.report.read import Run
from prefopt.report.summary import summarize
from prefopt.report.verdict import judgement


def run_with(margins=(), losses=(), record=None, summary=None, samples=()):
    logs = [{"step": i + 1, "rewards/margins": value} for i, value in enumerate(margins)]
    logs += [{"step": i + 1, "loss": value} for i, value in enumerate(losses)]
    return Run(Path("run"), record=record or {}, logs=logs, summary=summary or {}, samples=list(samples))


def samples(before: int, after: int, n: int):
    """n samples; the first ``before`` were good before, the first ``after`` after."""
    return [
        {"prompt": "?", "before": "b", "after": "a", "before_ok": i < before, "after_ok": i < after} for i in range(n)
    ]


LEARNED = [0.0, 0.1, 0.5, 0.9, 1.0, 1.1, 1.0, 1.1]


@pytest.mark.parametrize("margins", [LEARNED, [0.0, 1e-4, -1e-4, 2e-4, 1e-4], [0.0, -0.4, -0.5, -0.5, -0.6]])
def test_training_rows_alone_prove_nothing(margins):
    summary = summarize(run_with(margins))
    assert summary.tone == "unclear" and summary.verdict.startswith("The run had no held-out rows, so nothing was")


@pytest.mark.parametrize("margins", [[0.5, 0.6, 0.7], []])
def test_too_few_logs(margins):
    summary = summarize(run_with(margins))
    assert summary.tone == "unclear" and "Too little was logged" in summary.verdict


@pytest.mark.parametrize(
    ("margin", "error", "training", "tone", "words"),
    [
        (0.46, 0.05, LEARNED, "good", "prefer desirable answers: on held-out rows the margin is 0.4600 (95 % interval"),
        (0.46, None, LEARNED, "good", "on held-out rows the margin is 0.4600."),
        (0.46, 0.4, LEARNED, "bad", "but not on the held-out rows, where the margin is 0.4600 (95 % interval -0.3"),
        (0.46, 0.4, [0.0] * 8, "unclear", "It is not clear that the model learned"),
        (-0.3, 0.05, [0.0] * 8, "bad", "The model learned the opposite"),
        (0.004, 0.001, [0.0] * 8, "bad", "The model learned next to nothing"),
        (-0.13, 0.2, LEARNED, "bad", "on the training rows, but not on the held-out rows"),
    ],
)
def test_verdict_from_the_margin_on_held_out_rows(margin, error, training, tone, words):
    run = run_with(training)
    run.logs.append({"step": 8, "eval_rewards/margins": margin, "eval_rewards/margins_standard_error": error})
    summary = summarize(run)
    assert summary.tone == tone and words in summary.verdict


def evaluated(before: dict, after: dict, margin: float = 0.46):
    """A run that learned by its margin, with these held-out values."""
    run = run_with(LEARNED, samples=samples(10, 90, 100))
    for step, values in ((0, before), (8, after | {"rewards/margins": margin})):
        run.logs.append({"step": step} | {f"eval_{key}": value for key, value in values.items()})
    return run


def test_a_collapsed_model_is_no_success_whatever_the_margin_and_the_judge():
    # the run at 2e-4 on a real model: 96 % by the rule, a margin of 0.46
    start = {"entropy": 1.86, "log_ratios/chosen": 0.0}
    summary = summarize(evaluated(start, {"entropy": 2.97, "log_ratios/chosen": -0.77}))
    assert summary.tone == "bad"
    assert summary.verdict == (
        "The model collapsed: desirable answers lost 0.77 nats per token, the entropy went from 1.86 to 2.97 nats."
    )
    # entropy down and rows without a gradient are signs as well, each alone with the fall
    down = summarize(evaluated(start, {"entropy": 1.1, "log_ratios/chosen": -0.3}))
    assert down.verdict.startswith("The model collapsed") and down.tone == "bad"
    flat = summarize(evaluated(start, {"entropy": 1.9, "log_ratios/chosen": -0.3, "flat_rows": 0.64}))
    assert "64 % of the rows have almost no gradient left" in flat.verdict


def test_a_margin_from_falling_answers_alone_is_no_success():
    start = {"entropy": 1.9, "log_ratios/chosen": 0.0}
    summary = summarize(evaluated(start, {"entropy": 2.0, "log_ratios/chosen": -0.14}))
    assert summary.tone == "bad" and summary.verdict.startswith("Desirable answers became less likely, by 0.14 nats")


def test_an_intact_model_gets_its_success():
    # enhanced_kto on the same rows at the same rate
    start = {"entropy": 1.86, "log_ratios/chosen": 0.0}
    summary = summarize(evaluated(start, {"entropy": 1.91, "log_ratios/chosen": -0.025}))
    assert summary.tone == "good" and "The answers became better: +80.0 points" in summary.verdict


def test_without_held_out_rows_damage_is_read_from_the_training_logs():
    run = run_with(LEARNED)
    run.logs += [{"step": 1, "entropy": 1.88, "log_ratios/chosen": -0.01}]
    run.logs += [{"step": 9, "entropy": 2.97, "log_ratios/chosen": -0.8}]
    assert summarize(run).verdict.startswith("The model collapsed: desirable answers lost 0.80 nats per token")


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


def test_rewards_without_a_reference_model_are_not_compared_with_one():
    logs = [{"step": i, "rewards/chosen": -9.0, "rewards/rejected": -12.0} for i in (1, 2)]
    remark = "less likely than under the reference model"
    assert remark in " ".join(summarize(Run(Path("run"), logs=logs)).sentences)
    alone = Run(Path("run"), logs=logs, record={"reference": {"kind": "none"}})
    assert remark not in " ".join(summarize(alone).sentences)


@pytest.mark.parametrize(
    ("losses", "tone", "words"),
    [
        ([6.5, 6.4, 5.0, 4.0, 3.0, 2.5, 2.1, 2.0], "unclear", "On its training rows the loss went from 6.45 to 2.05"),
        ([2.0, 2.1, 2.0, 2.0, 2.0, 2.0, 2.1, 2.2], "bad", "The model learned nothing"),
        ([2.0, 1.0, 0.5, 0.1], "unclear", "Too little was logged"),
    ],
)
def test_a_run_without_margins_is_judged_by_its_loss(losses, tone, words):
    summary = summarize(run_with(losses=losses))
    assert summary.tone == tone and words in summary.verdict


@pytest.mark.parametrize(("after", "tone"), [(2.5, "good"), (3.5, "bad")])
def test_the_loss_on_held_out_rows_decides_where_there_is_no_margin(after, tone):
    run = run_with(losses=[3.0, 2.9, 2.0, 1.0, 0.5, 0.1, 0.1, 0.1])
    run.logs += [{"step": 0, "eval_loss": 3.0}, {"step": 8, "eval_loss": after}]
    summary = summarize(run)
    assert summary.tone == tone and f"the loss on held-out rows went from 3 to {after:.3g}" in summary.verdict
