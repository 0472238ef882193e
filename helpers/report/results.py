"""The measured part of the page: scores with intervals, comparisons, what was lost, fidelity and size, other tasks."""

from __future__ import annotations

from typing import Any

from helpers.report import svg
from helpers.report.facts import Facts
from helpers.report.markup import Markup, between, duration, esc, percent, plain, points, score, section, size, table

#: metrics of the table of scores, beside the headline; others have sections of their own
LABELS = {
    "accuracy": "accuracy",
    "accuracy_nonempty": "gold not empty",
    "accuracy_clean": "clean items",
    "valid": "query runs",
    "structural": "same structure",
    "exact": "exact match",
    "f1": "token F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "stopped": "stops itself",
}


def tiles(facts: Facts) -> Markup:
    """The few numbers a reader wants first."""
    found = []
    base, best = facts.baseline(), facts.best()
    for candidate in (base, best):
        if candidate and (accuracy := candidate["scores"].get("accuracy")):
            label = facts.scores["task"].get("label") or facts.scores["task"].get("metric") or "accuracy"
            found.append(
                (
                    score(accuracy),
                    candidate["name"],
                    f"{label}; 95 %: {between(accuracy['low'], accuracy['high'], accuracy.get('unit', 'share'))}"
                    if between(accuracy["low"], accuracy["high"])
                    else label,
                )
            )
    if base and best and (pair := comparison(facts, base["name"], best["name"])):
        found.append(
            (
                points(pair["difference"]),
                f"points: {pair['verdict']}",
                f"95 %: {points(pair['low'])} to {points(pair['high'])}, n = {pair['n']}",
            )
        )
    if best and svg.finite(best.get("size_bytes")):
        found.append(
            (
                size(best["size_bytes"]),
                "to ship" if (facts.scores.get("ship") or {}).get("name") else "size",
                f"{best['name']} on disk",
            )
        )
    elapsed = sum(m.data.get("wall_s") or 0 for m in facts.stages.values())
    if elapsed:
        peak = max((m.data.get("peak_memory_gib") or 0 for m in facts.stages.values()), default=0)
        found.append((duration(elapsed), "whole run", f"highest memory {peak:.1f} GiB" if peak else ""))
    return (
        Markup(
            '<div class="tiles">'
            + "".join(
                f'<div class="tile"><b>{esc(big)}</b><span class="name">{esc(name)}</span><span>{esc(small)}</span></div>'
                for big, name, small in found
            )
            + "</div>"
        )
        if found
        else Markup("")
    )


def comparison(facts: Facts, baseline: str, candidate: str, metric: str = "accuracy") -> dict[str, Any] | None:
    return next(
        (
            c
            for c in facts.scores["comparisons"]
            if (c["baseline"], c["candidate"], c["metric"]) == (baseline, candidate, metric)
        ),
        None,
    )


def scores(facts: Facts) -> Markup:
    """Every candidate with its interval, the paired comparisons, right answers by kind, and kinds of errors."""
    if not facts.scores:
        return Markup("")
    task = facts.scores["task"]
    body = _accuracy(facts) + _comparisons(facts) + _groups(facts) + _errors(facts)
    nonempty = f", {task['n_nonempty']} with a gold answer that has rows" if task.get("n_nonempty") is not None else ""
    decoding = ", ".join(f"{k} {plain(v)}" for k, v in (task.get("decoding") or {}).items())
    label = str(task.get("label") or task.get("metric"))
    sub = f"{label[:1].upper()}{label[1:]} on {task['n']} held-out items{nonempty}. Same prompts and decoding for all: {decoding or 'greedy'}."
    return section("scores", "Scores", body, sub)


def _accuracy(facts: Facts) -> str:
    ship = (facts.scores.get("ship") or {}).get("name")
    candidates = facts.candidates()
    extra = [m for m in LABELS if m != "accuracy" and any(m in c["scores"] for c in candidates)]
    known = [
        c["scores"]["accuracy"] for c in candidates if svg.finite((c["scores"].get("accuracy") or {}).get("value"))
    ]
    ceiling = (
        1.0
        if all(s.get("unit", "share") == "share" for s in known)
        else max([s.get("high") or s["value"] for s in known], default=1.0) * 1.05
    )
    rows, kinds = [], []
    for c in candidates:
        accuracy = c["scores"].get("accuracy") or {}
        speed = c.get("speed") or {}
        if c["status"] == "skipped":
            rows.append([c["name"], "skipped", c["reason"] or "no reason given", *[""] * len(extra), "", ""])
        else:
            rows.append(
                [
                    c["name"],
                    score(accuracy),
                    Markup(
                        svg.interval(accuracy.get("value"), accuracy.get("low"), accuracy.get("high"), 0.0, ceiling)
                        + f'<span class="muted">{between(accuracy.get("low"), accuracy.get("high"), accuracy.get("unit", "share"))}</span>'
                    ),
                    *[score(c["scores"].get(m)) for m in extra],
                    size(c["size_bytes"]),
                    f"{speed['items_per_s']:.1f} /s"
                    if svg.finite(speed.get("items_per_s")) and speed["items_per_s"]
                    else "",
                ]
            )
        kinds.append("ship" if c["name"] == ship else "")
    sentence = (facts.scores.get("ship") or {}).get("sentence")
    return table(
        [
            "",
            facts.scores["task"].get("metric") or "accuracy",
            "95 % interval",
            *[LABELS[m] for m in extra],
            "size",
            "speed",
        ],
        rows,
        ["name", "n", "bar", *["n"] * len(extra), "n", "n"],
        kinds,
    ) + (f"<p><b>{esc(sentence)}</b></p>" if sentence else "")


