"""Claims about scoring queries by running them, on the project's own database and on hostile answers."""

import json
from pathlib import Path

import pytest

from helpers.errors import TunebookError
from helpers.evaluate.scores import ERROR_KINDS
from helpers.tasks import made_up_database, text_to_sql
from helpers.tasks import questions as items

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def judge():
    found = text_to_sql.Judge([text_to_sql.open_readonly(PROJECT / "datasets" / "atlas.sqlite")])
    yield found
    found.close()


@pytest.fixture(scope="module")
def questions():
    return [json.loads(line) for line in (PROJECT / "datasets" / "atlas_test.jsonl").read_text().splitlines()]


def test_every_reference_of_the_default_test_is_right_against_itself_and_returns_rows(judge, questions):
    for row in questions:
        entry = judge.score(row["sql"], row["sql"])
        assert entry["score"] == 1.0 and entry["valid"] and entry["structural"] and not entry["error"]
    assert sum(judge.nonempty(q["sql"]) for q in questions) >= 0.9 * len(questions)


def test_a_planted_worse_model_with_shuffled_answers_comes_out_worse_and_an_identical_one_equal(judge, questions):
    from helpers.evaluate import statistics

    gold = [q["sql"] for q in questions]
    good = [judge.score(g, g)["score"] for g in gold]
    shuffled = [judge.score(gold[(i + 7) % len(gold)], g)["score"] for i, g in enumerate(gold)]
    worse, equal = statistics.settle(
        [statistics.pair("tuned", "shuffled", good, shuffled), statistics.pair("tuned", "copy", good, list(good))]
    )
    assert worse["verdict"] == "worse" and worse["high"] < -0.8
    assert equal["verdict"] == "identical"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("", "empty"),
        ("I do not know.", "no_sql"),
        ("SELECT name FRM countries", "syntax"),
        ("SELECT name FROM nations", "unknown_table"),
        ("SELECT capitol FROM countries", "unknown_column"),
        ("DROP TABLE countries", "forbidden"),
        ("ATTACH 'x.db' AS x", "forbidden"),
        ("PRAGMA writable_schema = 1", "forbidden"),
        ("INSERT INTO countries VALUES (1)", "forbidden"),
        ("WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r", "timeout"),
        ("SELECT 1 FROM countries a, countries b, countries c", "too_large"),
        ("SELECT name, area FROM countries", "wrong_columns"),
        ("SELECT name FROM countries LIMIT 3", "wrong_count"),
        ("SELECT abs(-9223372036854775808)", "runtime"),
        ("SELECT 'nowhere'", "wrong_values"),
        ("\x00\x01\x1b[2J", "no_sql"),
        ("SELECT \x00", "syntax"),
    ],
)
def test_each_way_of_being_wrong_is_named(judge, answer, kind):
    entry = judge.score(answer, "SELECT capital FROM countries WHERE name = 'France'")
    assert entry["error"] == kind and entry["score"] == 0 and kind in ERROR_KINDS
    assert entry["detail"]


def test_a_query_cut_off_by_the_token_limit_is_unfinished_not_bad_syntax(judge):
    entry = judge.score("SELECT name FROM countries WHERE (", "SELECT name FROM countries", stopped=False)
    assert entry["error"] == "unfinished"


def test_order_counts_only_under_the_references_order_by(judge):
    up, down = "SELECT name FROM lakes ORDER BY name", "SELECT name FROM lakes ORDER BY name DESC"
    assert judge.score(down, up)["error"] == "wrong_order"
    assert judge.score(down, "SELECT name FROM lakes")["score"] == 1.0


def test_duplicates_count(judge):
    assert (
        judge.score("SELECT DISTINCT continent FROM countries", "SELECT continent FROM countries")["error"]
        == "wrong_count"
    )


def test_a_reference_that_fails_leaves_the_item_undefined(judge):
    entry = judge.score("SELECT 1", "SELECT nothing FROM nowhere")
    assert entry["score"] is None and "reference itself" in entry["detail"]


def test_no_database_is_a_sentence():
    with pytest.raises(TunebookError, match="no database"):
        text_to_sql.Judge([])


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ("SELECT 1; DROP TABLE x", "SELECT 1"),
        ("```sql\nSELECT a FROM b;\n```\nThis works.", "SELECT a FROM b"),
        ("Here you are: SELECT a FROM b WHERE c = 'x;y';", "SELECT a FROM b WHERE c = 'x;y'"),
        ("  with t as (select 1) select * from t", "with t as (select 1) select * from t"),
        ("SELECT a\nFROM b\n\nIt lists every a.", "SELECT a\nFROM b"),
        ("no query here", None),
        ("```\nplain text\n```", None),
    ],
)
def test_the_query_is_found_inside_an_answer(answer, query):
    assert text_to_sql.extract(answer) == query


