"""What must be known to read the tables, in words: what went wrong, what was equal, what was measured."""

import math
from collections.abc import Sequence

from prefopt.compare.plan import FEWEST_TIMED, WARMUP
from prefopt.compare.summary import ACCURACIES, TOO_FEW, Line, accuracy_of, yardstick_of
from prefopt.report.score import BASE
from prefopt.report.words import NOTHING, number
from prefopt.train.methods import ANSWERS, METHODS


def notes_of(content: dict, lines: Sequence[Line]) -> list[str]:
    """The sentences, beginning with what went wrong.

    Args:
        content: of compare.json.
        lines: of ``lines_of``.
    """
    methods, runs = list(content["methods"]), content["runs"]
    seeds = sorted({run["seed"] for run in runs})
    notes = [f"{line.title}, {reason}" for line in lines for reason in line.stopped] + _nothing_learned(lines)
    if content["changes"]:
        head, *changes = content["changes"]
        notes.append(f"{head} {'; '.join(change.strip() for change in changes)}.")
    rows, steps = content["rows"], content["settings"]["steps"]
    if content["timed_steps"] < FEWEST_TIMED:
        notes.append(
            f"{steps} steps, less {WARMUP} of warm-up, are {TOO_FEW}: too few for a figure of time, so there is none."
        )
    if rows["shared_prompts"]:
        notes.append(
            f"{rows['shared_prompts']} prompts of the held-out rows were trained on: this is no held-out evaluation."
        )
    made, train = rows["paired_by_prompt"], rows["train"]
    if made:
        which = f"All {made:,}" if made == train else f"{made:,} of the {train:,}"
        notes.append(f"{which} pairs are answers to one prompt that were rated one by one; nobody compared them.")
    if rows["without_pair"]:
        notes.append(
            f"{rows['without_pair']:,} rows have no partner of the other label and were left out for every method."
        )
    for key, what in (
        ("device", "devices"),
        ("threads", "numbers of threads"),
        ("versions", "versions"),
    ):
        different = {str(run[key]) for run in runs}
        if len(different) > 1:
            notes.append(
                f"The runs had different {what}, so their times cannot be compared: {'; '.join(sorted(different))}."
            )
    return notes + _how(content, methods, seeds, steps)


def _how(content: dict, methods: list[str], seeds: list[int], steps: int) -> list[str]:
    """How it was measured."""
    rows, settings = content["rows"], content["settings"]
    repeated = "run" if len(seeds) == 1 else "runs"
    middle = "" if len(seeds) == 1 else ": the median and, in brackets, the lowest and the highest"
    beta = settings["loss.beta"] or 0.1
    accuracy = next((accuracy_of(run) for run in content["runs"] if "scores" in run), None)
    of = "the pairs"
    if accuracy is not None and accuracy["metric"] == ACCURACIES[1][1]:
        of = "all ways to pair a desirable with an undesirable answer"
    notes = [
        f"{len(seeds)} {repeated} of each method (seed {', '.join(map(str, seeds))}), a method after the other in each "
        f"round and every run in a process of its own{middle}.",
        f"Every method starts from the same model and makes {steps:,} steps with the same learning rate, on the same "
        f"{rows['train']:,} {rows['kind']} in the same order.",
    ]
    if any(METHODS[method].data == ANSWERS for method in methods):
        notes.append(
            "SFT learns from the desirable answers alone: it goes through the same prompts and sees half of the "
            "sequences."
        )
    if content["timed_steps"] >= FEWEST_TIMED:
        notes.append(
            f"Times are of the {content['timed_steps']:,} steps after {WARMUP} of warm-up, making the batches included "
            "and logging excluded, with the device synchronised at the end of each; the training time is of all steps. "
            "Tokens are "
            "those trained on: what a method scores again, under the reference model or for its reference point, costs "
            "time and is not counted. Efficiency is tokens per second relative to "
            f"{METHODS[yardstick_of(methods)].title} in the same round."
        )
    if settings["loss.precompute_ref_logps"]:
        notes.append("The reference's scores were computed before the first step, outside all times.")
    peaks = sorted({run["peak"] for run in content["runs"] if "peak" in run})
    libraries = ", Python and its libraries included" if "resident" in str(peaks) else ""
    notes += [
        f"Peak memory is the most bytes {'; or '.join(peaks)}{libraries}.",
        f"Margin and accuracy are of {rows['held_out']:,} held-out {rows['kind']}: rewards are {beta:g} times the "
        "log-ratio "
        f"to the base model in nats, whatever the method; accuracy is the share of {of} in which the desirable answer "
        "has the higher reward. Learned: the 95 % interval of the "
        "margin, for SFT of the change in the desirable answers' likelihood, is above 0.",
        "The loss is another function for each method, so losses compare with nothing in another line; first and last "
        "are means of a tenth of the steps.",
    ]
    left: dict[str, list[str]] = {}
    for method, one in content["methods"].items():
        for option in one["left_out"]:
            left.setdefault(option, []).append(METHODS[method].title)
    if left:
        listed = "; ".join(f"{option} ({', '.join(names)})" for option, names in left.items())
        notes.append(
            f"Options of the recipe that mean nothing, or something else, to a method were left out for it: {listed}."
        )
    return notes


def _nothing_learned(lines: Sequence[Line]) -> list[str]:
    """A sentence for each method that learned next to nothing, as the report of a run would say it."""
    said = []
    for line in lines:
        if line.method == BASE or not line.runs or METHODS[line.method].data == ANSWERS:
            continue
        margin = line.values["margin"].median if "margin" in line.values else math.inf
        if abs(margin) < NOTHING:
            said.append(f"{line.title} learned next to nothing: the reward margin ended at {number(margin)}.")
    return said
