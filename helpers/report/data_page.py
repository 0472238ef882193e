"""The look of the pages that the data stage writes: one self-contained file, light and dark, wide and phone. Nothing is fetched."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1d2330;--soft:#5c6678;--line:#dfe3ea;--panel:#f5f7fa;--accent:#1f6feb;
--trained:#c9f0d3;--trained-ink:#0d3b1e;--end:#ffd9a8;--end-ink:#5a3300;--special:#e3e0fb;--special-ink:#2f2a7a;--bar:#4c78a8;--bad:#c9372c}
@media (prefers-color-scheme:dark){:root{--ground:#12151b;--ink:#e4e8ef;--soft:#98a2b3;--line:#2b313c;--panel:#1a1f28;--accent:#6ea8fe;
--trained:#174a2a;--trained-ink:#c8f5d5;--end:#6b4208;--end-ink:#ffe3bf;--special:#34316b;--special-ink:#dedcff;--bar:#7aa6d8;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 16px 64px;max-width:960px;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .3em}h2{font-size:1.15rem;margin:2em 0 .5em}p{margin:.4em 0}.soft{color:var(--soft)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;vertical-align:top;padding:6px 12px 6px 0;border-bottom:1px solid var(--line);overflow-wrap:break-word}
td{max-width:34em}td.long{min-width:15em;overflow-wrap:anywhere}
th{color:var(--soft);font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:10px;margin:1em 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.card b{display:block;font-size:1.35rem;font-weight:650}
.card span{color:var(--soft);font-size:.85rem}
.row{border:1px solid var(--line);border-radius:8px;padding:12px 14px;margin:12px 0;background:var(--panel)}
.row h3{margin:0 0 8px;font-size:.88rem;font-weight:600;color:var(--soft);overflow-wrap:anywhere}
.tokens{font:14px/1.9 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.tokens span{border-radius:3px;padding:1px 0}.tokens span:hover{outline:2px solid var(--accent)}
.t{background:var(--trained);color:var(--trained-ink)}.e{background:var(--end);color:var(--end-ink);font-weight:600}.s{background:var(--special);color:var(--special-ink)}
.key span{border-radius:3px;padding:1px 6px;margin:0 8px 4px 0;display:inline-block}
.wide{width:100%;height:auto;display:block}.bar{fill:var(--bar)}.axis{fill:var(--soft);font-size:11px}.rule{stroke:var(--line)}
.mark{stroke:var(--bad);stroke-width:2}.mark2{stroke:var(--accent);stroke-width:2;stroke-dasharray:5 4}
pre{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:10px 12px;
white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}
@media (max-width:560px){body{padding:16px 12px 48px;font-size:15px}h1{font-size:1.35rem}}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document. `body` is markup whose values were escaped by `cell`; scripts cannot run in it."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{cell(title)}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def cell(value: Any) -> str:
    """Any value as text that is safe in HTML, in element and attribute alike. Control characters become visible."""
    text = "".join(sign if sign >= " " or sign in "\n\t" else chr(0x2400 + ord(sign)) for sign in str(value))
    return html.escape(text.encode("utf-8", "replace").decode(), quote=True)


def table(header: Iterable[str], rows: Iterable[Iterable[Any]], numbers: Iterable[int] = ()) -> str:
    """A table that scrolls sideways on a narrow screen; columns in `numbers` are set flush right."""
    right = set(numbers)

    def line(values: Iterable[Any], tag: str) -> str:
        def kind(at: int, value: Any) -> str:
            return " class=n" if at in right else " class=long" if len(str(value)) > 40 else ""

        return (
            "<tr>"
            + "".join(f"<{tag}{kind(at, value)}>{cell(value)}</{tag}>" for at, value in enumerate(values))
            + "</tr>"
        )

    return f"<div class=scroll><table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"


def cards(facts: Iterable[tuple[str, Any]]) -> str:
    return (
        "<div class=cards>"
        + "".join(f"<div class=card><b>{cell(value)}</b><span>{cell(name)}</span></div>" for name, value in facts)
        + "</div>"
    )


def histogram(counts: dict[str, int], marks: Iterable[tuple[str, int, str]], bins: int = 48) -> str:
    """Lengths (token count → rows) as an SVG bar chart. marks: (label, x, CSS class) are drawn as vertical lines."""
    pairs = sorted((int(length), rows) for length, rows in counts.items())
    if not pairs:
        return ""
    marks = list(marks)
    top = max([pairs[-1][0], *(x for _, x, _ in marks if x <= 2 * pairs[-1][0])]) + 1
    size = [0] * bins
    for length, rows in pairs:
        size[min(bins - 1, length * bins // top)] += rows
    width, height, left, base = 720, 240, 44, 190
    scale = (width - left - 10) / top
    drawn = []
    for at, rows in enumerate(size):
        tall = round(170 * rows / max(size), 1)
        x = left + at * top / bins * scale
        title = f"{at * top // bins:,} to {(at + 1) * top // bins:,} tokens: {rows:,} rows"
        drawn.append(
            f'<rect class=bar x="{x:.1f}" y="{base - tall}" width="{max(1, top / bins * scale - 1):.1f}" height="{tall}">'
            f"<title>{cell(title)}</title></rect>"
        )
    for tick in ticks(top):
        drawn.append(
            f'<text class=axis text-anchor=middle x="{left + tick * scale:.0f}" y="{base + 18}">{tick:,}</text>'
        )
    drawn.append(
        f'<text class=axis x="{left}" y="{base + 38}">tokens in a row</text>'
        f'<text class=axis text-anchor=end x="{left - 6}" y="28">{max(size):,}</text>'
    )
    drawn.append(
        f'<text class=axis text-anchor=end x="{left - 6}" y="{base}">0</text><line class=rule x1="{left}" x2="{width - 10}" y1="{base}" y2="{base}"/>'
    )
    for number, (label, x, kind) in enumerate(marks):
        if x <= top:
            at = left + x * scale
            side, shift = ("end", -5) if at > width / 2 else ("start", 5)
            drawn.append(
                f'<line class={kind} x1="{at:.1f}" x2="{at:.1f}" y1="12" y2="{base}"/>'
                f'<text class=axis text-anchor={side} x="{at + shift:.1f}" y="{20 + 16 * number}">{cell(label)}</text>'
            )
    return f'<svg class=wide viewBox="0 0 {width} {height}" role="img" aria-label="lengths of rows in tokens">{"".join(drawn)}</svg>'


def ticks(top: int, most: int = 7) -> list[int]:
    """Round numbers from 0 to `top`, at most `most` of them."""
    step = next(base * 10**power for power in range(12) for base in (1, 2, 5) if top / (base * 10**power) < most)
    return list(range(0, top + 1, step))


def preview(job: Any, rows: int = 6) -> Any:
    """preview.html: real rows as the model will see them, trained tokens in colour; its first rows for the notebook."""
    from helpers.report import data_preview

    return data_preview.write(job, rows)


def write(job: Any) -> Any:
    """report.html and the data card README.md; returns a short table for the notebook."""
    from helpers.report import data_card, data_report

    data_card.write(job)
    return data_report.write(job)
