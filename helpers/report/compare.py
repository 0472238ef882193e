"""Two or more runs on one page: what differs between them, what came of it, and a figure of the sweep."""

from __future__ import annotations

from typing import Any

from helpers import display, plots
from helpers.errors import TunebookError
from helpers.report import shell
from helpers.report.facts import TITLES, Facts, gather

MOST_AXES = 8


def render(names: list[str]) -> str:
    """The page's HTML. Raises TunebookError for fewer than two runs or a run that does not exist."""
    names = list(dict.fromkeys(names))
    if len(names) < 2:
        raise TunebookError(f"A comparison needs two runs or more; it got {', '.join(names) or 'none'}.")
    found = sorted(map(gather, names), key=lambda f: -(f.score.get("value") or -1))
    best, headline = found[0].score, "None of these runs has a score yet."
    if best.get("value") is not None:
        limits = display.interval(best.get("low"), best.get("high"))
        headline = f"Highest: {found[0].run} with {display.percent(best['value'])} ({limits})."
    settings, losses = _settings(found), [plots.series(f.logs.get("sft", []), "eval_loss")[1] for f in found]
    held_out = [values[-1] if values else None for values in losses]
    trained = {TITLES[s]: {f.run: f.logs[s] for f in found if f.logs.get(s)} for s in ("sft", "orpo")}
    return shell.page(
        "compare.html.j2",
        "Runs compared",
        headline=headline,
        warnings=_warnings(found),
        settings=settings,
        held_out=held_out,
        runs=found,
        sweep=_sweep(found, settings, held_out),
        curves={stage: plots.curves(logs, ["loss"]) for stage, logs in trained.items() if logs},
    )


def _settings(found: list[Facts]) -> dict[str, list[Any]]:
    """Parameters whose value differs between the runs that have the stage: name → a value for each run, or None."""
    every = dict.fromkeys((stage, n) for f in found for stage in f.stages for n in f.used(stage))
    kept = {}
    for stage, name in every:
        values = [f.used(stage).get(name) if stage in f.stages else None for f in found]
        if len({repr(v) for f, v in zip(found, values, strict=True) if stage in f.stages}) > 1:
            kept[stage, name] = values
    names = [name for _, name in kept]
    return {n if names.count(n) == 1 else f"{stage}.{n}": values for (stage, n), values in kept.items()}


def _warnings(found: list[Facts]) -> list[str]:
    said: dict[str, list[str]] = {}
    for f in found:
        lost = f.scores.get("lost") or {"passed": True}
        for warning in f.warnings + ([] if lost["passed"] else [lost["sentence"]]):
            said.setdefault(warning, []).append(f.run)
    warnings = [f"{'all runs' if len(who) == len(found) else ', '.join(who)}: {text}" for text, who in said.items()]
    warnings += [f"{f.run} has no evaluation; it is in the table without a score." for f in found if not f.scores]
    tasks = [f.scores["task"] for f in found if f.scores]
    if len({(t.get("data_sha256"), t.get("n")) for t in tasks}) > 1:
        warnings.append("The runs were scored on different test items; their scores cannot be compared.")
    if len({t.get("template_hash") for t in tasks}) > 1:
        warnings.append("The runs used different chat templates.")
    return warnings


def _sweep(found: list[Facts], settings: dict[str, list[Any]], held_out: list[float | None]) -> Any:
    """Parallel coordinates of differing parameters, held-out loss and score; None with fewer than two scores."""
    scored = [i for i, f in enumerate(found) if display.finite(f.score.get("value"))]
    axes = dict(list(settings.items())[:MOST_AXES])
    axes |= {"held-out loss": held_out, "accuracy": [f.score.get("value") for f in found]}
    shown = {name: [values[i] for i in scored] for name, values in axes.items()}
    shown = {name: values for name, values in shown.items() if any(v is not None for v in values)}
    return plots.sweep(shown, [found[i].run for i in scored]) if len(scored) > 1 else None
