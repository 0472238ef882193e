"""Real rows token by token: what is trained in colour, the end of turn in another, ids on hover. Read back from the written parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from helpers.data.tables import open_parquet
from helpers.report.data_page import STYLE, cell, page

MOST_TOKENS = 1500
KEY = (
    "<p class=key><span class=t>trained</span><span class=e>end of turn, trained</span><span class=s>control token, not trained</span>"
    "<span>not trained</span></p>"
)


def pieces(tokenizer: Any, ids: Iterable[int]) -> Iterator[tuple[int, str]]:
    """(token id, its text). A character that spans tokens is shown whole at the last of them, `·` at the others."""
    held: list[int] = []
    for token in ids:
        held.append(int(token))
        text = tokenizer.decode(held, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(held) < 4:
            yield int(token), "·"
            continue
        yield int(token), text
        held = []


def tokens(tokenizer: Any, ids: Iterable[int], mask: Iterable[int], ends: Iterable[int], special: Iterable[int]) -> str:
    """One row's tokens as HTML. ends: ids that end a turn; special: ids of control tokens."""
    ends, special, parts = set(ends), set(special), []
    ids, mask = list(ids), list(mask)
    for number, ((token, text), trained) in enumerate(zip(pieces(tokenizer, ids[:MOST_TOKENS]), mask, strict=False)):
        kind = "e" if trained and token in ends else "t" if trained else "s" if token in special else ""
        shown = cell(text).replace("\n", "↵\n") if text.strip("\n") == "" else cell(text)
        parts.append(f'<span{f" class={kind}" if kind else ""} title="id {token}, position {number}">{shown}</span>')
    more = f"<span class=soft> … and {len(ids) - MOST_TOKENS:,} more tokens</span>" if len(ids) > MOST_TOKENS else ""
    return f"<div class=tokens>{''.join(parts)}{more}</div>"


def first_rows(path: Path, count: int) -> list[dict]:
    with open_parquet(path) as file:
        return next((batch.to_pylist() for batch in file.iter_batches(batch_size=count)), [])


def write(job: Any, rows: int = 6) -> Any:
    """Save preview.html in the stage's folder and return the first rows of it for the notebook."""
    from helpers.display import Html
    from helpers.runs import write_atomic

    template, tokenizer = job.template(), job.tokenizer
    blocks = []
    for split in ("train", "eval"):
        for row in first_rows(job.path / f"{split}.parquet", rows):
            trained = sum(row["completion_mask"])
            head = f"{split} · {row['source']} · {row['id']} · {len(row['input_ids']):,} tokens, {trained:,} trained"
            shown = tokens(tokenizer, row["input_ids"], row["completion_mask"], template.end_ids, template.special_ids)
            blocks.append(f"<div class=row><h3>{cell(head)}</h3>{shown}</div>")
    pairs = job.path / "preference.parquet"
    for row in first_rows(pairs, max(1, rows // 2)) if pairs.exists() else []:
        prompt = [0] * len(row["prompt_ids"])
        sides = "".join(
            f"<h3>{side}: {cell(json.dumps(row[side][-1]['content'], ensure_ascii=False)[:120])}</h3>"
            + tokens(
                tokenizer,
                row["prompt_ids"] + row[f"{side}_ids"],
                prompt + [1] * len(row[f"{side}_ids"]),
                template.end_ids,
                template.special_ids,
            )
            for side in ("chosen", "rejected")
        )
        blocks.append(f"<div class=row><h3>preference · {cell(row['id'])}</h3>{sides}</div>")
    title = f"Which tokens are trained: {job.params.run}"
    told = f"Hover over a token for its id. Trained on: {job.params.train_on}. The first rows of every file, as they were written."
    intro = f"<h1>{cell(title)}</h1><p class=soft>{cell(told)}</p>{KEY}"
    write_atomic(job.path / "preview.html", page(title, intro + "".join(blocks)))
    inline = f"<div class=tunebook><style>{scoped(STYLE)}</style>{KEY}{''.join(blocks[:3])}</div>"
    return Html(inline, f"{len(blocks)} rows in {job.path / 'preview.html'}")


def scoped(style: str) -> str:
    """The page's style for use inside a notebook's output: the variables and classes only, under .tunebook."""
    kept = [
        line
        for line in style.replace("color-scheme:light dark;", "").splitlines()
        if line.startswith((":root", "--", "@media (prefers", ".row", ".tokens", ".t{", ".key"))
    ]
    text = "\n".join(kept)
    lines = [line if line.startswith(("--", "@media", ":root")) else ".tunebook " + line for line in text.splitlines()]
    # The notebook's theme may differ from the system's, so the block brings its own ground.
    ground = "\n.tunebook{color:var(--ink);background:var(--ground);padding:4px 10px;border-radius:8px}"
    return (
        "\n".join(lines)
        .replace(":root", ".tunebook")
        .replace("}.e{", "}.tunebook .e{")
        .replace("}.s{", "}.tunebook .s{")
        + ground
    )