def _comparisons(facts: Facts) -> str:
    found = [c for c in facts.scores["comparisons"] if svg.finite(c["difference"])]
    if not found:
        return ""
    reach = (
        max((abs(v) for c in found for v in (c["difference"], c["low"], c["high"]) if svg.finite(v)), default=0.1)
        or 0.1
    )
    rows = []
    for c in found:
        verdict = Markup(
            f'<span class="{c["verdict"] if c["verdict"] in ("better", "worse") else "muted"}">{esc(c["verdict"])}</span>'
        )
        what = f"{c['candidate']} against {c['baseline']}" + (
            "" if c["metric"] == "accuracy" else f", {LABELS.get(c['metric'], c['metric'])}"
        )
        p = c["p_holm"] if svg.finite(c["p_holm"]) else c["p"]
        rows.append(
            [
                what,
                verdict,
                Markup(svg.interval(c["difference"], c["low"], c["high"], -reach, reach, zero=True)),
                f"{points(c['difference'])} ({points(c['low'])} to {points(c['high'])})",
                "–" if not svg.finite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}",
                f"{c['wins']} / {c['losses']} / {c['ties']}" if c.get("wins") is not None else "",
                f"{points(c['detectable']).lstrip('+')}" if svg.finite(c["detectable"]) else "",
            ]
        )
    head = ["", "verdict", "difference", "points (95 %)", "p", "won / lost / tied", "detectable"]
    return (
        "<h3>Paired comparisons</h3>"
        + table(head, rows, ["wide", "", "bar", "n", "n", "n", "n"])
        + '<p class="sub">Same items for both sides. Intervals by paired bootstrap; p by '
        + esc(" and ".join(sorted({str(c["test"]) for c in found})))
        + ", corrected for the number of comparisons (Holm); detectable: the smallest difference in points this sample could show.</p>"
    )


def _groups(facts: Facts) -> str:
    shown = [c for c in facts.candidates() if c["status"] == "scored" and c["groups"]]
    columns = list(dict.fromkeys(column for c in shown for column in c["groups"]))
    parts = []
    for column in columns:
        values = list(dict.fromkeys(v for c in shown for v in c["groups"].get(column, {})))
        if len(values) < 2:
            continue
        rows = []
        for value in values:
            cells = [c["groups"].get(column, {}).get(value) or {} for c in shown]
            rows.append(
                [
                    value,
                    next((cell["n"] for cell in cells if cell), 0),
                    *[percent(cell.get("value"), 0) for cell in cells],
                ]
            )
        parts.append(
            f"<h3>Right answers by {esc(column)}</h3>"
            + table(["", "n", *[c["name"] for c in shown]], rows, ["name", "n", *["n"] * len(shown)])
        )
    return "".join(parts)


def _errors(facts: Facts) -> str:
    from helpers.evaluate.scores import ERROR_KINDS

    shown = [c for c in facts.candidates() if c["status"] == "scored" and any(c["errors"].values())]
    kinds = [k for k in ERROR_KINDS if any(c["errors"].get(k) for c in shown)]
    if not kinds:
        return ""
    rows = [[ERROR_KINDS[k], *[c["errors"].get(k) or "" for c in shown]] for k in kinds]
    return "<h3>What went wrong</h3>" + table(
        ["kind of error", *[c["name"] for c in shown]], rows, ["wide", *["n"] * len(shown)]
    )


