"""The sandbox for queries: nothing but reading gets through, every limit holds, and answers are compared fairly."""

import random
import sqlite3
import time

import pytest

from helpers.errors import TunebookError
from helpers.tasks import text_to_sql


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "a shop #1.sqlite"  # a space and a hash, which a careless URI would cut
    conn = sqlite3.connect(path)
    conn.executescript(
        """
        CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL, stock INTEGER);
        CREATE VIEW cheap AS SELECT name FROM item WHERE price < 5;
        """
    )
    conn.executemany("INSERT INTO item VALUES (?, ?, ?, ?)", [(i, f"item {i}", i * 0.5, i % 7) for i in range(1, 501)])
    conn.execute("INSERT INTO item VALUES (900, CAST(x'ff6162' AS TEXT), NULL, NULL)")
    conn.commit()
    conn.close()
    return path


@pytest.fixture
def conn(database):
    conn = text_to_sql.open_readonly(database)
    yield conn
    conn.close()


def test_a_select_returns_rows_and_columns(conn):
    result = text_to_sql.execute(conn, "SELECT name AS n, price FROM item WHERE id <= 2 ORDER BY id;")
    assert result.ok and result.error == ""
    assert result.columns == ["n", "price"]
    assert result.rows == [("item 1", 0.5), ("item 2", 1.0)]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count(*) FROM cheap",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10) SELECT sum(i) FROM n",
        "SELECT name, rank() OVER (ORDER BY price) FROM item",
        "SELECT date('2024-01-31', '+1 day'), upper(name), round(avg(price), 2) FROM item",
        "SELECT name FROM item WHERE id = 900",  # text that is no UTF-8
        "VALUES (1), (2)",
        "SELECT i.name FROM item i JOIN item j ON i.id = j.id + 1 WHERE i.stock IN (SELECT stock FROM item LIMIT 3)",
    ],
)
def test_ordinary_reading_is_admitted(conn, query):
    result = text_to_sql.execute(conn, query)
    assert result.ok, result
    assert result.rows


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO item VALUES (1000, 'x', 1, 1)",
        "UPDATE item SET price = 0",
        "DELETE FROM item",
        "DROP TABLE item",
        "CREATE TABLE t (a)",
        "CREATE TEMP TABLE t AS SELECT * FROM item",
        "ALTER TABLE item ADD COLUMN z",
        "PRAGMA query_only = OFF",
        "PRAGMA table_info(item)",
        "SELECT * FROM pragma_table_info('item')",
        "SELECT * FROM pragma_database_list",
        "ATTACH DATABASE '/tmp/tunebook_attached.sqlite' AS other",
        "VACUUM INTO '/tmp/tunebook_vacuum.sqlite'",
        "VACUUM",
        "REINDEX",
        "ANALYZE",
        "BEGIN",
        "SAVEPOINT a",
        "SELECT load_extension('/tmp/evil.so')",
        "CREATE VIRTUAL TABLE v USING fts5(a)",
        "WITH x AS (SELECT 1) DELETE FROM item",
    ],
)
def test_everything_but_reading_is_refused_and_changes_nothing(conn, database, query):
    before = database.read_bytes()
    result = text_to_sql.execute(conn, query)
    assert not result.ok and result.rows == []
    assert result.kind in ("forbidden", "unknown_table", "syntax"), result
    assert database.read_bytes() == before
    assert text_to_sql.execute(conn, "SELECT count(*) FROM item").rows == [(501,)], "the connection must stay usable"


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("", "syntax"),
        ("   \n", "syntax"),
        ("-- only a comment", "syntax"),
        ("SELECT 1; DROP TABLE item", "syntax"),
        ("SELEC 1", "syntax"),
        ("SELECT 'open", "syntax"),
        ("SELECT 1\x00", "syntax"),
        ("SELECT '\ud800'", "syntax"),
        ("SELECT colour FROM item", "unknown_column"),
        ("SELECT * FROM nowhere", "unknown_table"),
        ("SELECT sqrtt(1)", "runtime"),
        ("SELECT ?", "runtime"),
        ("SELECT :name", "runtime"),
        ("SELECT zeroblob(1000000000)", "too_large"),
        ("SELECT replace(printf('%900000d', 1), ' ', '  ')", "too_large"),
        ("SELECT abs(-9223372036854775808)", "runtime"),
        ("SELECT " + "+".join(["1"] * 300), "too_large"),
    ],
)
def test_a_failing_query_says_how_it_failed(conn, query, kind):
    result = text_to_sql.execute(conn, query)
    assert not result.ok and result.error
    assert result.kind == kind, result


