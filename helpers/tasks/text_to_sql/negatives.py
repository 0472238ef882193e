"""Rejected queries for preference pairs: candidates that were run and answer wrongly, not ones that merely look different.

Candidates come from a model (any function) or from small mistakes planted in the gold query; each is executed on a
read-only connection with limits (`helpers.tasks.text_to_sql.sqlite`). What answers like the gold query is no mistake and is never rejected.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from helpers.data.tables import Row, StepReport, answer_of, make_row
from helpers.errors import TunebookError
from helpers.tasks.text_to_sql import sqlite as runner

Candidates = Callable[[Row, str], Iterable[str]]  # (row, gold query) → queries
MAX_CANDIDATES = 24


def reject_queries(
    rows: Iterable[list[Row]],
    report: StepReport,
    database: str | Path,
    candidates: Candidates | None = None,
    seed: int = 17,
    max_steps: int = 5_000_000,
    timeout_s: float = 2.0,
) -> Iterator[list[Row]]:
    """Preference rows from sft rows whose answer is a query on `database` (a SQLite file).

    The rejected query is among the five wrong ones nearest to the gold query: those that run and answer differently where
    there are such, else those that fail. `meta` says which ("why") and what it answered. Dropped with a reason: rows whose gold
    query does not run, rows without a wrong candidate.
    """
    propose = candidates or planted_mistakes(database, seed)
    conn = runner.open_readonly(database)
    limits = {"max_rows": 1_000, "max_steps": max_steps, "timeout_s": timeout_s}
    try:
        for batch in rows:
            report.seen += len(batch)
            made = []
            for row in batch:
                gold = answer_of(row).strip()
                truth = runner.execute(conn, gold, **limits)
                if not truth.ok:
                    report.drop(row, "the right query does not run", f"{truth.kind}: {truth.error}")
                    continue
                tried = _tried(conn, gold, truth, propose(row, gold), limits)
                if not tried:
                    report.drop(row, "no wrong candidate", gold)
                    continue
                query, why = _pick(tried, random.Random(f"{seed}:{row['id']}"))
                answer = {"role": "assistant"}
                made.append(
                    make_row(
                        "preference",
                        row["messages"][:-1],
                        source=row["source"],
                        file=row["file"],
                        row=row["row"],
                        chosen=[answer | {"content": gold}],
                        rejected=[answer | {"content": query}],
                        meta=row["meta"] | {"why": why},
                    )
                )
                outcome = "fails" if why.startswith("it fails") else "answers differently"
                report.figures[outcome] = report.figures.get(outcome, 0) + 1
            report.kept += len(made)
            if made:
                yield made
    finally:
        conn.close()


def _tried(
    conn: sqlite3.Connection, gold: str, truth: runner.Result, queries: Iterable[str], limits: dict
) -> list[tuple[int, float, str, str]]:
    """Wrong candidates as (rank, distance, query, why); lower is better."""
    tried, seen = [], {" ".join(gold.split())}
    for _, query in zip(range(MAX_CANDIDATES), queries, strict=False):
        query = query.strip().rstrip(";").strip()
        if not query or " ".join(query.split()) in seen:
            continue
        seen.add(" ".join(query.split()))
        result = runner.execute(conn, query, **limits)
        if not result.ok:
            tried.append((2, _distance(gold, query), query, f"it fails ({result.kind}: {result.error})"))
        elif not runner.same_answer(gold, truth.rows, result.rows):
            # An empty answer is an easier mistake to see than a plausible wrong one.
            tried.append((0 if result.rows else 1, _distance(gold, query), query, _difference(truth.rows, result.rows)))
    return tried


def _pick(tried: list[tuple[int, float, str, str]], rng: random.Random) -> tuple[str, str]:
    """One of the five nearest mistakes of the best rank: always the nearest would teach a single kind of mistake."""
    best = min(tried)[0]
    return rng.choice(sorted(entry for entry in tried if entry[0] == best)[:5])[2:]


def _difference(right: list[tuple], wrong: list[tuple]) -> str:
    if len(right) != len(wrong):
        return f"it gives {len(wrong)} rows instead of {len(right)}"
    first = next(
        ((a, b) for a, b in zip(right, wrong, strict=True) if a != b),
        (right[0] if right else (), wrong[0] if wrong else ()),
    )
    return f"it gives {str(first[1])[:80]} instead of {str(first[0])[:80]}"


def _distance(a: str, b: str) -> float:
    import difflib

    return round(1 - difflib.SequenceMatcher(None, a.split(), b.split(), autojunk=False).ratio(), 4)


def planted_mistakes(database: str | Path, seed: int = 17) -> Candidates:
    """Candidates made from the gold query: another aggregate, comparison, column, value, direction or join, a lost condition.

    Raises TunebookError when the database cannot be read.
    """
    conn = runner.open_readonly(database)
    try:
        conn.set_authorizer(None)
        tables = [name for (name,) in conn.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
        columns = {
            t.lower(): [c[1] for c in conn.execute(f'PRAGMA table_info("{t.replace(chr(34), chr(34) * 2)}")')]
            for t in tables
        }
    finally:
        conn.close()
    if not columns:
        raise TunebookError(f"The database {database} has no table; name the one that the queries were written for.")

    def propose(row: Row, gold: str) -> Iterator[str]:
        import sqlglot
        from sqlglot.errors import SqlglotError

        try:
            tree = sqlglot.parse_one(gold, read="sqlite")
        except (SqlglotError, RecursionError):
            return
        rng = random.Random(f"{seed}:{row['id']}")
        made = list(_mistakes(tree, columns, rng))
        rng.shuffle(made)
        yield from made

    return propose


def _mistakes(tree: Any, columns: dict[str, list[str]], rng: random.Random) -> Iterator[str]:
    from sqlglot import exp

    def changed(node, new) -> str:
        """The query with one node replaced (new=None: taken out)."""
        if node is tree:
            return new.sql("sqlite")
        copy = tree.copy()
        places = list(zip(tree.walk(), copy.walk(), strict=True))
        twin = next(other for one, other in places if one is node)
        if new is None:
            twin.pop()
        else:
            twin.replace(new.copy())
        return copy.sql("sqlite")

    def like(node, kind):
        return kind(this=node.this.copy(), expression=node.expression.copy())

    tables = {t.name.lower() for t in tree.find_all(exp.Table)}
    names = sorted({c for t in tables for c in columns.get(t, [])})
    aggregates = [exp.Count, exp.Sum, exp.Avg, exp.Max, exp.Min]
    comparisons = [exp.GT, exp.LT, exp.GTE, exp.LTE]
    for node in list(tree.walk()):
        if type(node) in aggregates and not isinstance(node.this, (exp.Star, exp.Distinct)):
            for other in aggregates:
                if other is not type(node):
                    yield changed(node, other(this=node.this.copy()))
        elif isinstance(node, exp.Count) and isinstance(node.this, exp.Distinct):
            yield changed(node, exp.Count(this=node.this.expressions[0].copy()))
        elif type(node) in comparisons:
            for other in comparisons:
                if other is not type(node):
                    yield changed(node, like(node, other))
        elif isinstance(node, exp.EQ) and not isinstance(node.parent, exp.Join):
            yield changed(node, like(node, exp.NEQ))
        elif isinstance(node, exp.And):
            yield changed(node, node.this)
            yield changed(node, node.expression)
            yield changed(node, like(node, exp.Or))
        elif isinstance(node, exp.Or):
            yield changed(node, like(node, exp.And))
        elif isinstance(node, exp.Ordered):
            copy = node.copy()
            copy.set("desc", not node.args.get("desc"))
            yield changed(node, copy)
        elif isinstance(node, (exp.Where, exp.Having, exp.Limit, exp.Order, exp.Distinct)) and not isinstance(
            node.parent, exp.Count
        ):
            if isinstance(node.parent, exp.Select):
                yield changed(node, None)
        elif isinstance(node, exp.Join) and node.args.get("side") == "LEFT":
            copy = node.copy()
            copy.set("side", None)
            yield changed(node, copy)
        elif isinstance(node, exp.Column) and len(names) > 1:
            others = [c for c in names if c.lower() != node.name.lower()]
            for other in rng.sample(others, min(2, len(others))):
                yield changed(node, exp.column(other, table=node.table or None))
        elif isinstance(node, exp.Literal) and not node.is_string and not isinstance(node.parent, exp.Limit):
            number = float(node.this) if not node.this.isdigit() else int(node.this)
            yield changed(node, exp.Literal.number(number * 10))
            yield changed(node, exp.Literal.number(number + 1))
