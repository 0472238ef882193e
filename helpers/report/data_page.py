"""What the data stage leaves for people: report.html, preview.html with every token's colour, and a data card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers import display, plots, steps
from helpers.data.tables import open_parquet
from helpers.report import shell
from helpers.runs import write_atomic

MOST_TOKENS = 1500  # shown of one row
SIZES = {"n<1K": 10**3, "1K<n<10K": 10**4, "10K<n<100K": 10**5, "100K<n<1M": 10**6, "1M<n<10M": 10**7}
#: configuration of the data card → its splits as (name on the hub, file's stem)
CONFIGS = {
    "sft": [("train", "train"), ("validation", "eval")],
    "test": [("test", "test")],
    "preference": [("train", "preference"), ("validation", "preference_eval")],
    "kto": [("train", "kto")],
}


@steps.step
def preview(job: Any, rows: int = 6) -> display.Html:
    """Real rows token by token: what is trained in colour, the end of turn in another, ids on hover.

    The rows are read back from the written parquet files. The page is preview.html; its first rows are returned.
    """
    template, draw = job.template(), shell.macro("tokens.html.j2", "block")

    def drawn(ids: Sequence[int], mask: Sequence[int]) -> list[tuple[str, int, int, str]]:
        return tokens(job.tokenizer, ids, mask, template.end_ids, template.special.values())

    blocks = []
    for split in ("train", "eval"):
        for row in first_rows(job.path / f"{split}.parquet", rows):
            ids, mask = row["input_ids"], row["completion_mask"]
            head = f"{split} · {row['source']} · {row['id']} · {len(ids):,} tokens, {sum(mask):,} trained"
            blocks.append(draw(head, [("", drawn(ids, mask), len(ids) - MOST_TOKENS)]))
    for row in first_rows(job.path / "preference.parquet", max(1, rows // 2)):
        sides = []
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            mask = [0] * len(row["prompt_ids"]) + [1] * len(row[f"{side}_ids"])
            sides.append((side, drawn(ids, mask), len(ids) - MOST_TOKENS))
        blocks.append(draw(f"preference · {row['id']}", sides))
    title = f"Which tokens are trained: {job.params.run}"
    write_atomic(
        job.path / "preview.html", shell.page("preview.html.j2", title, blocks=blocks, train_on=job.params.train_on)
    )
    inline = shell.macro("tokens.html.j2", "inline")
    style = (shell.FOLDER / "page.css").read_text(encoding="utf-8").partition("/* Tokens of real rows.")[2]
    return display.Html(inline(style.partition("*/")[2], blocks[:3]), f"{len(blocks)} rows in {job.path}/preview.html")


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


def tokens(
    tokenizer: Any, ids: Sequence[int], mask: Sequence[int], ends: Iterable[int], special: Iterable[int]
) -> list[tuple[str, int, int, str]]:
    """(class, id, position, text) of one row's tokens. ends: ids that end a turn; special: ids of control tokens.

    Classes: "t" trained, "e" trained end of turn, "s" control token that is not trained, "" not trained.
    """
    ends, special, found = set(ends), set(special), []
    shown = zip(pieces(tokenizer, ids[:MOST_TOKENS]), mask, strict=False)
    for position, ((token, text), trained) in enumerate(shown):
        kind = "e" if trained and token in ends else "t" if trained else "s" if token in special else ""
        found.append((kind, token, position, text if text.strip("\n") else text.replace("\n", "↵\n")))
    return found


def first_rows(path: Path, count: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open_parquet(path) as file:
        return next((batch.to_pylist() for batch in file.iter_batches(batch_size=count)), [])


@steps.step
def write(job: Any) -> display.Html:
    """Save report.html and the data card README.md in the stage's folder; returns a short table for the notebook."""
    encoded, lost = job.encoded, job.rejects.as_dict()
    reasons = [*lost["invalid"].items(), *lost["removed"].items()]
    found = encoded["lengths"]
    marks = (encoded["max_length"], found["over"], found["proposed_max_length"])
    values = {
        "params": job.params,
        "encoded": encoded,
        "tokens": sum(part.get("tokens", 0) for part in encoded["splits"].values()),
        "trained": sum(part.get("trained_tokens", 0) for part in encoded["splits"].values()),
        "rejected": sum(lost["invalid"].values()),
        "sources": job.sources,
        "steps": job.steps,
        "warnings": list(filter(None, job.warnings.values())),
        "lengths": plots.lengths(encoded["histogram"], *marks),
        "vocabulary": job.figures.get("vocabulary", {}),
        "template": job.template().facts(),
        "reasons": [(reason, count, job.rejects.first[reason]) for reason, count in reasons],
    }
    write_atomic(job.path / "report.html", shell.page("data.html.j2", f"Data report: {job.params.run}", **values))
    written = {name: count for name, count in encoded["written"].items() if count}
    size = next((name for name, top in SIZES.items() if sum(written.values()) < top), "n>10M")
    write_atomic(
        job.path / "README.md", shell.card("data_card.md.j2", written=written, configs=CONFIGS, size=size, **values)
    )
    rows = [
        ("report", job.path / "report.html"),
        ("preview", job.path / "preview.html"),
        ("data card", job.path / "README.md"),
        ("rejected rows", f"{sum(lost['invalid'].values()):,} of {lost['seen']:,}"),
        ("removed by cleaning", f"{sum(lost['removed'].values()):,}"),
    ]
    return display.shown(rows)