@pytest.mark.parametrize("value", [None, 3, b"SELECT 1", ["SELECT 1"]])
def test_what_is_no_text_is_no_statement(conn, value):
    assert text_to_sql.execute(conn, value).kind == "syntax"


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


def test_an_endless_query_is_stopped_by_steps(conn):
    result = text_to_sql.execute(conn, ENDLESS, max_steps=200_000, timeout_s=60)
    assert result.kind == "timeout" and "200000 steps" in result.error
    assert text_to_sql.execute(conn, "SELECT 1").rows == [(1,)]


def test_an_endless_query_is_stopped_by_time(conn):
    result = text_to_sql.execute(conn, ENDLESS, max_steps=10**15, timeout_s=0.1)
    assert result.kind == "timeout" and "0.1 s" in result.error


def test_a_cross_join_is_stopped_while_rows_are_fetched(conn):
    query = "SELECT a.id FROM item a, item b, item c WHERE a.id + b.id + c.id < 0"
    assert text_to_sql.execute(conn, query, max_steps=500_000).kind == "timeout"


def test_too_many_rows_fail_whole(conn):
    assert text_to_sql.execute(conn, "SELECT id FROM item", max_rows=501).ok
    result = text_to_sql.execute(conn, "SELECT id FROM item", max_rows=500)
    assert result.kind == "too_large" and "500 rows" in result.error and result.rows == []


def test_too_many_bytes_fail_whole(conn):
    result = text_to_sql.execute(conn, "SELECT printf('%900000d', id) FROM item LIMIT 50", max_bytes=5_000_000)
    assert result.kind == "too_large" and "bytes" in result.error and result.rows == []


def test_a_missing_file_and_a_foreign_file_are_named(tmp_path):
    with pytest.raises(TunebookError, match="was not found"):
        text_to_sql.open_readonly(tmp_path / "none.sqlite")
    other = tmp_path / "notes.txt"
    other.write_text("not a database at all")
    with pytest.raises(TunebookError, match="is not a SQLite database"):
        text_to_sql.open_readonly(other)
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"SQLite format 3\x00" + b"\xff" * 200)
    with pytest.raises(TunebookError, match="cannot be read"):
        text_to_sql.open_readonly(broken)
    assert not (tmp_path / "none.sqlite").exists(), "opening must not create a file"


