"""The external plugin for ms-swift, with a stub of ms-swift's KTO trainer that builds logits.

Checked by hand on 21 November 2026 against ms-swift 4.6.0 with TRL 0.29.1: ``rlhf_trainers/kto_trainer.py``
(``forward``, ``_get_model_kwargs``, ``get_batch_logps``, ``_compute_kl_logps``), ``trainers/mixin.py``
(``prepare_logits_to_keep``, ``get_cu_seqlens``), ``trainers/trainer_factory.py`` and ``utils/utils.py``
(``import_external_file``).
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from prefopt_kernels.integrations import ms_swift
from support.causal_lm import make

THEIRS = "swift.rlhf_trainers.KTOTrainer"
OURS = "prefopt_kernels.integrations.ms_swift.FusedKTOTrainer"


class KTOTrainer:
    """ms-swift's two passes over a batch in plain torch: roll the labels, log_softmax, sum."""

    aux_loss_enabled = False
    calculate_KL = True
    is_encoder_decoder = False

    def __init__(self, keep: bool = False, padding_free: bool = False, parallel: int = 1):
        self.keep, self.model = keep, nn.Linear(1, 1)
        self.template = SimpleNamespace(padding_free=padding_free, sequence_parallel_size=parallel)
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        self.args = SimpleNamespace(gradient_checkpointing_kwargs=None)

    def _get_model_kwargs(self, inputs: dict, prefix: str) -> tuple[dict, Tensor]:
        kwargs = {k[len(prefix) :]: v for k, v in inputs.items() if k.startswith(prefix)}
        labels = kwargs.pop("labels")
        if self.keep:
            kept = labels.shape[-1] - (labels != -100).int().argmax(-1).min().item() + 1
            labels, kwargs["logits_to_keep"] = labels[:, -kept:], kept
        return kwargs, labels

    def get_cu_seqlens(self, position_ids: Tensor, logits_to_keep: int | None) -> Tensor:
        starts = (position_ids[0] == 0).nonzero()[:, 0]
        return torch.cat([starts, torch.tensor([position_ids.shape[1]])]).int()

    def _plain(self, model: nn.Module, batch: dict, prefix: str) -> tuple[Tensor, Tensor, object]:
        kwargs, labels = self._get_model_kwargs(batch, prefix)
        outputs = model(**kwargs)
        labels = labels.roll(-1, dims=1)
        logp = outputs.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        values = torch.stack([logp, outputs.logits.sum(-1)]) * (labels != -100)  # (2, B, L)
        if not self.template.padding_free:
            return *values.sum(-1), outputs
        bounds = self.get_cu_seqlens(kwargs["position_ids"], kwargs.get("logits_to_keep"))
        sizes = bounds.diff().tolist()
        return *torch.stack([part.sum((1, 2)) for part in values.split(sizes, -1)], 1), outputs

    def forward(self, model: nn.Module, batch: dict) -> tuple:
        kl_logps = self._compute_kl_logps(model, batch)
        logps, logits, outputs = self._plain(model, batch, "completion_")
        good = torch.tensor(batch["label"])
        answer = (logps[good], logps[~good], logits[good], logits[~good], kl_logps)
        return (*answer, outputs.aux_loss) if self.aux_loss_enabled else answer

    def _compute_kl_logps(self, model: nn.Module, batch: dict) -> Tensor | None:
        if not self.calculate_KL:
            return None
        with torch.no_grad():
            return self._plain(model, batch, "KL_completion_")[0]


