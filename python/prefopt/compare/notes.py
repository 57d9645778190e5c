"""Notes on the tables: problems, what was equal, and how the figures were measured."""

from collections.abc import Sequence
from typing import Any

from prefopt.compare.plan import FEWEST_TIMED, WARMUP
from prefopt.compare.summary import ACCURACIES, TOO_FEW, Line, accuracy_of, yardstick_of
from prefopt.report.score import BASE
from prefopt.report.statistics import number
from prefopt.report.verdict import NEGLIGIBLE
from prefopt.train.methods import ANSWERS, METHODS


def notes_of(content: dict[str, Any], lines: Sequence[Line]) -> list[str]:
    """The sentences, problems first.

    Args:
        content: of compare.json.
        lines: of ``lines_of``.
    """
    runs, rows, steps = content["runs"], content["rows"], content["settings"]["steps"]
    notes = [f"{line.title}, {reason}" for line in lines for reason in line.stopped] + _nothing_learned(lines)
    if content["changes"]:
        head, *changes = content["changes"]
        notes.append(f"{head} {'; '.join(change.strip() for change in changes)}.")
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
        notes.append(f"{which} pairs are answers to one prompt that were rated one by one, not against each other.")
    if rows["without_pair"]:
        notes.append(
            f"{rows['without_pair']:,} rows have no partner of the other label and were left out for every method."
        )
    for key, what in (("device", "devices"), ("threads", "numbers of threads"), ("versions", "versions")):
        different = {str(run[key]) for run in runs}
        if len(different) > 1:
            notes.append(
                f"The runs had different {what}, so their times cannot be compared: {'; '.join(sorted(different))}."
            )
    return notes + _how(content)


def _how(content: dict[str, Any]) -> list[str]:
    """How the figures were measured."""
    methods, runs, rows, settings = list(content["methods"]), content["runs"], content["rows"], content["settings"]
    seeds = sorted({run["seed"] for run in runs})
    beta = settings["loss.beta"] or 0.1
    accuracy = next((accuracy_of(run) for run in runs if "scores" in run), None)
    unpaired = accuracy is not None and accuracy["metric"] == ACCURACIES[1][1]
    of = "all combinations of a desirable and an undesirable answer" if unpaired else "the pairs"
    several = len(seeds) > 1
    notes = [
        f"{len(seeds)} {'runs' if several else 'run'} of each method (seed {', '.join(map(str, seeds))}), one method "
        "after the other in each round and every run in a process of its own"
        f"{': the median and, in brackets, the lowest and the highest' if several else ''}.",
        f"Every method starts from the same model and makes {settings['steps']:,} steps with the same learning rate, "
        f"on the same {rows['train']:,} {rows['kind']} in the same order.",
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
            "Tokens are those trained on: further forward passes, of the reference model or for the reference point, "
            "take time and are not counted. Efficiency is tokens per second relative to "
            f"{METHODS[yardstick_of(methods)].title} in the same round."
        )
    if settings["loss.precompute_ref_logps"]:
        notes.append("The log-probabilities of the reference were computed before the first step, outside all times.")
    peaks = "; or ".join(sorted({run["peak"] for run in runs if "peak" in run}))
    libraries = ", Python and its libraries included" if "resident" in peaks else ""
    notes += [
        f"Peak memory is the most bytes {peaks}{libraries}.",
        f"Margin and accuracy are of {rows['held_out']:,} held-out {rows['kind']}: rewards are {beta:g} times the "
        f"log-ratio to the base model in nats, for every method; accuracy is the share of {of} in which the desirable "
        "answer has the higher reward. Learned: the 95 % interval of the margin, for SFT of the change in the "
        "desirable answers' likelihood, is above 0.",
        "Each method has another loss function, so losses of different methods cannot be compared; first and last are "
        "means of a tenth of the steps.",
    ]
    left: dict[str, list[str]] = {}
    for method, one in content["methods"].items():
        for option in one["left_out"]:
            left.setdefault(option, []).append(METHODS[method].title)
    if left:
        listed = "; ".join(f"{option} ({', '.join(names)})" for option, names in left.items())
        notes.append(
            "Options of the recipe that a method does not take, or takes with another meaning, were left out for it: "
            f"{listed}."
        )
    return notes


def _nothing_learned(lines: Sequence[Line]) -> list[str]:
    """A sentence for each method that learned next to nothing, as in the report of a run."""
    notes = []
    for line in lines:
        if line.method != BASE and METHODS[line.method].data != ANSWERS and "margin" in line.values:
            margin = line.values["margin"].median
            if abs(margin) < NEGLIGIBLE:
                notes.append(f"{line.title} learned next to nothing: the reward margin ended at {number(margin)}.")
    return notes
