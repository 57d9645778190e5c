"""The suite preference: scores of held-out answers and of sampled ones.

Rewards are ``beta * (log p_run - log p_base)`` of a completion, as in training.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from prefopt.data.collate import pair_mismatched
from prefopt.errors import UserError
from prefopt.evaluate.held_out import HeldOut, trained_on
from prefopt.evaluate.request import EvalRequest
from prefopt.evaluate.results import Results, asked_on
from prefopt.evaluate.rules import Rule, make_rule
from prefopt.evaluate.scores import (
    auc_of,
    bootstrap,
    difference_of_means,
    mean_of,
    share,
    share_change,
    wins,
)
from prefopt.evaluate.subject import Subject
from prefopt.report.score import BASE, CHANGE, RUN, Score

BETA, MAX_NEW_TOKENS = 0.1, 128  # defaults
REWARDS, LIKELIHOOD, ANSWERS = "rewards", "likelihood", "sampled answers"


def evaluate(subject: Subject, held_out: HeldOut, request: EvalRequest) -> Results:
    """Score the rows under base and run; with a rule, also sample answers of both.

    Raises:
        UserError: the base is unknown.
    """
    if BASE not in subject.models:
        raise UserError(
            f"rewards of {subject.folder} are relative to the model it started from, which is not known; give it with "
            "--base"
        )
    rule = None if request.rule is None else make_rule(request.rule)
    beta = float(subject.option("loss", "beta") or BETA)
    measured = _Measurement(subject, held_out, request)
    scores, details = measured.rewards(beta)
    how = [
        f"Rewards are {beta:g} times the log-ratio of run to base, in nats; intervals draw whole prompts. Accuracy, "
        "pairs: the "
        "desirable answer of a pair has the higher reward (Wilson's interval if each pair has its own prompt). "
        "Accuracy, all: any desirable answer has a higher reward than any undesirable one (area under the ROC curve). "
        "KL, "
        "mismatched: mean log-ratio of answers to other prompts, which is KTO's reference point before it is cut at 0."
    ]
    if rule is not None:
        found, samples = measured.sampled(rule)
        scores += found
        details["samples"] = samples
        how.append(
            f"One answer to each prompt from base and from run, sampled at temperature {measured.temperature:g} up to "
            f"{measured.max_new_tokens} tokens, and checked by the rule {request.rule}. Wins: the run's answer passes "
            "and the base's does not, ties counting half. KL, own answers: mean log-ratio of the run's own answers, "
            "which estimates KL(run || base) of the first so many tokens without bias, at temperature 1."
        )
    source = held_out.source or held_out.loaded.name
    on = asked_on(source, held_out.split, held_out.revision)
    data = dict.fromkeys((REWARDS, LIKELIHOOD, ANSWERS), on)
    return Results(scores, how, measured.warnings, details, data)


class _Measurement:
    """Measures base and run on one set of rows."""

    def __init__(self, subject: Subject, held_out: HeldOut, request: EvalRequest):
        self.subject, self.held_out, self.request = subject, held_out, request
        self.rows = list(held_out.rows)
        self.labels = np.array([row["label"] for row in self.rows], dtype=bool)
        self.groups = [row["group"] for row in self.rows]
        self.temperature = 1.0 if request.temperature is None else request.temperature
        self.max_new_tokens = request.max_new_tokens or MAX_NEW_TOKENS
        self.warnings = subject.other_format(held_out.tokens.conversational)
        if len(set(self.labels.tolist())) == 1:
            self.warnings.append("All rows have the same label, so there is neither a margin nor an accuracy of all.")
        seen = len(set(self.groups) & trained_on(subject.recipe))
        if seen:
            self.warnings.append(
                f"{seen} of {len(set(self.groups))} prompts were trained on, so this is not a held-out evaluation."
            )
        lost = held_out.tokens.counts["truncated"]
        if lost:
            self.warnings.append(f"{lost} answers are longer than max_length and were scored truncated.")

    def logps(self, rows: list[dict], what: str, limit: int | None) -> dict[str, np.ndarray]:
        """(n,) nats of base and run."""
        size = self.request.batch_size
        return {
            who: self.subject.logps(who, rows, max_length=limit, batch_size=size, desc=f"{what}, {who}")
            for who in (BASE, RUN)
        }

    def rewards(self, beta: float) -> tuple[list[Score], dict[str, Any]]:
        """Margin, accuracies, KL on mismatched answers and likelihoods."""
        limit = self.held_out.tokens.max_length
        logps = self.logps(self.rows, "given answers", limit)
        ratios = logps[RUN] - logps[BASE]  # (n,) nats
        rewards = beta * ratios
        scores = []
        if len(set(self.labels.tolist())) == 2:
            scores.append(self._boot(difference_of_means(rewards, self.labels), "margin", "reward", 0.0))
        scores += self._pair_accuracy(rewards)
        if len(set(self.labels.tolist())) == 2:
            auc = self._boot(auc_of(rewards, self.labels), "accuracy, all", "share", 0.5)
            scores.append(auc)
        scores += self._kl(limit)
        scores += self._likelihoods(logps, limit)
        details = {
            "beta": beta,
            "rows": self.held_out.tokens.counts,
            "fingerprint": self.held_out.tokens.fingerprint,
            "mean_reward": {
                name: float(rewards[side].mean()) if side.any() else None
                for name, side in (("desirable", self.labels), ("undesirable", ~self.labels))
            },
        }
        return scores, details

    def _boot(self, statistic: Callable[[np.ndarray], float], metric: str, unit: str, chance: float | None) -> Score:
        # The variance of an AUC is at most A (1 - A) / min(desirable, undesirable) (Birnbaum and Klose 1957), that of a
        # share of so many.
        sides = (set(np.asarray(self.groups)[side]) for side in (self.labels, ~self.labels))
        return bootstrap(
            statistic,
            self.groups,
            seed=self.request.seed,
            independent=min(map(len, sides)),
            task=REWARDS,
            metric=metric,
            model=RUN,
            unit=unit,
            chance=chance,
        )

    def _pair_accuracy(self, rewards: np.ndarray) -> list[Score]:
        """Of rows that came as pairs: consecutive rows of one line."""
        lines = np.asarray(self.held_out.loaded.rows["line"][:])[[row["row"] for row in self.rows]]
        first = np.flatnonzero((lines[:-1] == lines[1:]) & self.labels[:-1] & ~self.labels[1:])
        if not len(first):
            return []
        better = rewards[first] - rewards[first + 1]
        outcomes = np.where(better > 0, 1.0, np.where(better == 0, 0.5, 0.0))
        groups = [self.groups[place] for place in first]
        labels: dict[str, Any] = {"task": REWARDS, "metric": "accuracy, pairs", "model": RUN, "chance": 0.5}
        if len(set(groups)) == len(groups):  # one pair per prompt
            return [share(outcomes.tolist(), **labels)]
        return [bootstrap(mean_of(outcomes), groups, seed=self.request.seed, **labels)]

    def _kl(self, limit: int | None) -> list[Score]:
        """On each prompt with the answer to another prompt, if there is room for it."""
        partners = pair_mismatched(self.groups)
        mixed = [
            {"prompt_ids": row["prompt_ids"], "completion_ids": self.rows[other]["completion_ids"]}
            | {"group": row["group"]}
            for row, other in zip(self.rows, partners, strict=True)
            if other >= 0 and (limit is None or len(row["prompt_ids"]) < limit)
        ]
        if not mixed:
            self.warnings.append("All rows share one prompt, so there are no mismatched answers.")
            return []
        logps = self.logps(mixed, "mismatched answers", limit)
        score = bootstrap(
            mean_of(logps[RUN] - logps[BASE]),
            [row["group"] for row in mixed],
            seed=self.request.seed,
            task=REWARDS,
            metric="KL, mismatched",
            model=RUN,
            unit="nats",
        )
        return [score]

    def _likelihoods(self, logps: dict[str, np.ndarray], limit: int | None) -> list[Score]:
        """Of base, run and change, per answer and per token, for each label."""
        ends = [min(len(row["completion_ids"]), (limit or np.inf) - len(row["prompt_ids"])) for row in self.rows]
        tokens = np.array(ends, dtype=float)
        scores = []
        for name, side in (("desirable", self.labels), ("undesirable", ~self.labels)):
            if not side.any():
                continue
            groups = [group for group, kept in zip(self.groups, side, strict=True) if kept]
            for metric, sizes in (("per answer", None), ("per token", tokens[side])):
                compared = name == "desirable" and metric == "per token"  # its change is reported against 0
                for who, values in (*logps.items(), (CHANGE, logps[RUN] - logps[BASE])):
                    score = bootstrap(
                        mean_of(values[side], sizes),
                        groups,
                        seed=self.request.seed,
                        task=LIKELIHOOD,
                        metric=f"{name}, {metric}",
                        model=who,
                        unit="nats",
                        chance=0.0 if compared and who == CHANGE else None,
                    )
                    scores.append(score)
        return scores

    def sampled(self, rule: Rule) -> tuple[list[Score], list[dict]]:
        """Sample an answer of base and run to each distinct prompt, and apply the rule."""
        prompts, questions = self._prompts()
        settings = {
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.request.batch_size,
            "temperature": self.temperature,
            "seed": self.request.seed,
        }
        answers = {who: self.subject.generate(who, prompts, **settings) for who in (BASE, RUN)}
        texts = {
            who: [text.strip() for text in self.subject.tokenizer.batch_decode(made, skip_special_tokens=True)]
            for who, made in answers.items()
        }
        passed = {
            who: [float(rule(*pair)) for pair in zip(questions, made, strict=True)] for who, made in texts.items()
        }
        labels: dict[str, Any] = {"task": ANSWERS, "temperature": self.temperature}
        named = labels | {"metric": "pass the rule"}
        scores = [share(one, model=who, **named) for who, one in passed.items()]
        scores.append(share_change(passed[BASE], passed[RUN], **named))
        scores.append(wins(passed[BASE], passed[RUN], metric="wins", **labels))
        if self.temperature == 1.0:
            own = [
                {"prompt_ids": prompt, "completion_ids": answer}
                for prompt, answer in zip(prompts, answers[RUN], strict=True)
            ]
            logps = self.logps(own, "own answers", None)
            ratios = logps[RUN] - logps[BASE]
            scores.append(
                bootstrap(
                    mean_of(ratios),
                    range(len(ratios)),
                    seed=self.request.seed,
                    metric="KL, own answers",
                    model=RUN,
                    unit="nats",
                    **labels,
                )
            )
        samples = [
            {"prompt": question, "before": before, "after": after, "before_ok": bool(was), "after_ok": bool(now)}
            for question, before, after, was, now in zip(
                questions, texts[BASE], texts[RUN], passed[BASE], passed[RUN], strict=True
            )
        ]  # fmt: skip
        return scores, samples

    def _prompts(self) -> tuple[list[list[int]], list[str]]:
        """The token ids and the last user message of each distinct prompt."""
        encode = self.subject.encode(self.held_out.loaded.conversational)
        texts, questions = [], []
        for place in {row["group"]: row["row"] for row in reversed(self.rows)}.values():
            row = self.held_out.loaded.rows[place]
            prompt, _, _ = encode.texts(row["prompt"], row["completion"])
            texts.append(prompt)
            asked = row["prompt"]
            questions.append(asked if isinstance(asked, str) else asked[-1]["content"])
        return encode.ids(texts)[::-1], questions[::-1]
