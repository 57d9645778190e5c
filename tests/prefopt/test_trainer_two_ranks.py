"""Defects 5 and 9, resume and the end, with two gloo processes; the file is the test and, as a script, one of them."""

import contextlib
import os
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    import conftest  # noqa: F401  no network

import pytest
import torch.distributed as dist

from prefopt.train.group import leave_process_group
from support.rank_scripts import leave, run_as_ranks
from support.tiny_models import make_rows
from support.trainer import data_for, make_trainer, make_world, train

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "broadcast",
    "broadcast_object_list",
    "gather_object",
    "barrier",
)
# 11 rows, 4 on each rank: the second step has 3 rows, all on rank 0; the dataloader repeats 5 others to fill up.
UNEVEN = {
    "data": make_rows(True)[:11],
    "sampler": "sequential",
    "max_steps": 2,
    "learning_rate": 0.0,
}
EPOCHS = {
    "data": make_rows(True)[:12],
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 3,
}
# Estimates over all the rows of a step, likelihoods over all its tokens; 11 rows or pairs, 8 a step: the second has 3.
METHOD_RUNS = {
    "bco": ("bco", {"shift": "window"}),
    "bco-ema": ("bco", {"shift": "ema"}),
    "enhanced_kto": (
        "enhanced_kto",
        {
            "shift": "cumulative",
            "shift_start": 0.0,
            "shift_ramp": 0.5,
            "decision_clip": (1e-3, 1e3),
            "precompute_ref_logps": True,  # pairs fixed per row, as in UNEVEN
        },
    ),
    "cpo": ("cpo", {}),
    "kto-exact": ("kto", {"kl_estimator": "exact"}),
    "kto-exact-cut": ("kto", {"kl_estimator": "exact", "sampler": "label_balanced"}),
    "bco-cut": ("bco", {"shift": "window", "sampler": "label_balanced"}),
    "dpo-cut": ("dpo", {"sampler": "random"}),
}


def drifted_world(folder: Path):
    """Policy and reference swapped, which makes the first reference points positive."""
    world = make_world("qwen3", folder)
    return world._replace(model=world.ref, ref=world.model)


def uneven(world, folder: Path, batch_size: int) -> list[dict]:
    """Pairs fixed per row, so that two ranks and one process have the same ones."""
    trainer = make_trainer(
        world,
        folder / "run",
        per_device_train_batch_size=batch_size,
        precompute_ref_logps=True,
        reference_cache_dir=str(folder / "cache"),
        **UNEVEN,
    )
    return train(trainer)


def of_method(world, folder: Path, name: str, rows_a_step: int) -> dict:
    """Logs and weights of a few steps with so many rows a step on each rank, in micro-batches of two."""
    method, options = METHOD_RUNS[name]
    trainer = make_trainer(
        world,
        folder,
        method=method,
        data=data_for(method, 11),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=rows_a_step // 2,
        **{"sampler": "sequential"} | options,
    )
    logs = train(trainer)
    norms = {key: value.norm().item() for key, value in trainer.model.state_dict().items()}
    return {"logs": logs, "norms": norms, "baselines": trainer.baselines.state_dict()}


def caller() -> str:
    """Module of the innermost frame outside torch and this file."""
    frame = sys._getframe(2)
    while frame.f_globals["__name__"].startswith("torch."):
        frame = frame.f_back
    return frame.f_globals["__name__"]


def count_collectives(counts: Counter) -> None:
    """From now on, count every collective by the module that calls it."""
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*args, original=original, name=name, **kwargs):
            counts[caller()] += 1
            return original(*args, **kwargs)

        setattr(dist, name, counted)


def rank_main(folder: Path) -> None:
    """Everything that a rank does; what it saw goes into a file of its own."""
    rank = int(os.environ["RANK"])
    world = drifted_world(folder / f"world{rank}")
    seen = {"uneven": uneven(world, folder, batch_size=4)}

    counts = Counter()
    count_collectives(counts)
    # Of the two ways round, the one whose reference points are above 0.
    usual = world._replace(model=world.ref, ref=world.model)
    for estimator, chosen in (("window", usual), ("microbatch", world)):
        trainer = make_trainer(
            chosen,
            folder / estimator,
            kl_estimator=estimator,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            **UNEVEN,
        )
        estimates, estimate = [], trainer.mismatched.estimator.estimate

        def watch(ratios, *, update, estimate=estimate, estimates=estimates):
            value = estimate(ratios, update=update)
            estimates.append((ratios.tolist(), value.item()))
            return value

        trainer.mismatched.estimator.estimate = watch
        counts.clear()
        logs = train(trainer)
        seen[estimator] = {"estimates": estimates, "logs": logs, "collectives": dict(counts)}

    seen["methods"] = {name: of_method(usual, folder / name, name, 4) for name in METHOD_RUNS}

    seen["epochs"] = {}
    for name, checkpoint in (("whole", None), ("resumed", str(folder / "epochs" / "checkpoint-4"))):
        trainer = make_trainer(world, folder / "epochs", **EPOCHS)
        rows, compute_loss = [], trainer.compute_loss

        def keep(model, inputs, *args, compute_loss=compute_loss, rows=rows, **kwargs):
            rows.append(inputs["row"].tolist())
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = keep
        logs = train(trainer, resume_from_checkpoint=checkpoint)
        seen["epochs"][name] = {"rows": rows, "logs": logs}
    leave(folder, seen)


