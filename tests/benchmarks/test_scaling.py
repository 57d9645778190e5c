"""The formulas of docs/scaling.md against two processes that train: bytes held, and bytes of each collective.

This file is the test and, run as a script, one of the processes.
"""

import copy
import os
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    import conftest  # noqa: F401  no network

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from benchmarks import scaling
from benchmarks.scaling import FP32, SHAPES, Shape, Step
from benchmarks.tables import BEGIN, END
from prefopt_kernels import vocab_parallel_linear_logprob
from support.distributed import (
    launch_environment,
    shard_on_the_cpu,
)
from support.rank_scripts import WORLD_SIZE, leave, leave_group, run_as_ranks
from support.trainer import data_for, make_trainer, make_world, train

CONFIG = Path(__file__).parents[2] / "python/prefopt/recipes/distributed/fsdp2.yaml"
RANK = 4
MICRO_BATCHES = 2
CASES = {  # layout, method, whether an adapter is trained
    "fsdp2-kto": ("fsdp2", "kto", False),
    "fsdp2-kto-lora": ("fsdp2", "kto", True),
    "fsdp2-dpo-lora": ("fsdp2", "dpo", True),
    "fsdp2-sft": ("fsdp2", "sft", False),
    "fsdp2-sft-each": ("fsdp2", "sft", False),
    "ddp-kto": ("ddp", "kto", False),
    "ddp-kto-lora": ("ddp", "kto", True),
}
PASSES = {"kto": (1, 2), "dpo": (0, 1), "sft": (0, 0)}  # of the policy ahead, of the reference
EACH_BATCH = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}


def step_of(name: str) -> Step:
    """The case as the formulas' input; the runs are in fp32."""
    layout, method, adapter = CASES[name]
    ahead, reference = PASSES[method]
    return Step(
        WORLD_SIZE,
        layout,
        rank=RANK if adapter else None,
        micro_batches=MICRO_BATCHES,
        ahead=ahead,
        reference=reference,
        copy=not adapter and reference > 0,
        each_batch=name.endswith("each"),
        weight=FP32,
        gather=FP32,
        reduce=FP32,
    )


class Ledger(TrainerCallback):
    """Bytes of the collectives of the second optimizer step, and bytes held when its gradients are complete."""

    def __init__(self):
        self.carried: Counter | None = None
        self.held = 0
        self.trainer = None

    def count(self, name: str, size: int) -> None:
        if self.carried is not None:
            self.carried[name] += size

    def on_step_begin(self, args, state, control, **kwargs):
        self.carried = Counter() if state.global_step == 1 else None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.held = held_by(self.trainer)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.second, self.carried = self.carried, None


def held_by(trainer) -> int:
    """Weights, gradients, AdamW's averages and a reference's weights on this process, bytes."""
    parameters = [*trainer.model.parameters()]
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if value.dim() > 0]
    reference = getattr(trainer.reference, "model", None)
    if reference not in (None, trainer.model):
        tensors += reference.parameters()
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    return sum(each.numel() * each.element_size() for each in local)


