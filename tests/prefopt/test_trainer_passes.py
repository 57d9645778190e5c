"""Layouts of passes and cuts of windows: what they may not change is every score, loss and gradient."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prefopt.train.methods import METHODS, PAIRS
from prefopt.train.passes import Answer, cut, lay_out
from prefopt.train.probe import why_not
from prefopt.train.scoring import score
from prefopt_kernels.integrations.transformers import lm_head_of
from support.tiny_models import make_rows
from support.trainer import data_for, gradients_of_first_step, make_pairs, make_trainer, make_world, train

VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, GEMMA),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, GEMMA),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
}
NATS = 1e-3  # of a sum over some twenty tokens of about 10 nats each, in fp32


def model_of(family: str, implementation: str = "sdpa"):
    config, kind, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(**SIZES | extra)).eval()
    model.set_attn_implementation(implementation)
    return model


def scores(model, answers, **layout):
    return score(model, lm_head_of(model), lay_out(answers, 0, **layout), backend="reference").logps


def some_answers() -> list[Answer]:
    """Two answers to a long prompt, one to a short one, and two to no prompt."""
    ids = torch.randint(0, VOCABULARY, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    long, short = ids[:13], ids[13:16]
    return [
        Answer(long, ids[20:31]),
        Answer(short, ids[31:36]),
        Answer(long, ids[36:37]),
        Answer([], ids[40:46]),
        Answer(long, ids[50:69]),
        Answer([], ids[70:73]),
    ]


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, kind) for family in FAMILIES for kind in ("sdpa", "eager") if (family, kind) != ("gemma2", "sdpa")],
)
def test_a_layout_changes_no_score_and_no_gradient(family, implementation, layout):
    model, answers = model_of(family, implementation), some_answers()
    apart = torch.cat([scores(model, [answer]) for answer in answers])
    (together := scores(model, answers, **{layout: True})).sum().backward()
    assert torch.allclose(together, apart, rtol=0, atol=NATS)
    weights = list(model.parameters())
    for weight, expected in zip(weights, torch.autograd.grad(apart.sum(), weights), strict=True):
        assert weight.grad.isfinite().all()
        assert (weight.grad - expected).norm() <= 1e-4 * expected.norm()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_layout_predicts_each_answer_from_its_own_prompt(data):
    ids = st.integers(1, 9)
    prompts = data.draw(st.lists(st.lists(ids, max_size=4), min_size=1, max_size=3))
    answers = [
        Answer(data.draw(st.sampled_from(prompts)), data.draw(st.lists(ids, min_size=1, max_size=4)))
        for _ in range(data.draw(st.integers(1, 5)))
    ]
    for shared, packed in ((False, False), (True, False), (False, True)):
        batch = lay_out(answers, 0, shared=shared, packed=packed)
        flat, bounds = batch["input_ids"].flatten(), batch["cu_seqlens"].tolist()
        for answer, start, end in zip(answers, bounds, bounds[1:], strict=False):
            scored = list(answer.completion) if answer.prompt else list(answer.completion)[1:]
            assert batch["targets"][start:end].tolist() == scored
            before = [*answer.prompt, *answer.completion][len(answer.prompt) - bool(answer.prompt) :][:-1]
            assert flat[batch["positions"][start:end]].tolist() == (before if scored else [])
        assert batch["tokens"].tolist() == [len(answer.prompt) + len(answer.completion) for answer in answers]
        assert batch["filled"] <= batch["input_ids"].numel() and (not packed or len(batch["input_ids"]) == 1)


def test_what_has_a_state_besides_attention_is_refused():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8)
    model = MambaForCausalLM(config).eval()
    head = lm_head_of(model)
    for layout in ({"shared": True}, {"packed": True}):
        assert why_not(model, lambda batch: score(model, head, batch, backend="reference").logps, VOCABULARY, **layout)
    llama = model_of("llama")
    head = lm_head_of(llama)
    for layout in ({"shared": True}, {"packed": True}):
        reason = why_not(
            llama, lambda batch: score(llama, head, batch, backend="reference").logps, VOCABULARY, **layout
        )
        assert reason is None


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_is_the_best_one_in_order_of_length(packed):
    draw = torch.Generator().manual_seed(2)

    def cost(widths, parts):
        if packed:
            return sum(sum(widths[row] for row in part) ** 2 for part in parts)
        return sum(len(part) * max((widths[row] for row in part), default=0) for part in parts)

    for n, pieces in itertools.product((1, 2, 5, 8), (1, 2, 3)):
        widths = torch.randint(1, 30, (n,), generator=draw).tolist()
        found = cut(widths, pieces, packed=packed)
        assert sorted(row for piece in found for row in piece) == list(range(n)) and len(found) == pieces
        order = sorted(range(n), key=lambda row: -widths[row])
        if n <= pieces:
            continue
        others = [
            [order[a:b] for a, b in itertools.pairwise((0, *bounds, n))]
            for bounds in itertools.combinations(range(1, n), pieces - 1)
        ]
        assert cost(widths, found) == min(cost(widths, parts) for parts in others)


def test_a_cut_keeps_to_its_cap():
    widths = [100, 90, 80, 10, 10, 10, 10, 10]
    free, capped = cut(widths, 2), cut(widths, 2, cap=200)
    assert max(len(part) * max(widths[row] for row in part) for part in free) > 200
    # no two passes hold three long rows within 200 positions, so this cap cannot be kept
    assert capped == free
    capped = cut(widths, 3, cap=200)
    assert max(len(part) * max(widths[row] for row in part) for part in capped) <= 200


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("llama", tmp_path_factory.mktemp("world"))


def rows_with_shared_prompts() -> list[dict]:
    """Unpaired rows of which some have the same prompt."""
    rows = make_rows(True)[:12]
    return [*rows, *({**rows[i], "completion": rows[i + 1]["completion"], "label": i % 2 == 0} for i in range(4))]


@pytest.mark.parametrize("method", METHODS)
def test_a_window_has_the_same_gradient_however_it_is_cut(world, tmp_path, method):
    data = make_pairs(8) if METHODS[method].data == PAIRS else rows_with_shared_prompts()
    extra = {"shift": "window"} if method == "bco" else {}

    def gradients(batch: int, accumulation: int, **options):
        trainer = make_trainer(
            world,
            tmp_path,
            method=method,
            data=data,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **extra,
            **options,
        )
        found = gradients_of_first_step(trainer)
        return torch.cat([gradient.flatten() for gradient in found.values()])

    whole = gradients(8, 1, share_prompts="off")
    assert whole.norm() > 1e-3
    for batch, accumulation, options in (
        (8, 1, {}),
        (4, 2, {}),
        (2, 4, {"share_prompts": "off"}),
        (2, 4, {"packing": "packed"}),
        (1, 8, {}),
    ):
        found = gradients(batch, accumulation, **options)
        assert (found - whole).norm() <= 2e-5 * whole.norm(), (batch, accumulation, options)


def test_evaluation_is_by_length_and_predictions_are_in_the_order_of_the_data(world, tmp_path):
    rows = make_rows(True)
    trainer = make_trainer(world, tmp_path, method="kto", per_device_eval_batch_size=3)
    first = trainer.predict(rows)
    back = trainer.predict(rows[::-1])
    for name in ("logps", "ref_logps", "rewards"):
        assert torch.allclose(
            *map(torch.tensor, (first.predictions[name], back.predictions[name][::-1].copy())), atol=NATS
        )
    assert first.label_ids.tolist() == [row["label"] for row in rows]


def test_the_run_folder_has_the_layout_and_the_share_of_padding(world, tmp_path):
    import json

    trainer = make_trainer(
        world, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, data=data_for("kto", 20)
    )
    train(trainer)
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    padding = run["passes"].pop("padding")
    assert 0 < padding < 0.2
    assert run["passes"] == {"packed": False, "share_prompts": True, "recut": True, "why_not": {}}
    plain = make_trainer(world, tmp_path / "plain", per_device_train_batch_size=2, sampler="sequential")
    assert plain.recuts is False and plain.scorer.collator.shared is False


def test_packing_that_the_model_cannot_take_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.train.scorer.why_not", lambda *args, **layout: "scores differ")
    with pytest.raises(ValueError, match="packing is 'packed'; LlamaForCausalLM cannot take it: scores differ"):
        make_trainer(world, tmp_path, packing="packed")
    trainer = make_trainer(world, tmp_path)
    assert trainer.scorer.collator.shared is False
