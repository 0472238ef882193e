"""Text-to-SQL by execution: run the model's query and the reference on the same read-only database and compare the answers.

Order counts only under the reference's ORDER BY. Empty equals empty is free credit (49 % of WikiSQL's references return
nothing), so accuracy on references that return rows is reported apart. Where only CREATE TABLE is known, the databases
are synthetic (helpers/tasks/text_to_sql/made_up_database.py) and agreement on all of them counts.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from typing import Any

from helpers.errors import TunebookError
from helpers.tasks.text_to_sql import sqlite as readonly
from helpers.tasks.text_to_sql import structure

SHOWN_ROWS, SHOWN_CHARS = 10, 200
LIMITS = {"max_rows": 10_000, "max_steps": 5_000_000, "timeout_s": 5.0}  # 5 million steps are a quarter of a second
_VERBS = r"(?:SELECT|WITH|VALUES|INSERT|UPDATE|DELETE|DROP|CREATE|ALTER|ATTACH|DETACH|PRAGMA|REPLACE|VACUUM|EXPLAIN|BEGIN|REINDEX|ANALYZE)"
_KINDS = {
    "syntax": "syntax",
    "denied": "forbidden",
    "statements": "syntax",
    "parameters": "runtime",
    "steps": "timeout",
    "timeout": "timeout",
    "rows": "too_large",
    "size": "too_large",
    "error": "runtime",
}


def extract(text: str) -> str | None:
    """The query inside an answer: a fenced block, else from the first SQL verb at the start of a line or sentence; None if there is none.

    Generous on purpose, the same for every candidate: a base model that explains its query is not failed for the explanation.
    """
    fenced = re.search(r"```[a-zA-Z]*\s*\n?(.*?)(?:```|\Z)", text, re.DOTALL)
    body = fenced.group(1) if fenced and re.search(rf"\b{_VERBS}\b", fenced.group(1), re.IGNORECASE) else text
    body = body.replace("```", " ").strip().removeprefix("sqlite").removeprefix("sql").strip()
    start = re.match(rf"\(*\s*{_VERBS}\b", body, re.IGNORECASE) or re.search(
        r"\bSELECT\b[^.]*?\bFROM\b|^[ \t]*WITH\s+\w+\s+AS\b|\bSELECT\s", body, re.IGNORECASE | re.DOTALL | re.MULTILINE
    )
    if not start:
        return None
    query = _first_statement(body[start.start() :])
    return query.split("\n\n")[0].strip() or None


def _first_statement(text: str) -> str:
    """Up to the first semicolon outside quotes and comments."""
    for match in re.finditer(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/|;", text, re.DOTALL):
        if match.group() == ";":
            return text[: match.start()].strip()
    return text.strip()


class Judge:
    """Scores answers against reference queries on one or more connections of `helpers.tasks.text_to_sql.sqlite.open_readonly`.

    Reference answers are computed once. A reference that fails is the data's fault and is named at once.
    """

    def __init__(self, connections: Sequence[sqlite3.Connection]):
        if not connections:
            raise TunebookError(
                "There is no database to run queries on; set database in notebook 01, or give CREATE TABLE in the prompts."
            )
        self.connections = list(connections)
        self._gold: dict[str, list[readonly.Result]] = {}

    def close(self) -> None:
        for connection in self.connections:
            connection.close()

    def gold(self, reference: str) -> list[readonly.Result]:
        if reference not in self._gold:
            self._gold[reference] = [readonly.execute(c, reference, **LIMITS) for c in self.connections]
        return self._gold[reference]

    def nonempty(self, reference: str) -> bool:
        """Whether the reference returns at least one row with a value in it."""
        return any(r.ok and any(v is not None for row in r.rows for v in row) for r in self.gold(reference))

    def score(self, text: str, reference: str, stopped: bool = True) -> dict[str, Any]:
        """An answer's entry in answers.jsonl (without tokens): text, sql, score, valid, error, detail, structural, stopped, result."""
        entry = {
            "text": text,
            "sql": None,
            "score": 0.0,
            "valid": False,
            "error": "",
            "detail": "",
            "structural": False,
            "stopped": stopped,
            "result": None,
        }
        gold = self.gold(reference)
        if failed := next((r for r in gold if not r.ok), None):
            return {
                **entry,
                "score": None,
                "valid": None,
                "detail": f"the reference itself fails: {failed.error[:SHOWN_CHARS]}",
            }
        if not text.strip():
            return {**entry, "error": "empty", "detail": "the answer is empty"}
        query = extract(text)
        if query is None:
            return {**entry, "error": "no_sql", "detail": "no query was found in the answer"}
        entry["sql"] = query
        found = [readonly.execute(c, query, **LIMITS) for c in self.connections]
        bad = next((r for r in found if not r.ok), None)
        if bad is not None:
            kind = _kind(bad)
            if kind == "syntax" and not stopped:
                kind = "unfinished"
            return {**entry, "error": kind, "detail": bad.error[:SHOWN_CHARS]}
        entry.update(valid=True, result=shown(found[0]), structural=structure.same(query, reference))
        for mine, theirs in zip(found, gold, strict=True):
            if not readonly.same_answer(reference, theirs.rows, mine.rows):
                kind, detail = _difference(mine, theirs)
                return {**entry, "error": kind, "detail": detail}
        return {**entry, "score": 1.0}


def _kind(result: readonly.Result) -> str:
    if result.kind == "schema":
        return (
            "unknown_table"
            if "no such table" in result.error
            else "unknown_column"
            if "column" in result.error
            else "runtime"
        )
    return _KINDS[result.kind]


def _difference(mine: readonly.Result, gold: readonly.Result) -> tuple[str, str]:
    if len(mine.columns) != len(gold.columns):
        return "wrong_columns", f"{_count(len(mine.columns), 'column')} instead of {len(gold.columns)}"
    if readonly.same_answer("", gold.rows, mine.rows):
        return "wrong_order", "the rows are right, their order is not"
    if len(mine.rows) != len(gold.rows):
        return "wrong_count", f"{_count(len(mine.rows), 'row')} instead of {len(gold.rows)}"
    return "wrong_values", f"{_count(len(mine.rows), 'row')} as expected, with other values"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def shown(result: readonly.Result) -> dict[str, Any] | None:
    """A result small enough to show: ten rows, long cells cut, bytes described. None for a query that failed."""
    if not result.ok:
        return None
    return {
        "columns": [c[:SHOWN_CHARS] for c in result.columns[:20]],
        "count": len(result.rows),
        "rows": [[_cell(v) for v in row[:20]] for row in result.rows[:SHOWN_ROWS]],
    }


def _cell(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value[:SHOWN_CHARS] if isinstance(value, str) else value
