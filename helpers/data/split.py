"""Splits by content: where a row lands depends on the row alone, so it lands there again next year and in every job.

A key is hashed to a number between 0 and 1; the test split takes the lowest, the eval split the highest, training what
lies between. Rows that must not be parted share a key: the value of a column that the user names, the document that
pieces were cut from, the first question of a conversation (its other answers and later turns have the same). Any other
row has its id. Near-duplicates take that of a group among them, else the smallest.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import numpy as np

from helpers.data.shingles import text_hash
from helpers.data.tables import Table
from helpers.data.turns import Row
from helpers.errors import TunebookError

SPLITS = ("train", "eval", "test")
OFTEN = 50  # rows that ask one question, before it may be a phrase that a set's rows share


def place_of(key: str) -> float:
    """Where a key lies from 0 to 1, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"split:{key}".encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64


def split_of(key: str, eval_share: float, test_share: float) -> str:
    """The split of a key."""
    place = place_of(key)
    return "test" if place < test_share else "eval" if place >= 1 - eval_share else "train"


class Questions:
    """The questions that several rows of a table ask, but those that over a quarter of the rows (and over 50) share."""

    def __init__(self, table: Table) -> None:
        every = np.array(array("Q", (key for row in table.rows() for key in asked(row))), np.uint64)
        keys, counts = np.unique(every, return_counts=True)
        shared = (counts > 1) & (counts <= max(OFTEN, len(table) / 4))
        self.again = set(keys[shared].tolist())

    def key(self, row: Row) -> str:
        """What the row shares with those that must stay on its side: its document, its question, or its id alone."""
        if "document" in row["meta"] and "piece" in row["meta"]:
            return f" {row['file']} {row['meta']['document']}"
        return next((f"{key:016x}" for key in asked(row) if key in self.again), row["id"])


def asked(row: Row) -> list[int]:
    """The question that a conversation begins with, then with its second question, and so on, as 64 bits each.

    Case and white space do not count, nor does a system prompt."""
    said = [" ".join((m.get("content") or "").lower().split()) for m in row["messages"] if m["role"] == "user"]
    return [text_hash(talk) for talk in accumulate(said, "{}\n{}".format)]


def asks(table: Table) -> Callable[[Row], bool]:
    """Whether a row asks a question of `table`, goes on from one, or is where one of its conversations begins."""
    tests = [asked(row) for row in table.rows()]
    begun, whole = {key for keys in tests for key in keys}, {keys[-1] for keys in tests if keys}
    return lambda row: bool(keys := asked(row)) and (keys[-1] in begun or not whole.isdisjoint(keys))


def components(one: np.ndarray, other: np.ndarray, size: int) -> np.ndarray:
    """The component of each of `size` nodes, of which `one` and `other` are linked in pairs, int32 (size,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(one), bool), (one, other)), (size, size))
    return connected_components(links, directed=False)[1]


def smallest_linked(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """For every name in `pairs` the smallest of the names that it is linked to, through others too."""
    names = sorted({name for pair in pairs for name in pair})
    places = {name: place for place, name in enumerate(names)}
    ends = np.array([[places[one], places[other]] for one, other in pairs], np.int64).reshape(-1, 2).T
    smallest: dict[int, str] = {}
    return {
        name: smallest.setdefault(part, name)
        for name, part in zip(names, components(ends[0], ends[1], len(names)).tolist(), strict=True)
    }


def split(
    rows: Iterable[list[Row]],
    eval_share: float = 0.05,
    test_share: float = 0.0,
    group_by: str = "",
    together: Iterable[tuple[str, str]] = (),
) -> dict[str, Table]:
    """Tables of train, eval and test rows. Plain text asks no question, so none of it goes to the test split.

    A share of a row or more whose split would be empty takes the nearest question or document that has up to twice as
    many rows; train is never empty. group_by: a column whose equal values stay together (among the row's other columns,
    or "source", "file"). together: pairs of row ids that must not be parted, such as near-duplicates. Raises
    TunebookError for a column of no row.
    """
    table = rows if isinstance(rows, Table) else Table.collect(rows)
    questions, linked, found = Questions(table), list(together), not group_by or not len(table)
    near = {name for pair in linked for name in pair}
    for row in table.rows() if group_by or near else ():
        value = group_value(row, group_by)
        found |= value is not None
        if value is None and row["id"] not in near:
            continue
        question = questions.key(row)
        linked += [(row["id"], value or question)] if row["id"] in near else []
        linked += [(question, value)] if value is not None and question[0] != " " and question != row["id"] else []
    if not found:
        columns = ", ".join(sorted(next(table.rows())["meta"])) or "none"
        raise TunebookError(f"No row has the column {group_by!r} that group_by names; the other columns are {columns}.")
    keys, moved, shares = smallest_linked(linked), dict[str, str](), {"eval": eval_share, "test": test_share}

    def key(row: Row) -> str:
        name = row["id"] if row["id"] in keys else group_value(row, group_by) or questions.key(row)
        return keys.get(name, name)

    def divided() -> dict[str, Table]:
        tables = {name: Table() for name in SPLITS}
        for row in table.rows():
            name = key(row)
            place = moved.get(name) or split_of(name, eval_share, 0.0 if row["kind"] == "text" else test_share)
            tables[place].append([row])
        return {name: part.close() for name, part in tables.items()}

    tables = divided()
    for name, share in shares.items():
        if share * len(table) >= 1 and not len(tables[name]):
            sizes = Counter(key(row) for row in tables["train"].rows() if name == "eval" or row["kind"] != "text")
            fit = [one for one, size in sizes.items() if size <= 2 * share * len(table) and len(sizes) > 1]
            moved |= dict.fromkeys(sorted(fit, key=place_of, reverse=name == "eval")[:1], name)
    tables = divided() if moved else tables
    return (
        tables if len(tables["train"]) else {**tables, "train": table, "eval": Table().close(), "test": Table().close()}
    )


def group_value(row: Mapping[str, Any], column: str) -> str | None:
    """The row's group as a key that sorts before every id, so that a group keeps its place whatever rows join it."""
    value = row["meta"].get(column, row.get(column) if column in ("source", "file") else None) if column else None
    return None if value is None else " " + json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
