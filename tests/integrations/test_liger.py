"""The classes with Liger's names against liger-kernel 0.8.5, in fp32 on the CPU: values, logged values, gradients.

The contract is 1e-5 of the largest entry. Where ours differ on purpose, a test says where and why.
"""

import importlib.metadata
import inspect

import liger_kernel.chunked_loss as theirs
import pytest
import torch
import torch.nn.functional as F

import prefopt_kernels.integrations.liger as ours
from support.liger_batch import CONTRACT, B, Batch, L, V, assert_agree

PAIRED = {
    "DPO": {"use_ref_model": True},
    "CPO": {},
    "SimPO": {},
    "ORPO": {},
}
NAMES = {name: f"LigerFusedLinear{name}Loss" for name in ("KTO", *PAIRED)}


def test_liger_has_the_supported_version():
    assert importlib.metadata.version("liger_kernel") == "0.8.5"


@pytest.mark.parametrize("name", NAMES.values())
def test_classes_have_ligers_arguments_and_defaults(name):
    for method in ("__init__", "forward"):
        mine, other = (
            [(p.name, p.default) for p in inspect.signature(getattr(c, method)).parameters.values()]
            for c in (getattr(ours, name), getattr(theirs, name))
        )
        assert mine == other, method


def compare(name: str, options: dict, call, **batch) -> tuple:
    """Run both; loss, everything logged and every gradient must agree. An upstream gradient of 3 goes through too."""
    results = []
    for module in (ours, theirs):
        x = Batch(**batch)
        loss, logged = call(getattr(module, NAMES[name])(compiled=False, **options), x)
        (3.0 * loss).backward()
        results.append((loss, logged, x.gradients()))
    (loss, logged, gradients), (their_loss, their_logged, their_gradients) = results
    assert_agree(loss, their_loss, "loss")
    assert len(logged) == len(their_logged)
    for i, (mine, other) in enumerate(zip(logged, their_logged, strict=True)):
        assert not mine.requires_grad
        assert_agree(mine, other, f"logged {i}")
    assert gradients.keys() == their_gradients.keys()
    for key, gradient in gradients.items():
        assert gradient.abs().max() > 1e-4, "the comparison would be blind"
        assert_agree(gradient, their_gradients[key], f"gradient of {key}")
    return results[0]


KTO_CASES = {
    "reference": ({"use_ref_model": True}, {}, torch.tensor(0.7)),
    "kl of shape (1,)": ({"use_ref_model": True}, {}, torch.tensor([0.7])),
    "no kl": ({"use_ref_model": True, "beta": 0.5}, {}, None),
    "no reference, mean": ({"average_log_prob": True, "beta": 0.3}, {}, torch.tensor(0.3)),
    "frozen head, no bias": (
        {"use_ref_model": True},
        {"frozen": True, "bias": False},
        torch.tensor(0.7),
    ),
    "chunks of two": ({"use_ref_model": True, "chunk_size": 2}, {}, torch.tensor(0.7)),
    "kl of shape (B,) in one chunk": (
        {"use_ref_model": True, "chunk_size": B},
        {},
        torch.tensor([0.1, 0.9, 0.4, 1.5, 0.0, 3.0]),
    ),
}


@pytest.mark.parametrize("case", KTO_CASES)
def test_kto(case):
    options, batch, kl = KTO_CASES[case]

    def call(module, x):
        ref = x.reference() if options.get("use_ref_model") else {}
        return module(x.input, x.weight, x.target, x.bias, preference_labels=x.labels, kl=kl, **ref)

    compare("KTO", options, call, **batch)


def paired(module, x, **extra):
    return module(x.weight, x.input, x.target, x.bias, **extra)


DPO_TYPES = {
    "sigmoid": {},
    "hinge": {},
    "exo_pair": {"label_smoothing": 0.01},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.2},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.5},
}


@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_dpo(loss_type):
    options = {"loss_type": loss_type, "beta": 0.05, **DPO_TYPES[loss_type]}
    compare("DPO", options, lambda module, x: paired(module, x, **x.reference()))


def test_every_loss_type_of_liger_is_tested():
    assert set(DPO_TYPES) == theirs.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"use_ref_model": False}, {}),
        ({"use_ref_model": False, "average_log_prob": True, "beta": 1.0}, {}),
        ({"use_ref_model": False, "compute_nll_loss": True, "alpha": 0.4}, {}),
        ({"use_ref_model": False, "chunk_size": 2}, {"frozen": True, "bias": False}),
    ],
)
def test_dpo_options(options, batch):
    compare("DPO", options, paired, **batch)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CPO", {}),
        ("CPO", {"label_smoothing": 0.2, "alpha": 0.5, "average_log_prob": True}),
        ("CPO", {"compute_nll_loss": False}),
        ("SimPO", {}),
        ("SimPO", {"beta": 2.0, "gamma": 1.0, "compute_nll_loss": False}),
        ("SimPO", {"label_smoothing": 0.1, "alpha": 0.0}),
        ("ORPO", {}),
        ("ORPO", {"beta": 1.5, "compute_nll_loss": False}),
    ],
)
def test_losses_without_a_reference(name, options):
    compare(name, options, paired)
    compare(name, options, paired, frozen=True, bias=False)


def test_orpo_with_nll_target():
    def call(module, x):
        nll_target = x.target.clone()
        nll_target[:, 2:] = torch.arange(L - 2)  # prompt tokens too
        return module(x.weight, x.input, x.target, x.bias, nll_target=nll_target)

    compare("ORPO", {}, call)


# Where ours differ


