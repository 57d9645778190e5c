"""examples/plain_loop.py learns, and its losses are the formula's."""

import copy
import runpy

import pytest
import torch

from prefopt.data import PreferenceCollator
from prefopt.demo.model import build_model, build_tokenizer
from support.docs_checks import ROOT

EXAMPLE = ROOT / "examples" / "plain_loop.py"


def test_the_program_prints_a_falling_loss(capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    losses = [float(word) for word in capsys.readouterr().out.split()]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(0.5, abs=1e-4)  # policy and reference agree
    assert losses[-1] < 0.3


def plain_logps(model, batch: dict, prefix: str = "") -> torch.Tensor:
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"]
    logits = model(input_ids=ids, attention_mask=batch[f"{prefix}attention_mask"]).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logp * mask[:, 1:]).sum(1)


def test_losses_equal_plain_torch():
    """A loop on the model's own logits has the same losses."""
    tokenizer = build_tokenizer()
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt_ids": torch.randint(3, 500, (5,), generator=generator).tolist(),
            "completion_ids": torch.randint(3, 500, (2 + i,), generator=generator).tolist(),
            "label": i % 2 == 0,
            "group": i,
            "row": i,
        }
        for i in range(4)
    ]
    collator = PreferenceCollator(tokenizer.pad_token_id, mismatch="rotate", max_length=64)
    model, reference = (build_model(tokenizer, seed) for seed in (0, 1))
    other, steps, rate = copy.deepcopy(model), 3, 1e-3
    losses = runpy.run_path(str(EXAMPLE))["train"](model, reference, [collator(rows)] * steps, rate)

    batch = collator(rows)
    optimizer = torch.optim.AdamW(other.parameters(), lr=rate)
    points = []
    for found in losses:
        with torch.no_grad():
            ratios = plain_logps(other, batch, "kl_") - plain_logps(reference, batch, "kl_")
            ref_logps = plain_logps(reference, batch)
        points.append(ratios.mean().clamp(min=0))
        sign = torch.where(batch["labels"], 1.0, -1.0)
        rewards = plain_logps(other, batch) - ref_logps - points[-1]
        loss = torch.sigmoid(-0.1 * sign * rewards).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert found == pytest.approx(loss.item(), abs=1e-5)  # the contract on a loss in fp32
    assert max(points) > 0, "blind otherwise"
    assert len({round(loss, 3) for loss in losses}) == steps
