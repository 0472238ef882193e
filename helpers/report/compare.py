"""Two or more runs on one page: what differs between them, what came of it, and a parallel-coordinates plot of the sweep."""

from __future__ import annotations

from typing import Any

from helpers import runs
from helpers.errors import TunebookError
from helpers.report import svg
from helpers.report.facts import Facts, gather
from helpers.report.markup import Markup, between, duration, esc, percent, plain, section, size, table

MOST_AXES = 8


def render(names: list[str]) -> str:
    """The page's HTML. Raises TunebookError for fewer than two runs or a run that does not exist."""
    from helpers.report.page import document, warnings_card

    names = list(dict.fromkeys(names))
    if len(names) < 2:
        raise TunebookError(f"A comparison needs two runs or more; it got {', '.join(names) or 'none'}.")
    found = [gather(name) for name in names]
    differing = _differing(found)
    said: dict[str, list[str]] = {}
    for f in found:
        for warning in f.warnings:
            said.setdefault(warning, []).append(f.run)
    warnings = [
        f"{'all runs' if len(who) == len(found) else ', '.join(who)}: {warning}" for warning, who in said.items()
    ]
    warnings += [f"{f.run} has no evaluation; it is in the table without a score." for f in found if not f.scores]
    warnings += _unlike(found)
    warned = warnings_card(warnings)
    best = max(
        (f for f in found if _accuracy(f).get("value") is not None), key=lambda f: _accuracy(f)["value"], default=None
    )
    headline = (
        f"Highest: {best.run} with {percent(_accuracy(best)['value'])} ({between(_accuracy(best).get('low'), _accuracy(best).get('high'))})."
        if best
        else "None of these runs has a score yet."
    )
    body = (
        f"<header><h1>{len(found)} runs compared</h1><p class='headline'>{esc(headline)}</p></header><main>{warned}"
        + section(
            "runs",
            "Runs",
            _table(found, differing),
            "Intervals are each run's own; runs whose intervals overlap are not told apart by this table. "
            "Parameters that are the same everywhere are left out.",
        )
        + section(
            "sweep",
            "Sweep",
            _parallel(found, differing),
            "One line a run; the last axis is the score. Hover or focus a line for its name.",
        )
        + section("curves", "Training", _curves(found))
        + "</main>"
        + f"<footer>Written by Tunebook from the manifests of {esc(', '.join(names))}.</footer>"
    )
    return document("Runs compared", body)


def _accuracy(facts: Facts) -> dict[str, Any]:
    return ((facts.best() or facts.baseline() or {}).get("scores") or {}).get("accuracy") or {}


def _differing(found: list[Facts]) -> list[tuple[str, str]]:
    """(stage, parameter) whose value is not the same in all runs that have the stage."""
    names = list(
        dict.fromkeys((stage, n) for f in found for stage, m in f.stages.items() for n in m.params if n != "run")
    )
    return [(s, n) for s, n in names if len({repr(_value(f, s, n)) for f in found if s in f.stages}) > 1]


def _value(facts: Facts, stage: str, name: str) -> Any:
    return facts.stages[stage].params.get(name) if stage in facts.stages else None


def _unlike(found: list[Facts]) -> list[str]:
    """Scores of different tests must not be read side by side."""
    tests = {(f.scores["task"].get("data_sha256"), f.scores["task"].get("n")) for f in found if f.scores}
    templates = {f.scores["task"].get("template_hash") for f in found if f.scores}
    return (
        ["The runs were scored on different test items; their scores cannot be compared."] if len(tests) > 1 else []
    ) + (["The runs used different chat templates."] if len(templates) > 1 else [])


def _table(found: list[Facts], differing: list[tuple[str, str]]) -> str:
    head = [
        "run",
        *[n if stages_of(differing, n) == 1 else f"{s}.{n}" for s, n in differing],
        "judged",
        "accuracy",
        "95 % interval",
        "held-out loss",
        "time",
        "memory, GiB",
        "size",
    ]
    rows = []
    for f in sorted(found, key=lambda f: -(_accuracy(f).get("value") or -1)):
        accuracy, candidate = _accuracy(f), f.best() or f.baseline()
        rows.append(
            [
                f.run,
                *["–" if (v := _value(f, s, n)) is None else plain(v) for s, n in differing],
                candidate["name"] if candidate else "–",
                percent(accuracy.get("value")),
                Markup(
                    svg.interval(accuracy.get("value"), accuracy.get("low"), accuracy.get("high"))
                    + f'<span class="muted">{between(accuracy.get("low"), accuracy.get("high"))}</span>'
                ),
                plain(_held_out(f)),
                duration(sum(m.data.get("wall_s") or 0 for m in f.stages.values())),
                plain(max((m.data.get("peak_memory_gib") or 0 for m in f.stages.values()), default=None)),
                size((candidate or {}).get("size_bytes")),
            ]
        )
    return table(head, rows, ["name", *["n"] * len(differing), "", "n", "bar", "n", "n", "n", "n"])


def stages_of(differing: list[tuple[str, str]], name: str) -> int:
    return sum(n == name for _, n in differing)


def _held_out(facts: Facts) -> float | None:
    rows = facts.logs.get("sft", [])
    return next((r["eval_loss"] for r in reversed(rows) if svg.finite(r.get("eval_loss"))), None)


def _parallel(found: list[Facts], differing: list[tuple[str, str]]) -> str:
    scored = [f for f in found if svg.finite(_accuracy(f).get("value"))]
    axes = differing[:MOST_AXES]
    dimensions = [n if stages_of(differing, n) == 1 else f"{s} {n}" for s, n in axes] + ["held-out loss", "accuracy"]
    rows = [(f.run, [*[_axis(_value(f, s, n)) for s, n in axes], _held_out(f), _accuracy(f)["value"]]) for f in scored]
    keep = [i for i in range(len(dimensions)) if any(r[1][i] is not None for r in rows)]
    return svg.parallel(
        [dimensions[i] for i in keep],
        [(n, [v[i] for i in keep]) for n, v in rows],
        "Parameters that differ, and what came of them",
        shares=["accuracy"],
    )


def _axis(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "(empty)" if value == "" else value


def _curves(found: list[Facts]) -> str:
    figures = ""
    for stage in ("sft", "orpo"):
        for key, title in (("loss", "training loss"), ("eval_loss", "held-out loss")):
            series = {
                f.run: [
                    (r["step"], r[key])
                    for r in f.logs.get(stage, [])
                    if svg.finite(r.get("step")) and svg.finite(r.get(key))
                ]
                for f in found
            }
            figures += svg.lines(
                {n: p for n, p in series.items() if p}, f"{runs.FOLDERS[stage]}: {title}", "step", "nats per token"
            )
    return f'<div class="plots">{figures}</div>' if figures else ""
