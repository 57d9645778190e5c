"""The order of the rows: with labels spread evenly over the batches, or given.

A batch of one class gives KTO's loss a one-sided gradient.
"""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler


class ListSampler(Sampler[int]):
    """The rows in a given order."""

    def __init__(self, order: Sequence[int]):
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class LabelBalancedSampler(Sampler[int]):
    """Every row once an epoch, in a seeded random order, with the labels spread evenly over the batches.

    In any run of consecutive batches, such as an optimizer step, the number of desirable rows is within one row of the
    data's share. The order depends on ``seed`` and the epoch only; a resumed run calls ``set_epoch`` and skips the rows
    it has seen.

    Args:
        labels: (n,) True for desirable rows.
        batch_size: rows per micro-batch.
        seed: any integer.

    Example:
        >>> labels = [True, True, True, True, False, False]
        >>> order = list(LabelBalancedSampler(labels, batch_size=3, seed=0))
        >>> sorted(order), sum(labels[i] for i in order[:3])
        ([0, 1, 2, 3, 4, 5], 2)
    """

    def __init__(self, labels: Sequence[bool], batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.labels = [bool(label) for label in labels]
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order; accelerate calls it at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        desirable = [row for row, label in enumerate(self.labels) if label]
        undesirable = [row for row, label in enumerate(self.labels) if not label]
        rng.shuffle(desirable)
        rng.shuffle(undesirable)
        total = len(self.labels)
        # After r rows, floor((D r + phase) / n) are desirable: within one of D r / n, and D at r = n. The random phase
        # moves a rare class to other batches in every epoch.
        phase = rng.randrange(total) if total else 0
        done = 0
        for start in range(0, total, self.batch_size):
            end = min(start + self.batch_size, total)
            due = (len(desirable) * end + phase) // total
            batch = desirable[done:due] + undesirable[start - done : end - due]
            done = due
            rng.shuffle(batch)
            yield from batch