@pytest.fixture
def swift(monkeypatch):
    """The parts of ms-swift 4.6.0 that the plugin uses."""
    mapping = {"kto": THEIRS, "dpo": "swift.rlhf_trainers.DPOTrainer"}
    checkpointing = contextlib.nullcontext
    for name, members in {
        "swift": {},
        "swift.trainers": {
            "TrainerFactory": SimpleNamespace(TRAINER_MAPPING=mapping),
            "disable_gradient_checkpointing": lambda model, kwargs: checkpointing(),
        },
        "swift.rlhf_trainers": {"KTOTrainer": KTOTrainer},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    known = importlib.metadata.version
    found = {"ms-swift": "4.6.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found.get(name) or known(name), raising=True)
    ms_swift._trainer.cache_clear()
    yield SimpleNamespace(mapping=mapping, versions=found)
    ms_swift._trainer.cache_clear()


def batch(padding_free: bool) -> dict:
    generator = torch.Generator().manual_seed(0)
    made = {"label": [True, False, True]}
    for prefix, lengths in {"completion_": (9, 6, 8), "KL_completion_": (7, 9, 5)}.items():
        rows = [torch.randint(3, 97, (n,), generator=generator) for n in lengths]
        labels = [torch.cat([torch.full((n // 2,), -100), row[n // 2 :]]) for n, row in zip(lengths, rows, strict=True)]
        if padding_free:
            made[f"{prefix}input_ids"] = torch.cat(rows)[None]
            made[f"{prefix}labels"] = torch.cat(labels)[None]
            made[f"{prefix}position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        else:
            pad = nn.utils.rnn.pad_sequence
            made[f"{prefix}input_ids"] = pad(rows, batch_first=True)
            made[f"{prefix}labels"] = pad(labels, batch_first=True, padding_value=-100)
            ones = [torch.ones_like(row) for row in rows]
            made[f"{prefix}attention_mask"] = pad(ones, batch_first=True)
    return made


def answers(cls, name: str, **options) -> tuple[list, dict[str, Tensor]]:
    trainer = cls(**options)
    model = make(name).train()
    if name == "experts qwen3_moe":
        trainer.aux_loss_enabled = True
    answer = trainer.forward(model, batch(options.get("padding_free", False)))
    good, bad = answer[:2]
    (good.sum() - 0.5 * bad.sum()).backward()
    return answer, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "softcap gemma2", "experts qwen3_moe"])
@pytest.mark.parametrize("options", [{}, {"keep": True}, {"padding_free": True}])
def test_a_batch_has_the_results_of_ms_swift(name, options, swift):
    mine, gradients = answers(ms_swift.FusedKTOTrainer, name, **options)
    theirs, expected = answers(KTOTrainer, name, **options)
    assert len(mine) == len(theirs) == (6 if name == "experts qwen3_moe" else 5)
    assert mine[0].shape == (2,) and mine[1].shape == (1,) and mine[4].shape == (3,)
    for found, other in zip(mine, theirs, strict=True):
        # sums of some 5 log-probabilities, or of some 500 logits, in fp32
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-4)
    assert not mine[4].requires_grad and mine[0].requires_grad
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        error = (gradient - expected[parameter]).norm()
        assert error <= 1e-5 * expected[parameter].norm().clamp(min=1e-6), parameter


def test_a_loss_without_kl_has_no_mismatched_pass(swift):
    trainer = ms_swift.FusedKTOTrainer()
    trainer.calculate_KL = False
    model, positions = make("llama"), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, out: positions.append(out.shape[1]))
    assert trainer.forward(model, batch(False))[4] is None
    assert positions == [0]  # one pass, without logits


def test_register_names_a_class_that_imports(swift):
    ms_swift.register()
    ms_swift.register()  # harmless
    assert swift.mapping == {"kto": OURS, "dpo": "swift.rlhf_trainers.DPOTrainer"}
    module, name = OURS.rsplit(".", 1)
    assert issubclass(getattr(importlib.import_module(module), name), KTOTrainer)
    with pytest.raises(AttributeError, match="has no attribute 'FusedDPOTrainer'"):
        _ = ms_swift.FusedDPOTrainer


def test_the_file_as_a_plugin_does_not_shadow_trl(swift, monkeypatch):
    """ms-swift prepends the file's folder to the path, where the folder trl would shadow the package."""
    file = Path(ms_swift.__file__).resolve()
    monkeypatch.setattr(sys, "path", [str(file.parent), *sys.path])
    spec = importlib.util.spec_from_file_location("_swift_external_0", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert swift.mapping["kto"] == OURS
    assert Path(importlib.util.find_spec("trl").origin).parent.name == "trl"
    assert str(file.parent) not in sys.path


def test_refusals(swift, monkeypatch):
    with pytest.raises(ValueError, match="sequence_parallel_size is 2; expected 1"):
        ms_swift.FusedKTOTrainer(parallel=2)
    with monkeypatch.context() as m, pytest.raises(ValueError, match="ZeRO-3 has partitioned the"):
        m.setattr(nn.Parameter, "ds_id", 0, raising=False)  # as ZeRO-3 marks them
        ms_swift.FusedKTOTrainer()
    swift.mapping["kto"] = "somebody.else.Trainer"
    with pytest.raises(RuntimeError, match="is somebody.else.Trainer already; expected its own"):
        ms_swift.register()
    swift.versions["ms-swift"] = "3.9.0"
    with pytest.raises(RuntimeError, match=r"ms-swift is 3.9.0; tested with 4.6"):
        ms_swift.register()
    assert swift.mapping["kto"] == "somebody.else.Trainer"


def test_missing_ms_swift():
    with pytest.raises(RuntimeError, match="cannot be fused: ms-swift is not installed"):
        ms_swift.register()