def count_collectives(ledger_of: list[Ledger]) -> None:
    """Record the bytes of FSDP2's and DDP's collectives in the last ledger of the list."""
    gather, scatter = dist.all_gather_single, dist.reduce_scatter_single
    wrapped = DistributedDataParallel.__init__

    def gathered(output, *args, **kwargs):
        ledger_of[-1].count("gathered", output.numel() * output.element_size())
        return gather(output, *args, **kwargs)

    def scattered(*args, **kwargs):
        tensor = kwargs["input"]
        ledger_of[-1].count("reduced", tensor.numel() * tensor.element_size())
        return scatter(*args, **kwargs)

    def hook(state, bucket):
        ledger_of[-1].count("all-reduced", bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(state, bucket)

    def with_hook(self, *args, **kwargs):
        wrapped(self, *args, **kwargs)
        self.register_comm_hook(None, hook)

    dist.all_gather_single, dist.reduce_scatter_single = gathered, scattered
    DistributedDataParallel.__init__ = with_hook


def run_case(world, folder: Path, name: str, ledgers: list[Ledger]) -> dict:
    """Two steps of AdamW."""
    _, method, adapter = CASES[name]
    ledgers.append(Ledger())
    trainer = make_trainer(
        world,
        folder,
        method=method,
        data=data_for(method, 8),
        ref=step_of(name).copy,
        peft_config=LoraConfig(target_modules="all-linear", r=RANK) if adapter else None,
        callbacks=[ledgers[-1]],
        max_steps=2,
        sampler="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=MICRO_BATCHES,
        accelerator_config=EACH_BATCH if step_of(name).each_batch else None,
    )
    ledgers[-1].trainer = trainer
    train(trainer)
    return {"held": ledgers[-1].held, **ledgers[-1].second}


def vocab_parallel_bytes() -> int:
    """Bytes of the all-reduces of a vocabulary-parallel head, forward and backward."""
    carried, all_reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        carried.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    hidden = torch.randn(6, 8, requires_grad=True)
    targets = torch.arange(6)
    shard = torch.randn(5, 8)
    vocab_parallel_linear_logprob(hidden, shard, targets, vocab_start=5 * dist.get_rank()).logp.sum().backward()
    dist.all_reduce = all_reduce
    return sum(carried)


def rank_main(folder: Path) -> None:
    """The work of one process."""
    world = make_world("qwen3", folder / f"world{os.environ['RANK']}")
    world.model.resize_token_embeddings(len(world.tokenizer) + len(world.tokenizer) % 2)
    world = world._replace(ref=copy.deepcopy(world.model))
    ledgers = [Ledger()]
    count_collectives(ledgers)
    use_fsdp = os.environ.pop("ACCELERATE_USE_FSDP")
    seen = {}
    for layout in ("ddp", "fsdp2"):
        if layout == "fsdp2":
            os.environ["ACCELERATE_USE_FSDP"] = use_fsdp
            shard_on_the_cpu()
        for name in CASES:
            if CASES[name][0] == layout:
                seen[name] = run_case(world, folder / name, name, ledgers)
    config = world.model.config
    seen["shape"] = [config.hidden_size, config.num_hidden_layers, config.intermediate_size]
    seen["shape"] += [config.num_attention_heads, config.num_key_value_heads, config.vocab_size]
    seen["vocab parallel"] = vocab_parallel_bytes()
    leave(folder, seen)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The records of the two processes."""
    return run_as_ranks(__file__, tmp_path_factory.mktemp("scaling"), **launch_environment(CONFIG))


@pytest.fixture(scope="module")
def shape(ranks):
    """The shape of the trained model."""
    return Shape(*ranks[0]["shape"], tied=False, head_dim=12)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bytes_held(ranks, shape, name):
    expected = scaling.held(shape, step_of(name))
    assert [rank[name]["held"] for rank in ranks] == [expected] * WORLD_SIZE


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bytes_of_the_collectives(ranks, shape, name):
    step = step_of(name)
    gradients = step.trained(shape) * FP32
    for rank in ranks:
        carried = {key: value for key, value in rank[name].items() if key != "held"}
        if step.layout == "ddp":
            assert carried == {"all-reduced": gradients}
            assert scaling.sent(shape, step) == gradients  # 2 (n - 1) / n of it, n = 2
        else:
            gathered = scaling.gathered(shape, step) * FP32
            assert carried == {"gathered": gathered, "reduced": step.reductions * gradients}
            assert scaling.sent(shape, step) == sum(carried.values()) / 2


@pytest.mark.slow
def test_bytes_of_a_vocab_parallel_head(ranks):
    expected = scaling.vocab_parallel(6, 8, WORLD_SIZE, width=FP32)
    assert [rank["vocab parallel"] for rank in ranks] == [expected] * WORLD_SIZE


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_architecture(name):
    shape = SHAPES[name]
    Config, Model = (Qwen3Config, Qwen3ForCausalLM) if shape.qk_norm else (LlamaConfig, LlamaForCausalLM)
    config = Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = Model(config)
    assert shape.parameters == sum(each.numel() for each in model.parameters())


def test_the_page_has_the_formulas_tables(tmp_path, capsys):
    assert scaling.main(["--check"]) == 0
    page = tmp_path / "scaling.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n", encoding="utf-8")
    assert scaling.main(["--check"], page) == 1
    assert "scaling.md: its tables are not those of the formulas" in capsys.readouterr().out
    assert scaling.main([], page) == 0
    assert scaling.main(["--check"], page) == 0
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n{scaling.tables()}{END}\nafter\n"


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    leave_group()
