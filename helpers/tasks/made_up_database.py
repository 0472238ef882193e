"""Databases for questions that come with CREATE TABLE and no data: seeded, small, holding what the reference looks for.

Each column gets the literals that the reference compares it with, their near neighbours, and other values of its type:
the reference returns rows on some database and a wrong query differs on some. Agreement on all of them is necessary for
being right, not proof of it (Zhong et al. 2020, https://arxiv.org/abs/2010.02840).
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from typing import Any

from helpers.errors import TunebookError
from helpers.tasks import extraction, text_to_sql
from helpers.tasks.questions import CREATE_TABLE
from helpers.tasks.sqlite_reader import Database

DATABASES, ROWS, ATTEMPTS = 4, 24, 6
_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "iris", "juniper")
_NUMERIC = ("INT", "REAL", "FLOA", "DOUB", "NUM", "DEC", "BOOL")
Tables = dict[str, dict[str, str]]  # table → column → declared type


def databases(schema: str, reference: str, seed: int = 17, count: int = DATABASES) -> list[Database]:
    """`count` databases in memory with the same fences as a file opened read-only.

    One that the reference finds empty is drawn anew a few times. Raises TunebookError when the schema cannot be read.
    """
    tables, reference = parse(schema), extraction.query(reference)
    wanted = literals(reference, tables)
    made = []
    for number in range(count):
        for attempt in range(ATTEMPTS):
            database = _build(tables, wanted, random.Random(f"{seed}/{number}/{attempt}"))
            if attempt == ATTEMPTS - 1 or text_to_sql.execute(database, reference, max_steps=500_000).rows:
                break
        made.append(database)
    return made


def parse(schema: str) -> Tables:
    """The tables of the CREATE TABLE statements in a text, each column with its declared type, which decides in SQLite
    how its values are kept and compared (https://www.sqlite.org/datatype3.html)."""
    from sqlglot import exp

    found: Tables = {}
    for match in CREATE_TABLE.finditer(schema):
        depth, end = 0, match.end()
        for end in range(match.end(), len(schema)):
            depth += (schema[end] == "(") - (schema[end] == ")")
            if schema[end] == ")" and depth == 0:
                break
        tree = text_to_sql.parsed(schema[match.start() : end + 1])
        if not isinstance(tree, exp.Create) or not isinstance(tree.this, exp.Schema):
            continue
        kinds = {c.name: c.args.get("kind") for c in tree.this.find_all(exp.ColumnDef)}
        columns = {name: kind.sql(dialect="sqlite") if kind else "" for name, kind in kinds.items()}
        columns = columns or {i.name: "" for i in tree.this.expressions if isinstance(i, exp.Identifier)}
        if columns:
            found[tree.this.this.name] = columns
    if not found:
        seen = f"No CREATE TABLE could be read in {schema[:80]!r}"
        raise TunebookError(f"{seen}; without tables no query can be run. Mend the schema.")
    return found


def literals(reference: str, tables: Tables) -> dict[str, list[Any]]:
    """{column in lower case: values that the reference compares it with}; "" holds literals beside no column."""
    from sqlglot import exp

    found: dict[str, list[Any]] = defaultdict(list)
    tree = text_to_sql.parsed(reference)
    if tree is None:
        return found
    for literal in tree.find_all(exp.Literal):
        place = literal.find_ancestor(exp.Binary, exp.In, exp.Between, exp.Select, exp.Limit, exp.Offset)
        if place is None or isinstance(place, (exp.Limit, exp.Offset)):
            continue
        column = None if isinstance(place, exp.Select) else place.find(exp.Column)
        value: Any = literal.this.strip("%")
        if not literal.is_string:
            value = float(value) if any(c in value for c in ".eE") else int(value)
        found[column.name.lower() if column else ""].append(value)
    known = {name.lower() for columns in tables.values() for name in columns}
    for column in tree.find_all(exp.Column):
        # "Double quotes" around what is not a column are text to SQLite.
        if isinstance(column.this, exp.Identifier) and column.this.quoted and column.name.lower() not in known:
            near = column.parent.find_all(exp.Column) if column.parent else ()
            beside = next((c for c in near if c is not column), None)
            found[beside.name.lower() if beside else ""].append(column.name)
    return found


def _build(tables: Tables, wanted: dict[str, list[Any]], rng: random.Random) -> Database:
    told = []
    shared = [rng.choice(_WORDS) + str(i % 7) for i in range(8)]  # one pool of text, so that joins meet
    for table, columns in tables.items():
        types = {column: re.sub(r"[^\w ,()]", "", kind) for column, kind in columns.items()}
        names = ", ".join(f"{text_to_sql.quote(column)} {kind}" for column, kind in types.items())
        rows = [_row(columns, wanted, shared, rng) for _ in range(rng.randint(ROWS // 2, ROWS))]
        name = text_to_sql.quote(table)
        insert = f"INSERT INTO {name} VALUES ({', '.join('?' * len(columns))})"
        told.append([f"CREATE TABLE {name} ({names})", insert, rows])
    return Database({"tables": told})


def _row(columns: dict[str, str], wanted: dict[str, list[Any]], shared: list[str], rng: random.Random) -> list[Any]:
    hit = rng.random() < 0.4  # a row that answers the whole WHERE clause, so that conditions meet in one place
    row: list[Any] = []
    for name, kind in ((column.lower(), kind) for column, kind in columns.items()):
        values = wanted.get(name)
        if values and (hit or rng.random() < 0.35):
            value = rng.choice(values)
            if isinstance(value, (int, float)) and rng.random() < 0.6:
                value += rng.choice((-1, 1)) * rng.choice((1, 2, 5))
        elif name == "id" or name.endswith("_id"):
            value = rng.randint(1, 12)
        else:
            number = any(word in kind.upper() for word in _NUMERIC)
            value = rng.randint(0, 100) if number else rng.choice(shared)
        row.append(None if rng.random() < 0.03 else value)
    return row
