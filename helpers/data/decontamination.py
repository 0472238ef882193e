"""Training rows that hold an evaluation question: found by 8-grams of tokens, over the whole example.

An evaluation item is the text that its user asks (the whole text of a plain-text row). A training row is contaminated
when it holds at least `share` of the distinct 8-grams of one item, wherever line breaks fall and whatever the case and
punctuation; a gram is 8 characters where a script has no spaces. Items of fewer than 8 tokens have no 8-gram
and are compared whole, message by message. System prompts and tools are left out: every row of a job may share them.

Grams over paragraphs miss text that was wrapped anew (recall 0.87 → 0.00), so `injection_recall` measures on the
user's own data how many planted questions are found; the report shows the figure.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from helpers.data.shingles import contains, shingles, tokens
from helpers.data.tables import StepReport
from helpers.data.turns import Row, make_row

GRAM = 8
SHARE = 0.5
_FILTER_BITS = 22


def decontaminate(
    rows: Iterable[list[Row]], report: StepReport, evaluation: Iterable[list[Row]], share: float = SHARE
) -> Iterator[list[Row]]:
    """Drop training rows that hold an item of `evaluation`; the reason names the item.

    share: of an item's distinct 8-grams that a row must hold, over 0 to 1.
    """
    items = Items(evaluation, share)
    report.figures |= {"items": items.count, "items_too_short": items.short, "share": share}
    touched: set[int] = set()
    for batch in rows:
        report.seen += len(batch)
        found = items.find(batch)
        kept = []
        for row, item in zip(batch, found, strict=True):
            if item < 0:
                kept.append(row)
                continue
            touched.add(item)
            report.drop(row, "holds an evaluation question", items.name(item))
        report.kept += len(kept)
        report.figures["items_found"] = len(touched)
        if kept:
            yield kept


class Items:
    """The evaluation questions as sorted arrays of 8-gram hashes."""

    def __init__(self, evaluation: Iterable[list[Row]], share: float = SHARE):
        self.share, self.count, self.short = share, 0, 0
        self._names: list[str] = []
        grams, owners = [], []
        for batch in evaluation:
            texts = [question_of(row) for row in batch]
            flat, offsets = shingles(texts, GRAM, GRAM, symbols=False)
            sizes = np.diff(offsets)
            owner = np.repeat(np.arange(len(batch)) + self.count, sizes)
            grams.append(flat)
            owners.append(owner)
            self.short += int((np.diff(tokens(texts, symbols=False)[1]) < GRAM).sum())
            self.count += len(batch)
            self._names += [
                f"{row['file']} row {row['row']}: {text[:100]}" for row, text in zip(batch, texts, strict=True)
            ]
        gram = np.concatenate(grams) if grams else np.zeros(0, np.uint64)
        owner = np.concatenate(owners) if owners else np.zeros(0, np.int64)
        order = np.lexsort((owner, gram))
        gram, owner = gram[order], owner[order]
        once = np.r_[True, (gram[1:] != gram[:-1]) | (owner[1:] != owner[:-1])] if len(gram) else np.zeros(0, bool)
        self._gram, self._owner = gram[once], owner[once]
        self._sizes = np.bincount(self._owner, minlength=self.count)
        self._filter = np.zeros(1 << _FILTER_BITS, bool)  # one look-up spares most tokens the binary search
        self._filter[self._gram & np.uint64((1 << _FILTER_BITS) - 1)] = True

    def name(self, item: int) -> str:
        return self._names[item]

    def find(self, batch: list[Row]) -> np.ndarray:
        """The item that every row holds, int64 (rows,); -1 where it holds none."""
        result = np.full(len(batch), -1)
        rows, items = self.holds(batch)
        result[rows] = items
        return result

    def holds(self, batch: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Every pair of a row and an item that it holds: their places, int64 (pairs,) each."""
        nothing = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if not len(self._gram):
            return nothing
        owners, texts = [], []
        for place, row in enumerate(batch):
            messages = [m.get("content") or "" for m in spoken(row)]
            texts.append("\n".join(messages))
            owners.append(place)
            if self.short:
                texts += messages
                owners += [place] * len(messages)
        flat, offsets = shingles(texts, GRAM, GRAM, symbols=False)
        hit = self._filter[flat & np.uint64((1 << _FILTER_BITS) - 1)]
        hit[hit] = contains(self._gram, flat[hit])
        if not hit.any():
            return nothing
        place = np.repeat(np.array(owners), np.diff(offsets))[hit]
        first = np.searchsorted(self._gram, flat[hit], "left")
        last = np.searchsorted(self._gram, flat[hit], "right")
        gram_at = np.repeat(first - np.r_[0, np.cumsum(last - first)[:-1]], last - first) + np.arange(
            (last - first).sum()
        )
        shared = np.unique(np.stack([np.repeat(place, last - first), self._owner[gram_at], gram_at]), axis=1)[:2]
        pairs, counts = np.unique(shared, axis=1, return_counts=True)
        enough = counts >= np.maximum(1, np.ceil(self.share * self._sizes[pairs[1]] - 1e-9))
        return pairs[0][enough], pairs[1][enough]


