"""scores.json and answers.jsonl as the tables that end notebook 05's cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from helpers import display
from helpers.display import Html
from helpers.evaluate.scores import ERROR_KINDS

SHOWN_CHARS, SHOWN_ITEMS = 400, 4


def speed(found: dict[str, Any]) -> Html:
    """How fast each candidate answered, and how much came from the cache."""
    rows = []
    for c in found["candidates"]:
        s = c["speed"]
        rate = f"{s['items_per_s']:.1f}" if s else "left out"
        rows.append((c["name"], rate, *((display.duration(s["seconds"]), s["tokens"], s["from_cache"]) if s else ())))
    return display.shown(rows, ("candidate", "questions/s", "time", "tokens", "answers from the cache"))


def scores(found: dict[str, Any]) -> Html:
    named = {"valid": "valid SQL", "stopped": "stops by itself"}
    known = [name for name in named if any(name in c["scores"] for c in found["candidates"])]
    rows = []
    for c in found["candidates"]:
        if c["status"] == "skipped":
            rows.append((c["name"], "left out", c["reason"]))
            continue
        accuracy, shares = c["scores"]["accuracy"], [_share(c["scores"][name]) for name in known]
        rows.append((c["name"], _share(accuracy), _interval(accuracy), *shares, display.size(c["size_bytes"])))
    head = ("candidate", found["task"]["label"], "95 % interval", *(named[name] for name in known), "size")
    said = [found["headline"], *(f"⚠ {warning}" for warning in found["warnings"])]
    return display.said(*said) + display.shown(rows, head) + display.said((found["ship"] or {}).get("sentence", ""))


def comparisons(found: dict[str, Any]) -> Html:
    rows = []
    for c in found["comparisons"]:
        who, counts = f"{c['candidate']} against {c['baseline']}", f"{c['wins']} / {c['losses']} / {c['ties']}"
        rows.append((who, c["sentence"], counts, f"{c['p_holm']:.2g}", c["test"]))
    head = ("comparison", "result", "won / lost / tied", "p (Holm)", "test")
    return display.shown(rows, head) if rows else display.said("One candidate alone: there is nothing to compare.")


def errors(found: dict[str, Any]) -> Html:
    scored = [c for c in found["candidates"] if c["status"] == "scored"]
    kinds = [k for k in ERROR_KINDS if any(k in c["errors"] for c in scored)]
    rows = [(ERROR_KINDS[k], *(c["errors"].get(k, "") for c in scored)) for k in kinds]
    return display.shown(rows, ("wrong because", *(c["name"] for c in scored)))


def forgetting(found: dict[str, Any]) -> Html:
    record = found["forgetting"]
    if record is None:
        return display.said(
            "Not measured: general_text, general_chat and general_tasks are empty, or there is no base."
        )
    rows, tasks = [], list(record["candidates"][record["baseline"]]["tasks"])
    for name, f in record["candidates"].items():
        verdict = "" if name == record["baseline"] else "kept" if f["passed"] else "FORGOT"
        measured = [f"{f[k]:{form}}" if f[k] is not None else "" for k, form in (("loss", ".3f"), ("change", "+.3f"))]
        shares = [*(f["tasks"].get(t, {}).get("value") for t in tasks), f["refusal_rate"], f["manners"]]
        rows.append((name, verdict, *measured, *(display.percent(s, 0) for s in shares), f["sentence"]))
    head = ("candidate", "verdict", "general text, nats/token", "change", *tasks, "refusals", "manners", "in words")
    return display.shown(rows, head) + display.said(*(f"→ {a}" for a in record["advice"]))


def preferences(found: dict[str, Any]) -> Html:
    if not found["preference"]:
        return display.said("This run has no preference pairs.")
    rows = []
    for name, p in found["preference"].items():
        odds, accuracy = p["log_odds"], p["accuracy"]
        margin = f"{odds['value']:+.2f} ({odds['low']:+.2f} to {odds['high']:+.2f})" if p["n"] else "–"
        rows.append((name, _share(accuracy), _interval(accuracy), margin, _share(p["win_rate"]), p["n"]))
    head = ("candidate", "prefers the chosen", "95 % interval", "log-odds margin", "beats the base's margin", "pairs")
    return display.shown(rows, head)


def sides(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Html:
    """Answers side by side: items that the last of `names` won over the first, then items that it got wrong."""
    first, last = names[0], names[-1]

    def gain(row: dict[str, Any]) -> float:
        before, after = (row["answers"][n]["score"] for n in (first, last))
        return 0.0 if None in (before, after) else after - before

    won = [r for r in sorted(rows, key=gain, reverse=True) if gain(r) > 0]
    wrong = [r for r in sorted(rows, key=gain) if (r["answers"][last]["score"] or 0) < 0.5]
    shown = display.said("" if won or wrong else "No answer to show.")
    for title, group in ((f"{last} at its best", won), (f"{last} at its worst", wrong)):
        lines: list[tuple[str, ...]] = []
        for row in group[:SHOWN_ITEMS]:
            lines += [("question", row["question"]), ("reference", row["reference"])]
            for name in names:
                answer = row["answers"][name]
                mark = "✓" if answer["score"] and not answer["error"] else "✗"
                lines.append((name, answer["text"][:SHOWN_CHARS], mark, answer["detail"]))
        if lines:
            shown += display.said(title) + display.shown(lines)
    return shown


def _share(score: dict[str, Any] | None) -> str:
    return display.percent(score["value"]) if score else ""


def _interval(score: dict[str, Any]) -> str:
    return display.interval(score["low"], score["high"])
