"""Filter, balance and split the answers of `prefopt data build`.

An answer is a number with a few attributes; its text is in the spool. Each dropped answer has a reason, so that the
answers made are those kept plus those dropped. All random choices sort by a hash of (seed, name): they do not depend on
the order of the rows, and stay the same when a source grows.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from prefopt.data.build.plan import Plan, Source
from prefopt.errors import DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"

OTHER_LANGUAGE = "in another language"
PER_GROUP = "over the rows of a group"
CONTRADICTORY = "the same answer has both labels"
REPEATED = "repeated within its source"
ELSEWHERE = "already in another source"
PER_CATEGORY = "over the groups of a category"
GROUPS = "over the groups of a source"
RAN_OUT = "after a source ran out"
MAX_ROWS = "over max_rows"
REASONS = (
    OTHER_LANGUAGE, PER_GROUP, CONTRADICTORY, REPEATED, ELSEWHERE, PER_CATEGORY, GROUPS, RAN_OUT, MAX_ROWS,
)  # fmt: skip


class Answers:
    """The attributes of every answer, by number, and the groups of answers.

    Groups that share a prompt are joined, since the same question in two sources must be in one split.
    """

    def __init__(self) -> None:
        self.source: list[int] = []
        self.line: list[int] = []
        self.label: list[bool] = []
        self.key: list[bytes] = []  # of prompt and completion, folded
        self.group: list[int] = []  # within its source
        self.category: list[str] = []
        self.reason: list[str | None] = []  # why it was dropped
        self._names: list[str] = []  # of the groups
        self._numbers: dict[str, int] = {}
        self._parent: list[int] = []
        self._least: list[str] = []  # by root: the first name of the joined groups
        self._of_prompt: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.source)

    def add(
        self,
        source: int,
        line: int,
        label: bool,
        prompt: bytes,
        key: bytes,
        group: str,
        category: str,
        reason: str | None = None,
    ) -> None:
        """Add an answer; ``prompt`` is a digest of the prompt, ``key`` of prompt and completion."""
        number = self._numbers.setdefault(group, len(self._names))
        if number == len(self._names):
            self._names.append(group)
            self._parent.append(number)
            self._least.append(group)
        self._join(number, self._of_prompt.setdefault(prompt, number))
        self.source.append(source)
        self.line.append(line)
        self.label.append(label)
        self.key.append(key)
        self.group.append(number)
        self.category.append(category)
        self.reason.append(reason)

    def alive(self, source: int | None = None) -> list[int]:
        """The answers that were not dropped, in the order they were read."""
        return [
            number
            for number, reason in enumerate(self.reason)
            if reason is None and source in (None, self.source[number])
        ]

    def drop(self, numbers: Iterable[int], reason: str) -> None:
        """Drop answers for a reason."""
        for number in numbers:
            self.reason[number] = reason

    def group_name(self, number: int) -> str:
        """The group of an answer: the alphabetically first name of the joined groups."""
        return self._least[self._root(self.group[number])]

    def _root(self, group: int) -> int:
        while self._parent[group] != group:
            self._parent[group] = self._parent[self._parent[group]]
            group = self._parent[group]
        return group

    def _join(self, first: int, second: int) -> None:
        first, second = self._root(first), self._root(second)
        if first != second:
            self._parent[second] = first
            self._least[first] = min(self._least[first], self._least[second])


def digest(seed: int | str, *parts: str) -> bytes:
    """A hash of the seed and the parts, 32 bytes to sort by."""
    text = "\x1f".join((str(seed), *parts))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def choose(answers: Answers, plan: Plan) -> dict[str, list[int]]:
    """Drop answers as the plan requires, and assign the rest to splits.

    Returns:
        {split: numbers of its answers, in the order of the file}.

    Raises:
        DataError: a split is empty, or the train split has one label only and the plan does not set ``one_label``.
    """
    for number, source in enumerate(plan.sources):
        if source.per_group is not None:
            _cap_rows_of_groups(answers, number, source.per_group, plan.seed)
    _drop_contradictory(answers)
    _drop_repeated(answers)
    for number, source in enumerate(plan.sources):
        _cap_groups(answers, number, source, plan)
    _round_robin(answers, plan)
    return _splits(answers, plan)


def _cap_rows_of_groups(answers: Answers, source: int, most: int, seed: int) -> None:
    """Keep at most ``most`` rows (a pair is one row) of each group of a source."""
    groups: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in answers.alive(source):
        groups[answers.group[number]][answers.line[number]].append(number)
    for rows in groups.values():
        order = sorted(rows, key=lambda line: (digest(seed, answers.key[rows[line][0]].hex()), line))
        for line in order[most:]:
            answers.drop(rows[line], PER_GROUP)


def _drop_contradictory(answers: Answers) -> None:
    labels = defaultdict(set)
    for number in answers.alive():
        labels[answers.key[number]].add(answers.label[number])
    answers.drop([number for number in answers.alive() if len(labels[answers.key[number]]) > 1], CONTRADICTORY)


def _drop_repeated(answers: Answers) -> None:
    first: dict[bytes, int] = {}
    for number in answers.alive():
        original = first.setdefault(answers.key[number], number)
        if original != number:
            same = answers.source[original] == answers.source[number]
            answers.drop([number], REPEATED if same else ELSEWHERE)


def _cap_groups(answers: Answers, source: int, own: Source, plan: Plan) -> None:
    """Limit the groups of a source, first by category and then in total."""
    if own.per_category is not None:
        categories = defaultdict(list)
        for number in answers.alive(source):
            categories[answers.category[number]].append(number)
        for members in categories.values():
            for block in _by_group(answers, members, plan.seed)[own.per_category :]:
                answers.drop(block, PER_CATEGORY)
    most = own.groups if own.groups is not None else plan.groups_per_source
    if most is not None:
        for block in _by_group(answers, answers.alive(source), plan.seed)[most:]:
            answers.drop(block, GROUPS)


def _round_robin(answers: Answers, plan: Plan) -> None:
    """Take a group of each source in turn until all sources, or the first one, run out, or ``max_rows`` is reached."""
    queues = [_by_group(answers, answers.alive(source), plan.seed) for source in range(len(plan.sources))]
    turns = (min if plan.until == "first" else max)(len(queue) for queue in queues)
    taken, full = 0, False
    for turn in range(max(len(queue) for queue in queues)):
        for queue in queues:
            block = queue[turn] if turn < len(queue) else []
            if turn >= turns:
                answers.drop(block, RAN_OUT)
                continue
            full = full or (plan.max_rows is not None and taken + len(block) > plan.max_rows)
            if full:
                answers.drop(block, MAX_ROWS)
            else:
                taken += len(block)


def _by_group(answers: Answers, numbers: Sequence[int], seed: int) -> list[list[int]]:
    """The answers of each group, the groups ordered by hash."""
    groups = defaultdict(list)
    for number in numbers:
        groups[answers.group_name(number)].append(number)
    return [groups[name] for name in sorted(groups, key=lambda name: (digest(seed, name), name))]


def _splits(answers: Answers, plan: Plan) -> dict[str, list[int]]:
    kept = answers.alive()
    if not kept:
        reasons = sorted({reason for reason in answers.reason if reason is not None})
        raise DataError(f"no rows are left to train on; they were: {', '.join(reasons)}")
    names = {number: answers.group_name(number) for number in kept}
    where = _exactly(answers, kept, plan) if plan.exact_split else _by_hash(set(names.values()), plan)
    wanted = {TRAIN: 1.0, VALIDATION: plan.validation, TEST: plan.test}
    splits: dict[str, list[int]] = {name: [] for name, share in wanted.items() if share}
    for number in kept:
        splits[where[names[number]]].append(number)
    for name, numbers in splits.items():
        if not numbers:
            raise DataError(
                f"the {name} split is empty: its share is "
                f"{1 - plan.validation - plan.test if name == TRAIN else wanted[name]:.3g} of "
                f"{len(set(names.values()))} groups"
            )
        numbers.sort(key=lambda one: (digest(plan.seed, "order", answers.key[one].hex(), str(answers.label[one])), one))
    labels = {answers.label[number] for number in splits[TRAIN]}
    if len(labels) == 1 and not plan.one_label:
        word = "desirable" if labels == {True} else "undesirable"
        raise DataError(
            f"all {len(splits[TRAIN])} rows of the train split are {word}, but kto and apo_zero need both labels; "
            "--one-label (one_label: true) allows it, for supervised training"
        )
    return splits


def _by_hash(groups: set[str], plan: Plan) -> dict[str, str]:
    """Assign each group by its own hash, independently of the others."""
    where = {}
    for name in groups:
        share = int.from_bytes(digest(plan.seed, "split", name)[:8], "big") / 2**64
        side = VALIDATION if share < plan.test + plan.validation else TRAIN
        where[name] = TEST if share < plan.test else side
    return where


def _exactly(answers: Answers, kept: Sequence[int], plan: Plan) -> dict[str, str]:
    """Assign the exact shares of groups, and nearly so within each category.

    The groups of a category are ordered by hash; a group's place is its relative rank. Sorted by place, every stretch
    of the list has each category in proportion. The list is then cut, held-out shares rounded up.
    """
    strata: dict[tuple[int, str], dict[str, None]] = defaultdict(dict)
    first: dict[str, tuple[int, str]] = {}
    for number in kept:
        name = answers.group_name(number)
        stratum = first.setdefault(name, (answers.source[number], answers.category[number]))
        strata[stratum][name] = None
    places = []
    for names in strata.values():
        ordered = sorted(names, key=lambda name: digest(plan.seed, "split", name))
        places += [
            ((rank + 0.5) / len(ordered), digest(plan.seed, "place", name), name) for rank, name in enumerate(ordered)
        ]
    order = [name for _, _, name in sorted(places)]
    share = plan.validation + plan.test
    held_out = math.ceil(share * len(order) - 1e-9)
    tested = math.ceil(held_out * plan.test / share - 1e-9) if share else 0
    cuts = len(order) - held_out, len(order) - tested
    return {
        name: TRAIN if place < cuts[0] else VALIDATION if place < cuts[1] else TEST for place, name in enumerate(order)
    }
