"""KTO in a plain PyTorch loop: a model, a frozen copy as its reference, AdamW, and nothing else.

python examples/plain_loop.py trains a small random model on eight answers, half of them good, and prints the loss of
each step. It falls from 0.5, where policy and reference agree.
"""

import copy

import torch

from prefopt.data import PreferenceCollator
from prefopt.demo.model import build_model, build_tokenizer
from prefopt_kernels import FusedLinearKTOLoss, linear_logprob, sequence_logps
from prefopt_kernels.integrations.transformers import pack_completions


def hidden_states(model, batch, prefix=""):
    """The hidden states (T, H) that predict the completions' tokens, and where those are."""
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    packing = pack_completions(ids, batch[f"{prefix}completion_mask"])
    states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return states.flatten(0, 1)[packing.positions], packing


@torch.no_grad()
def mismatched_logps(model, batch):
    """(n,) nats of completions under prompts of other rows, of which KTO's reference point is made."""
    hidden, packing = hidden_states(model, batch, "kl_")
    logp = linear_logprob(hidden, model.lm_head.weight, packing.targets).logp
    return sequence_logps(logp, packing.cu_seqlens)


def train(model, reference, batches, learning_rate):
    """One optimizer step per batch; returns the losses."""
    kto = FusedLinearKTOLoss(beta=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for batch in batches:
        z0 = mismatched_logps(model, batch) - mismatched_logps(reference, batch)
        with torch.no_grad():
            ref_hidden, _ = hidden_states(reference, batch)
        hidden, tokens = hidden_states(model, batch)
        head, ref_head = model.lm_head.weight, reference.lm_head.weight
        ref = {"ref_hidden": ref_hidden, "ref_weight": ref_head, "kl_log_ratio": z0}
        loss, _ = kto(hidden, head, tokens.targets, tokens.cu_seqlens, batch["labels"], **ref)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    tokenizer = build_tokenizer()
    rows = []
    for i in range(8):
        prompt, answer = f"What is {i} and {i}? ", str(2 * i) if i % 2 else "No."
        ids = {"prompt_ids": tokenizer(prompt)["input_ids"], "group": i, "row": i}
        ids["completion_ids"] = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        rows.append(ids | {"label": i % 2 == 1})
    batch = PreferenceCollator(tokenizer.pad_token_id, mismatch="rotate", max_length=64)(rows)
    model = build_model(tokenizer, seed=0)
    losses = train(model, copy.deepcopy(model).requires_grad_(False), [batch] * 20, 1e-3)
    print(" ".join(f"{loss:.4f}" for loss in losses))