def test_results_shown_are_small_and_plain_json(judge):
    result = judge.score("SELECT zeroblob(99), 1e999, name, * FROM countries", "SELECT 1")["result"]
    assert len(result["rows"]) == 10 and result["count"] > 100 and result["rows"][0][:2] == ["99 bytes", "inf"]
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("query", "reference", "same"),
    [
        (
            "select T1.Name as n from countries as T1 where 5 < T1.area and 'x' = continent order by name asc",
            "SELECT name FROM countries WHERE continent = 'x' AND area > 5 ORDER BY name",
            True,
        ),
        (
            "SELECT c.name FROM cities c JOIN rivers r ON c.river = r.name WHERE a = 1 AND b = 2 AND d = 3",
            "SELECT cities.name FROM cities INNER JOIN rivers ON rivers.name = cities.river "
            "WHERE d = 3 AND a = 1 AND b = 2",
            True,
        ),
        ('SELECT "name" FROM "countries"', "SELECT name FROM countries", True),
        ("SELECT max(area) FROM countries", "SELECT min(area) FROM countries", False),
        ("SELECT name FROM countries WHERE area > 5", "SELECT name FROM countries WHERE area >= 5", False),
        ("SELECT name FROM countries ORDER BY area", "SELECT name FROM countries ORDER BY area DESC", False),
        ("SELECT a FROM t LEFT JOIN u ON t.i = u.i", "SELECT a FROM t JOIN u ON t.i = u.i", False),
        ("SELECT a - b FROM t", "SELECT b - a FROM t", False),
        ("SELECT x FROM", "SELECT x FROM t", False),
        ("SELECT 1", "not a query at all (", None),
    ],
)
def test_structure_ignores_writing_and_sees_meaning(query, reference, same):
    assert text_to_sql.same_structure(query, reference) is same


# ------------------------------------------------------------ only CREATE TABLE is known

SCHEMA = (
    "CREATE TABLE head (age INTEGER, name VARCHAR, born_state VARCHAR)\n"
    "CREATE TABLE management (head_id INTEGER, temporary_acting VARCHAR)"
)


def test_synthetic_databases_answer_the_reference_and_tell_wrong_queries_apart():
    for reference, wrong in [
        ("SELECT COUNT(*) FROM head WHERE age > 56", "SELECT COUNT(*) FROM head WHERE age > 60"),
        (
            "SELECT name FROM head WHERE born_state = 'Alabama' AND age < 40",
            "SELECT name FROM head WHERE born_state = 'Alabama'",
        ),
        ('SELECT name FROM head WHERE born_state <> "Alaska"', 'SELECT name FROM head WHERE born_state = "Alaska"'),
    ]:
        judge = text_to_sql.Judge(made_up_database.databases(SCHEMA, reference))
        assert judge.nonempty(reference) and judge.score(reference, reference)["score"] == 1.0
        assert judge.score(wrong, reference)["score"] == 0.0
        judge.close()


def test_synthetic_databases_are_the_same_for_the_same_seed_and_closed_to_writing():
    reference = "SELECT name FROM head WHERE age = 7"
    first, again, other = (
        text_to_sql.execute(made_up_database.databases(SCHEMA, reference, seed)[0], "SELECT * FROM head").rows
        for seed in (1, 1, 2)
    )
    assert first == again != other
    made = made_up_database.databases(SCHEMA, reference)[0]
    assert text_to_sql.execute(made, "DELETE FROM head").kind == "forbidden"


def test_a_schema_that_cannot_be_read_is_a_sentence():
    with pytest.raises(TunebookError, match="No CREATE TABLE could be read"):
        made_up_database.databases("there is no table here", "SELECT 1")


def test_the_task_is_found_from_references_database_and_prompts():
    ask = [{"role": "user", "content": "How many?"}]
    query, prose = items.Item("1", ask, "SELECT 1"), items.Item("2", ask, "Forty-two.")
    known = items.Item("3", [{"role": "user", "content": f"{SCHEMA}\nHow many?"}], "SELECT 1")
    assert (
        items.task_kind([query], Path("x.sqlite")) == "text_to_sql" and items.task_kind([query], None) == "references"
    )
    assert items.task_kind([known], None) == "text_to_sql" and items.task_kind([prose], None) == "references"
    assert items.task_kind([items.Item("4", ask, "")], None) == "none"
