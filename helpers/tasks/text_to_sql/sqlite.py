"""Run SQL that nobody has read: a read-only SQLite connection with limits, and a fair comparison of answers.

Three fences stand around a query: the file is opened read-only, SQLite's authorizer admits nothing but reading
(https://www.sqlite.org/c3ref/set_authorizer.html), and steps, time, rows and bytes are counted.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from helpers.errors import TunebookError

ALLOWED_ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
DENIED_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "sqlite_log"}
LIMITS = (
    (sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000),  # one value, so that zeroblob(1e9) cannot fill memory
    (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000),
    (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
    (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 50),
    (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
    (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1_000),
)
STEPS_PER_CHECK = 1_000  # SQLite calls back this often; a check costs under a microsecond
# Result.kind from SQLite's or the sqlite3 module's message.
_KINDS = (
    ("denied", r"not authorized|authorization denied|prohibited|readonly"),
    ("statements", r"one statement at a time"),
    ("parameters", r"number of bindings|binding"),
    ("schema", r"no such (table|column|function|module|collation)|ambiguous column|wrong number of arguments"),
    ("syntax", r"syntax error|unrecognized token|incomplete input|null character|surrogates not allowed|codec"),
    ("size", r"too big|too large|out of memory"),
    ("error", ""),
)


@dataclass(frozen=True)
class Result:
    """What one query did: its rows (none when it failed) and columns.

    error: SQLite's message or the limit that was hit. kind: "ok", or why it failed: one of `_KINDS`, or the limit
    "steps", "timeout", "rows" or "size"; "statements": none, or more than one.
    """

    rows: list[tuple] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    error: str = ""
    kind: str = "ok"

    @property
    def ok(self) -> bool:
        return self.kind == "ok"


def open_readonly(path: str | Path) -> sqlite3.Connection:
    """Connection to the SQLite file at `path` on which nothing but SELECT is admitted; one thread at a time may use it.

    Raises TunebookError when the file is missing or is not a SQLite database.
    """
    path = Path(path)
    if not path.is_file():
        raise TunebookError(f"The database {path} was not found; name an existing SQLite file.")
    with path.open("rb") as file:
        head = file.read(16)
    if head != b"SQLite format 3\x00":
        raise TunebookError(f"{path} is not a SQLite database (it begins with {head!r}); name a .sqlite file.")
    uri = path.resolve().as_uri() + "?mode=ro"
    conn = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    try:
        conn.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return fence(conn)
    except sqlite3.DatabaseError as error:
        conn.close()
        raise TunebookError(f"{path} cannot be read as a SQLite database ({error}); rebuild or replace it.") from error


def fence(conn: sqlite3.Connection) -> sqlite3.Connection:
    """Close an open connection to everything but SELECT within limits; for databases made in memory."""
    conn.execute("PRAGMA query_only = ON")
    conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
    for limit, value in LIMITS:
        conn.setlimit(limit, value)
    conn.set_authorizer(_authorize)
    return conn


def _authorize(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
    denied = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in DENIED_FUNCTIONS
    return sqlite3.SQLITE_OK if action in ALLOWED_ACTIONS and not denied else sqlite3.SQLITE_DENY


def execute(
    conn: sqlite3.Connection,
    sql: str,
    max_rows: int = 10_000,
    max_steps: int = 20_000_000,
    timeout_s: float = 5.0,
    max_bytes: int = 16 << 20,
) -> Result:
    """Run one SELECT on a connection of `open_readonly`; never raises for what the query does.

    max_steps counts SQLite's virtual-machine instructions (20 million are about a second), so a verdict does not depend
    on how busy the machine is. A query with more rows or bytes fails rather than giving a part of its answer.
    """
    if not isinstance(sql, str) or not sql.strip():
        return Result(error="no statement", kind="statements")
    stopped, steps = "", 0
    deadline = time.monotonic() + timeout_s

    def watch() -> int:
        nonlocal stopped, steps
        steps += STEPS_PER_CHECK
        if steps > max_steps:
            stopped = "steps"
        elif time.monotonic() > deadline:
            stopped = "timeout"
        return bool(stopped)

    conn.set_progress_handler(watch, STEPS_PER_CHECK)
    cursor = None
    try:
        cursor = conn.execute(sql)
        if cursor.description is None:
            return Result(error="the statement returns no rows", kind="statements")
        rows, size = list[tuple](), 0
        for row in cursor:
            size += sum(len(value) if isinstance(value, (str, bytes)) else 8 for value in row)
            if len(rows) >= max_rows:
                return Result(error=f"more than {max_rows} rows", kind="rows")
            if size > max_bytes:
                return Result(error=f"more than {max_bytes} bytes of values", kind="size")
            rows.append(tuple(row))
        return Result(rows, [column[0] for column in cursor.description])
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        if stopped:
            limit = f"{max_steps} steps" if stopped == "steps" else f"{timeout_s:g} s"
            return Result(error=f"stopped after {limit}", kind=stopped)
        said = str(error) or type(error).__name__
        return Result(error=said, kind=next(kind for kind, found in _KINDS if re.search(found, said, re.IGNORECASE)))
    finally:
        if cursor is not None:
            cursor.close()
        conn.set_progress_handler(None, 0)


def quote(name: str) -> str:
    """A table's or column's name as SQL."""
    return '"' + name.replace('"', '""') + '"'


# ---------------------------------------------------------------- comparing answers


def same_answer(gold_sql: str, rows_a: list[tuple], rows_b: list[tuple]) -> bool:
    """Whether two row lists answer `gold_sql` alike: as multisets, in order only under a top-level ORDER BY.

    never equals a number. Multisets, as in Spider's test suite (Zhong et al. 2020, arXiv:2010.02840).
    never equals a number. Multisets as in Spider's test suite (Zhong et al. 2020, https://arxiv.org/abs/2010.02840).
    """
    if len(rows_a) != len(rows_b):
        return False
    left, right = ([tuple(map(_canonical, row)) for row in rows] for rows in (rows_a, rows_b))
    return left == right if has_order(gold_sql) else Counter(left) == Counter(right)


# Literals, quoted names and comments are swallowed whole, or an ORDER BY inside one would count.
_TOKENS = re.compile(
    r"""(?: '(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*` | \[[^\]]*\] | --[^\n]* | /\*.*?(?:\*/|\Z) | \s+ )
        | ( \( | \) | \w+ | [^\w\s] )""",
    re.VERBOSE | re.DOTALL,
)


def has_order(sql: str) -> bool:
    """Whether the outermost query has an ORDER BY; those in subqueries, CTEs and windows order nothing."""
    depth, before = 0, ""
    for token in filter(None, _TOKENS.findall(sql)):
        depth += (token == "(") - (token == ")")
        if depth == 0 and before == "order" and token.lower() == "by":
            return True
        before = token.lower() if depth == 0 else ""
    return False


def _canonical(value: object) -> tuple:
    """A hashable form in which equal answers are equal: (type, value)."""
    if isinstance(value, float):
        value = value if value.is_integer() else float(f"{value:.9g}")
        if value.is_integer() and abs(value) < 2**63:
            value = int(value)
        return ("number", value)
    return ("number" if isinstance(value, int) else type(value).__name__, value)
