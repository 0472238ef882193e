"""Text-to-SQL by execution: run SQL that nobody has read, and compare what it answers with the reference's answer.

It runs in `sqlite_reader`'s child. Order counts only under the reference's ORDER BY. Empty equals empty is free credit
(49 % of WikiSQL's references return nothing), so accuracy on references that return rows is reported apart. Where only
CREATE TABLE is known, the databases are made up (made_up_database.py) and agreement on all of them counts.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from helpers.errors import TunebookError
from helpers.tasks import extraction
from helpers.tasks.sqlite_reader import Database, Result, execute, open_readonly, quote  # noqa: F401 - the judge's

SHOWN_ROWS, SHOWN_CHARS, SEVERAL = 10, 200, 8
Ties = list[tuple[list[tuple], int]]  # rows that tie, how many of them are taken
#: Why an answer is not right, from worst to nearest. "timeout" and "too_large" are limits of the read-only executor.
ERROR_KINDS = {
    "empty": "no answer",
    "no_sql": "no query in the answer",
    "several": "different queries, none of them called the answer",
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


def parsed(sql: str) -> Any:
    """A statement as sqlglot's tree; None when it cannot be read."""
    import sqlglot

    with suppress(sqlglot.errors.SqlglotError, RecursionError):
        return sqlglot.parse_one(sql, read="sqlite")


# ---------------------------------------------------------------- comparing answers


def same_answer(gold_sql: str, rows_a: list[tuple], rows_b: list[tuple], ties: Ties | None = None) -> bool:
    """Whether two row lists answer `gold_sql` alike: as multisets, in order only under a top-level ORDER BY.

    Floats are compared to twelve digits, near zero to 1e-9; 1 equals 1.0, text never equals a number. ties: what
    `tied_rows` found, whose groups may come in any order. Multisets as in Spider's test suite (Zhong et al. 2020,
    https://arxiv.org/abs/2010.02840).
    """
    if len(rows_a) != len(rows_b):
        return False
    if all(map(_close, rows_a, rows_b)) or (ties and _fits(rows_b, ties)):
        return True
    return not has_order(gold_sql) and all(map(_close, sorted(rows_a, key=_place), sorted(rows_b, key=_place)))


def _close(a: tuple, b: tuple) -> bool:
    def close(x: Any, y: Any) -> bool:
        if isinstance(x, (int, float)) and isinstance(y, (int, float)) and float in (type(x), type(y)):
            return math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-9)
        return type(x) is type(y) and x == y

    return len(a) == len(b) and all(map(close, a, b))


def _place(row: tuple) -> tuple:
    """Sorts rows so that those that differ in a float's last digits stand in the same place."""
    numbers = [value for value in row if isinstance(value, (int, float))]
    return [str(v) if type(v) in (str, bytes, type(None)) else "" for v in row], [f"{n:.6e}" for n in numbers], numbers


def _fits(rows: list[tuple], ties: Ties) -> bool:
    """Whether rows come group by group; of those that an OFFSET and a LIMIT may cut, any."""
    for group, taken in ties:
        part, rows = rows[:taken], rows[taken:]
        left = list(group)
        for row in part:
            if (found := next((i for i, one in enumerate(left) if _close(one, row)), None)) is None:
                return False
            del left[found]
        if not rows:
            return True
    return False


