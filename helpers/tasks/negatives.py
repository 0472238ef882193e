"""Rejected queries for preference pairs: queries that were run and answer wrongly, not ones that merely look different.

Proposals come from any function or from small mistakes planted in the gold query; each is executed on a read-only
connection with limits. What answers like the gold query is no mistake and is never rejected.
"""

from __future__ import annotations

import difflib
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError
from helpers.tasks import text_to_sql

Proposals = Callable[[str, random.Random], Iterable[str]]  # a gold query → queries that may be wrong
MAX_PROPOSALS = 24


class NoMistake(Exception):
    """Why there is no rejected query, as (reason, detail)."""


def rejected(
    conn: sqlite3.Connection, gold: str, proposals: Proposals, rng: random.Random, **limits: Any
) -> tuple[str, str]:
    """(a wrong query near `gold`, what is wrong with it). Raises NoMistake where there is none.

    One of the five nearest to gold (always the nearest would teach a single kind of mistake): of those that return
    rows where there are such, else of those that return none, which is easier to see, else of those that fail.
    """
    truth = text_to_sql.execute(conn, gold, **limits)
    if not truth.ok:
        raise NoMistake("the right query does not run", f"{truth.kind}: {truth.error}")
    tried, seen = [], {" ".join(gold.split())}
    for query in islice(proposals(gold, rng), MAX_PROPOSALS):
        query = query.strip().rstrip(";").strip()
        if not query or " ".join(query.split()) in seen:
            continue
        seen.add(" ".join(query.split()))
        result = text_to_sql.execute(conn, query, **limits)
        if not result.ok:
            rank, why = 2, f"it fails ({result.kind}: {result.error})"
        elif not text_to_sql.same_answer(gold, truth.rows, result.rows):
            rank, why = (0 if result.rows else 1), _difference(truth.rows, result.rows)
        else:
            continue
        alike = difflib.SequenceMatcher(None, gold.split(), query.split(), autojunk=False).ratio()
        tried.append((rank, round(1 - alike, 4), query, why))
    if not tried:
        raise NoMistake("no wrong candidate", gold)
    best = min(tried)[0]
    return rng.choice(sorted(entry for entry in tried if entry[0] == best)[:5])[2:]


def _difference(right: list[tuple], wrong: list[tuple]) -> str:
    if len(right) != len(wrong):
        return f"it gives {len(wrong)} rows instead of {len(right)}"
    here, there = next((a, b) for a, b in zip(right, wrong, strict=True) if a != b)
    return f"it gives {str(there)[:80]} instead of {str(here)[:80]}"


def planted_mistakes(database: str | Path) -> Proposals:
    """Proposals made from a gold query: another aggregate, comparison, column, value, direction, join, no condition.

    Raises TunebookError when the database cannot be read.
    """
    conn = text_to_sql.open_readonly(database)
    try:
        conn.set_authorizer(None)
        tables = [name for (name,) in conn.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
        columns = {
            t.lower(): [c[1] for c in conn.execute(f"PRAGMA table_info({text_to_sql.quote(t)})")] for t in tables
        }
    finally:
        conn.close()
    if not columns:
        raise TunebookError(f"The database {database} has no table; name the one that the queries were written for.")

    def propose(gold: str, rng: random.Random) -> Iterator[str]:
        import sqlglot
        from sqlglot.errors import SqlglotError

        try:
            tree = sqlglot.parse_one(gold, read="sqlite")
        except (SqlglotError, RecursionError):
            return
        made = [_changed(tree, node, new) for node, new in _mistakes(tree, columns, rng)]
        rng.shuffle(made)
        yield from made

    return propose


def _changed(tree: Any, node: Any, new: Any) -> str:
    """The query with one node replaced (new=None: taken out)."""
    if node is tree:
        return new.sql("sqlite")
    copy = tree.copy()
    twin = next(other for one, other in zip(tree.walk(), copy.walk(), strict=True) if one is node)
    if new is None:
        twin.pop()
    else:
        twin.replace(new.copy())
    return copy.sql("sqlite")


def _mistakes(tree: Any, columns: dict[str, list[str]], rng: random.Random) -> Iterator[tuple[Any, Any]]:
    """(node, what stands there instead; None: nothing)."""
    from sqlglot import exp

    def like(node: Any, kind: Any) -> Any:
        return kind(this=node.this.copy(), expression=node.expression.copy())

    def without(node: Any, setting: str, value: Any) -> Any:
        copy = node.copy()
        copy.set(setting, value)
        return copy

    tables = {t.name.lower() for t in tree.find_all(exp.Table)}
    names = sorted({c for t in tables for c in columns.get(t, [])})
    aggregates = [exp.Count, exp.Sum, exp.Avg, exp.Max, exp.Min]
    comparisons = [exp.GT, exp.LT, exp.GTE, exp.LTE]
    for node in list(tree.walk()):
        if type(node) in aggregates and not isinstance(node.this, (exp.Star, exp.Distinct)):
            yield from ((node, kind(this=node.this.copy())) for kind in aggregates if kind is not type(node))
        elif isinstance(node, exp.Count) and isinstance(node.this, exp.Distinct):
            yield node, exp.Count(this=node.this.expressions[0].copy())
        elif type(node) in comparisons:
            yield from ((node, like(node, kind)) for kind in comparisons if kind is not type(node))
        elif isinstance(node, exp.EQ) and not isinstance(node.parent, exp.Join):
            yield node, like(node, exp.NEQ)
        elif isinstance(node, exp.And):
            yield from ((node, node.this), (node, node.expression), (node, like(node, exp.Or)))
        elif isinstance(node, exp.Or):
            yield node, like(node, exp.And)
        elif isinstance(node, exp.Ordered):
            yield node, without(node, "desc", not node.args.get("desc"))
        elif isinstance(node, (exp.Where, exp.Having, exp.Limit, exp.Order, exp.Distinct)):
            if isinstance(node.parent, exp.Select):
                yield node, None
        elif isinstance(node, exp.Join) and node.args.get("side") == "LEFT":
            yield node, without(node, "side", None)
        elif isinstance(node, exp.Column) and len(names) > 1:
            others = [c for c in names if c.lower() != node.name.lower()]
            for other in rng.sample(others, min(2, len(others))):
                yield node, exp.column(other, table=node.table or None)
        elif isinstance(node, exp.Literal) and not node.is_string and not isinstance(node.parent, exp.Limit):
            number = int(node.this) if node.this.isdigit() else float(node.this)
            yield node, exp.Literal.number(number * 10)
            yield node, exp.Literal.number(number + 1)