def test_a_damaged_database_is_refused_or_its_queries_fail(database, tmp_path, record_property):
    whole, rng = database.read_bytes(), random.Random(1)
    for number in range(120):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 4, 40))):
            damaged[rng.randrange(len(damaged) if number % 2 else 1200)] = rng.randrange(256)
        file = tmp_path / f"{number}.sqlite"
        file.write_bytes(damaged if number % 10 else damaged[: rng.randrange(len(damaged))])
        try:
            connection = text_to_sql.open_readonly(file)
        except TunebookError:
            continue
        for query in ("SELECT * FROM item ORDER BY name", "SELECT count(*) FROM cheap"):
            assert text_to_sql.execute(connection, query).ok in (True, False)
        connection.close()
    record_property("tried", 120)


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 3", True),
        ("SELECT a FROM t ORDER/* x */BY a", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("SELECT a FROM t", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("WITH x AS (SELECT a FROM t ORDER BY a LIMIT 3) SELECT a FROM x", False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'it''s order by a' FROM t", False),
        ("SELECT a FROM t -- order by a", False),
        ('SELECT a AS "order by" FROM t', False),
        ("SELECT [order by] FROM t", False),
    ],
)
def test_only_a_top_level_order_by_orders(query, ordered):
    assert text_to_sql.has_order(query) is ordered


def test_answers_are_multisets_without_an_order():
    assert text_to_sql.same_answer("SELECT a FROM t", [(1,), (2,), (2,)], [(2,), (1,), (2,)])
    assert not text_to_sql.same_answer("SELECT a FROM t", [(1,), (2,), (2,)], [(1,), (1,), (2,)])
    assert not text_to_sql.same_answer("SELECT a FROM t", [(1,)], [(1,), (1,)])
    assert not text_to_sql.same_answer("SELECT a FROM t ORDER BY a", [(1,), (2,)], [(2,), (1,)])
    assert text_to_sql.same_answer("SELECT a FROM t ORDER BY a", [(1,), (2,)], [(1,), (2,)])


def test_values_are_compared_as_a_reader_would():
    def same(a, b):
        return text_to_sql.same_answer("SELECT a", [a], [b])

    assert same((1,), (1.0,))
    assert same((0.1 + 0.2,), (0.3,))
    assert same((123456789012,), (123456789012.0,))
    assert same((2.9999999999,), (3,))
    assert same((None,), (None,)) and same((b"a",), (b"a",))
    assert not same((1,), ("1",))
    assert not same((None,), (0,))
    assert not same((1.5,), (1.50001,))
    assert not same((1, 2), (2, 1)), "column order counts"
    assert not same(("a",), ("A",))


@pytest.mark.parametrize(
    "query",
    [
        "SELECT "
        + ", ".join(
            ["instr(replace(hex(zeroblob(490000)), '00', 'ab'), replace(hex(zeroblob(240000)), '00', 'ab') || 'c')"]
            * 20
        ),
        "SELECT " + ", ".join(["*"] * 1_999) + " FROM item, item, item",
        "WITH "
        + ", ".join(
            [f"t{n} AS (SELECT * FROM t{n - 1} a, t{n - 1} b)" if n else "t0 AS (SELECT 1 x)" for n in range(30)]
        )
        + " SELECT count(*) FROM t29",
        "SELECT group_concat(hex(randomblob(400000))) FROM item, item, item",
    ],
    ids=["one long C call", "wide columns", "doubling CTEs", "large values"],
)
def test_what_sqlite_cannot_stop_costs_the_child_and_not_this_process(conn, query):
    began = time.monotonic()
    result = text_to_sql.execute(conn, query, timeout_s=1.0)
    assert result.kind in ("timeout", "too_large", "syntax", "runtime") and time.monotonic() - began < 30
    assert text_to_sql.execute(conn, "SELECT count(*) FROM item").rows == [(501,)]


def test_bytes_and_large_numbers_come_back_as_they_are(conn):
    found = text_to_sql.execute(conn, "SELECT x'00ff', 9223372036854775807, -1.5e308, NULL, 'é', 9e999")
    assert found.rows == [(b"\x00\xff", 2**63 - 1, -1.5e308, None, "é", float("inf"))]


def test_damaged_databases_are_results_or_one_message(database, tmp_path):
    whole, rng = database.read_bytes(), random.Random(7)
    for number in range(60):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 20, 400))):
            content[rng.randrange(16, len(content))] = rng.randrange(256)
        broken = tmp_path / f"{number}.sqlite"
        broken.write_bytes(content)
        try:
            text_to_sql.execute(text_to_sql.open_readonly(broken), "SELECT * FROM item ORDER BY name")
        except TunebookError as error:
            assert "cannot be read as a SQLite database" in str(error)