def tied_rows(connection: Database, sql: str, result: Result) -> Ties | None:
    """The rows of a query in groups with equal sort keys, whole whatever OFFSET and LIMIT cut, and how many of each the
    OFFSET leaves; None without an order, or where the keys cannot be had."""
    from sqlglot import exp

    tree = parsed(sql) if result.ok and has_order(sql) else None
    if not isinstance(tree, exp.Query) or not tree.args.get("order"):
        return None
    names, keys, width = [c.lower() for c in result.columns], list[int](), len(result.columns)
    offset, skipped = tree.args.get("offset"), 0
    if not offset or offset.expression.is_int:
        skipped = int(offset.expression.this) if offset else 0
        tree.set("limit", None)
        tree.set("offset", None)
    for term in (ordered.this for ordered in tree.args["order"].expressions):
        if isinstance(term, exp.Literal) and term.is_int:
            keys.append(int(term.this) - 1)
        elif isinstance(term, exp.Column) and not term.table and term.name.lower() in names:
            keys.append(names.index(term.name.lower()))
        elif isinstance(tree, exp.Select) and not tree.args.get("distinct"):
            tree.select(term.copy(), copy=False)
            keys.append(width)
            width += 1
        else:
            return None
    rows = execute(connection, tree.sql("sqlite")).rows
    ties: Ties = []
    for _, group in itertools.groupby(rows, key=lambda row: [row[key] for key in keys]):
        tied = [row[: len(names)] for row in group]
        gone = min(skipped, len(tied))
        skipped -= gone
        ties += [(tied, len(tied) - gone)] if gone < len(tied) else []
    return ties if _fits(result.rows, ties) else None


def has_order(sql: str) -> bool:
    """Whether the outermost query has an ORDER BY; those in subqueries, CTEs and windows order nothing."""
    import sqlglot
    from sqlglot.tokens import TokenType

    depth, outermost = 0, []
    with suppress(sqlglot.errors.TokenError):  # a comment that is left open
        for token in sqlglot.tokenize(sql, read="sqlite"):
            depth += (token.token_type == TokenType.L_PAREN) - (token.token_type == TokenType.R_PAREN)
            if depth == 0 and token.token_type not in (TokenType.IDENTIFIER, TokenType.STRING):
                outermost.append(token.text)
    return bool(re.search(r"\bORDER BY\b", " ".join(outermost), re.IGNORECASE))


def same_structure(query: str, reference: str) -> bool | None:
    """Whether both have one canonical form, whatever they return; None when the reference cannot be parsed."""
    gold = canonical(reference)
    return None if gold is None else canonical(query) == gold


def canonical(query: str) -> str | None:
    """The query without its table and output aliases, as sqlglot normalises and simplifies it; None for no SQL.

    It misses rewrites: a match means much, a mismatch little.
    """
    from sqlglot import exp
    from sqlglot.optimizer.normalize_identifiers import normalize_identifiers
    from sqlglot.optimizer.simplify import simplify

    if (tree := parsed(query)) is None:
        return None
    with suppress(RecursionError, ValueError, AttributeError, TypeError):  # what sqlglot cannot simplify
        tree = normalize_identifiers(tree, dialect="sqlite")
        tables, columns = list(tree.find_all(exp.Table)), list(tree.find_all(exp.Column))
        named = {t.alias_or_name: t.name for t in tables}
        used = {c.name for c in columns if not isinstance(c.parent, exp.Alias)}
        if len(set(named.values())) == len(tables):  # no table stands beside itself
            for table in tables:
                table.set("alias", None)
            for column in columns:
                name = column.table if len(tables) > 1 else ""
                column.set("table", exp.to_identifier(named.get(name, name)) if name else None)
        implied = ((exp.Identifier, "quoted", True), (exp.Ordered, "desc", False), (exp.Join, "kind", "INNER"))
        for kind, key, value in implied:
            for node in tree.find_all(kind):
                if node.args.get(key) == value:
                    node.set(key, None)
        for select in tree.find_all(exp.Select):
            select.set("expressions", [e if e.alias in used else e.unalias() for e in select.expressions])
        return simplify(tree).sql("sqlite", comments=False)
    return None


# ---------------------------------------------------------------- scoring answers


def extract(text: str) -> str | None:
    """The query in an answer, the first of several; None where there is none."""
    return next(iter(extraction.queries(extraction.without_thinking(text))), None)


