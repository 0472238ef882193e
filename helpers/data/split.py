"""Splits by content: where a row lands depends on the row alone, so it lands there again next year and in every job.

A key (the row's id, or its group: the value of a column that the user names) is hashed to a number between 0 and 1; the
test split takes the lowest, the eval split the highest, training what lies between. Near-duplicates share one key: that
of a group among them, else the smallest id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from helpers.data.tables import Table
from helpers.data.turns import Row
from helpers.errors import TunebookError

SPLITS = ("train", "eval", "test")


def split_of(key: str, eval_share: float, test_share: float) -> str:
    """The split of a key, the same on every machine."""
    digest = hashlib.sha256(f"split:{key}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    return "test" if place < test_share else "eval" if place >= 1 - eval_share else "train"


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

    group_by: a column whose equal values stay together (among the row's other columns, or "source", "file"). together:
    pairs of row ids that must not be parted, such as near-duplicates. Raises TunebookError for a column of no row.
    """
    table = rows if isinstance(rows, Table) else Table.collect(rows)
    linked, found = list(together), not group_by or not len(table)
    near = {name for pair in linked for name in pair}
    for row in table.rows() if group_by else ():
        value = group_value(row, group_by)
        found |= value is not None
        if value is not None and row["id"] in near:
            linked.append((row["id"], value))
    if not found:
        columns = ", ".join(sorted(next(table.rows())["meta"])) or "none"
        raise TunebookError(f"No row has the column {group_by!r} that group_by names; the other columns are {columns}.")
    keys, tables = smallest_linked(linked), {name: Table() for name in SPLITS}
    for row in table.rows():
        name = row["id"] if row["id"] in keys else group_value(row, group_by) or row["id"]
        asked = 0.0 if row["kind"] == "text" else test_share
        tables[split_of(keys.get(name, name), eval_share, asked)].append([row])
    return {name: part.close() for name, part in tables.items()}


def pairs_of(table: Table, groups: np.ndarray) -> list[tuple[str, str]]:
    """Pairs of row ids to keep together, from the position of the first row of every row's group, int32 (rows,)."""
    others = np.flatnonzero(groups != np.arange(len(groups)))
    wanted = set(others.tolist()) | set(groups[others].tolist())
    ids = {at: row["id"] for at, row in enumerate(table.rows()) if at in wanted}
    return [(ids[first], ids[at]) for at, first in zip(others.tolist(), groups[others].tolist(), strict=True)]


def group_value(row: Mapping[str, Any], column: str) -> str | None:
    """The row's group as a key that sorts before every id, so that a group keeps its place whatever rows join it."""
    value = row["meta"].get(column, row.get(column) if column in ("source", "file") else None) if column else None
    return None if value is None else " " + json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