def forgetting(facts: Facts) -> Markup:
    """Cross-entropy on general text, refusals, manners and general tasks, before and after, with the verdict."""
    lost = (facts.scores or {}).get("forgetting")
    if not lost:
        return Markup("")
    rows = []
    tasks = list(dict.fromkeys(t for c in lost["candidates"].values() for t in (c.get("tasks") or {})))
    for name, c in in_order(facts, lost["candidates"]):
        verdict = Markup(
            ""
            if name == lost["baseline"]
            else '<span class="better">kept</span>'
            if c.get("passed")
            else '<span class="worse">lost</span>'
        )
        change = "" if name == lost["baseline"] else f"{c['change']:+.3f}" if svg.finite(c.get("change")) else "–"
        limits = (
            f"{c['low']:+.3f} to {c['high']:+.3f}"
            if name != lost["baseline"] and svg.finite(c.get("low")) and svg.finite(c.get("high"))
            else ""
        )
        rows.append(
            [
                name,
                plain(c.get("loss")),
                plain(c.get("perplexity")),
                change,
                limits,
                percent(c.get("refusal_rate"), 0),
                percent(c.get("manners"), 0),
                *[
                    f"{percent((c.get('tasks') or {}).get(t, {}).get('base'))} → {percent((c.get('tasks') or {}).get(t, {}).get('value'))}"
                    for t in tasks
                ],
                verdict,
            ]
        )
    head = ["", "loss, nats", "perplexity", "change", "95 % interval", "refusals", "manners", *tasks, "verdict"]
    body = table(head, rows, ["name", *["n"] * (len(head) - 2), ""])
    body += "".join(
        f"<p>{esc(c['sentence'])}</p>"
        for n, c in in_order(facts, lost["candidates"])
        if n != lost["baseline"] and c.get("sentence")
    )
    body += "".join(f"<p><b>Advice:</b> {esc(a)}</p>" for a in lost.get("advice") or [])
    limit = (lost.get("threshold") or {}).get("loss_increase")
    texts = next((c.get("n") for c in lost["candidates"].values() if c.get("n")), None)
    sub = (
        f"Cross-entropy per token on general text{f' ({texts} texts)' if texts else ''} that has nothing to do with the job"
        + (f"; more than {limit:+.2f} nats counts as lost." if svg.finite(limit) else ".")
    )
    return section("forgetting", "What was lost", body, sub)


def fidelity(facts: Facts) -> Markup:
    """Each exported file against the merged model: size, divergence, agreement, and the task score measured on it."""
    files = exported(facts)
    if not files:
        return Markup("")
    accuracy = {
        str(c["name"]).lower().removeprefix("gguf").strip(" :-"): (c["scores"].get("accuracy") or {}).get("value")
        for c in facts.candidates()
        if c["kind"] == "gguf"
    }
    rows, by_kl = [], []
    by_score = [
        (c["size_bytes"] / 1e6, c["scores"]["accuracy"]["value"], c["name"])
        for c in facts.candidates()
        if svg.finite(c["size_bytes"])
        and c["role"] in ("gguf", "merged")
        and svg.finite((c["scores"].get("accuracy") or {}).get("value"))
    ]
    for name, f in files.items():
        measured = percent(accuracy.get(name.lower()))
        if name.lower() not in accuracy and svg.finite(
            f.get("task_score")
        ):  # scored by the export alone, on fewer questions
            measured = f"{percent(f['task_score'])} of {f.get('task_count') or '?'}"
        kl, failed = f.get("mean_kl"), f.get("failed") or {}
        gate = "; ".join(f"{which}: {why}" for which, why in failed.items())
        rows.append(
            [
                name,
                size(f.get("bytes")),
                plain(f.get("bits_per_weight")),
                plain(kl),
                plain(f.get("weights_kl")),
                plain(f.get("p99_kl")),
                percent(f.get("top1")),
                plain(f.get("perplexity")),
                measured,
                Markup(
                    f'<span class="worse">{esc(gate)}</span>' if gate else '<span class="better">within bounds</span>'
                ),
            ]
        )
        if svg.finite(f.get("bytes")) and svg.finite(kl):
            by_kl.append((f["bytes"] / 1e6, kl, name))
    figures = svg.scatter(
        by_kl, "Divergence from the merged model by size", "MB", "mean KL, nats", log_y=all(p[1] > 0 for p in by_kl)
    ) + (svg.scatter(by_score, "Task score by size", "MB", "accuracy", percent_y=True) if len(by_score) > 1 else "")
    head = [
        "file",
        "size",
        "bits / weight",
        "mean KL",
        "of it weights",
        "99 % KL",
        "same first choice",
        "perplexity",
        "task score",
        "gate",
    ]
    best = facts.metrics("gguf").get("recommended") or {}
    advice = f"{best['type']}, {best['why']}." if best.get("type") else best.get("why", "")
    body = (
        table(head, rows, ["name", *["n"] * 8, ""])
        + (f"<p><b>Recommended:</b> {esc(advice)}</p>" if advice else "")
        + f'<div class="plots">{figures}</div>'
    )
    return section(
        "fidelity",
        "Fidelity and size",
        body,
        "Each GGUF file in llama.cpp's runtime against the merged model, on held-out text of this job.",
    )


