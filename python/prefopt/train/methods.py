"""Every method in one table: what it learns from, whether it needs a reference model, and which options it takes.

An option that stands nowhere in a method's row is not part of its formula and is refused; so is one whose switch is off.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RATED, PAIRS, ANSWERS = "rated rows", "pairs", "desirable answers"


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    title: str
    data: str  # RATED, PAIRS or ANSWERS
    options: Mapping[str, Any] = field(default_factory=dict)  # the ones it takes, with its defaults
    needs_reference: bool = True
    fades: bool = False  # the pull on a row that is very wrong goes to 0


_WEIGHTS = {"desirable_weight": 1.0, "undesirable_weight": 1.0}

METHODS: dict[str, Method] = {
    "kto": Method("KTO", RATED, {"beta": 0.1, **_WEIGHTS, "kl_estimator": "window"}, fades=True),
    "apo_zero": Method("APO-zero", RATED, {"beta": 0.1, **_WEIGHTS}, fades=True),
    "enhanced_kto": Method(
        "Enhanced KTO",
        RATED,
        {
            "beta": 0.1,
            **_WEIGHTS,
            "kl_estimator": "window",
            "loss_aversion": 2.25,
            "alpha": 0.88,
            "kappa": 0.1,
            "win_weighting": "off",
            "decision_weighting": "tversky-kahneman",
            "odds_weight": 0.1,
            "shift": "off",
        },
        fades=True,
    ),
    "bco": Method("BCO", RATED, {"beta": 0.1, "shift": "window"}),
    "dpo": Method("DPO", PAIRS, {"beta": 0.1, "label_smoothing": 0.0, "robust": False}),
    "ipo": Method("IPO", PAIRS, {"beta": 0.1}),
    "cpo": Method("CPO", PAIRS, {"beta": 0.1, "alpha": 1.0}, needs_reference=False),
    "simpo": Method("SimPO", PAIRS, {"beta": 2.0, "gamma": 1.0}, needs_reference=False),
    "orpo": Method("ORPO", PAIRS, {"odds_weight": 0.1}, needs_reference=False),
    "sft": Method("SFT", ANSWERS, needs_reference=False),
}

# Options that another one switches on, with the defaults they have then.
_KL_DECAY = {"kl_decay": 0.9}
_DECISION_CLIP = {"decision_clip": (0.5, 2.0)}
_SHIFT_DECAY = {"shift_decay": 0.9}
_SHIFT = {  # of the method; a bound of 0 is none
    "bco": {"shift_bound": 0.0, "shift_start": 0.0, "shift_ramp": 0.0},
    "enhanced_kto": {"shift_bound": 0.5, "shift_start": 0.3, "shift_ramp": 0.1},
}

OPTIONS = tuple(
    dict.fromkeys(
        name
        for options in (
            *(method.options for method in METHODS.values()),
            *_SHIFT.values(),
            _SHIFT_DECAY,
            _KL_DECAY,
            _DECISION_CLIP,
            {"main_bound": 0.0, "odds_bound": 0.0},
        )
        for name in options
    )
)


def in_force(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the chosen method uses under these settings, with the values they have.

    Args:
        options: of a configuration, with a valid ``method``; None, or absent, is the method's default.

    Example:
        >>> in_force({"method": "simpo", "beta": 2.5})
        {'beta': 2.5, 'gamma': 1.0}
        >>> sorted(set(in_force({"method": "bco", "shift": "ema"})) - set(in_force({"method": "bco"})))
        ['shift_decay']
    """
    name = options["method"]
    values: dict[str, Any] = {}

    def take(defaults: Mapping[str, Any]) -> None:
        for option, default in defaults.items():
            given = options.get(option)
            values[option] = default if given is None else given

    take(METHODS[name].options)
    if values.get("kl_estimator") == "ema":
        take(_KL_DECAY)
    if values.get("decision_weighting", "off") != "off":
        take(_DECISION_CLIP)
    shifted = values.get("shift", "off") != "off"
    if shifted:
        take(_SHIFT[name])
        if values["shift"] == "ema":
            take(_SHIFT_DECAY)
    if name == "enhanced_kto":
        # KTO's own pull; and twice what the odds term has at a mean token probability of 0.
        main, odds = values["beta"], values["odds_weight"]
        take(
            {
                "main_bound": main / 4 if shifted and isinstance(main, (int, float)) else 0.0,
                "odds_bound": 2 * odds if shifted and isinstance(odds, (int, float)) else 0.0,
            }
        )
    return values
