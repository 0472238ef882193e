"""Preference rows from sft rows whose answer is a query: chosen is that query, rejected one that answers wrongly."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from helpers.data.tables import StepReport
from helpers.data.turns import PLACE, Row, answer_of, make_row
from helpers.tasks import negatives, text_to_sql


def reject_queries(
    rows: Iterable[list[Row]],
    report: StepReport,
    database: str | Path,
    proposals: negatives.Proposals | None = None,
    seed: int = 17,
    max_steps: int = 5_000_000,
    timeout_s: float = 2.0,
) -> Iterator[list[Row]]:
    """`meta` says what is wrong with the rejected query ("why"). Dropped with a reason: rows whose query does
    not run, rows for which no wrong query was proposed."""
    propose = proposals or negatives.planted_mistakes(database)
    conn = text_to_sql.open_readonly(database)
    limits = {"max_rows": 1_000, "max_steps": max_steps, "timeout_s": timeout_s}
    try:
        for batch in rows:
            report.seen += len(batch)
            made = []
            for row in batch:
                gold = answer_of(row).strip()
                try:
                    query, why = negatives.rejected(conn, gold, propose, random.Random(f"{seed}:{row['id']}"), **limits)
                except negatives.NoMistake as nothing:
                    report.drop(row, *nothing.args)
                    continue
                outcome = "fails" if why.startswith("it fails") else "answers differently"
                report.figures[outcome] = report.figures.get(outcome, 0) + 1
                places = {key: row[key] for key in PLACE}
                chosen, rejected = ([{"role": "assistant", "content": text}] for text in (gold, query))
                meta = row["meta"] | {"why": why}
                prompt = row["messages"][:-1]
                made.append(make_row("preference", prompt, chosen=chosen, rejected=rejected, meta=meta, **places))
            report.kept += len(made)
            if made:
                yield made
    finally:
        conn.close()
