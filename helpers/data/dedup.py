"""Duplicates: exact ones by content hash, near ones by MinHash with every candidate verified.

Rows are compared as whole examples. Two rows are near-duplicates when their system prompt and tools are the same and
the Jaccard similarity of their shingle sets reaches the threshold twice: over question and answer together, and over
the answer alone. Without the second rule, questions that share a long context (a schema, a passage) would all be
"duplicates"; without the first, a shared system prompt would make them so.

MinHash in bands (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3) proposes pairs: 8 bands
of 5 find a pair of Jaccard 0.9 with probability 0.9992, of 0.8 with 0.96. Each pair is then measured on its shingles,
so a false duplicate needs a hash collision. Shingles lie in a temporary file: memory holds 84 bytes a row.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

from helpers.data.shingles import mix, shingles, text_hash
from helpers.data.split import components
from helpers.data.tables import StepReport, Table
from helpers.data.turns import Row, batches, shown

Fault = tuple[str, str] | None
BANDS, BAND_ROWS = 8, 5
WORDS, CHARS = 3, 5  # tokens in a shingle; characters where a script has no spaces
ROWS_AT_ONCE = 100  # a hundred rows of 150 shingles stay in the processor's cache
HASHES: np.ndarray = mix(np.arange(1, 81, dtype=np.uint64)).astype(np.uint32).reshape(BANDS, BAND_ROWS, 2)


def exact_duplicates(rows: Iterable[list[Row]], report: StepReport) -> Iterator[list[Row]]:
    """Keep the first of the rows with the same content (`id`): messages, tools, answers and label."""
    seen: set[int] = set()

    def judge(batch: list[Row]) -> Iterator[Fault]:
        for row in batch:
            number = int(row["id"], 16)
            yield ("exact duplicate", "") if number in seen else None
            seen.add(number)

    return report.sift(rows, judge)


def near_duplicates(rows: Iterable[list[Row]], report: StepReport, threshold: float = 0.8) -> Iterator[list[Row]]:
    """Keep the first of rows that are near-duplicates of each other, at Jaccard `threshold` (0 to 1).

    A row is dropped only when it was measured against a kept row and reached the threshold: chains of ever slightly
    different rows do not vanish whole.
    """
    table = rows if isinstance(rows, Table) else Table.collect(rows)
    keeper = NearIndex(table.rows(), threshold).keepers()
    doubled = np.flatnonzero(keeper >= 0)
    report.figures |= {"threshold": threshold, "near_duplicates": len(doubled)}
    example = int(keeper[doubled[0]]) if len(doubled) else -1  # the kept row behind the example
    texts: dict[int, str] = {}
    places = itertools.count()

    def judge(batch: list[Row]) -> Iterator[Fault]:
        for row, at in zip(batch, places, strict=False):
            if at == example:
                texts[at] = ": " + shown(row, 200)
            kept = int(keeper[at])
            yield None if kept < 0 else ("near duplicate", f"of kept row {kept + 1:,}{texts.get(kept, '')}")

    return report.sift(table, judge)


def near_duplicate_groups(rows: Iterable[list[Row]], threshold: float = 0.8) -> np.ndarray:
    """Group of every row, int32 (rows,): the position of the first row it is linked to by near-duplicates.

    Links are transitive, so that rows of one group can be kept on one side of a split.
    """
    return NearIndex(itertools.chain.from_iterable(rows), threshold).groups()


def parts_of(row: Row) -> tuple[str, str, str]:
    """(scope, question, answer) of a row; only rows of the same scope can be duplicates."""

    def said(message: dict) -> str:
        calls = message.get("tool_calls")
        return (message.get("content") or "") + (json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else "")

    messages = row["messages"]
    if row["kind"] == "text":
        return "", "", said(messages[0])
    scope = [said(m) for m in messages if m["role"] == "system"]
    scope += [row.get("tools") or "", str(row.get("label", ""))]
    talk = [said(m) for m in messages if m["role"] != "system"]
    if row["kind"] == "preference":
        answer = [said(m) for m in row["chosen"] + row["rejected"]]
    else:
        answer, talk = talk[-1:], talk[:-1]
    return "\n".join(scope), "\n".join(talk), "\n".join(answer)


class NearIndex:
    """Shingles and MinHash band keys of rows, among which `groups` and `keepers` look for near-duplicates."""

    def __init__(self, rows: Iterable[Row], threshold: float = 0.8) -> None:
        self.threshold = threshold
        self._file = tempfile.TemporaryFile(prefix="tunebook-")  # noqa: SIM115 - as long as the index
        sizes: list[np.ndarray] = [np.zeros((0, 2), np.int32)]
        keys: list[np.ndarray] = [np.zeros((BANDS, 0), np.uint64)]
        for parts in (list(map(parts_of, some)) for some in batches(rows, ROWS_AT_ONCE)):
            flat, offsets = shingles([text for _, *texts in parts for text in texts], WORDS, CHARS)
            # The upper half: for a polynomial hash after `mix` either would do, but one must be chosen for ever.
            short = (flat >> np.uint64(32)).astype(np.uint32)
            self._file.write(short.data)
            sizes.append(np.diff(offsets).astype(np.int32).reshape(-1, 2))
            scopes = {scope: text_hash(scope) for scope in {part[0] for part in parts}}
            keys.append(_band_keys(short, offsets[::2]) ^ np.array([scopes[part[0]] for part in parts], np.uint64))
        self._file.flush()
        self._sizes, self._keys = np.concatenate(sizes), np.concatenate(keys, axis=1)  # question and answer, bands
        self._ends = np.cumsum(self._sizes.sum(1, dtype=np.int64))
        self._filled: np.ndarray = np.flatnonzero(self._sizes.any(1)).astype(np.int32)

    def groups(self) -> np.ndarray:
        """int32 (rows,): the first row of every row's group."""
        group: np.ndarray = np.arange(len(self._sizes), dtype=np.int32)
        group[self._filled] = self._linked(self._filled)
        return group

    def keepers(self) -> np.ndarray:
        """int32 (rows,): the kept row that every row duplicates, or -1."""
        keeper: np.ndarray = np.full(len(self._sizes), -1, np.int32)
        subset = self._filled
        while len(subset):
            firsts = self._linked(subset)
            later = firsts != subset
            firsts, subset = firsts[later], subset[later]
            close = self._near(firsts, subset)
            keeper[subset[close]] = firsts[close]
            subset = subset[~close]  # linked to the group's first row only through others
        return keeper

    def _linked(self, subset: np.ndarray) -> np.ndarray:
        """The first row that every row of the ascending `subset` is linked to, by one near pair or a chain of them."""
        pairs = np.unique(np.concatenate([_candidates(keys[subset]) for keys in self._keys]))
        left, right = pairs >> 32, pairs & 0xFFFFFFFF
        close = self._near(subset[left], subset[right])
        group = components(left[close], right[close], len(subset))
        return subset[np.unique(group, return_index=True)[1][group]]

    def _near(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """bool (pairs,): which pairs of rows are near-duplicates by their shingles."""

        def near(one: int, other: int) -> bool:
            (asked, a), (asked_too, b) = self._read(one), self._read(other)
            if jaccard(a[asked:], b[asked_too:]) < self.threshold:
                return False
            return asked + asked_too == 0 or jaccard(a, b) >= self.threshold

        return np.fromiter(map(near, left.tolist(), right.tolist()), bool, len(left))

    def _read(self, row: int) -> tuple[int, memoryview]:
        """How many shingles a row's question has, and those of question and answer."""
        question, answer = self._sizes[row].tolist()
        size = question + answer
        read = os.pread(self._file.fileno(), 4 * size, 4 * (int(self._ends[row]) - size))
        return question, memoryview(read).cast("I")


def jaccard(one: Iterable[int], other: Iterable[int]) -> float:
    """Jaccard similarity of two sets of shingles; 1 when both are empty."""
    one, other = set(one), set(other)
    return len(one & other) / len(one | other) if one or other else 1.0


def _band_keys(flat: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Key of every row in every band, uint64 (BANDS, rows); 0 for rows without shingles."""
    filled = np.flatnonzero(np.diff(offsets))
    keys: np.ndarray = np.zeros((BANDS, len(offsets) - 1), np.uint64)
    for band in range(BANDS):
        for factor, shift in HASHES[band]:
            smallest = np.minimum.reduceat(flat * (factor | 1) + shift, offsets[filled])
            keys[band, filled] = mix(keys[band, filled] + smallest)
    return keys


def _candidates(keys: np.ndarray) -> np.ndarray:
    """Pairs of rows with the same key as earlier << 32 | later: each row with the first of its bucket and with the one
    before it, so that a bucket of n rows costs no more than 2n measurements."""
    order = np.argsort(keys, kind="stable")
    repeats = np.r_[False, keys[order][1:] == keys[order][:-1]]
    firsts = order[np.maximum.accumulate(np.where(repeats, 0, np.arange(len(keys))))]
    later = np.flatnonzero(repeats)
    return np.concatenate([firsts[later], order[later - 1]]) << 32 | np.tile(order[later], 2)
