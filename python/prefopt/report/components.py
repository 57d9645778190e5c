"""The components of Enhanced KTO and BCO: which are active, how they are set, and how hard each one pulled."""

from dataclasses import dataclass
from typing import Any

from prefopt.report.facts import shown
from prefopt.report.read import Run

METHODS = ("enhanced_kto", "bco")
MEASURED = ("base", "shift", "value", "weighting", "odds")  # the parts that are logged as grad/*
OFF = "off"
WEIGHTS = (
    "KTO without any of this is not symmetric either: desirable_weight and undesirable_weight{given} already are a "
    "knob of "
    "loss aversion, by label. loss_aversion is one by outcome: it weighs rows, of either label, that are on the wrong "
    "side of the reference point."
)
SHIFT = (
    "On BCO's shift: it was reported to make about 40 % of such runs unstable. In this project's study on a toy policy "
    "(docs/bco-stability.md of prefopt-kernels) the shift was not the cause: the plain forms of value function and "
    "weighting were, and enhanced_kto's defaults with the shift on had no unstable run."
)
SHARES = (
    "Share of the gradient: the mean size of a component's pull on the log-probabilities, in shares of the sum of all "
    "components', averaged over the logs of training. Value function and loss aversion are measured together, and so "
    "are the two weightings."
)


@dataclass(frozen=True)
class Component:
    """A line of the table; ``part`` is one of ``MEASURED``, or None for what has no pull of its own."""

    name: str
    active: bool
    setting: str
    part: str | None
    what: str


def components(run: Run) -> list[Component]:
    """The table's lines; none where the method has no components."""
    config = run.record.get("config")
    method = run.record.get("method")
    if method not in METHODS or not isinstance(config, dict):
        return []
    found = [_shift(config)]
    if method == "enhanced_kto":
        found = [*_prospect(config), *found, _bounds(config)]
    return found


def share(run: Run, part: str | None) -> str:
    """The mean of what was logged of a component's pull, in percent; empty where nothing was."""
    values = [] if part is None else run.finite(f"grad/{part}")
    return f"{100 * sum(values) / len(values):.1f} %" if values else ""


def table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Head and body, as text; no body where the method has no components."""
    found = components(run)
    measured = any(share(run, part) for part in MEASURED)
    head = ["component", "state", "setting", "share of the gradient", "what it does"]
    body = [
        [
            one.name,
            "active" if one.active else OFF,
            one.setting,
            _measured(run, one, found),
            one.what,
        ]
        for one in found
    ]
    if body and share(run, "base"):
        name, what = (
            ("BCO's loss", "what it would be with a shift of 0")
            if run.record.get("method") == "bco"
            else ("KTO", "the sigmoid of the log-ratio's distance from its reference point")
        )
        body.insert(0, [name, "active", "", share(run, "base"), what])
    if not measured:
        head, body = head[:3] + head[4:], [line[:3] + line[4:] for line in body]
    return head, body


def _measured(run: Run, one: Component, among: list[Component]) -> str:
    """The share of an active component, with those that were measured with it."""
    if not one.active or one.part is None:
        return ""
    measured = share(run, one.part)
    partners = sum(other.active and other.part == one.part for other in among)
    return f"{measured} together" if measured and partners > 1 else measured or "not measured"


def notes(run: Run) -> list[str]:
    """The sentences that belong to the table."""
    config = run.record.get("config")
    if not components(run) or not isinstance(config, dict):
        return []
    said = [SHARES] if any(share(run, part) for part in MEASURED) else []
    weights = [config.get("desirable_weight"), config.get("undesirable_weight")]
    if run.record.get("method") == "enhanced_kto":
        given = "" if None in weights else f" (here {shown(weights[0])} and {shown(weights[1])})"
        said += [WEIGHTS.format(given=given), SHIFT]
    else:
        said.append(SHIFT)
    return said


def _prospect(config: dict) -> list[Component]:
    alpha, aversion = config.get("alpha"), config.get("loss_aversion")
    win, decision = (config.get(f"{one}_weighting") or OFF for one in ("win", "decision"))
    odds = config.get("odds_weight")
    clip = config.get("decision_clip")
    return [
        Component(
            "value function",
            alpha not in (None, 1),
            _set(alpha=alpha, kappa=config.get("kappa")),
            "value",
            "curvature: what is gained or lost far from the reference point counts less than near it",
        ),
        Component(
            "loss aversion",
            aversion not in (None, 1),
            _set(loss_aversion=aversion),
            "value",
            "a row on the wrong side of the reference point pulls this many times as hard",
        ),
        Component(
            "win weighting",
            win != OFF,
            _set(win_weighting=win),
            "weighting",
            "probability weighting of how surely a row is on the right side",
        ),
        Component(
            "decision weighting",
            decision != OFF,
            _set(decision_weighting=decision, decision_clip=clip if decision != OFF else None),
            "weighting",
            "rows weigh by their likelihood, unlikely ones more than their share; the mean weight is 1",
        ),
        Component(
            "odds ratio",
            bool(odds),
            _set(odds_weight=odds),
            "odds",
            "raises the odds of desirable answers and lowers those of undesirable ones, without the reference model",
        ),
    ]


def _shift(config: dict) -> Component:
    kind = config.get("shift") or OFF
    setting = _set(shift=kind)
    if kind != OFF:
        start, ramp = config.get("shift_start"), config.get("shift_ramp")
        setting = _set(shift=kind, shift_decay=config.get("shift_decay"))
        bound = config.get("shift_bound")
        setting += f"; bounded by {shown(bound)} in reward" if bound else "; no bound"
        setting += f"; from {_when(start)}"
        setting += f", fully after another {100 * ramp:g} % of the steps" if ramp else ", at once"
    return Component(
        "BCO's shift",
        kind != OFF,
        setting,
        "shift",
        "a baseline made of the rewards themselves, in the place of KTO's reference point",
    )


def _bounds(config: dict) -> Component:
    main, odds = config.get("main_bound"), config.get("odds_bound")
    return Component(
        "bounds",
        bool(main or odds),
        _set(main_bound=main or None, odds_bound=odds or None) or "none set",
        None,
        "scale down the gradient of a row that would pull harder, and change no value",
    )


def _set(**options: Any) -> str:
    """The settings that there are: alpha 0.88, kappa 0.1."""
    return ", ".join(f"{name} {shown(value)}" for name, value in options.items() if value is not None)


def _when(start: Any) -> str:
    if start == "plateau":
        return "the plateau of the margin"
    return f"{100 * start:g} % of the steps" if start else "the start"
