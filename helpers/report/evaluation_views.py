"""What notebook 05 shows: tables and plots of scores.json, answers side by side. Everything a model wrote is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from helpers.display import Html, table

RIGHT, WRONG, GREY = "#2a9d6f", "#d1495b", "#8a8f98"
ANSWER = "white-space:pre-wrap;overflow-wrap:anywhere;max-width:44em;margin:2px 0"


def scores(found: dict[str, Any]) -> Html:
    """The table of candidates, warnings first, the sentence about what to ship last."""
    rows = []
    for c in found["candidates"]:
        if c["status"] == "skipped":
            rows.append((c["name"], "left out", c["reason"], "", "", "", ""))
            continue
        s = c["scores"]
        size = f"{c['size_bytes'] / 2**20:.0f} MiB" if c["size_bytes"] else ""
        rows.append(
            (
                c["name"],
                percent(s["accuracy"]),
                between(s["accuracy"]),
                percent(s.get("valid")),
                percent(s.get("structural")),
                percent(s.get("stopped")),
                size,
                f"{c['speed'].get('items_per_s') or 0:.1f}",
            )
        )
    head = (
        "candidate",
        found["task"]["label"],
        "95 % interval",
        "runs",
        "same structure",
        "stops by itself",
        "size",
        "questions/s",
    )
    ship = f"<p><b>{html.escape(found['ship']['sentence'])}</b></p>" if found["ship"] else ""
    warnings = "".join(f"<p>⚠ {html.escape(w)}</p>" for w in found["warnings"])
    text = "\n".join(["  ".join(f"{v!s:>14}" for v in row) for row in (head, *rows)])
    return Html(
        f"<p>{html.escape(found['headline'])}</p>{warnings}{table(rows, head)}{ship}", f"{found['headline']}\n{text}"
    )


def comparisons(found: dict[str, Any]) -> Html:
    """Paired comparisons in words, with their p-values."""
    rows = [
        (
            f"{c['candidate']} against {c['baseline']}",
            c["sentence"],
            f"{c['wins']} / {c['losses']} / {c['ties']}",
            f"{c['p_holm']:.2g}",
            c["test"],
        )
        for c in found["comparisons"]
    ]
    if not rows:
        return Html(
            "<p>One candidate alone: there is nothing to compare.</p>",
            "One candidate alone: there is nothing to compare.",
        )
    return Html(
        table(rows, ("comparison", "result", "won / lost / tied", "p (Holm)", "test")),
        "\n".join(f"{r[0]}: {r[1]}" for r in rows),
    )


def errors(found: dict[str, Any]) -> Html:
    """How often each candidate failed in which way."""
    from helpers.evaluate.scores import ERROR_KINDS

    scored = [c for c in found["candidates"] if c["status"] == "scored"]
    kinds = [k for k in ERROR_KINDS if any(k in c["errors"] for c in scored)]
    rows = [(ERROR_KINDS[k], *(c["errors"].get(k, "") for c in scored)) for k in kinds]
    return Html(
        table(rows, ("wrong because", *(c["name"] for c in scored))), "\n".join(" ".join(map(str, r)) for r in rows)
    )


def lost(found: dict[str, Any]) -> Html:
    """The forgetting verdicts and, where one failed, the advice."""
    record = found["forgetting"]
    if record is None:
        return Html(
            "<p>Not measured: general_text is empty, or the baseline was left out.</p>", "Forgetting was not measured."
        )
    rows = []
    for name, f in record["candidates"].items():
        task = next(iter(f["tasks"].values()), None)
        verdict = "" if name == record["baseline"] else "kept" if f["passed"] else "FORGOT"
        rows.append(
            (
                name,
                verdict,
                f"{f['loss']:.3f}",
                f"{f['change']:+.3f}",
                f"{f['perplexity']:.1f}",
                share(task["value"] if task else None),
                share(f["refusal_rate"]),
                share(f["manners"]),
                f["sentence"],
            )
        )
    head = (
        "candidate",
        "verdict",
        "general text, nats/token",
        "change",
        "perplexity",
        "general questions",
        "refusals",
        "manners",
        "in words",
    )
    advice = "".join(f"<p>→ {html.escape(a)}</p>" for a in record["advice"])
    return Html(table(rows, head) + advice, "\n".join([f"{r[0]}: {r[8]}" for r in rows] + record["advice"]))


def preferences(found: dict[str, Any]) -> Html:
    """Held-out preference pairs: how often and by how much the chosen answer is likelier."""
    if not found["preference"]:
        return Html("<p>This run has no preference pairs.</p>", "This run has no preference pairs.")
    rows = [
        (
            name,
            percent(p["accuracy"]),
            between(p["accuracy"]),
            f"{p['log_odds']['value']:+.2f}",
            f"{p['log_odds']['low']:+.2f} to {p['log_odds']['high']:+.2f}",
            percent(p["win_rate"]),
            p["n"],
        )
        for name, p in found["preference"].items()
        if p["n"]
    ]
    head = (
        "candidate",
        "prefers the chosen",
        "95 % interval",
        "log-odds margin",
        "95 % interval",
        "beats the base's margin",
        "pairs",
    )
    return Html(table(rows, head), "\n".join(" ".join(map(str, r)) for r in rows))


def figure(found: dict[str, Any]) -> Any:
    """Each candidate's score with its interval, and its file size beside it."""
    from helpers import plots

    bars = []
    for c in found["candidates"]:
        score = c["scores"].get("accuracy") or {}
        if c["status"] == "scored" and score.get("value") is not None:
            kind = {"base": "base", "gguf": "file"}.get(c["role"], "tuned")
            bars.append(plots.Bar(c["name"], score["value"], score["low"], score["high"], kind, c["size_bytes"]))
    return plots.scores(bars, f"{found['task']['label']}, % of {found['task']['n']} questions (95 % interval)")


