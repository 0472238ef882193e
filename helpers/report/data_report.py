"""report.html of the data stage: what went in, what was lost and why, how long rows are, what is trained."""

from __future__ import annotations

from typing import Any

from helpers.data import vocabulary
from helpers.data.lengths import choices, expanded
from helpers.report.data_page import cards, cell, histogram, page, table


def write(job: Any) -> Any:
    """Save report.html in the stage's folder; returns a short table for the notebook."""
    from helpers import display
    from helpers.runs import write_atomic

    write_atomic(job.path / "report.html", page(f"Data report: {job.params.run}", body(job)))
    lost = job.rejects.as_dict()
    rows = [
        ("report", job.path / "report.html"),
        ("preview", job.path / "preview.html"),
        ("data card", job.path / "README.md"),
        ("rejected rows", f"{sum(lost['invalid'].values()):,} of {lost['seen']:,}"),
        ("removed by cleaning", f"{sum(lost['removed'].values()):,}"),
    ]
    return display.Html(display.table(rows), "\n".join(f"{a}: {b}" for a, b in rows))


def body(job: Any) -> str:
    """The page's markup; every value from the data goes through `cell`."""
    encoded, lost, found = job.encoded, job.rejects.as_dict(), job.encoded["lengths"]
    tokens = sum(part.get("tokens", 0) for part in encoded["splits"].values())
    trained = sum(part.get("trained_tokens", 0) for part in encoded["splits"].values())
    parts = [
        f"<h1>Data report: {cell(job.params.run)}</h1><p class=soft>{cell(job.params.dataset)}, rendered for {cell(job.params.model)}</p>"
    ]
    parts.append(
        cards(
            [(f"{name} rows", f"{count:,}") for name, count in encoded["written"].items()]
            + [
                ("tokens", f"{tokens:,}"),
                ("trained tokens", f"{trained / max(1, tokens):.1%}"),
                ("rejected rows", f"{sum(lost['invalid'].values()):,}"),
            ]
        )
    )
    parts.append(
        "<h2>Sources</h2>"
        + table(
            ("source", "file", "rows", "rejected", "read as", "kept aside"),
            (
                (
                    r.name,
                    r.where,
                    f"{r.rows:,}",
                    f"{r.rejected:,}",
                    "; ".join(f"{shape} ({count:,})" for shape, count in r.shapes.most_common(4)),
                    ", ".join(name for name, _ in r.unused.most_common(8)),
                )
                for r in job.sources
            ),
            (2, 3),
        )
    )
    parts.append(
        "<h2>Cleaning</h2>"
        + table(
            ("step", "rows in", "rows out", "changed", "removed because"),
            (
                (
                    s.step,
                    f"{s.seen:,}",
                    f"{s.kept:,}",
                    f"{s.changed:,}",
                    ", ".join(f"{reason}: {n:,}" for reason, n in s.dropped.items()) or "–",
                )
                for s in job.steps
            ),
            (1, 2, 3),
        )
    )
    for step in job.steps:
        for reason, example in step.examples.items():
            text = example.get("text") or f"{example.get('before')}\n→ {example.get('after')}"
            where = f", {example['file']} row {example['row']}" if example.get("file") else ""
            parts.append(
                f"<p>{cell(step.step)}: an example of “{cell(reason)}”{cell(where)} {cell(example.get('detail', ''))}</p><pre>{cell(text)}</pre>"
            )
        if step.figures:
            parts.append(
                f"<p class=soft>{cell(step.step)}: {cell(', '.join(f'{k} {v}' for k, v in step.figures.items()))}</p>"
            )
    parts.append(_mixture(encoded["mixture"]))
    parts.append(
        "<h2>Lengths</h2>"
        + histogram(
            encoded["histogram"],
            [
                (f"max_length {encoded['max_length']:,}", encoded["max_length"], "mark"),
                (f"proposed {found['proposed_max_length']:,}", found["proposed_max_length"], "mark2"),
            ],
        )
    )
    parts.append(
        f"<p>{found['over']:,} of {found['rows']:,} rows are over max_length; "
        f"cutting them would have taken the end of turn from {found['lost_end_share']:.0%} of those. "
        f"Dropped {found['dropped']:,}, truncated {found['truncated']:,}, split {found['split_rows']:,} into {found['split_into']:,}.</p>"
    )
    parts.append(
        table(
            ("max_length", "rows over", "share", "tokens lost if dropped"),
            (
                (
                    f"{c['max_length']:,}{' (proposed)' if c['proposed'] else ''}",
                    f"{c['rows_over']:,}",
                    f"{c['share_over']:.1%}",
                    f"{c['tokens_lost']:,}",
                )
                for c in choices(expanded(encoded["histogram"]))
            ),
            (1, 2, 3),
        )
    )
    if "vocabulary" in job.figures:
        header, rows = vocabulary.table(job.figures["vocabulary"])
        parts.append("<h2>Vocabulary</h2>" + table(header, rows))
    parts.append("<h2>Chat template</h2>" + table(("what", "as its renderings show"), job.template().facts()))
    if encoded["notes"]:
        parts.append(
            table(
                ("what the template cannot show, or changes", "rows"),
                ((what, f"{n:,}") for what, n in encoded["notes"].items()),
                (1,),
            )
        )
    reasons = [*lost["invalid"].items(), *lost["removed"].items()]
    if reasons:
        parts.append(
            "<h2>Rejected and removed rows</h2>"
            + table(
                ("reason", "rows", "first in", "detail"),
                (
                    (
                        reason,
                        f"{n:,}",
                        f"{job.rejects.first[reason]['file']} row {job.rejects.first[reason]['row']}",
                        job.rejects.first[reason]["detail"][:200],
                    )
                    for reason, n in reasons
                ),
                (1,),
            )
        )
    parts.append(
        f"<p class=soft>Cache: {cell(encoded['cache'])}. "
        "Rows that are not in the files above are listed in rejected.jsonl with file, row and reason.</p>"
    )
    return "".join(parts)


def _mixture(mixture: list[dict[str, Any]]) -> str:
    return "<h2>Mixture of the training and eval rows</h2>" + table(
        ("source", "rows", "share of rows", "tokens", "share of tokens"),
        (
            (m["source"], f"{m['rows']:,}", f"{m['row_share']:.1%}", f"{m['tokens']:,}", f"{m['token_share']:.1%}")
            for m in mixture
        ),
        (1, 2, 3, 4),
    )
