"""Two or more runs on one page: what differs between them, what came of it, and a figure of the sweep."""

from __future__ import annotations

from typing import Any

from helpers import display, plots, runs
from helpers.errors import TunebookError
from helpers.report import shell
from helpers.report.facts import Facts, accuracy, gather

MOST_AXES = 8


def render(names: list[str]) -> str:
    """The page's HTML. Raises TunebookError for fewer than two runs or a run that does not exist."""
    names = list(dict.fromkeys(names))
    if len(names) < 2:
        raise TunebookError(f"A comparison needs two runs or more; it got {', '.join(names) or 'none'}.")
    found = [gather(name) for name in names]
    found.sort(key=lambda f: -(_score(f).get("value") or -1))
    differing = _differing(found)
    best = _score(found[0])
    headline = "None of these runs has a score yet."
    if best.get("value") is not None:
        limits = display.interval(best.get("low"), best.get("high"))
        headline = f"Highest: {found[0].run} with {display.percent(best['value'])} ({limits})."
    return shell.page(
        "compare.html.j2",
        "Runs compared",
        headline=headline,
        warnings=_warnings(found),
        differing=list(differing),
        runs=[_row(f, list(differing.values())) for f in found],
        sweep=_sweep(found, differing),
        curves=_curves(found),
    )


def _judged(facts: Facts) -> dict[str, Any]:
    return facts.best or facts.baseline or {}


def _score(facts: Facts) -> dict[str, Any]:
    return accuracy(_judged(facts))


def _differing(found: list[Facts]) -> dict[str, tuple[str, str]]:
    """Shown name → (stage, parameter) of every parameter whose value differs between the runs that have the stage."""
    every = dict.fromkeys((stage, n) for f in found for stage, m in f.stages.items() for n in m.params if n != "run")
    kept = [(s, n) for s, n in every if len({repr(_value(f, s, n)) for f in found if s in f.stages}) > 1]
    names = [name for _, name in kept]
    return {name if names.count(name) == 1 else f"{stage}.{name}": (stage, name) for stage, name in kept}


def _value(facts: Facts, stage: str, name: str) -> Any:
    return facts.stages[stage].params.get(name) if stage in facts.stages else None


def _held_out(facts: Facts) -> float | None:
    return next(iter(reversed(plots.series(facts.logs.get("sft", []), "eval_loss")[1])), None)


def _row(facts: Facts, differing: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "name": facts.run,
        "settings": [_value(facts, stage, name) for stage, name in differing],
        "candidate": _judged(facts),
        "accuracy": _score(facts),
        "held_out": _held_out(facts),
        "seconds": facts.seconds,
        "memory": facts.memory,
    }


def _warnings(found: list[Facts]) -> list[str]:
    said: dict[str, list[str]] = {}
    for f in found:
        for warning in f.warnings:
            said.setdefault(warning, []).append(f.run)
    warnings = [f"{'all runs' if len(who) == len(found) else ', '.join(who)}: {text}" for text, who in said.items()]
    warnings += [f"{f.run} has no evaluation; it is in the table without a score." for f in found if not f.scores]
    tasks = [f.scores["task"] for f in found if f.scores]
    if len({(t.get("data_sha256"), t.get("n")) for t in tasks}) > 1:
        warnings.append("The runs were scored on different test items; their scores cannot be compared.")
    if len({t.get("template_hash") for t in tasks}) > 1:
        warnings.append("The runs used different chat templates.")
    return warnings


def _sweep(found: list[Facts], differing: dict[str, tuple[str, str]]) -> Any:
    """Parallel coordinates of differing parameters, held-out loss and score; None with fewer than two scores."""

    def place(value: Any) -> Any:
        return display.plain(value) if isinstance(value, bool) else "(empty)" if value == "" else value

    scored = [f for f in found if display.finite(_score(f).get("value"))]
    axes = {name: [place(_value(f, *where)) for f in scored] for name, where in list(differing.items())[:MOST_AXES]}
    axes |= {"held-out loss": [_held_out(f) for f in scored], "accuracy": [_score(f).get("value") for f in scored]}
    axes = {name: values for name, values in axes.items() if any(v is not None for v in values)}
    if len(scored) < 2 or len(axes) < 2:
        return None
    return plots.sweep(list(axes), {f.run: [values[i] for values in axes.values()] for i, f in enumerate(scored)})


def _curves(found: list[Facts]) -> list[Any]:
    figures = []
    for stage in ("sft", "orpo"):
        for key, title in (("loss", "training loss"), ("eval_loss", "held-out loss")):
            series = {f.run: plots.series(f.logs.get(stage, []), key) for f in found}
            series = {name: points for name, points in series.items() if points[0]}
            if series:
                figures.append(plots.overlay(series, f"{runs.FOLDERS[stage]}: {title}", "nats a token"))
    return figures
