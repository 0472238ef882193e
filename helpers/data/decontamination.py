"""Training rows that hold an evaluation question: found by 8-grams of tokens, over the whole example.

An evaluation item is the text that its user asks (the whole text of a plain-text row). A training row is contaminated
when it holds at least `share` of the distinct 8-grams of one item, wherever line breaks fall and whatever the case and
punctuation; a gram is 8 characters where a script has no spaces. Items of fewer than 8 tokens have no 8-gram and are
compared whole, message by message. System prompts and tools are left out: every row of a job may share them.

Grams over paragraphs miss text that was wrapped anew (recall 0.87 → 0.00), so `injection_recall` measures on the
user's own data how many planted questions are found; the report shows the figure.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from helpers.data.shingles import contains, shingles, tokens
from helpers.data.tables import StepReport
from helpers.data.turns import Row, make_row, spoken

GRAM = 8
SHARE = 0.5
FILTER = np.uint64((1 << 22) - 1)  # one look-up in a table of this size spares most tokens the binary search


def decontaminate(
    rows: Iterable[list[Row]], report: StepReport, evaluation: Iterable[list[Row]], share: float = SHARE
) -> Iterator[list[Row]]:
    """Drop training rows that hold an item of `evaluation`; the reason names the item.

    share: of an item's distinct 8-grams that a row must hold, over 0 to 1.
    """
    items = Items(evaluation, share)
    report.figures |= {"items": len(items.names), "items_too_short": items.short, "share": share, "items_found": 0}
    touched: set[int] = set()

    def judge(batch: list[Row]) -> Iterator[tuple[str, str] | None]:
        for item in items.find(batch).tolist():
            if item >= 0:
                touched.add(item)
                report.figures["items_found"] = len(touched)
            yield ("holds an evaluation question", items.names[item]) if item >= 0 else None

    return report.sift(rows, judge)


class Items:
    """The evaluation questions as sorted arrays of 8-gram hashes. short: items of fewer than 8 tokens."""

    def __init__(self, evaluation: Iterable[list[Row]], share: float = SHARE) -> None:
        self.share, self.short, self.names = share, 0, list[str]()
        grams: list[np.ndarray] = [np.zeros(0, np.uint64)]
        owners: list[np.ndarray] = [np.zeros(0, np.int64)]
        for batch in evaluation:
            texts = [question_of(row) for row in batch]
            flat, offsets = shingles(texts, GRAM, GRAM, symbols=False)
            grams.append(flat)
            owners.append(np.repeat(np.arange(len(batch)) + len(self.names), np.diff(offsets)))
            self.short += int((np.diff(tokens(texts, symbols=False)[1]) < GRAM).sum())
            places = zip(batch, texts, strict=True)
            self.names += [f"{row['file']} row {row['row']}: {text[:100]}" for row, text in places]
        gram, owner = np.concatenate(grams), np.concatenate(owners)
        order = np.lexsort((owner, gram))
        gram, owner = gram[order], owner[order]
        once: np.ndarray = np.ones(len(gram), bool)
        once[1:] = (gram[1:] != gram[:-1]) | (owner[1:] != owner[:-1])
        self._gram, self._owner = gram[once], owner[once]
        self._sizes = np.bincount(self._owner, minlength=len(self.names))
        self._filter: np.ndarray = np.zeros(int(FILTER) + 1, bool)
        self._filter[self._gram & FILTER] = True

    def find(self, batch: list[Row]) -> np.ndarray:
        """The item that every row holds, int64 (rows,); -1 where it holds none."""
        result: np.ndarray = np.full(len(batch), -1)
        rows, items = self.holds(batch)
        result[rows] = items
        return result

    def holds(self, batch: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Every pair of a row and an item that it holds: their places, int64 (pairs,) each."""
        owners, texts = [], []
        for place, row in enumerate(batch):
            messages = spoken(row)
            parts = ["\n".join(messages), *(messages if self.short else [])]
            texts += parts
            owners += [place] * len(parts)
        flat, offsets = shingles(texts, GRAM, GRAM, symbols=False)
        hit = self._filter[flat & FILTER]
        hit[hit] = contains(self._gram, flat[hit])
        if not hit.any():
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        place = np.repeat(np.array(owners), np.diff(offsets))[hit]
        first: Any = np.searchsorted(self._gram, flat[hit], "left")
        counts = np.searchsorted(self._gram, flat[hit], "right") - first
        # Every place of the item list that a hit reaches: first, first + 1, … for each.
        reached = np.repeat(first - np.r_[0, np.cumsum(counts)[:-1]], counts) + np.arange(counts.sum())
        shared = np.unique(np.stack([np.repeat(place, counts), self._owner[reached], reached]), axis=1)[:2]
        pairs, held = np.unique(shared, axis=1, return_counts=True)
        enough = held >= np.maximum(1, np.ceil(self.share * self._sizes[pairs[1]] - 1e-9))
        return pairs[0][enough], pairs[1][enough]


def held(questions: list[list[dict]], training: Path, share: float = SHARE) -> list[bool]:
    """Whether some row of a train.parquet of stage 01 holds each question (its messages)."""
    import pyarrow.parquet as pq

    rows: list[Row] = [{"messages": messages, "file": "test", "row": i} for i, messages in enumerate(questions)]
    items = Items([rows], share)
    found: np.ndarray = np.zeros(len(questions), bool)
    for batch in pq.ParquetFile(training).iter_batches(columns=["messages"]):
        cells = batch.column("messages").to_pylist()
        found[items.holds([{"messages": json.loads(c) if isinstance(c, str) else c} for c in cells])[1]] = True
    return found.tolist()


def question_of(row: Row) -> str:
    """What an evaluation row asks: its user turns; the text of a plain-text row."""
    return "\n".join(m.get("content") or "" for m in row["messages"] if m["role"] in ("user", "text"))


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
        carrier, question = question_of(carriers[rng.randrange(len(carriers))]), _disguise(question_of(row), rng)
        at = rng.randint(0, len(carrier))
        # A question too short for 8-grams is looked for as a whole message, so that is how it is planted.
        if tokens([question_of(row)], symbols=False)[1][1] >= GRAM:
            question = f"{carrier[:at]}\n{question}\n{carrier[at:]}"
        planted.append(make_row("sft", [{"role": "user", "content": question}]))
    return float((Items([rows], share).find(planted) >= 0).mean())


def _disguise(text: str, rng: random.Random) -> str:
    words, width = text.split(), rng.randint(3, 12)
    lines = [" ".join(words[i : i + width]) for i in range(0, len(words), width)]
    text = "\n  ".join(lines).replace("?", " ?").replace(",", " ,")
    return rng.choice([text, text.upper(), text.rstrip("?!. ")])
