"""The hyper-parameters of one call, as every backend gets them."""

from typing import NamedTuple

from torch import Tensor

METHODS = ("kto", "apo_zero", "bco", "enhanced_kto")
WEIGHTINGS = ("tversky-kahneman", "prelec")
_CLASS_WEIGHTS = ("desirable_weight", "undesirable_weight")
# What each method takes beside beta; enhanced_kto takes everything.
TAKEN = {
    "kto": ("reference_point", *_CLASS_WEIGHTS),
    "apo_zero": _CLASS_WEIGHTS,
    "bco": ("shift",),
}
# The keywords beside method and beta at the values that switch them off, which are their defaults.
OFF = {
    "reference_point": 0.0,
    "shift": 0.0,
    "shift_gate": 0.0,
    "shift_bound": 10.0,
    "loss_aversion": 1.0,
    "alpha": 1.0,
    "kappa": 0.1,
    "win_weighting": None,
    "decision_weighting": None,
    "decision_clip": (0.5, 2.0),
    "decision_mean": None,
    "odds_weight": 0.0,
    "odds_baseline": 0.0,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "main_bound": None,
    "odds_bound": None,
}


class Parameters(NamedTuple):
    """The keywords of ``sequence_loss``; a bound that is not set is infinite.

    The first five may be 0-dim fp32 tensors on the device of the rows, because they change from step to step.
    """

    reference_point: Tensor | float  # nats
    shift: Tensor | float  # reward units
    shift_gate: Tensor | float
    odds_baseline: Tensor | float  # log-odds
    decision_mean: Tensor | float  # 0: the mean over the rows of this call
    beta: float
    shift_bound: float
    loss_aversion: float
    alpha: float
    kappa: float
    decision_low: float
    decision_high: float
    odds_weight: float
    desirable_weight: float
    undesirable_weight: float
    main_bound: float
    odds_bound: float


TENSORS = Parameters._fields[:5]  # those that may be tensors


class Form(NamedTuple):
    """What is computed: the method and the two weightings, each None or one of WEIGHTINGS."""

    method: str
    win_weighting: str | None
    decision_weighting: str | None
