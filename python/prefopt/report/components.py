"""The components of Enhanced KTO and BCO: which are active, their settings, and their shares of the gradient."""

from dataclasses import dataclass
from typing import Any

from prefopt.report.facts import format_value
from prefopt.report.read import Run
from prefopt.report.score import is_number
from prefopt.train.methods import COMPONENTS

METHODS = ("enhanced_kto", "bco")
OFF = "off"
WEIGHTS = (
    "Plain KTO is not symmetric either: desirable_weight and undesirable_weight{given} already are a form of loss "
    "aversion, by label. loss_aversion depends on the outcome: it weighs rows of either label that are on the wrong "
    "side of the reference point."
)
SHIFT = (
    "On BCO's shift: it was reported to make about 40 % of such runs unstable. In this project's study on a toy policy "
    "(docs/bco-stability.md of prefopt-kernels) the shift was not the cause: the plain forms of value function and "
    "weighting were, and enhanced_kto's defaults with the shift on had no unstable run."
)
SHARES = (
    "Share of the gradient: the mean absolute gradient of a component with respect to the log-probabilities, relative "
    "to the sum over all components, averaged over the logs of training. Value function and loss aversion are measured "
    "together, and so are the two weightings."
)
EFFECTS = {
    "KTO": "the sigmoid of the log-ratio's distance from its reference point",
    "BCO's loss": "what it would be with a shift of 0",
    "value function": "curvature: gains and losses far from the reference point count less than those near it",
    "loss aversion": "multiplies the gradient of a row on the wrong side of the reference point",
    "win weighting": "probability weighting of how surely a row is on the right side",
    "decision weighting": "weighs rows by likelihood, unlikely ones more than in proportion; the mean weight is 1",
    "odds ratio": "raises the odds of desirable answers, lowers those of undesirable ones, without the reference model",
    "BCO's shift": "a baseline computed from the rewards, instead of KTO's reference point",
    "bounds": "scale down the gradient of a row beyond the bound; the value of the loss stays",
}


@dataclass(frozen=True)
class Component:
    """A row of the table; ``gradient`` is its logged component of the gradient, or None if it has none."""

    name: str
    active: bool
    setting: str
    gradient: str | None


def components(run: Run) -> list[Component]:
    """The rows of the table; none if the method has no components."""
    config = run.record.get("config")
    if run.record.get("method") not in METHODS or not isinstance(config, dict):
        return []
    if run.record["method"] == "bco":
        return [_shift(config)]
    return _enhanced_kto(config)


def gradient_share(run: Run, component: str | None) -> str:
    """The mean of the logged shares of a gradient component, in percent; empty if none was logged."""
    values = [] if component is None else run.finite(f"grad/{component}")
    return f"{100 * sum(values) / len(values):.1f} %" if values else ""


def table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Head and body; no body if the method has no components."""
    rows = components(run)
    head = ["component", "state", "setting", "share of the gradient", "what it does"]
    body = []
    base = gradient_share(run, "base")
    if rows and base:
        name = "BCO's loss" if run.record["method"] == "bco" else "KTO"
        body.append([name, "active", "", base, EFFECTS[name]])
    for one in rows:
        share = ""
        if one.active and one.gradient is not None:
            share = gradient_share(run, one.gradient)
            together = share and sum(other.active and other.gradient == one.gradient for other in rows) > 1
            share = f"{share} together" if together else share or "not measured"
        body.append([one.name, "active" if one.active else OFF, one.setting, share, EFFECTS[one.name]])
    if not _is_measured(run):
        head, body = head[:3] + head[4:], [row[:3] + row[4:] for row in body]
    return head, body


def notes(run: Run) -> list[str]:
    """The sentences below the table."""
    if not components(run):
        return []
    sentences = [SHARES] if _is_measured(run) else []
    if run.record["method"] == "enhanced_kto":
        weights = [run.record["config"].get(f"{label}_weight") for label in ("desirable", "undesirable")]
        given = "" if None in weights else f" (here {format_value(weights[0])} and {format_value(weights[1])})"
        sentences.append(WEIGHTS.format(given=given))
    return [*sentences, SHIFT]


def _is_measured(run: Run) -> bool:
    return any(gradient_share(run, one) for one in COMPONENTS)


def _enhanced_kto(config: dict[str, Any]) -> list[Component]:
    alpha, aversion, odds = (config.get(key) for key in ("alpha", "loss_aversion", "odds_weight"))
    win, decision = (config.get(f"{one}_weighting") or OFF for one in ("win", "decision"))
    clip = config.get("decision_clip") if decision != OFF else None
    main, bound = (config.get(f"{one}_bound") or None for one in ("main", "odds"))
    bounds = _settings(main_bound=main, odds_bound=bound)
    decided = _settings(decision_weighting=decision, decision_clip=clip)
    return [
        Component("value function", alpha not in (None, 1), _settings(alpha=alpha, kappa=config.get("kappa")), "value"),
        Component("loss aversion", aversion not in (None, 1), _settings(loss_aversion=aversion), "value"),
        Component("win weighting", win != OFF, _settings(win_weighting=win), "weighting"),
        Component("decision weighting", decision != OFF, decided, "weighting"),
        Component("odds ratio", bool(odds), _settings(odds_weight=odds), "odds"),
        _shift(config),
        Component("bounds", bool(bounds), bounds or "none set", None),
    ]


def _shift(config: dict[str, Any]) -> Component:
    kind = config.get("shift") or OFF
    setting = _settings(shift=kind)
    if kind != OFF:
        start, ramp, bound = (config.get(f"shift_{one}") for one in ("start", "ramp", "bound"))
        begin = f"{100 * start:g} % of the steps" if is_number(start) and start else "the start"
        parts = [
            _settings(shift=kind, shift_decay=config.get("shift_decay")),
            f"bounded by {format_value(bound)} in reward" if bound else "no bound",
            f"from {'the plateau of the margin' if start == 'plateau' else begin}",
        ]
        when = f"fully after another {100 * ramp:g} % of the steps" if ramp else "at once"
        setting = f"{'; '.join(parts)}, {when}"
    return Component("BCO's shift", kind != OFF, setting, "shift")


def _settings(**options: Any) -> str:
    """The options that are set: alpha 0.88, kappa 0.1."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in options.items() if value is not None)
