"""Preference rows from sft rows whose answer is a query: chosen is that query, rejected one that answers wrongly.

Both are written by one serialiser, so that they differ in the mistake alone and a model cannot learn the spelling.

Rejected queries were run, they do not merely look different. They come from any function or are small mistakes planted
in the right query; each is executed on a read-only connection with limits. What answers like the right query is no
mistake and is never rejected.
"""

from __future__ import annotations

import difflib
import functools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from helpers.data.tables import StepReport
from helpers.data.turns import PLACE, Row, answer_of, make_row
from helpers.errors import TunebookError
from helpers.tasks import text_to_sql

Proposals = Callable[[str, random.Random], Iterable[str]]  # a right query → queries that may be wrong
MAX_PROPOSALS = 24


def reject_queries(
    rows: Iterable[list[Row]],
    report: StepReport,
    database: str | Path,
    proposals: Proposals | None = None,
    seed: int = 17,
    max_steps: int = 5_000_000,
) -> Iterator[list[Row]]:
    """`meta` says what is wrong with the rejected query ("why"). Dropped with a reason: rows whose query does
    not run, rows for which no wrong query was proposed."""
    with closing(text_to_sql.open_readonly(database)) as conn:
        propose = proposals or planted_mistakes(conn)
        run = functools.partial(text_to_sql.execute, conn, max_rows=1_000, max_steps=max_steps)
        for batch in rows:
            report.seen += len(batch)
            made = []
            for row in batch:
                gold, rng = answer_of(row).strip(), random.Random(f"{seed}:{row['id']}")
                truth, spelt = run(gold), respelt(gold)
                if truth.ok and spelt != gold and text_to_sql.same_answer(gold, truth.rows, run(spelt).rows):
                    gold = spelt
                if not truth.ok:
                    report.drop(row, "the right query does not run", f"{truth.kind}: {truth.error}")
                    continue
                wrong = _wrong(gold, truth, islice(propose(gold, rng), MAX_PROPOSALS), run)
                if not wrong:
                    report.drop(row, "no wrong candidate", gold)
                    continue
                nearest = sorted(entry for entry in wrong if entry[0] == min(wrong)[0])[:5]
                rank, _, query, why = rng.choice(nearest)  # always the nearest would teach a single kind of mistake
                outcome = "fails" if rank == 2 else "answers differently"
                report.figures[outcome] = report.figures.get(outcome, 0) + 1
                chosen, rejected = ([{"role": "assistant", "content": text}] for text in (gold, query))
                kept = {key: row[key] for key in PLACE} | {"meta": row["meta"] | {"why": why}}
                made.append(make_row("preference", row["messages"][:-1], chosen=chosen, rejected=rejected, **kept))
            report.kept += len(made)
            if made:
                yield made


def _wrong(
    gold: str, truth: text_to_sql.Result, proposals: Iterable[str], run: Callable[[str], text_to_sql.Result]
) -> list[tuple[int, float, str, str]]:
    """The proposals that answer wrongly, as (rank, distance from gold, query, what is wrong with it).

    rank: 0 for a query that returns rows, 1 for one that returns none, which is easier to see, 2 for one that fails.
    """
    found, seen = [], {" ".join(gold.split())}
    for query in (text.strip().rstrip(";").strip() for text in proposals):
        if not query or " ".join(query.split()) in seen:
            continue
        seen.add(" ".join(query.split()))
        result = run(query)
        if not result.ok:
            rank, why = 2, f"it fails ({result.kind}: {result.error})"
        elif text_to_sql.same_answer(gold, truth.rows, result.rows):
            continue
        elif len(result.rows) != len(truth.rows):
            rank, why = int(not result.rows), f"it gives {len(result.rows)} rows instead of {len(truth.rows)}"
        else:
            right, wrong = next((a, b) for a, b in zip(truth.rows, result.rows, strict=True) if a != b)
            rank, why = 0, f"it gives {str(wrong)[:80]} instead of {str(right)[:80]}"
        alike = difflib.SequenceMatcher(None, gold.split(), query.split(), autojunk=False).ratio()
        found.append((rank, round(1 - alike, 4), query, why))
    return found


