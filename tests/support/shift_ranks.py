"""What two gloo processes compute for the tests of BCO's shifts and of the averaged KL."""

import torch
import torch.distributed as dist

# One list of windows; per window and rank: rewards, labels. Exact in binary.
WINDOWS = [
    (([1.0, 2.0, -4.0], [1, 1, 0]), ([3.0], [1])),  # one class missing on rank 1
    (([], []), ([8.0, -2.0], [1, 0])),  # nothing on rank 0
    (([5.0], [1]), ([6.0], [1])),  # a class missing everywhere
    (([], []), ([], [])),  # nothing anywhere
    (([float("nan"), -1.0], [1, 0]), ([float("-inf"), 4.0], [0, 1])),
]


def shifts(rank: int) -> list[dict]:
    """Each estimator's value after each window, and the shapes it reduced."""
    from prefopt_kernels.reference_point import EMAKL, CumulativeShift, EMAShift, WindowShift

    calls, all_reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    estimators = {
        "cumulative": CumulativeShift(),
        "window": WindowShift(),
        "ema": EMAShift(decay=0.5),
        "kl": EMAKL(decay=0.5),
    }
    results = []
    for window in WINDOWS:
        rewards, labels = window[rank]
        rewards, labels = torch.tensor(rewards), torch.tensor(labels, dtype=torch.bool)
        row = {}
        for name, estimator in estimators.items():
            calls.clear()
            rows = (rewards,) if name == "kl" else (rewards, labels)
            value = estimator.estimate(*rows).item()
            row[name] = (value, estimator.value.item(), list(calls))
        results.append(row)
    return results
