"""SQLite databases that run SQL which nobody has read, in a child process that can be ended.

Three fences stand around a query: the file is opened read-only, SQLite's authorizer admits nothing but reading
(https://www.sqlite.org/c3ref/set_authorizer.html), and steps, time, rows and bytes are counted. What those cannot see,
one long C call or the memory that preparing a statement takes, costs the child its life and the query its answer.
"""

from __future__ import annotations

import functools
import re
import sqlite3
import time
from collections import OrderedDict
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import worker
from helpers.cache import key
from helpers.errors import TunebookError

ALLOWED_ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
DENIED_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "sqlite_log"}
CONNECTION_LIMITS = (
    (sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000),  # one value, so that zeroblob(1e9) cannot fill memory
    (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000),
    (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
    (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 50),
    (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
    (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1_000),
)
MEMORY_GIB = 1.0  # of the child
GRACE_S = 2.0  # after which a query that does not heed its own time limit is ended with its process
MOST_OPEN = 64  # databases that the child keeps open
STEPS_PER_CHECK = 1_000  # SQLite calls back this often; a check costs under a microsecond
# Why a query failed, a key of ERROR_KINDS, from SQLite's or the sqlite3 module's message.
_MESSAGES = (
    ("forbidden", r"not authorized|authorization denied|prohibited|readonly"),
    (
        "syntax",
        r"one statement at a time|syntax error|unrecognized token|incomplete input|null character|surrogates|codec",
    ),
    ("unknown_table", r"no such table"),
    ("unknown_column", r"no such column|ambiguous column"),
    ("too_large", r"too big|too large|out of memory"),
    ("runtime", ""),
)


@dataclass(frozen=True)
class Result:
    """What one query did: its rows (none when it failed) and columns.

    error: SQLite's message or the limit that was hit. kind: "ok", or why it failed, a key of `ERROR_KINDS`.
    """

    rows: list[tuple] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    error: str = ""
    kind: str = "ok"

    @property
    def ok(self) -> bool:
        return self.kind == "ok"


class Database:
    """A database in the child. told: {"path"} of a file, or {"tables": [[statement, insert, rows]]} made in memory."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._told, self._key = told, key(told)

    def ask(self, request: dict[str, Any], timeout_s: float) -> Any:
        """The child's answer. Raises worker.Lost."""
        found = _child().ask({"key": self._key, **request}, timeout_s=timeout_s)
        if found is None:  # it does not have the database open
            found = _child().ask({"key": self._key, "told": self._told, **request}, timeout_s=timeout_s + GRACE_S)
        return found

    def close(self) -> None:
        """Let the child close it; a later query opens it again."""
        _child().ask({"close": self._key})


def open_readonly(path: str | Path) -> Database:
    """The SQLite file at `path`, on which nothing but SELECT is admitted.

    Raises TunebookError when the file is missing or is not a SQLite database.
    """
    path = Path(path)
    if not path.is_file():
        raise TunebookError(f"The database {path} was not found; name an existing SQLite file.")
    with path.open("rb") as file:
        head = file.read(16)
    if head != b"SQLite format 3\x00":
        raise TunebookError(f"{path} is not a SQLite database (it begins with {head!r}); name a .sqlite file.")
    database = Database({"path": str(path.resolve())})
    found = execute(database, "SELECT count(*) FROM sqlite_master")
    if not found.ok:
        raise TunebookError(f"{path} cannot be read as a SQLite database ({found.error}); rebuild or replace it.")
    return database


def execute(
    database: Database,
    sql: str,
    max_rows: int = 10_000,
    max_steps: int = 5_000_000,
    timeout_s: float = 5.0,
    max_bytes: int = 16 << 20,
) -> Result:
    """Run one SELECT on a database of `open_readonly`; never raises for what the query does.

    max_steps counts SQLite's virtual-machine instructions (5 million are about 0.25 s), so a verdict does not depend
    on how busy the machine is. A query with more rows or bytes fails rather than giving a part of its answer.
    """
    if not isinstance(sql, str) or not sql.strip():
        return Result(error="no statement", kind="syntax")
    request = {"sql": sql, "max_rows": max_rows, "max_steps": max_steps}
    request |= {"timeout_s": timeout_s, "max_bytes": max_bytes}
    try:
        found = database.ask(request, timeout_s + GRACE_S)
    except worker.Lost as lost:
        kind = {"time": "timeout", "memory": "too_large"}.get(lost.why, "runtime")
        return Result(error=str(lost), kind=kind)
    rows = [tuple(bytes.fromhex(v["hex"]) if isinstance(v, dict) else v for v in row) for row in found["rows"]]
    return Result(rows, found["columns"], found["error"], found["kind"])


@functools.cache
def _child() -> worker.Worker:
    return worker.Worker("helpers.tasks.sqlite_reader:Queries", name="SQLite", memory_gib=MEMORY_GIB)


def quote(name: str) -> str:
    """A table's or column's name as SQL."""
    return '"' + name.replace('"', '""') + '"'


# ---------------------------------------------------------------- in the child


class Queries:
    """The handler: opens what it is told of, and runs one statement a request."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, sqlite3.Connection] = OrderedDict()

    def __call__(self, request: dict[str, Any], event: worker.Event) -> Any:
        if gone := self._open.pop(request.get("close", ""), None):
            gone.close()
        if "key" not in request:
            return {}
        name, told = request.pop("key"), request.pop("told", None)
        if name not in self._open:
            if told is None:
                return None
            try:
                self._open[name] = _opened(told)
            except (sqlite3.Error, UnicodeDecodeError) as error:
                return _answer(Result(error=str(error), kind="runtime"))
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return _answer(_execute(self._open[name], **request))


def _answer(result: Result) -> dict[str, Any]:
    rows = [[{"hex": v.hex()} if isinstance(v, bytes) else v for v in row] for row in result.rows]
    return {"rows": rows, "columns": result.columns, "error": result.error, "kind": result.kind}


def _opened(told: dict[str, Any]) -> sqlite3.Connection:
    where = Path(told["path"]).as_uri() + "?mode=ro" if "path" in told else ":memory:"
    connection = sqlite3.connect(where, uri="path" in told, isolation_level=None)
    for statement, insert, rows in told.get("tables", ()):
        connection.execute(statement)
        connection.executemany(insert, rows)
    connection.execute("PRAGMA query_only = ON")
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    for limit, value in CONNECTION_LIMITS:
        connection.setlimit(limit, value)
    connection.set_authorizer(_authorize)
    return connection


def _authorize(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
    denied = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in DENIED_FUNCTIONS
    return sqlite3.SQLITE_OK if action in ALLOWED_ACTIONS and not denied else sqlite3.SQLITE_DENY


def _execute(
    conn: sqlite3.Connection, sql: str, max_rows: int, max_steps: int, timeout_s: float, max_bytes: int
) -> Result:
    stopped, steps = "", 0
    deadline = time.monotonic() + timeout_s

    def watch() -> bool:
        nonlocal stopped, steps
        steps += STEPS_PER_CHECK
        if steps > max_steps:
            stopped = f"{max_steps} steps"
        elif time.monotonic() > deadline:
            stopped = f"{timeout_s:g} s"
        return bool(stopped)

    conn.set_progress_handler(watch, STEPS_PER_CHECK)
    try:
        with closing(conn.execute(sql)) as cursor:
            if cursor.description is None:
                return Result(error="the statement returns no rows", kind="syntax")
            rows, size = list[tuple](), 0
            for row in cursor:
                size += sum(len(value) if isinstance(value, (str, bytes)) else 8 for value in row)
                if len(rows) >= max_rows:
                    return Result(error=f"more than {max_rows} rows", kind="too_large")
                if size > max_bytes:
                    return Result(error=f"more than {max_bytes} bytes of values", kind="too_large")
                rows.append(row)
            return Result(rows, [column[0] for column in cursor.description])
    except MemoryError:
        raise
    except Exception as error:  # sqlite3's own, and what damaged files make Python's decoders raise
        if stopped:
            return Result(error=f"stopped after {stopped}", kind="timeout")
        said = str(error) or type(error).__name__
        return Result(error=said, kind=next(kind for kind, found in _MESSAGES if re.search(found, said, re.IGNORECASE)))
    finally:
        conn.set_progress_handler(None, 0)
