"""Duplicates: exact ones by content hash, near ones by MinHash with every candidate verified.

Rows are compared as whole examples. Two rows are near-duplicates when their system prompt and tools are the same and
the Jaccard similarity of their shingle sets reaches the threshold twice: over question and answer together, and over
the answer alone. Without the second rule, questions that share a long context (a schema, a passage) would all be
"duplicates"; without the first, a shared system prompt would make them so.

MinHash in bands (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3) proposes pairs: 8 bands
of 5 find a pair of Jaccard 0.9 with probability 0.9992, of 0.8 with 0.96. Each pair is then measured on its shingles,
so a false duplicate needs a hash collision. Shingles and band keys lie in temporary files: memory holds a few bytes a
row, and mapped files would count as memory of the process, page by page.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from helpers.data.shingles import mix, shingles, text_hash
from helpers.data.tables import StepReport, Table
from helpers.data.turns import Row, shown
from helpers.worker import Forked

Parts = tuple[str, str, str]  # what is compared of a row: scope, question, answer
Fault = tuple[str, str] | None
Hashes = tuple[np.ndarray, np.ndarray, np.ndarray]
BANDS, BAND_ROWS = 8, 5
HASHES = BANDS * BAND_ROWS
WORDS, CHARS = 3, 5  # tokens in a shingle; characters where a script has no spaces
ALONE = 5_000  # rows from which workers are worth their start
# Beside this process, which hashes too when they are busy; threads would only pass the interpreter's lock about.
WORKERS = min(3, (os.cpu_count() or 1) - 1)
PAIRS_AT_ONCE = 1_000  # of 150 words each: arrays of a few MB
FACTORS = mix(np.arange(1, HASHES + 1, dtype=np.uint64)).astype(np.uint32) | np.uint32(1)
SHIFTS: np.ndarray = mix(np.arange(1001, 1001 + HASHES, dtype=np.uint64)).astype(np.uint32)
KEYS = mix(np.arange(2001, 2001 + HASHES, dtype=np.uint64)) | np.uint64(1)


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
    keeper = _index(table).find(threshold)[1]
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
    return _index(rows).find(threshold, groups_only=True)[0]


def _index(rows: Iterable[list[Row]]) -> NearIndex:
    index = NearIndex()
    for batch in rows:
        index.add([parts_of(row) for row in batch])
    return index


def parts_of(row: Row) -> Parts:
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
    """Shingles and MinHash band keys of rows, kept in temporary files until `find` compares them."""

    def __init__(self) -> None:
        self.rows = 0
        self._sizes = array("i")  # shingles of the question and of the answer, two numbers a row
        self._shingles = tempfile.TemporaryFile("a+b", 0, prefix="tunebook-")  # noqa: SIM115 - as long as the index
        self._bands = [tempfile.TemporaryFile("a+b", prefix="tunebook-") for _ in range(BANDS)]  # noqa: SIM115
        self._workers: list[Forked] = []
        self._waiting: deque[_Batch] = deque()  # in order

    def add(self, parts: list[Parts]) -> None:
        """Index rows."""
        if not parts:
            return
        self.rows += len(parts)
        if not self._workers and self.rows > ALONE:
            self._workers = [Forked(_hashed) for _ in range(WORKERS)]
        self._waiting.append(_Batch(parts, next((w for w in self._workers if w.idle), None)))
        for batch in self._waiting:
            if batch.done():
                batch.take()  # its worker may be asked again, whatever comes before it
        while self._waiting and self._waiting[0].done():
            self._write_first()

    def _write_first(self) -> None:
        sizes, short, keys = self._waiting.popleft().take()
        self._sizes.extend(sizes.tolist())
        self._shingles.write(short.data)
        for file, band in zip(self._bands, keys, strict=True):
            file.write(band.data)

    def find(self, threshold: float, groups_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(group, keeper), int32 (rows,) each: first row of the row's group; the kept row it duplicates, or -1."""
        while self._waiting:
            self._write_first()
        while self._workers:
            self._workers.pop().stop()
        sizes = np.frombuffer(self._sizes, np.int32).reshape(-1, 2)
        group: np.ndarray = np.arange(self.rows, dtype=np.int32)
        keeper: np.ndarray = np.full(self.rows, -1, np.int32)
        measure = _Measure(self._shingles, sizes, threshold)
        subset: np.ndarray = np.flatnonzero(sizes.any(1)).astype(np.int32)
        first = True
        while len(subset) > 1:
            roots = self._components(subset, measure)
            if first:
                group[subset] = roots
            if groups_only:
                break
            other = roots != subset
            heads, members = roots[other], subset[other]
            close = measure(heads, members)
            keeper[members[close]] = heads[close]
            subset, first = members[~close], False  # linked to the group's first row only through others
        return group, keeper

    def _components(self, subset: np.ndarray, measure: _Measure) -> np.ndarray:
        """First row of the component of every row of the ascending `subset`, linked by measured pairs."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        size = len(subset)
        roots: np.ndarray = np.arange(size)  # after each band every row points at the first row it is linked to
        for file in self._bands:
            file.flush()
            file.seek(0)
            keys = np.fromfile(file, np.uint64, self.rows)
            left, right = _candidates(keys if size == self.rows else keys[subset])
            apart = roots[left] != roots[right]
            left, right = left[apart], right[apart]
            close = measure(subset[left], subset[right])
            if close.any():
                links = coo_array((close[close], (roots[left[close]], roots[right[close]])), (size, size))
                component = connected_components(links, directed=False)[1][roots]
                first: np.ndarray = np.full(component.max() + 1, size)
                np.minimum.at(first, component, np.arange(size))
                roots = first[component]
        return subset[roots]


class _Measure:
    """Which pairs of rows are near-duplicates, by true Jaccard on their hashed shingle sets, read from the file."""

    def __init__(self, file: Any, sizes: np.ndarray, threshold: float) -> None:
        self.file, self.sizes, self.threshold = file, sizes, threshold
        self.starts = np.concatenate([[0], np.cumsum(sizes.sum(1, dtype=np.int64))])

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """bool (pairs,) for row numbers int32 (pairs,) each."""
        close: np.ndarray = np.zeros(len(left), bool)
        for at in range(0, len(left), PAIRS_AT_ONCE):
            a, b = left[at : at + PAIRS_AT_ONCE], right[at : at + PAIRS_AT_ONCE]
            near = self._jaccard(a, b, answers=False) >= self.threshold
            asked = self.sizes[a, 0] + self.sizes[b, 0] > 0  # without a question the answer is the whole
            twice = np.flatnonzero(near & asked)
            near[twice] = self._jaccard(a[twice], b[twice], answers=True) >= self.threshold
            close[at : at + PAIRS_AT_ONCE] = near
        return close

    def _jaccard(self, a: np.ndarray, b: np.ndarray, answers: bool) -> np.ndarray:
        left, right = self._sets(a, answers), self._sets(b, answers)
        both = np.sort(np.concatenate([left, right]))
        both = both[1:][both[1:] == both[:-1]]
        shared, one, two = (
            np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(a)) for keys in (both, left, right)
        )
        union = one + two - shared
        return np.where(union == 0, 1.0, shared / np.maximum(union, 1))

    def _sets(self, rows: np.ndarray, answers: bool) -> np.ndarray:
        """Distinct shingles of the rows, sorted, each with its place in `rows` in the upper 32 bits."""
        counts = self.sizes[rows, 1] if answers else self.sizes[rows].sum(1)
        begins = self.starts[rows] + (self.sizes[rows, 0] if answers else 0)
        read = []
        for begin, count in zip(begins.tolist(), counts.tolist(), strict=True):
            self.file.seek(4 * begin)
            read.append(self.file.read(4 * count))
        flat = np.frombuffer(b"".join(read), np.uint32).astype(np.uint64)
        keys = np.sort(flat | np.repeat(np.arange(len(rows), dtype=np.uint64), counts) << np.uint64(32))
        return keys[np.r_[True, keys[1:] != keys[:-1]]] if len(keys) else keys  # np.unique hashes: ten times slower


class _Batch:
    """Rows on their way into an index: hashed by a worker, or here where none is idle or it was killed."""

    def __init__(self, parts: list[Parts], worker: Forked | None) -> None:
        self.parts = parts
        self.worker = worker if worker is not None and worker.ask(parts) else None
        self.hashes = None if self.worker else _hashed(parts)

    def done(self) -> bool:
        return self.worker is None or self.hashes is not None or self.worker.answered()

    def take(self) -> Hashes:
        if self.hashes is None:
            self.hashes = (self.worker and self.worker.answer()) or _hashed(self.parts)
        return self.hashes


def _hashed(parts: list[Parts]) -> Hashes:
    """(shingles in each question and answer int32 (2 · rows,), the shingles uint32, band keys uint64 (BANDS, rows))."""
    flat, offsets = shingles([text for _, question, answer in parts for text in (question, answer)], WORDS, CHARS)
    # The upper half: for a polynomial hash after `mix` either would do, but one must be chosen for ever.
    short = (flat >> np.uint64(32)).astype(np.uint32)
    scopes = {scope: text_hash(scope) for scope in {part[0] for part in parts}}
    keys = _band_keys(short, offsets[::2]) ^ np.array([scopes[scope] for scope, _, _ in parts], np.uint64)
    return np.diff(offsets).astype(np.int32), short, keys


def _band_keys(flat: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Key of every row in every band, uint64 (BANDS, rows); rows without shingles get 0 before the scope is added."""
    rows = len(offsets) - 1
    filled = np.flatnonzero(np.diff(offsets))
    keys: np.ndarray = np.zeros((BANDS, rows), np.uint64)
    for at in range(0, len(filled), 100):  # a hundred rows of 150 shingles stay in the cache
        some = filled[at : at + 100]
        part = flat[offsets[some[0]] : offsets[some[-1] + 1]]
        begins = offsets[some] - offsets[some[0]]
        work = np.empty_like(part)
        for k in range(HASHES):
            np.multiply(part, FACTORS[k], out=work)
            work += SHIFTS[k]
            keys[k // BAND_ROWS, some] += np.minimum.reduceat(work, begins).astype(np.uint64) * KEYS[k]
    return mix(keys)


def _candidates(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows with the same key, int64 (pairs,) each, the earlier first: each row with the first of its bucket
    and with the one before it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same: np.ndarray = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    begins = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    firsts = order[begins[np.searchsorted(begins, same, "right") - 1]]
    pairs = np.unique(np.concatenate([firsts, order[same - 1]]) << 32 | np.tile(order[same], 2))
    return pairs >> 32, pairs & 0xFFFFFFFF
