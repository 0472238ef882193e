"""Rejected queries: each was run, each answers wrongly, and what answers rightly in other words is never rejected."""

import itertools
import sqlite3

import pytest

from helpers.data import sql_pairs
from helpers.data.tables import StepReport
from helpers.data.turns import batches, make_row
from helpers.errors import TunebookError
from helpers.tasks import text_to_sql


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("sql") / "rivers.sqlite"
    conn = sqlite3.connect(path)
    conn.executescript(
        "CREATE TABLE rivers (name TEXT, country TEXT, length INTEGER);"
        "CREATE TABLE cities (name TEXT, river TEXT, people INTEGER);"
    )
    conn.executemany(
        "INSERT INTO rivers VALUES (?, ?, ?)", [(f"river {i}", f"country {i % 5}", 100 + 37 * i) for i in range(40)]
    )
    conn.executemany(
        "INSERT INTO cities VALUES (?, ?, ?)", [(f"city {i}", f"river {i % 40}", 1_000 * i) for i in range(120)]
    )
    conn.commit()
    conn.close()
    return path


GOLD = [
    "SELECT count(*) FROM rivers WHERE length > 500",
    "SELECT name FROM rivers WHERE country = 'country 1' AND length < 900 ORDER BY length DESC LIMIT 3",
    "SELECT c.name FROM cities c JOIN rivers r ON c.river = r.name WHERE r.country = 'country 2'",
    "SELECT country, avg(length) FROM rivers GROUP BY country HAVING count(*) > 2",
    "SELECT DISTINCT country FROM rivers",
    "SELECT max(people) FROM cities",
    "SELECT name FROM rivers WHERE length = (SELECT max(length) FROM rivers)",
]


def rows(queries):
    made = []
    for i, query in enumerate(queries):
        messages = [
            {"role": "system", "content": "tables"},
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": query},
        ]
        made.append(make_row("sft", messages, file="f", row=i + 1, meta={"kind": "k"}))
    return made


def reject(queries, database, **options):
    report = StepReport("sql")
    return [
        row
        for batch in sql_pairs.reject_queries(batches(rows(queries), 3), report, database, **options)
        for row in batch
    ], report


def test_every_planted_mistake_runs_and_answers_differently(database):
    before = database.read_bytes()
    made, report = reject(GOLD, database)
    assert (
        len(made) == len(GOLD)
        and report.kept == report.seen == len(GOLD)
        and report.figures == {"answers differently": len(GOLD)}
    )
    conn = text_to_sql.open_readonly(database)
    for row, gold in zip(made, GOLD, strict=True):
        right, wrong = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert right == sql_pairs.respelt(gold) and row["kind"] == "preference" and row["meta"]["kind"] == "k"
        assert [m["role"] for m in row["messages"]] == ["system", "user"]
        a, b = text_to_sql.execute(conn, right), text_to_sql.execute(conn, wrong)
        assert a.ok and b.ok and not text_to_sql.same_answer(gold, a.rows, b.rows), (right, wrong)
        assert "instead of" in row["meta"]["why"]
    conn.close()
    assert database.read_bytes() == before


def test_the_mistakes_are_of_several_kinds_and_the_same_every_time(database):
    queries = [
        f"SELECT count(*) FROM rivers WHERE length > {n} AND country = 'country 1'" for n in range(200, 1_200, 50)
    ]
    once, again = reject(queries, database)[0], reject(queries, database)[0]
    assert once == again
    shapes = {"".join(c for c in row["rejected"][0]["content"] if not c.isdigit()) for row in once}
    assert len(shapes) >= 3


def test_what_answers_rightly_in_other_words_is_never_rejected(database):
    same = [
        "select COUNT(1) from rivers where 500 < length",
        "SELECT sum(length > 500) FROM rivers",
        "SELECT count(*) FROM rivers WHERE length > 500;",
    ]
    made, report = reject(
        GOLD[:1], database, proposals=lambda gold, rng: [*same, "SELECT count(*) FROM rivers WHERE length < 500"]
    )
    assert made[0]["rejected"][0]["content"] == "SELECT count(*) FROM rivers WHERE length < 500"
    made, report = reject(GOLD[:1], database, proposals=lambda gold, rng: same)
    assert made == [] and report.dropped == {"no wrong candidate": 1}


def test_a_plausible_mistake_is_preferred_to_an_empty_one_and_that_to_a_failing_one(database):
    failing, empty, plausible = (
        "SELECT nope FROM rivers",
        "SELECT length FROM rivers WHERE length < 0",
        "SELECT count(*) FROM cities",
    )
    for candidates, expected in (
        ([failing, empty, plausible], plausible),
        ([failing, empty], empty),
        ([failing], failing),
    ):
        made, report = reject(GOLD[:1], database, proposals=lambda gold, rng, c=candidates: c)
        assert made[0]["rejected"][0]["content"] == expected
    assert made[0]["meta"]["why"].startswith("it fails (unknown_column: no such column: nope") and report.figures == {
        "fails": 1
    }


def test_hostile_and_endless_candidates_are_contained(database):
    before = database.read_bytes()
    evil = ["DROP TABLE rivers", "DELETE FROM rivers", "ATTACH 'x.db' AS x", "SELECT 1; DELETE FROM rivers",
            "", "not sql",
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"]  # fmt: skip
    made, _ = reject(GOLD[:1], database, proposals=lambda gold, rng: evil, max_steps=100_000)
    assert made[0]["meta"]["why"].startswith("it fails")
    assert database.read_bytes() == before


def test_a_gold_query_that_does_not_run_is_dropped_with_its_error(database):
    made, report = reject(["SELECT x FROM nowhere", "Sorry, I cannot.", GOLD[0]], database)
    assert len(made) == 1 and report.dropped == {"the right query does not run": 2}
    assert "no such table: nowhere" in report.examples["the right query does not run"]["detail"]


def test_only_a_few_candidates_are_run(database):
    asked = []

    def endless(gold, rng):
        while True:
            asked.append(1)
            yield f"SELECT {len(asked)} FROM nowhere"

    made, _ = reject(GOLD[:1], database, proposals=endless)
    assert len(made) == 1 and len(asked) <= sql_pairs.MAX_PROPOSALS + 1


def test_a_missing_or_empty_database_is_named(tmp_path):
    with pytest.raises(TunebookError, match="was not found"):
        reject(GOLD, tmp_path / "none.sqlite")
    empty = tmp_path / "empty.sqlite"
    conn = sqlite3.connect(empty)
    conn.executescript("CREATE TABLE t (a); DROP TABLE t;")
    conn.close()
    with pytest.raises(TunebookError, match="has no table"):
        reject(GOLD, empty)


def test_chosen_and_rejected_of_the_embedded_data_differ_in_a_mistake_and_never_in_spelling():
    from helpers.data.sources import read
    from helpers.data.tables import Rejects

    table, report = read("datasets/atlas_train.jsonl", Rejects()).table, StepReport("sql")
    some = batches(itertools.islice(table.rows(), 0, None, 12))
    made = [row for batch in sql_pairs.reject_queries(some, report, "datasets/atlas.sqlite") for row in batch]
    assert len(made) > 40
    for row in made:
        sides = [row[side][0]["content"] for side in ("chosen", "rejected")]
        assert sides == [sql_pairs.respelt(text) for text in sides] and sides[0].lower() != sides[1].lower()
