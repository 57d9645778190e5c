"""Which answers stay, and in which split: the stages of `prefopt data build` after the rows were read.

An answer is known here by a number and a few facts; its text lies in a file. Every stage gives the answers that leave
it a reason, so that what was made is what is kept plus what has a reason. Whatever looks random is the order of hashes
of (seed, name): it does not depend on the order of the sources' rows, and stays as it is when they grow.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from prefopt.data.build.plan import Plan, Source
from prefopt.data.rows import DataError

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
    """Facts about every answer, by its number, and the groups they are in.

    Two groups are one as soon as a prompt is in both: the same question in two sources must not be in two splits.
    """

    def __init__(self) -> None:
        self.source: list[int] = []
        self.line: list[int] = []
        self.label: list[bool] = []
        self.key: list[bytes] = []  # of prompt and completion, folded
        self.group: list[int] = []  # as the source has it
        self.category: list[str] = []
        self.reason: list[str | None] = []  # why it is not used
        self._names: list[str] = []  # of the groups
        self._numbers: dict[str, int] = {}
        self._parent: list[int] = []
        self._least: list[str] = []  # of the root of each group: the first name in it
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
        """Take in the next answer; ``prompt`` and ``key`` are digests, of the prompt and of prompt and completion."""
        number = self._numbers.setdefault(group, len(self._names))
        if number == len(self._names):
            self._names.append(group)
            self._parent.append(number)
            self._least.append(group)
        self._join(number, self._of_prompt.setdefault(prompt, number))
        for column, value in (
            (self.source, source), (self.line, line), (self.label, label), (self.key, key), (self.group, number),
            (self.category, category), (self.reason, reason),
        ):  # fmt: skip
            column.append(value)

    def alive(self, source: int | None = None) -> list[int]:
        """The answers that no stage has left out, in the order they were read."""
        return [
            number
            for number, reason in enumerate(self.reason)
            if reason is None and source in (None, self.source[number])
        ]

    def drop(self, numbers: Iterable[int], reason: str) -> None:
        """Leave answers out, for a reason."""
        for number in numbers:
            self.reason[number] = reason

    def group_name(self, number: int) -> str:
        """The group of an answer: the first name, by spelling, of all groups that share a prompt with it."""
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
    """A number that depends on the seed and the parts alone, as 32 bytes to sort by."""
    text = "\x1f".join((str(seed), *parts))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def choose(answers: Answers, plan: Plan) -> dict[str, list[int]]:
    """Leave out what must go, and share the rest among the splits.

    Returns:
        {split: numbers of its answers, in the order they are to be written}.

    Raises:
        DataError: a split is empty, or training has one label alone and the plan does not ask for that.
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
    """At most so many rows (a pair is one row) of a group of this source."""
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
    answers.drop(
        [number for number in answers.alive() if len(labels[answers.key[number]]) > 1],
        CONTRADICTORY,
    )


def _drop_repeated(answers: Answers) -> None:
    first: dict[bytes, int] = {}
    for number in answers.alive():
        original = first.setdefault(answers.key[number], number)
        if original != number:
            same = answers.source[original] == answers.source[number]
            answers.drop([number], REPEATED if same else ELSEWHERE)


def _cap_groups(answers: Answers, source: int, own: Source, plan: Plan) -> None:
    """At most so many groups in each category, and then in all."""
    if own.per_category is not None:
        categories = defaultdict(list)
        for number in answers.alive(source):
            categories[answers.category[number]].append(number)
        for members in categories.values():
            blocks = _by_group(answers, members, plan.seed)
            for block in blocks[own.per_category :]:
                answers.drop(block, PER_CATEGORY)
    most = own.groups if own.groups is not None else plan.groups_per_source
    if most is not None:
        for block in _by_group(answers, answers.alive(source), plan.seed)[most:]:
            answers.drop(block, GROUPS)


def _round_robin(answers: Answers, plan: Plan) -> None:
    """A group of each source in turn, until all have run out, or the first one has, or max_rows are full."""
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
    """The answers group by group, the groups in a random but fixed order."""
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
                f"the {name} split is empty: there are {len(set(names.values()))} groups, and it was to have "
                f"{1 - plan.validation - plan.test if name == TRAIN else wanted[name]:.3g} of them"
            )
        numbers.sort(
            key=lambda number: (
                digest(plan.seed, "order", answers.key[number].hex(), str(answers.label[number])),
                number,
            )
        )
    labels = {answers.label[number] for number in splits[TRAIN]}
    if len(labels) == 1 and not plan.one_label:
        word = "desirable" if labels == {True} else "undesirable"
        raise DataError(
            f"all {len(splits[TRAIN])} rows of the train split are {word}, but kto and apo_zero need both labels; "
            "--one-label (one_label: true) builds it all the same, for supervised training"
        )
    return splits


def _by_hash(groups: set[str], plan: Plan) -> dict[str, str]:
    """Each group goes where its own hash sends it, whatever else there is."""
    where = {}
    for name in groups:
        share = int.from_bytes(digest(plan.seed, "split", name)[:8], "big") / 2**64
        side = VALIDATION if share < plan.test + plan.validation else TRAIN
        where[name] = TEST if share < plan.test else side
    return where


def _exactly(answers: Answers, kept: Sequence[int], plan: Plan) -> dict[str, str]:
    """Exactly the shares asked for, of groups, and of each category as nearly as they divide.

    The groups of a category are ordered by hash; a group's place is its rank among them. Sorted by place, every stretch
    of the list has each category in its share; the list is cut once, held-out shares rounded up.
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