def assert_leaves_no_thread() -> None:
    """Leave the group as a run does. A thread of gloo that it left could abort the process as the interpreter ends."""
    there = threads()
    leave_process_group()
    assert any("gloo" in name for name in there) and not any("gloo" in name for name in threads())


def threads() -> list[str]:
    """The names of this process's threads."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it ended since it was listed
            names.append((task / "comm").read_text(encoding="utf-8"))
    return names


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[list[dict], Path]:
    """What the two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_as_ranks(__file__, folder), folder


@pytest.mark.slow
def test_defect_05_an_uneven_last_step_counts_every_row_once(ranks, tmp_path):
    """Two ranks of 4 rows log what one process with 8 rows logs, also where 5 of the 8 rows are repeats."""
    (rank0, _), _ = ranks
    alone = uneven(drifted_world(tmp_path), tmp_path, batch_size=8)
    assert len(rank0["uneven"]) == len(alone) == 2
    assert any(entry["kl"] > 0.1 for entry in alone)
    for step, (together, single) in enumerate(zip(rank0["uneven"], alone, strict=True)):
        for key, value in single.items():
            tolerance = 1e-5 if key == "loss" else 1e-4  # the contract of the parity tests
            assert together[key] == pytest.approx(value, abs=tolerance, rel=0), (step, key)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["window", "microbatch"])
def test_defect_05_ranks_share_the_reference_point(ranks, estimator):
    seen = [rank[estimator]["estimates"] for rank in ranks[0]]
    assert len(seen[0]) == len(seen[1]) == {"window": 2, "microbatch": 3}[estimator]
    assert any(value > 0 for _, value in seen[0])
    for (mine, value), (others, same) in zip(*seen, strict=True):
        if estimator == "window":
            mean = sum(mine + others) / max(len(mine + others), 1)
        else:
            means = [sum(ratios) / len(ratios) for ratios in (mine, others) if ratios]
            mean = sum(means) / max(len(means), 1)
        assert value == same == pytest.approx(max(mean, 0.0), abs=1e-4)
    # the last piece of the 11 rows: 3 of them, 2 on rank 0; a repeat gives nothing to the estimate
    total = sum(len(ratios) for rank in seen for ratios, _ in rank)
    assert total == {"window": 10, "microbatch": 10}[estimator]


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "estimates"), [("window", 2), ("microbatch", 3)])
def test_defect_09_one_collective_per_estimate_and_one_per_log(ranks, estimator, estimates):
    counts = ranks[0][0][estimator]["collectives"]
    ours = {name: count for name, count in counts.items() if name.startswith("prefopt")}
    logs = len(ranks[0][0][estimator]["logs"])
    assert ours == {
        "prefopt_kernels.reference_point.estimator": estimates,
        "prefopt.train.metrics": logs,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", METHOD_RUNS)
def test_two_ranks_take_the_steps_of_one(ranks, tmp_path, name):
    """Also where the last step has 3 rows, all on rank 0, and the dataloader repeats others to fill up."""
    (rank0, rank1), _ = ranks
    usual = make_world("qwen3", tmp_path / "world")
    alone = of_method(usual, tmp_path / "run", name, 8)
    together = rank0["methods"][name]
    assert together["baselines"] == rank1["methods"][name]["baselines"]
    assert together["norms"] == rank1["methods"][name]["norms"]
    for step, (mine, single) in enumerate(zip(together["logs"], alone["logs"], strict=True)):
        assert set(mine) >= set(single)
        for key, value in single.items():
            if key != "epoch":
                tolerance = 1e-5 if key == "loss" else 1e-4  # the contract of the parity tests
                assert mine[key] == pytest.approx(value, abs=tolerance, rel=0), (step, key)
    assert together["norms"] == pytest.approx(alone["norms"], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_share_the_rows_and_resume_where_they_were(ranks):
    runs = [rank["epochs"] for rank in ranks[0]]
    for epoch in (slice(0, 3), slice(3, 6)):
        rows = [row for run in runs for batch in run["whole"]["rows"][epoch] for row in batch]
        assert sorted(rows) == list(range(12))
    for run in runs:
        assert run["resumed"]["rows"] == run["whole"]["rows"][4:]
    assert runs[0]["resumed"]["logs"][-1] == pytest.approx(runs[0]["whole"]["logs"][-1], abs=1e-12)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    assert_leaves_no_thread()