class Judge:
    """Scores answers against reference queries on one or more databases of `open_readonly`.

    Reference answers are computed once. A reference that fails is the data's fault: its items have no score.
    """

    def __init__(self, connections: Sequence[Database]):
        if not connections:
            raise TunebookError(
                "There is no database to run queries on; set database in notebook 01, or give CREATE TABLE in prompts."
            )
        self.connections = list(connections)
        self._gold: dict[str, list[Result]] = {}
        self._read: dict[str, tuple[str, list[Ties | None]]] = {}  # each reference's query and its ties

    def close(self) -> None:
        for connection in self.connections:
            connection.close()

    def gold(self, reference: str) -> list[Result]:
        if reference not in self._gold:
            query = extraction.query(reference, self._compiles)
            self._gold[reference] = found = [execute(c, query) for c in self.connections]
            self._read[reference] = query, list(map(tied_rows, self.connections, [query] * len(found), found))
        return self._gold[reference]

    def _compiles(self, sql: str) -> bool:
        return execute(self.connections[0], f"EXPLAIN {sql}").ok

    def nonempty(self, reference: str) -> bool:
        """Whether the reference returns at least one row with a value in it."""
        return any(value is not None for result in self.gold(reference) for row in result.rows for value in row)

    def score(self, text: str, reference: str, stopped: bool = True) -> dict[str, Any]:
        """What answers.jsonl says of an answer: sql, score, valid, structural, error, detail, result."""
        entry: dict[str, Any] = {"sql": None, "score": 0.0, "valid": False, "structural": False, "result": None}
        entry |= {"error": "", "detail": ""}
        gold = self.gold(reference)
        if failed := next((r for r in gold if not r.ok), None):
            detail = f"the reference itself fails: {failed.error[:SHOWN_CHARS]}"
            return {**entry, "score": None, "valid": None, "structural": None, "detail": detail}
        if not (text := extraction.without_thinking(text)):
            kind, detail = ("empty", "the answer is empty") if stopped else ("unfinished", "cut off before an answer")
            return {**entry, "error": kind, "detail": detail}
        found = extraction.queries(text, self._compiles)
        if not found:
            return {**entry, "error": "no_sql", "detail": "no query was found in the answer"}
        judged = [self._judged(entry | {"sql": sql}, reference, stopped) for sql in found[:SEVERAL]]
        worst = min(judged, key=lambda one: one["score"])
        if worst["score"] < max(one["score"] for one in judged):
            return {**worst, "error": "several", "detail": f"{len(found)} different queries, not all of them right"}
        return worst

    def _judged(self, entry: dict[str, Any], reference: str, stopped: bool) -> dict[str, Any]:
        """The entry with what its query came to."""
        found = [execute(c, entry["sql"]) for c in self.connections]
        if bad := next((r for r in found if not r.ok), None):
            kind = "unfinished" if bad.kind == "syntax" and not stopped else bad.kind
            return {**entry, "error": kind, "detail": bad.error[:SHOWN_CHARS]}
        query, all_ties = self._read[reference]
        entry |= {"valid": True, "result": shown(found[0]), "structural": same_structure(entry["sql"], query)}
        for mine, theirs, ties in zip(found, self.gold(reference), all_ties, strict=True):
            if not same_answer(query, theirs.rows, mine.rows, ties):
                kind, detail = _difference(mine, theirs)
                return {**entry, "error": kind, "detail": detail}
        return {**entry, "score": 1.0}


def _difference(mine: Result, gold: Result) -> tuple[str, str]:
    if len(mine.columns) != len(gold.columns):
        return "wrong_columns", f"{len(mine.columns)} instead of {len(gold.columns)} columns"
    if same_answer("", gold.rows, mine.rows):
        return "wrong_order", "the rows are right, their order is not"
    if len(mine.rows) != len(gold.rows):
        return "wrong_count", f"{len(mine.rows)} instead of {len(gold.rows)} rows"
    return "wrong_values", "as many rows as expected, with other values"


def shown(result: Result) -> dict[str, Any] | None:
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