def kinds(found: dict[str, Any], column: str = "kind") -> Any:
    """Share right by kind of question, a bar a candidate; None where the data has no such column."""
    from helpers import plots

    groups = {
        c["name"]: c["groups"][column] for c in found["candidates"] if c["status"] == "scored" and column in c["groups"]
    }
    if not groups:
        return None
    counts = {n: g["n"] for found_groups in groups.values() for n, g in sorted(found_groups.items())}
    return plots.by_group(
        dict(sorted(counts.items())), {c: {n: g["value"] for n, g in v.items()} for c, v in groups.items()}
    )


def sides(rows: Sequence[dict[str, Any]], names: Sequence[str], count: int = 4) -> Html:
    """Best and worst answers side by side: items that the last of `names` won over the first, then items it got wrong."""

    def gain(row: dict[str, Any]) -> float:
        values = [row["answers"][n]["score"] for n in (names[0], names[-1])]
        return -9 if None in values else values[1] - values[0]

    def score(row: dict[str, Any]) -> float:
        return 9 if row["answers"][names[-1]]["score"] is None else row["answers"][names[-1]]["score"]

    won = [r for r in sorted(rows, key=lambda r: -gain(r)) if gain(r) > 0][:count]
    lost_ = [r for r in sorted(rows, key=lambda r: (gain(r), score(r))) if score(r) < 0.5][:count]
    parts = [
        f"<h4>{title}</h4>{''.join(_item(r, names) for r in group)}"
        for title, group in (
            (f"{html.escape(names[-1])} at its best", won),
            (f"{html.escape(names[-1])} at its worst", lost_),
        )
        if group
    ]
    return Html("".join(parts) or "<p>No answer to show.</p>", "\n".join(r["question"] for r in [*won, *lost_]))


def _item(row: dict[str, Any], names: Iterable[str]) -> str:
    lines = [
        f"<p style='margin:8px 0 2px'><b>{html.escape(_clean(row['question']))}</b></p>",
        f"<div style='{ANSWER};color:{GREY}'>reference: {html.escape(_clean(row['reference']))}</div>",
    ]
    for name in names:
        answer = row["answers"][name]
        mark, colour = ("✓", RIGHT) if not answer["error"] and answer["score"] else ("✗", WRONG)
        why = (
            f" <span style='color:{colour}'>({html.escape(_clean(answer['detail']))})</span>"
            if answer["detail"]
            else ""
        )
        text = html.escape(_clean(answer["text"])[:400])
        lines.append(
            f"<div style='{ANSWER}'><span style='color:{colour}'>{mark}</span> {html.escape(name)}: {text}{why}</div>"
        )
    return "".join(lines)


def _clean(text: str) -> str:
    """Without control characters, which a terminal or a browser might act on."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def percent(score: dict[str, Any] | None) -> str:
    return "" if not score or score["value"] is None else f"{100 * score['value']:.1f} %"


def between(score: dict[str, Any] | None) -> str:
    return "" if not score or score["low"] is None else f"{100 * score['low']:.1f} to {100 * score['high']:.1f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"
