"""Defects of TRL 1.16's KTOTrainer, one test for each, behind the batches: what the reference and the logits are.

Here: 7 (cache of the reference), 9 (waiting for the device), 12 (logits in fp32), 14 (policy and reference in one
mode). The others, and where they are tested: test_trainer_defects.py.
"""

import copy
import re
import sys
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from prefopt_kernels.integrations.transformers import (
    completion_logprobs,
    lm_head_of,
    pack_completions,
)
from support.tiny_models import make_dataset, make_rows
from support.trainer import (
    make_trainer,
    make_world,
    train,
)

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("qwen3"))


# ---- 7 ----


def test_defect_07_the_reference_cache_outlives_training_options(world, tmp_path):
    def build(name: str, **options):
        trainer = make_trainer(
            world,
            tmp_path / name,
            precompute_ref_logps=True,
            reference_cache_dir=str(tmp_path / "cache"),
            **({"per_device_train_batch_size": 4, "max_length": 96} | options),
        )
        assert trainer.reference is None
        return trainer.train_dataset["ref_logps"][:]

    def files() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    first = build("first")
    assert files() == 1
    same = build(
        "second",
        learning_rate=5e-5,
        seed=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        beta=0.5,
        max_steps=9,
        logging_steps=5,
        sampler="random",
        weight_decay=0.1,
    )
    assert same == first and files() == 1
    build("rows", data=make_rows(True)[:12])
    assert files() == 2
    build("length", max_length=64)
    assert files() == 3
    with torch.no_grad():
        world.ref.lm_head.weight[5, 5] += 1.0
    changed = build("weights")
    with torch.no_grad():
        world.ref.lm_head.weight[5, 5] -= 1.0
    assert files() == 4 and changed != first


@pytest.mark.parametrize("adapter", [False, True])
def test_precomputed_scores_are_those_of_the_reference(world, tmp_path, adapter):
    """A window of all rows has the pairs of the dataset, so precomputed and live runs log the same."""
    rows = make_rows(True)[:8]
    options = {
        "data": rows,
        "sampler": "sequential",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "eval_dataset": rows,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 8,
        "ref": not adapter,
    }

    def config():
        return LoraConfig(target_modules=["q_proj"], init_lora_weights=False) if adapter else None

    live = make_trainer(world, tmp_path, peft_config=config(), **options)
    train(live)
    stored = make_trainer(
        world,
        tmp_path,
        peft_config=config(),
        precompute_ref_logps=True,
        precompute_batch_size=3,
        reference_cache_dir=str(tmp_path / "cache"),
        **options,
    )
    train(stored)
    assert any(entry.get("kl", 0) > 0 for entry in live.state.log_history)
    for mine, other in zip(stored.state.log_history, live.state.log_history, strict=True):
        for key, value in other.items():
            if key in ("kl_per_token", "eval_kl_per_token"):  # needs both distributions
                continue
            if not key.endswith(("runtime", "per_second", "flos")):
                assert mine[key] == pytest.approx(value, abs=1e-4, rel=0), key


# ---- 9 ----


class _HostReads(TorchDispatchMode):
    """Lists the operations that would make the host wait for a GPU, by the file and function that ask for them."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.places: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        mask = name in ("index", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.READS or mask:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            self.places.append((frame.f_code.co_filename, frame.f_code.co_name))
        return func(*args, **(kwargs or {}))


def test_defect_09_a_step_does_not_wait_for_the_device(world, tmp_path):
    """Reads by the model itself and by checks that only look at CPU tensors (in the op) are not the trainer's."""
    trainer = make_trainer(world, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    step, log = trainer.training_step, trainer.log
    reads, logs = _HostReads(), []

    def watched_step(*args):
        with reads:
            return step(*args)

    def watched_log(*args):
        with reads:
            logs.append(args)
            return log(*args)

    trainer.training_step, trainer.log = watched_step, watched_log
    train(trainer)
    assert len(logs) == 3  # two steps and the summary
    ours = {place for place in reads.places if re.search("prefopt/train|integrations", place[0])}
    assert not ours
    with reads:  # the mode does see them
        assert torch.ones(3)[torch.tensor([True, False, True])].sum().item() == 2
    assert [file for file, _ in reads.places[-2:]] == [__file__, __file__]


# ---- 12 ----


def test_defect_12_logits_are_not_rounded_to_bf16(world):
    """Per-token log-probabilities of a bf16 model against fp64 from the same hidden states."""
    model = copy.deepcopy(world.model).bfloat16().eval()
    with torch.no_grad():
        model.lm_head.weight *= 4.0  # logits of some tens, as trained models have
    head = lm_head_of(model)
    ids = torch.randint(0, head.weight.shape[0], (4, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    packing = pack_completions(ids, mask)
    caught = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        ours = completion_logprobs(model, ids, mask, packing, head=head).logp.double()
        logits = model(input_ids=ids).logits
    handle.remove()
    hidden = caught[-1][:, :-1].flatten(0, 1).double()
    exact_logits = hidden @ head.weight.double().T
    exact = exact_logits.log_softmax(-1).gather(1, packing.targets[:, None])[:, 0]
    rounded = logits[:, :-1].flatten(0, 1).float().log_softmax(-1)  # what a bf16 tile leaves
    rounded = rounded.gather(1, packing.targets[:, None])[:, 0].double()
    terms = (hidden.abs() @ head.weight.double().abs().T).amax()
    # an fp32 accumulation of H products, and an fp32 log-sum-exp of V logits
    bound = 8 * EPS * (terms + exact_logits.abs().amax())
    assert (ours - exact).abs().max() < bound
    assert (rounded - exact).abs().max() > 100 * bound


# ---- 14 ----


@pytest.mark.parametrize("kind", ["adapter", "copy"])
@pytest.mark.parametrize("bf16", [False, True])
def test_defect_14_the_log_ratio_is_exactly_zero_at_step_0(world, tmp_path, kind, bf16):
    model = copy.deepcopy(world.model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3  # would be drawn in training mode, were it left on
    adapter = LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.3)
    trainer = make_trainer(
        world,
        tmp_path,
        model=model,
        ref=False,
        peft_config=adapter if kind == "adapter" else None,
        bf16=bf16,
        eval_dataset=make_dataset(True),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    modes, running = [], trainer.reference.running

    @contextmanager
    def watch(training):
        with running(training) as reference:
            modes.append((reference.training, trainer.model.training))
            yield reference

    trainer.reference.running = watch
    metrics = trainer.evaluate()
    (log,) = train(trainer)
    for found, prefix in ((metrics, "eval_"), (log, "")):
        for key in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert found[prefix + key] == 0.0, prefix + key
        assert found[prefix + "loss"] == 0.5
    assert {policy for _, policy in modes} == {True, False}
    assert all(reference == policy for reference, policy in modes)
