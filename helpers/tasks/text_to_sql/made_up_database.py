"""Databases for questions that come with CREATE TABLE and no data: seeded, small, holding what the reference looks for.

Each column gets the literals that the reference compares it with, their near neighbours, and other values of its type, so that
the reference returns rows on some database and a wrong query differs on some. Agreement on all of them is "execution
agreement": necessary for being right, not proof of it (Zhong et al. 2020, https://arxiv.org/abs/2010.02840).
"""

from __future__ import annotations

import random
import sqlite3
from typing import Any

from helpers.errors import TunebookError
from helpers.tasks.text_to_sql import sqlite as readonly

DATABASES, ROWS = 4, 24
_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "iris", "juniper")


def databases(schema: str, reference: str, seed: int = 17, count: int = DATABASES) -> list[sqlite3.Connection]:
    """`count` in-memory connections with the same fences as a file opened read-only. The first that a reference finds empty is drawn anew
    a few times. Raises TunebookError when the schema cannot be read."""
    tables = parse(schema)
    wanted = literals(reference, tables)
    made = []
    for number in range(count):
        for attempt in range(6):
            connection = _build(tables, wanted, random.Random(f"{seed}/{number}/{attempt}"))
            if readonly.execute(connection, reference, max_steps=500_000).rows or attempt == 5:
                break
            connection.close()
        made.append(connection)
    return made


def parse(schema: str) -> dict[str, dict[str, str]]:
    """{table: {column: "number" | "text"}} of the CREATE TABLE statements in a text."""
    import sqlglot
    from sqlglot import errors, exp

    found: dict[str, dict[str, str]] = {}
    for statement in _statements(schema):
        try:
            tree = sqlglot.parse_one(statement, read="sqlite")
        except (errors.SqlglotError, RecursionError):
            continue
        if not isinstance(tree, exp.Create) or not isinstance(tree.this, exp.Schema):
            continue
        columns = {d.name: _type(d) for d in tree.this.find_all(exp.ColumnDef)}
        columns = columns or {i.name: "text" for i in tree.this.expressions if isinstance(i, exp.Identifier)}
        if columns:
            found[tree.this.this.name] = columns
    if not found:
        raise TunebookError(
            f"No CREATE TABLE could be read in {schema[:80]!r}; without tables no query can be run. Mend the row's schema."
        )
    return found


def _statements(text: str) -> list[str]:
    import re

    found = []
    for match in re.finditer(r"\bCREATE\s+(?:TEMP\w*\s+)?TABLE\b", text, re.IGNORECASE):
        depth, end = 0, None
        for at in range(match.start(), len(text)):
            depth += (text[at] == "(") - (text[at] == ")")
            if depth == 0 and text[at] == ")":
                end = at + 1
                break
        if end:
            found.append(text[match.start() : end])
    return found


def _type(definition: Any) -> str:
    kind = definition.args.get("kind")
    name = kind.sql(dialect="sqlite").upper() if kind is not None else ""
    return "number" if any(w in name for w in ("INT", "REAL", "FLOA", "DOUB", "NUM", "DEC", "BOOL")) else "text"


def literals(reference: str, tables: dict[str, dict[str, str]]) -> dict[str, list[Any]]:
    """{column in lower case: values that the reference compares it with}; "" holds literals that stand beside no column."""
    import sqlglot
    from sqlglot import errors, exp

    found: dict[str, list[Any]] = {}
    try:
        tree = sqlglot.parse_one(reference, read="sqlite")
    except (errors.SqlglotError, RecursionError):
        return found
    for literal in tree.find_all(exp.Literal):
        parent = literal.parent
        while parent is not None and not isinstance(
            parent, (exp.Binary, exp.In, exp.Between, exp.Select, exp.Limit, exp.Offset)
        ):
            parent = parent.parent
        if parent is None or isinstance(parent, (exp.Limit, exp.Offset)):
            continue
        column = next(iter(parent.find_all(exp.Column)), None) if not isinstance(parent, exp.Select) else None
        text = literal.this.strip("%") if literal.is_string else literal.this
        value: Any = text if literal.is_string else _number(text)
        found.setdefault(column.name.lower() if column is not None else "", []).append(value)
    for column in tree.find_all(exp.Column):  # "double quotes" that are no column are text to SQLite
        quoted = isinstance(column.this, exp.Identifier) and column.this.quoted
        if quoted and not any(column.name.lower() == c.lower() for t in tables.values() for c in t):
            beside = (
                next((c for c in column.parent.find_all(exp.Column) if c is not column), None)
                if column.parent is not None
                else None
            )
            found.setdefault(beside.name.lower() if beside is not None else "", []).append(column.name)
    return found


def _number(text: str) -> float | int:
    return float(text) if any(c in text for c in ".eE") else int(text)


def _build(tables: dict[str, dict[str, str]], wanted: dict[str, list[Any]], rng: random.Random) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    shared = [rng.choice(_WORDS) + str(i % 7) for i in range(8)]  # one pool of text, so that joins meet
    for table, columns in tables.items():
        names = ", ".join(_quote(c) + (" NUMERIC" if k == "number" else "") for c, k in columns.items())
        connection.execute(f"CREATE TABLE {_quote(table)} ({names})")
        rows = [_row(columns, wanted, shared, rng) for _ in range(rng.randint(ROWS // 2, ROWS))]
        connection.executemany(f"INSERT INTO {_quote(table)} VALUES ({', '.join('?' * len(columns))})", rows)
    return readonly.fence(connection)


def _row(columns: dict[str, str], wanted: dict[str, list[Any]], shared: list[str], rng: random.Random) -> list[Any]:
    hit = rng.random() < 0.4  # a row that answers the whole WHERE clause, so that conditions meet in one place
    row = []
    for column, kind in columns.items():
        values = wanted.get(column.lower(), [])
        if values and (hit or rng.random() < 0.35):
            value = rng.choice(values)
            if isinstance(value, (int, float)) and rng.random() < 0.6:
                value += rng.choice((-1, 1)) * rng.choice((1, 2, 5))
        elif kind == "number" or column.lower() == "id" or column.lower().endswith("_id"):
            value = (
                rng.randint(1, 12) if column.lower() == "id" or column.lower().endswith("_id") else rng.randint(0, 100)
            )
        else:
            value = rng.choice(shared)
        row.append(None if rng.random() < 0.03 else value)
    return row


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
