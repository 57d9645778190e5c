"""The loss of a micro-batch and its gradient from token log-probabilities: sequence_loss beside the plain functions.

python -m benchmarks.losses
"""

import argparse
import functools
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure_cpu import KEPT_ROUNDS, interleaved, require_green, summary
from benchmarks.rows import RESULTS, keep, now, origin
from prefopt_kernels import enhanced_kto_loss, kto_loss
from prefopt_kernels.modules import sequence_logps
from prefopt_kernels.ops.sequence_loss import sequence_loss

METHODS: dict[str, tuple[Any, dict]] = {
    "kto": (kto_loss, {"beta": 0.1}),
    "enhanced_kto": (
        enhanced_kto_loss,
        {
            "beta": 0.1,
            "loss_aversion": 2.25,
            "alpha": 0.88,
            "decision_weighting": "tversky-kahneman",
            "odds_weight": 0.1,
        },
    ),
}
SHAPES = ((4, 128), (16, 256), (64, 512))  # sequences, tokens of each
CALLS = 200  # in a timed sample: one call takes less than a millisecond


def step(method: str, sequences: int, tokens: int, fused: bool) -> None:
    """CALLS times forward and backward."""
    loss, options = METHODS[method]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((sequences,), tokens)
    bounds = torch.arange(0, sequences * tokens + 1, tokens)
    labels = torch.arange(sequences) % 2 == 0
    logp = (-3 * torch.rand(sequences * tokens, generator=generator)).requires_grad_()
    ref_logps = sequence_logps(logp.detach(), bounds) + torch.randn(sequences, generator=generator)
    options = options | {"reference_point": torch.tensor(0.5)}
    if method == "enhanced_kto":
        options["decision_mean"] = torch.tensor(1.0)

    def plain() -> Tensor:
        rows = (sequence_logps(logp, bounds), ref_logps, labels)
        return loss(*rows, *([lengths] if method == "enhanced_kto" else []), **options)

    def in_one() -> Tensor:
        return sequence_loss(logp, bounds, ref_logps, labels, lengths, method=method, **options).losses

    for _ in range(CALLS):
        (in_one() if fused else plain()).sum().backward()


def measure(rounds: int, where: dict) -> list[dict]:
    rows = []
    for method in METHODS:
        for sequences, tokens in SHAPES:
            calls = {who: functools.partial(step, method, sequences, tokens, who == "sequence_loss") for who in WHO}
            seconds, _ = interleaved(calls, rounds)
            unit = statistics.median(seconds["plain"])
            for who in WHO:
                shape = {"method": method, "sequences": sequences, "tokens": tokens, "calls": CALLS}
                times = {"rounds": rounds, **summary(seconds[who]), "ratio": statistics.median(seconds[who]) / unit}
                start = {"time": now(), "op": "sequence_loss", "threads": torch.get_num_threads(), "variant": who}
                rows.append(where | start | shape | times)
    return rows


WHO = ("plain", "sequence_loss")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=KEPT_ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.rounds >= KEPT_ROUNDS:
        require_green("tests/ops/test_sequence_loss.py")
    rows = measure(options.rounds, origin())
    for row in rows:
        each = 1e3 * row["median_ms"] / CALLS
        print(
            f"{row['method']} {row['sequences']} x {row['tokens']} {row['variant']}: {each:,.0f} us, {row['ratio']:.2f}"
        )
    if options.rounds >= KEPT_ROUNDS:
        print(keep(rows, RESULTS / "sequence_loss"))


if __name__ == "__main__":
    main()
