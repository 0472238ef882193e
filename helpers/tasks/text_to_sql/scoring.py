"""Text-to-SQL by execution: run the model's query and the reference on the same read-only database and compare.

Order counts only under the reference's ORDER BY. Empty equals empty is free credit (49 % of WikiSQL's references return
nothing), so accuracy on references that return rows is reported apart. Where only CREATE TABLE is known, the databases
are made up (made_up_database.py) and agreement on all of them counts.

Beside execution stands a stricter look, `same_structure`: do two queries say the same, whatever they return.
"""

from __future__ import annotations

import functools
import logging
import re
import sqlite3
from collections.abc import Sequence
from typing import Any

from helpers.errors import TunebookError
from helpers.tasks.text_to_sql import sqlite

SHOWN_ROWS, SHOWN_CHARS = 10, 200
LIMITS: dict[str, Any] = {"max_rows": 10_000, "max_steps": 5_000_000, "timeout_s": 5.0}  # 5 million steps: 0.25 s
_VERBS = (
    r"(?:SELECT|WITH|VALUES|INSERT|UPDATE|DELETE|DROP|CREATE|ALTER|ATTACH|DETACH|PRAGMA|REPLACE|VACUUM|EXPLAIN|BEGIN"
    r"|REINDEX|ANALYZE)"
)
#: Why an answer is not right, from worst to nearest. "timeout" and "too_large" are limits of the read-only executor.
ERROR_KINDS = {
    "empty": "no answer",
    "no_sql": "no query in the answer",
    "unfinished": "cut off before the end of its turn",
    "syntax": "not SQL this database can parse",
    "unknown_table": "a table that does not exist",
    "unknown_column": "a column that does not exist",
    "forbidden": "writes, attaches or changes settings",
    "timeout": "stopped at the step or time limit",
    "too_large": "returned too many rows",
    "runtime": "failed while running",
    "wrong_columns": "another number of columns",
    "wrong_order": "right rows in the wrong order",
    "wrong_count": "another number of rows",
    "wrong_values": "right shape, other values",
}
_KINDS = {"denied": "forbidden", "statements": "syntax", "steps": "timeout", "rows": "too_large", "size": "too_large"}