def in_order(facts: Facts, values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Items in the order in which the candidates were judged; JSON keeps its keys sorted."""
    order = [c["name"] for c in facts.candidates()]
    return sorted(values.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))


def exported(facts: Facts) -> dict[str, dict[str, Any]]:
    """type -> what fidelity.json says of that file, with its size; largest first. A file that was measured and not kept has none."""
    if not facts.fidelity:
        return {}
    sizes = {f["type"]: f for f in facts.fidelity.get("sizes") or []}
    files = {
        f["type"]: {"bytes": None, "bits_per_weight": None, **sizes.get(f["type"], {}), **f}
        for f in facts.fidelity.get("files") or []
    }
    return dict(sorted(files.items(), key=lambda item: -(item[1]["bytes"] or 0)))


def others(facts: Facts) -> Markup:
    """Standard tasks, held-out preference, instruction checks, a judge, contamination and seeds: whatever was measured."""
    s = facts.scores or {}
    parts = []
    if harness := s.get("harness"):
        names = list(dict.fromkeys(n for t in harness.values() for n in t["metrics"]))
        rows = [
            [task, metric, t["n"], *[_plus_minus(t["metrics"].get(n, {}).get(metric)) for n in names]]
            for task, t in harness.items()
            for metric in dict.fromkeys(m for v in t["metrics"].values() for m in v)
        ]
        parts.append(
            "<h3>Standard tasks</h3>"
            + table(["task", "metric", "n", *names], rows, ["name", "", "n", *["n"] * len(names)])
        )
    if preference := s.get("preference"):
        rows = [
            [
                n,
                score(p["accuracy"]),
                between(p["accuracy"].get("low"), p["accuracy"].get("high")),
                plain((p["log_odds"] or {}).get("value")),
                score(p.get("win_rate")),
                p["n"],
            ]
            for n, p in in_order(facts, preference)
        ]
        parts.append(
            "<h3>Held-out preference pairs</h3>"
            + table(
                ["", "prefers the chosen", "95 % interval", "log-odds", "win rate", "n"], rows, ["name", *["n"] * 5]
            )
        )
    if instructions := s.get("instructions"):
        checks = list(dict.fromkeys(c for v in instructions.values() for c in v))
        parts.append(
            "<h3>Instruction checks</h3>"
            + table(
                ["", *checks],
                [[n, *[score(v.get(c)) for c in checks]] for n, v in in_order(facts, instructions)],
                ["name", *["n"] * len(checks)],
            )
        )
    if judge := s.get("judge"):
        rows = [
            [
                f"{p['candidate']} against {p['baseline']}",
                percent(p["win_rate"]),
                between(p["low"], p["high"]),
                percent(p["length_controlled"]),
                percent(p["order_agreement"]),
                p["n"],
                p["failed"],
            ]
            for p in judge["pairs"]
        ]
        parts.append(
            f"<h3>Judge: {esc(judge['model'])}</h3>"
            + table(
                ["", "win rate", "95 % interval", "length-controlled", "orders agree", "n", "failed"],
                rows,
                ["wide", *["n"] * 6],
            )
        )
    if dirty := s.get("contamination"):
        rows = [
            [n, score(c.get("clean")), score(c.get("contaminated"))] for n, c in in_order(facts, dirty["candidates"])
        ]
        parts.append(
            f"<h3>Contamination</h3><p>{dirty['contaminated']} of {dirty['n']} test items share {dirty['ngram']}-grams with {esc(dirty['reference'])}"
            f"{'; they are scored apart' if dirty['contaminated'] else ''}.</p>"
            + (
                table(["", "clean items", "contaminated items"], rows, ["name", "n", "n"])
                if dirty["contaminated"]
                else ""
            )
        )
    if seeds := s.get("seeds"):
        every = list(dict.fromkeys(k for v in seeds.values() for k in v if k not in ("mean", "sd")))
        rows = [
            [
                n,
                percent(v.get("mean")),
                percent(v.get("sd")),
                *[percent((v.get(k) or {}).get("accuracy")) for k in every],
            ]
            for n, v in in_order(facts, seeds)
        ]
        parts.append(
            "<h3>Several seeds</h3>"
            + table(
                ["", "mean", "standard deviation", *[f"seed {k}" for k in every]],
                rows,
                ["name", *["n"] * (2 + len(every))],
            )
        )
    return section("tasks", "Other measurements", "".join(parts))


def _plus_minus(value: dict[str, Any] | None) -> str:
    if not value or not svg.finite(value.get("value")):
        return "–"
    error = value.get("stderr")
    return f"{value['value']:.4f}" + (f" ± {error:.4f}" if svg.finite(error) else "")