def test_kl_of_shape_b_is_applied_per_row():
    kl = torch.tensor([0.1, 0.9, 0.4, 1.5, 0.0, 3.0])
    x = Batch()
    expected = []
    logps, ref_logps = (
        (F.log_softmax(h @ w.T + b, -1).gather(-1, x.target.clamp(min=0)[..., None])[..., 0])
        .where(x.target != -100, torch.tensor(0.0))
        .sum(1)
        for h, w, b in ((x.input, x.weight, x.bias), (x.ref_input, x.ref_weight, x.ref_bias))
    )
    for i in range(B):  # one sequence after the other, by the formula
        sign = 1.0 if x.labels[i] else -1.0
        expected.append(torch.sigmoid(-0.1 * sign * (logps[i] - ref_logps[i] - kl[i])))
    expected = torch.stack(expected).mean().detach()

    def loss(module, **options):
        kto = module.LigerFusedLinearKTOLoss(use_ref_model=True, compiled=False, **options)
        arguments = (x.input, x.weight, x.target, x.bias)
        return kto(*arguments, preference_labels=x.labels, kl=kl, **x.reference())[0].detach()

    assert_agree(loss(ours), expected, "ours")
    # Liger's chunk of one sequence meets all six entries and sums over them.
    assert loss(theirs) > 2 * expected


def test_kto_accepts_flattened_sequences():
    x = Batch()
    kto = ours.LigerFusedLinearKTOLoss()
    padded = kto(x.input, x.weight, x.target, preference_labels=x.labels)[0]
    flat = kto(x.input.flatten(0, 1), x.weight, x.target.flatten(), preference_labels=x.labels)[0]
    assert torch.equal(padded, flat)


def test_mean_of_a_completion_without_scored_tokens_is_0():
    found = {}
    for module in (ours, theirs):
        x = Batch()
        x.target[4] = -100  # a rejected one
        simpo = module.LigerFusedLinearSimPOLoss(compiled=False)
        loss, logged = simpo(x.weight, x.input, x.target)
        loss.backward()
        found[module] = loss, logged[1][1], x.weight.grad
    assert found[ours][1] == 0 and all(value.isfinite().all() for value in found[ours])
    assert all(value.isnan().any() for value in found[theirs])


def test_ipo_loss_type():
    with pytest.raises(ValueError, match="Unsupported loss_type"):
        theirs.LigerFusedLinearDPOLoss(loss_type="ipo")
    x = Batch()
    found = {}
    for average in (False, True):
        dpo = ours.LigerFusedLinearDPOLoss(loss_type="ipo", average_log_prob=average)
        loss, (chosen, rejected, *_) = paired(dpo, x, **x.reference())
        found[average] = loss.detach(), chosen, rejected
    lengths = (x.target != -100).sum(1)
    assert_agree(found[False][1] / lengths[:3], found[True][1], "chosen means")
    assert_agree(found[False][0], found[True][0], "the loss divides by tokens in either case")


def test_half_precision_keeps_fp32_logits():
    """With bf16 operands ours is closer to fp64 than Liger, which rounds its logits."""
    x = Batch(bias=False)
    hidden, weight = x.input.detach().bfloat16(), x.weight.detach().bfloat16()
    logp = F.log_softmax(hidden.double() @ weight.double().T, -1)
    logp = logp.gather(-1, x.target.clamp(min=0)[..., None])[..., 0]
    exact = logp.where(x.target != -100, 0.0).sum(1)[x.labels].sum()
    error = {}
    for module in (ours, theirs):
        kto = module.LigerFusedLinearKTOLoss(compiled=False)
        _, (chosen_logps, *_) = kto(hidden, weight, x.target, preference_labels=x.labels)
        error[module] = (chosen_logps.double() - exact).abs().item()
    assert error[ours] <= CONTRACT * exact.abs() and error[theirs] > 10 * error[ours]


def test_custom_ignore_index():
    x, y = Batch(), Batch()
    y.target[y.target == -100] = V + 3
    for name in ("CPO", "SimPO", "ORPO"):
        losses = [
            getattr(ours, NAMES[name])(ignore_index=index)(b.weight, b.input, b.target)[0]
            for b, index in ((x, -100), (y, V + 3))
        ]
        assert torch.equal(*losses), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: kto(x, kl=torch.zeros(2)),
            r"kl has shape \(2,\); expected one number or \(6,\)",
        ),
        (lambda x: kto(x, preference_labels=None), "preference_labels is None"),
        (lambda x: kto(x, ref_input=x.ref_input), "ref_input is given with use_ref_model=False"),
        (lambda x: kto(x, use_ref_model=True), "ref_input is None; expected it with use_ref_model"),
        (
            lambda x: kto(x, use_ref_model=True, ref_input=x.ref_input),
            "ref_weight is None; expected it with use_ref_model",
        ),
        (
            lambda x: ours.LigerFusedLinearCPOLoss()(x.weight, x.input[:5], x.target[:5]),
            "target has 5 rows; expected 2 P",
        ),
        (
            lambda x: ours.LigerFusedLinearCPOLoss()(x.weight, x.input[0], x.target[0]),
            r"expected \(B, L, H\) and \(B, L\)",
        ),
        (lambda x: ours.LigerFusedLinearDPOLoss(loss_type="sigmod"), "loss_type is 'sigmod'"),
        (
            lambda x: ours.LigerFusedLinearDPOLoss(loss_type="exo_pair"),
            "label_smoothing is 0.0; expected above 0",
        ),
        (
            lambda x: ours.LigerFusedLinearDPOLoss(loss_type="robust", label_smoothing=0.5),
            "label_smoothing is 0.5; expected from 0 to below 0.5",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(Batch())


def kto(x, use_ref_model=False, **arguments):
    arguments = {"preference_labels": x.labels} | arguments
    module = ours.LigerFusedLinearKTOLoss(use_ref_model=use_ref_model)
    return module(x.input, x.weight, x.target, **arguments)
