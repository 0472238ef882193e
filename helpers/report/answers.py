"""Answers side by side, the most telling first, with filters that work without a network and a page that is whole without them."""

from __future__ import annotations

from typing import Any

from helpers.report import svg
from helpers.report.facts import Facts
from helpers.report.markup import Markup, esc, section

BUDGET = 1_300_000  # bytes of answers in the page; the page as a whole stays under 3 MB
LONGEST = 1200  # characters of one text; the rest is in answers.jsonl
PRINTED = 8  # items on paper: the best and the worst

GROUPS = {"gained": "gained", "lost": "lost", "both wrong": "both wrong", "both right": "both right", "other": "other"}


def show(facts: Facts) -> Markup:
    """The section: every item's question, reference and the candidates' answers. Gained: only the best candidate is right."""
    if not facts.answers or not facts.candidates():
        return Markup("")
    base, best = facts.baseline(), facts.best() or facts.baseline()
    names = [c["name"] for c in facts.candidates() if c["status"] == "scored"]
    if not names:
        return Markup("")
    ranked = sorted(
        ((_group(row, base["name"], best["name"]), row) for row in facts.answers),
        key=lambda pair: _rank(*pair, best["name"]),
    )
    ranked = _woven(ranked)
    items, used = [], 0
    for group, row in ranked:
        item = _item(group, row, names, printed=len(items) < PRINTED)
        used += len(item.encode())
        if used > BUDGET and items:
            break
        items.append(item)
    left = (
        f" The {len(items)} most telling of {len(facts.answers)} are shown; all are in answers.jsonl."
        if len(items) < len(facts.answers)
        else ""
    )
    story = (
        f" “Gained”: {best['name']} is right where {base['name']} is not; “lost”: the other way round."
        if best is not base
        else ""
    )
    sub = f"Best and worst first.{story}{left}"
    body = _filters(facts, ranked[: len(items)], names) + "".join(items)
    body += '<p><button class="show-more noprint" type="button" hidden>Show more</button></p>'
    return section("answers", "Answers", body, sub)


def _right(answer: dict[str, Any] | None) -> bool | None:
    return None if not answer or not svg.finite(answer.get("score")) else answer["score"] >= 0.5


def _group(row: dict[str, Any], base: str, best: str) -> str:
    before, after = _right(row["answers"].get(base)), _right(row["answers"].get(best))
    return {
        (False, True): "gained",
        (True, False): "lost",
        (False, False): "both wrong",
        (True, True): "both right",
    }.get((before, after), "other")


def _rank(group: str, row: dict[str, Any], best: str) -> tuple:
    """Within a group, wrong answers that do not even run come first among the wrong, short questions among the right."""
    answer = row["answers"].get(best) or {}
    return (
        list(GROUPS).index(group),
        bool(answer.get("valid")) if group in ("lost", "both wrong") else False,
        len(row["question"]),
        row["id"],
    )


def _woven(ranked: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The groups in turn, so that the first screen, and the printed page, shows good and bad alike."""
    piles = [[pair for pair in ranked if pair[0] == group] for group in GROUPS]
    return [pile[i] for i in range(max(map(len, piles), default=0)) for pile in piles if i < len(pile)]


def _filters(facts: Facts, shown: list[tuple[str, dict]], names: list[str]) -> str:
    present = [g for g in GROUPS if any(group == g for group, _ in shown)]
    counts = {g: sum(group == g for group, _ in shown) for g in present}
    buttons = '<button type="button" data-group="all" aria-pressed="true">all</button>' + "".join(
        f'<button type="button" data-group="{esc(g)}" aria-pressed="false">{esc(GROUPS[g])} {counts[g]}</button>'
        for g in present
    )
    selects = ""
    for column in ("kind", "origin"):
        values = sorted({str((row["meta"] or {}).get(column)) for _, row in shown if (row["meta"] or {}).get(column)})
        if len(values) > 1:
            selects += _select(column, f"any {column}", values)
    errors = sorted(
        {f"{n}: {a['error']}" for _, row in shown for n in names if (a := row["answers"].get(n)) and a["error"]}
    )
    selects += _select("errors", "any error", errors) if errors else ""
    return (
        f'<div class="filters" hidden>{buttons}{selects}<input type="search" placeholder="Search" aria-label="Search the answers">'
        '<span class="muted"><span class="count"></span> items</span></div>'
    )


def _select(name: str, anything: str, values: list[str]) -> str:
    options = "".join(f'<option value="{esc(v)}">{esc(v)}</option>' for v in values)
    return f'<select name="{name}" aria-label="{esc(name)}"><option value="">{esc(anything)}</option>{options}</select>'


def _item(group: str, row: dict[str, Any], names: list[str], printed: bool) -> str:
    meta = row["meta"] or {}
    errors = "\n".join(
        f"{n}: {row['answers'][n]['error']}" for n in names if (row["answers"].get(n) or {}).get("error")
    )
    tags = [str(meta[k]) for k in ("kind", "origin") if meta.get(k)]
    tags += ["contaminated"] if row.get("contaminated") else []
    tags += ["gold answer is empty"] if row.get("nonempty") is False else []
    sides = [_side("reference", row["reference"], "", _result(row.get("gold")))] if row["reference"] else []
    alike: dict[tuple[str, str, str], list[str]] = {}  # candidates that answered the very same share one box
    for name in names:
        answer = row["answers"].get(name)
        if answer is None:
            alike.setdefault(("", '<span class="muted">not asked</span>', ""), []).append(name)
            continue
        right = _right(answer)
        why = answer["detail"] or answer["error"] or "wrong"
        mark = (
            ""
            if right is None
            else '<span class="ok">✓ right</span>'
            if right
            else f'<span class="no">✗ {esc(why)}</span>'
        )
        if svg.finite(answer.get("score")) and 0 < answer["score"] < 1:
            mark += f' <span class="muted">{answer["score"]:.2f}</span>'
        alike.setdefault((answer["text"], mark, "" if right else _result(answer.get("result"))), []).append(name)
    sides += [_side(", ".join(who), *said) for said, who in alike.items()]
    system = (
        f'<details class="noprint"><summary class="muted">system prompt</summary><pre>{_clip(row["system"])}</pre></details>'
        if row["system"]
        else ""
    )
    return (
        f'<article class="item{"" if printed else " more"}" data-group="{esc(group)}" data-kind="{esc(meta.get("kind", ""))}" '
        f'data-origin="{esc(meta.get("origin", ""))}" data-errors="{esc(errors)}">'
        f'<h4>{_clip(row["question"])}</h4><div class="muted">{esc(" · ".join([group, *tags, row["id"]]))}</div>{system}'
        f'<div class="sides">{"".join(sides)}</div></article>'
    )


def _side(who: str, text: str, mark: str, result: str) -> str:
    shown = f"<pre>{_clip(text)}</pre>" if text else '<pre class="muted">(nothing)</pre>'
    return f'<div class="side"><div class="who">{esc(who)} {mark}</div>{shown}{result}</div>'


def _clip(text: str) -> Markup:
    return esc(text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)")


def _result(result: dict[str, Any] | None) -> str:
    """What a query returned: its first rows as one line."""
    if not result:
        return ""
    rows = ["; ".join(", ".join("NULL" if cell is None else str(cell) for cell in row) for row in result["rows"][:3])]
    more = f" … {result['count']} rows" if result["count"] > 3 else "" if result["count"] else "no rows"
    return f'<div class="muted">→ {_clip(rows[0][:200])}{more}</div>'
