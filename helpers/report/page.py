"""The page itself: one self-contained HTML file with its style and its one script inside, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from helpers import runs
from helpers.report import answers, results, stages
from helpers.report.facts import TITLES, Facts
from helpers.report.markup import Markup, esc

HERE = Path(__file__).parent


def render(facts: Facts) -> str:
    """The run's page. Answers and other foreign text are escaped; a policy in the page lets no other script run."""
    parts = [
        results.scores(facts),
        results.forgetting(facts),
        results.fidelity(facts),
        results.others(facts),
        answers.show(facts),
        stages.training(facts),
        stages.data(facts),
        stages.provenance(facts),
    ]
    body = [
        _header(facts, "".join(parts)),
        "<main>",
        warnings_card(facts.warnings),
        results.tiles(facts),
        *parts,
        "</main>",
        _footer(facts),
    ]
    return document(f"{facts.run}: report", "".join(body))


def document(title: str, body: str) -> str:
    """A whole HTML page around `body`."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="generator" content="Tunebook">'
        f"<title>{esc(title)}</title><style>{style}</style></head>\n<body>{body}<script>{script}</script></body></html>\n"
    )


def _header(facts: Facts, content: str) -> Markup:
    model = facts.model.get("name", "")
    made = facts.last.data.get("finished_at", "").replace("T", " ").replace("Z", " UTC") if facts.last else ""
    headline = (
        facts.scores["headline"]
        if facts.scores
        else "No evaluation yet: run 05_evaluation to measure this run."
        if facts.stages
        else "No stage of this run has finished."
    )
    chips = "".join(
        f'<li class="{facts.states[s].replace(" ", "-")}">{TITLES[s]}{"" if facts.states[s] == "finished" else ": " + facts.states[s]}</li>'
        for s in runs.FOLDERS
    )
    names = {
        "scores": "Scores",
        "forgetting": "What was lost",
        "fidelity": "Fidelity",
        "tasks": "Other",
        "answers": "Answers",
        "training": "Training",
        "data": "Data",
        "made": "How it was made",
    }
    links = "".join(f'<a href="#{k}">{v}</a>' for k, v in names.items() if f'<section id="{k}"' in content)
    return Markup(
        f"<header><h1>{esc(facts.run)}</h1><div class='muted'>{esc(' · '.join(filter(None, [model, made])))}</div>"
        f"<p class='headline'>{esc(headline)}</p><ul class='chips'>{chips}</ul></header><nav>{links}</nav>"
    )


def warnings_card(found: list[str]) -> Markup:
    """What a reader must know before the numbers; nothing when there is nothing."""
    if not found:
        return Markup("")
    unique = list(dict.fromkeys(found))
    return Markup(
        f'<section class="warnings" id="warnings"><h2>Read this first</h2><ul>{"".join(f"<li>{esc(w)}</li>" for w in unique)}</ul></section>'
    )


def _footer(facts: Facts) -> Markup:
    import time

    return Markup(
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by Tunebook from the manifests of the run "
        f"{esc(facts.run)}. Every number has its source in runs/{esc(facts.run)}/.</footer>"
    )