def held(questions: list[list[dict]], training: Path, share: float = SHARE) -> list[bool]:
    """Whether some row of a train.parquet of stage 01 holds each question (its messages)."""
    import pyarrow.parquet as pq

    rows = [{"messages": messages, "file": "test", "row": i} for i, messages in enumerate(questions)]
    items, found = Items([rows], share), np.zeros(len(questions), bool)
    for batch in pq.ParquetFile(training).iter_batches(columns=["messages"]):
        cells = batch.column("messages").to_pylist()
        found[items.holds([{"messages": json.loads(c) if isinstance(c, str) else c} for c in cells])[1]] = True
    return found.tolist()


def question_of(row: Row) -> str:
    """What an evaluation row asks: its user turns; the text of a plain-text row."""
    asked = [m.get("content") or "" for m in row["messages"] if m["role"] in ("user", "text")]
    return "\n".join(asked)


def spoken(row: Row) -> list[dict]:
    """The messages of a row that are its own: everything but system prompts."""
    return [m for m in row["messages"] if m["role"] != "system"] + row.get("chosen", []) + row.get("rejected", [])


def injection_recall(
    evaluation: Iterable[list[Row]], carriers: list[Row], share: float = SHARE, limit: int = 1_000, seed: int = 17
) -> float:
    """Share of evaluation questions that are found after being planted in training rows.

    Each question is wrapped anew, in other case and with its punctuation changed, and put somewhere inside the text of
    a carrier row. 1.0 is perfect; NaN when there is nothing to plant.
    """
    rng = random.Random(seed)
    rows = [row for batch in evaluation for row in batch if question_of(row).strip()]
    rows = rng.sample(rows, min(limit, len(rows)))
    if not rows or not carriers:
        return float("nan")
    planted = []
    for row in rows:
        carrier = question_of(carriers[rng.randrange(len(carriers))])
        at = rng.randint(0, len(carrier))
        text = f"{carrier[:at]}\n{_disguise(question_of(row), rng)}\n{carrier[at:]}"
        # A question too short for 8-grams is looked for as a whole message, so that is how it is planted.
        short = tokens([question_of(row)], symbols=False)[1][1] < GRAM
        planted.append(
            make_row("sft", [{"role": "user", "content": _disguise(question_of(row), rng) if short else text}])
        )
    found = Items([rows], share).find(planted)
    return float((found >= 0).mean())


def _disguise(text: str, rng: random.Random) -> str:
    words = text.split()
    width = rng.randint(3, 12)
    lines = [" ".join(words[i : i + width]) for i in range(0, len(words), width)]
    text = "\n  ".join(lines).replace("?", " ?").replace(",", " ,")
    return rng.choice([text, text.upper(), text.rstrip("?!. ")])