def extract(text: str) -> str | None:
    """The query in an answer: a fenced block, else from the first SQL verb at the start of a line or sentence, if any.

    Generous on purpose: a base model that explains its query is not failed for the explanation.
    """
    fenced = re.search(r"```[a-zA-Z]*\s*\n?(.*?)(?:```|\Z)", text, re.DOTALL)
    body = fenced.group(1) if fenced and re.search(rf"\b{_VERBS}\b", fenced.group(1), re.IGNORECASE) else text
    body = body.replace("```", " ").strip().removeprefix("sqlite").removeprefix("sql").strip()
    start = re.match(rf"\(*\s*{_VERBS}\b", body, re.IGNORECASE) or re.search(
        r"\bSELECT\b[^.]*?\bFROM\b|^[ \t]*WITH\s+\w+\s+AS\b|\bSELECT\s", body, re.IGNORECASE | re.DOTALL | re.MULTILINE
    )
    if not start:
        return None
    query = body[start.start() :]
    for match in re.finditer(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/|;", query, re.DOTALL):
        if match.group() == ";":  # the first one outside quotes and comments
            query = query[: match.start()]
            break
    return query.strip().split("\n\n")[0].strip() or None


class Judge:
    """Scores answers against reference queries on one or more connections of `sqlite.open_readonly`.

    Reference answers are computed once. A reference that fails is the data's fault: its items have no score.
    """

    def __init__(self, connections: Sequence[sqlite3.Connection]):
        if not connections:
            raise TunebookError(
                "There is no database to run queries on; set database in notebook 01, or give CREATE TABLE in prompts."
            )
        self.connections = list(connections)
        self._gold: dict[str, list[sqlite.Result]] = {}

    def close(self) -> None:
        for connection in self.connections:
            connection.close()

    def gold(self, reference: str) -> list[sqlite.Result]:
        if reference not in self._gold:
            self._gold[reference] = [sqlite.execute(c, reference, **LIMITS) for c in self.connections]
        return self._gold[reference]

    def nonempty(self, reference: str) -> bool:
        """Whether the reference returns at least one row with a value in it."""
        return any(value is not None for result in self.gold(reference) for row in result.rows for value in row)

    def score(self, text: str, reference: str, stopped: bool = True) -> dict[str, Any]:
        """What answers.jsonl says of an answer: sql, score, valid, error, detail, structural, result."""
        entry: dict[str, Any] = {"sql": None, "score": 0.0, "valid": False, "error": "", "detail": ""}
        entry |= {"structural": False, "result": None}
        gold = self.gold(reference)
        if failed := next((r for r in gold if not r.ok), None):
            detail = f"the reference itself fails: {failed.error[:SHOWN_CHARS]}"
            return {**entry, "score": None, "valid": None, "detail": detail}
        if not text.strip():
            return {**entry, "error": "empty", "detail": "the answer is empty"}
        query = extract(text)
        if query is None:
            return {**entry, "error": "no_sql", "detail": "no query was found in the answer"}
        entry["sql"] = query
        found = [sqlite.execute(c, query, **LIMITS) for c in self.connections]
        if bad := next((r for r in found if not r.ok), None):
            kind = _error_kind(bad)
            kind = "unfinished" if kind == "syntax" and not stopped else kind
            return {**entry, "error": kind, "detail": bad.error[:SHOWN_CHARS]}
        entry |= {"valid": True, "result": shown(found[0]), "structural": same_structure(query, reference)}
        for mine, theirs in zip(found, gold, strict=True):
            if not sqlite.same_answer(reference, theirs.rows, mine.rows):
                kind, detail = _difference(mine, theirs)
                return {**entry, "error": kind, "detail": detail}
        return {**entry, "score": 1.0}


def _error_kind(result: sqlite.Result) -> str:
    if result.kind == "schema" and "no such table" in result.error:
        return "unknown_table"
    if result.kind == "schema" and "column" in result.error:
        return "unknown_column"
    return result.kind if result.kind in ERROR_KINDS else _KINDS.get(result.kind, "runtime")


def _difference(mine: sqlite.Result, gold: sqlite.Result) -> tuple[str, str]:
    rows, columns = (
        f"{n} {what}{'s' * (n != 1)}" for n, what in ((len(mine.rows), "row"), (len(mine.columns), "column"))
    )
    if len(mine.columns) != len(gold.columns):
        return "wrong_columns", f"{columns} instead of {len(gold.columns)}"
    if sqlite.same_answer("", gold.rows, mine.rows):
        return "wrong_order", "the rows are right, their order is not"
    if len(mine.rows) != len(gold.rows):
        return "wrong_count", f"{rows} instead of {len(gold.rows)}"
    return "wrong_values", f"{rows} as expected, with other values"


def shown(result: sqlite.Result) -> dict[str, Any] | None:
    """A result small enough to show: ten rows, long cells cut, bytes described. None for a query that failed."""

    def cell(value: Any) -> Any:
        if isinstance(value, bytes):
            return f"{len(value)} bytes"
        if isinstance(value, float) and (value != value or abs(value) == float("inf")):
            return str(value)
        return value[:SHOWN_CHARS] if isinstance(value, str) else value

    if not result.ok:
        return None
    return {
        "columns": [c[:SHOWN_CHARS] for c in result.columns[:20]],
        "count": len(result.rows),
        "rows": [[cell(v) for v in row[:20]] for row in result.rows[:SHOWN_ROWS]],
    }


# ---------------------------------------------------------------- the same query in other words


def same_structure(query: str, reference: str) -> bool | None:
    """Whether both have one canonical form; None when the reference cannot be parsed."""
    gold = canonical(reference)
    return None if gold is None else canonical(query) == gold


@functools.lru_cache(maxsize=8192)
def canonical(query: str) -> str | None:
    """The canonical text of one query, None when sqlglot cannot parse it.

    Names lose their case and quotes, table aliases become table names, output aliases go, sqlglot's `simplify` puts the
    operands of AND, OR and comparisons in order. It misses rewrites: a match means much, a mismatch little.
    """
    import sqlglot
    from sqlglot.errors import SqlglotError
    from sqlglot.optimizer.simplify import simplify

    logging.getLogger("sqlglot").setLevel(logging.ERROR)
    if len(query) > 20_000:
        return None
    try:
        return simplify(_plain_names(sqlglot.parse_one(query, read="sqlite"))).sql(dialect="sqlite", comments=False)
    except (SqlglotError, RecursionError, ValueError, AttributeError, TypeError):
        return None


def _plain_names(tree: Any) -> Any:
    from sqlglot import exp

    tables = list(tree.find_all(exp.Table))
    names = [t.name.lower() for t in tables]
    real = {t.alias.lower(): t.name.lower() for t in tables if t.alias and names.count(t.name.lower()) == 1}
    for table in tables:
        if table.alias.lower() in real:
            table.set("alias", None)
    for identifier in tree.find_all(exp.Identifier):
        identifier.set("quoted", False)
        identifier.set("this", identifier.this.lower())
    columns = list(tree.find_all(exp.Column))
    for column in columns:
        if column.table:
            one = len(tables) == 1
            column.set("table", None if one else exp.to_identifier(real.get(column.table, column.table)))
    used = {c.name for c in columns if not isinstance(c.parent, exp.Alias)}  # dropping these would change the query
    for select in tree.find_all(exp.Select):
        shown = [e.this if isinstance(e, exp.Alias) and e.alias not in used else e for e in select.expressions]
        select.set("expressions", shown)
    for ordered in tree.find_all(exp.Ordered):
        ordered.set("nulls_first", None)
        ordered.set("desc", ordered.args.get("desc") or None)
    for join in tree.find_all(exp.Join):
        if (join.kind or "").upper() == "INNER":
            join.set("kind", None)
    return tree
