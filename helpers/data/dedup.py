"""Duplicates: exact ones by content hash, near ones by MinHash with every candidate verified.

Two rows are near-duplicates when their system prompt and tools are the same and the Jaccard similarity of their shingle
sets reaches the threshold for the questions and for the answers, each for itself. Shingles that stand in many questions
(an instruction, a schema) are no evidence of sameness and do not count. A row is only dropped for one with the very
same answer: two labels, or two queries that differ in one constant, are two examples. Plain text is compared whole.

MinHash in bands (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3) proposes pairs: 8 bands
of 5 find a pair of Jaccard 0.9 with probability 0.9992, of 0.8 with 0.96. Each pair is then measured on its shingles,
so a false duplicate needs a hash collision. Shingles lie in a temporary file: memory holds 108 bytes a row.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

from helpers.data.shingles import many, mix, shingles, text_hash
from helpers.data.split import components
from helpers.data.tables import StepReport, Table
from helpers.data.turns import Row, batches, shown

Fault = tuple[str, str] | None
BANDS, BAND_ROWS = 8, 5
WORDS, CHARS = 3, 5  # tokens in a shingle; characters where a script has no spaces
ROWS_AT_ONCE = 100  # a hundred rows of 150 shingles stay in the processor's cache
SAMPLE = 20_000  # rows whose questions say what many questions share
BUCKETS = 2**22  # in which shingles are counted
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
    report.made = NearIndex(table.rows())
    keeper = report.made.keepers(threshold)
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


def near_pairs(table: Table, index: NearIndex | None = None, threshold: float = 0.8) -> list[tuple[str, str]]:
    """Pairs of ids of the rows that a split must not part: each row with the first one that near-duplicates link it to,
    in chains too. index: of rows among which these are; a new one is made where it is not theirs."""
    ids = np.fromiter((int(row["id"], 16) for row in table.rows()), np.uint64, len(table))
    if index is None or not np.isin(ids, index.ids).all():
        index = NearIndex(table.rows())
    return index.pairs(ids, threshold)


def parts_of(row: Row) -> tuple[str, str, str, str]:
    """(scope, learnt, question, answers) of a row. Only rows of the same scope can be duplicates, and only those that
    teach the same, white space aside, are dropped: every answer, or the chosen one; of plain text nothing is asked."""

    def said(message: dict) -> str:
        calls = message.get("tool_calls")
        return (message.get("content") or "") + (json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else "")

    messages = row["messages"]
    if row["kind"] == "text":
        return "", "", "", said(messages[0])
    scope = [said(m) for m in messages if m["role"] == "system"]
    scope += [row.get("tools") or "", str(row.get("label", ""))]
    talk = [said(m) for m in messages if m["role"] != "system"]
    if row["kind"] != "preference":
        earlier = [said(m) for m in messages[:-1] if m["role"] == "assistant"]  # they may be trained too
        taught = "\0".join(" ".join(text.split()) for text in (*earlier, *talk[-1:]))
        return "\n".join(scope), taught, "\n".join(talk[:-1]), "".join(talk[-1:])
    learnt, rejected = ([said(m) for m in row[side]] for side in ("chosen", "rejected"))
    return "\n".join(scope), " ".join("\n".join(learnt).split()), "\n".join(talk), "\n".join(learnt + rejected)


class NearIndex:
    """Shingles and MinHash band keys of rows, among which `pairs` and `keepers` look for near-duplicates of a Jaccard
    threshold. ids: the rows' own, uint64 (rows,)."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._file = tempfile.TemporaryFile(prefix="tunebook-")  # noqa: SIM115 - as long as the index
        sizes: list[np.ndarray] = [np.zeros((0, 2), np.int32)]
        hashes: list[np.ndarray] = [np.zeros((0, 3), np.uint64)]
        for some in batches(rows, ROWS_AT_ONCE):
            parts = list(map(parts_of, some))
            flat, offsets = shingles([text for part in parts for text in part[2:]], WORDS, CHARS)
            # The upper half: for a polynomial hash after `mix` either would do, but one must be chosen for ever.
            self._file.write((flat >> np.uint64(32)).astype(np.uint32).data)
            sizes.append(np.diff(offsets).astype(np.int32).reshape(-1, 2))
            scopes = {scope: text_hash(scope) for scope in {part[0] for part in parts}}
            named = zip(((scopes[part[0]], text_hash(part[1])) for part in parts), some, strict=True)
            hashes.append(np.array([(*both, int(row["id"], 16)) for both, row in named], np.uint64))
        self._file.flush()
        self._sizes = np.concatenate(sizes)  # of question and answer
        scope, self._answers, self.ids = np.concatenate(hashes).T
        self._ends = np.cumsum(self._sizes.sum(1, dtype=np.int64))
        self._filled: np.ndarray = np.flatnonzero(self._sizes.any(1)).astype(np.int32)
        self._shared = self._in_many_questions()
        starts = range(0, len(scope), ROWS_AT_ONCE)
        keys = [_band_keys(*self._distinctive(start, start + ROWS_AT_ONCE)) for start in starts]
        self._keys = np.concatenate([np.zeros((BANDS, 0), np.uint64), *keys], axis=1) ^ scope

    def _in_many_questions(self) -> np.ndarray:
        """bool (BUCKETS,): whether the shingles of a bucket stand in many different questions of a sample of rows."""
        asked = np.flatnonzero(self._sizes[:, 0])
        counts: np.ndarray = np.zeros(BUCKETS, np.uint16)
        seen: set[bytes] = set()
        sample = asked[:: -(-len(asked) // SAMPLE) or 1].tolist()
        for at in range(0, len(sample), ROWS_AT_ONCE):
            read = [self._read(row) for row in sample[at : at + ROWS_AT_ONCE]]
            new = list({found[:size].tobytes() for size, found in read} - seen)
            seen.update(new)
            found = np.frombuffer(b"".join(new), np.uint32) % BUCKETS
            owners: np.ndarray = np.repeat(np.arange(len(new)), np.array([len(one) // 4 for one in new], np.int64))
            np.add.at(counts, np.unique(owners * BUCKETS + found) % BUCKETS, 1)
        return many(counts, len(seen))

    def _distinctive(self, first: int, behind: int) -> tuple[np.ndarray, np.ndarray]:
        """The shingles of consecutive rows without those of many questions, and where those of each row begin."""
        sizes = self._sizes[first:behind]
        begin = int(self._ends[first] - sizes[0].sum())
        flat, offsets = self._stored(begin, int(self._ends[first:behind][-1])), np.r_[0, np.cumsum(sizes.sum(1))]
        if not sizes[:, 0].any():
            return flat, offsets
        asked: np.ndarray = np.repeat(np.tile([True, False], len(sizes)), sizes.ravel())
        kept = ~(asked & self._shared[flat % BUCKETS])
        return flat[kept], np.r_[0, np.cumsum(kept)][offsets]

    def pairs(self, ids: np.ndarray, threshold: float = 0.8) -> list[tuple[str, str]]:
        """What `near_pairs` says of rows of this index."""
        places = np.unique(self.ids, return_index=True)[1]  # of the first row of each id, the ids ascending
        wanted = places[np.searchsorted(self.ids[places], ids)]
        subset: np.ndarray = np.intersect1d(wanted, self._filled).astype(np.int32)
        firsts = self._linked(subset, threshold)
        linked = firsts != subset
        found = (self.ids[ends[linked]].tolist() for ends in (firsts, subset))
        return [(f"{first:016x}", f"{other:016x}") for first, other in zip(*found, strict=True)]

    def keepers(self, threshold: float = 0.8) -> np.ndarray:
        """int32 (rows,): the kept row that every row duplicates, or -1."""
        keeper: np.ndarray = np.full(len(self._sizes), -1, np.int32)
        subset = self._filled
        while len(subset):
            firsts = self._linked(subset, threshold, self._answers)
            later = firsts != subset
            firsts, subset = firsts[later], subset[later]
            close = self._near(firsts, subset, threshold)
            keeper[subset[close]] = firsts[close]
            subset = subset[~close]  # linked to the group's first row only through others
        return keeper

    def _linked(self, subset: np.ndarray, threshold: float, answers: np.ndarray | None = None) -> np.ndarray:
        """The first row that every row of the ascending `subset` is linked to, by one near pair or a chain of them.

        answers: hashes, uint64 (rows,); then rows of different ones are not linked."""
        salt = np.zeros(1, np.uint64) if answers is None else answers[subset]
        pairs = np.unique(np.concatenate([_candidates(keys[subset] ^ salt) for keys in self._keys]))
        left, right = subset[pairs >> 32], subset[pairs & 0xFFFFFFFF]
        close = self._near(left, right, threshold) & (answers is None or answers[left] == answers[right])
        group = components(pairs[close] >> 32, pairs[close] & 0xFFFFFFFF, len(subset))
        return subset[np.unique(group, return_index=True)[1][group]]

    def _near(self, left: np.ndarray, right: np.ndarray, threshold: float) -> np.ndarray:
        """bool (pairs,): which pairs of rows are near-duplicates by their shingles."""

        def near(one: int, other: int) -> bool:
            (asked, a), (asked_too, b) = self._read(one), self._read(other)
            if jaccard(a[asked:].tolist(), b[asked_too:].tolist()) < threshold:
                return False
            question, question_too = a[:asked], b[:asked_too]
            if np.array_equal(question, question_too):
                return True
            own, own_too = (part[~self._shared[part % BUCKETS]].tolist() for part in (question, question_too))
            return bool(own or own_too) and jaccard(own, own_too) >= threshold

        return np.fromiter(map(near, left.tolist(), right.tolist()), bool, len(left))

    def _read(self, row: int) -> tuple[int, np.ndarray]:
        """How many shingles a row's question has, and those of question and answer."""
        end = int(self._ends[row])
        return int(self._sizes[row, 0]), self._stored(end - int(self._sizes[row].sum()), end)

    def _stored(self, begin: int, end: int) -> np.ndarray:
        return np.frombuffer(os.pread(self._file.fileno(), 4 * (end - begin), 4 * begin), np.uint32)


def jaccard(one: Iterable[int], other: Iterable[int]) -> float:
    """Jaccard similarity of two sets of shingles; 1 when both are empty."""
    one, other = set(one), set(other)
    return len(one & other) / len(one | other) if one or other else 1.0


def _band_keys(flat: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Key of every row in every band, uint64 (BANDS, rows); 0 for rows without shingles. offsets: int (rows + 1,)."""
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