def respelt(query: str) -> str:
    """The query as the serialiser writes it that writes the planted mistakes; one that does not parse as it is."""
    tree = text_to_sql.parsed(query)
    return tree.sql("sqlite") if tree is not None else query


def planted_mistakes(conn: text_to_sql.Database) -> Proposals:
    """Proposals made from a right query: another aggregate, comparison, column, value, direction, join, no condition.

    Raises TunebookError when the database has no table.
    """
    tables = text_to_sql.execute(conn, "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").rows
    if not tables:
        raise TunebookError("The database has no table; name the one that the queries were written for.")
    empty = "SELECT * FROM {} LIMIT 0"
    columns = {t.lower(): text_to_sql.execute(conn, empty.format(text_to_sql.quote(t))).columns for (t,) in tables}

    def propose(gold: str, rng: random.Random) -> list[str]:
        from sqlglot import exp

        tree, made = text_to_sql.parsed(gold), []
        if tree is None:
            return []
        names = sorted({c for table in tree.find_all(exp.Table) for c in columns.get(table.name.lower(), [])})
        for node in list(tree.walk()):
            for wrong in _mistakes(node, names, rng):
                node.parent.set(node.arg_key, wrong, node.index)
                made.append(tree.sql("sqlite"))
                node.parent.set(node.arg_key, node, node.index)
        rng.shuffle(made)
        return made

    return propose


def _mistakes(node: Any, names: list[str], rng: random.Random) -> Iterator[Any]:
    """What may stand in a node's place; None: nothing. names: the columns of the query's tables."""
    from sqlglot import exp

    def like(kind: Any) -> Any:
        return kind(**{key: node.args[key].copy() for key in ("this", "expression") if node.args.get(key)})

    def having(setting: str, value: Any) -> Any:
        copy = node.copy()
        copy.set(setting, value)
        return copy

    aggregates, comparisons = (exp.Count, exp.Sum, exp.Avg, exp.Max, exp.Min), (exp.GT, exp.LT, exp.GTE, exp.LTE)
    if isinstance(node, exp.Count) and isinstance(node.this, exp.Distinct):
        yield exp.Count(this=node.this.expressions[0].copy())
    elif type(node) in aggregates and not isinstance(node.this, exp.Star):
        yield from (like(kind) for kind in aggregates if kind is not type(node))
    elif type(node) in comparisons:
        yield from (like(kind) for kind in comparisons if kind is not type(node))
    elif isinstance(node, exp.EQ) and not isinstance(node.parent, exp.Join):
        yield like(exp.NEQ)
    elif isinstance(node, exp.And):
        yield from (node.this.copy(), node.expression.copy(), like(exp.Or))
    elif isinstance(node, exp.Or):
        yield like(exp.And)
    elif isinstance(node, exp.Ordered):
        yield having("desc", not node.args.get("desc"))
    elif isinstance(node, (exp.Where, exp.Having, exp.Limit, exp.Order, exp.Distinct)):
        if isinstance(node.parent, exp.Select):
            yield None
    elif isinstance(node, exp.Join) and node.args.get("side") == "LEFT":
        yield having("side", None)
    elif isinstance(node, exp.Column) and len(names) > 1:
        others = [name for name in names if name.lower() != node.name.lower()]
        yield from (exp.column(name, table=node.table or None) for name in rng.sample(others, min(2, len(others))))
    elif isinstance(node, exp.Literal) and not node.is_string and not isinstance(node.parent, exp.Limit):
        number = int(node.this) if node.this.isdigit() else float(node.this)
        yield from (exp.Literal.number(number * 10), exp.Literal.number(number + 1))
