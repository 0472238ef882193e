"""The embedded data set: counts, queries that run, nothing of the test in training, bytes that repeat."""

import hashlib
import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "datasets"
KINDS = {"lookup", "filter", "count", "aggregate", "order", "group", "join", "nested"}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train():
    return rows("atlas_train")


@pytest.fixture(scope="module")
def held_out():
    return rows("atlas_test")


@pytest.fixture(scope="module")
def pairs():
    return rows("atlas_preference")


@pytest.fixture(scope="module")
def atlas():
    with sqlite3.connect(f"file:{FOLDER / 'atlas.sqlite'}?mode=ro", uri=True) as connection:
        yield connection
    connection.close()


def answer(atlas, sql: str) -> list[tuple]:
    found = atlas.execute(sql).fetchall()
    return found if "ORDER BY" in sql else sorted(found, key=repr)


def has_content(found: list[tuple]) -> bool:
    return any(value is not None for row in found for value in row)


def literals(sql: str) -> set[str]:
    return set(re.findall(r"'([^']*)'", sql)) | set(re.findall(r"(?<![\w.'])\d{2,}", sql))


def test_there_are_enough_rows_of_every_kind(train, held_out, pairs):
    assert len(train) >= 850 and len(held_out) >= 150 and len(pairs) >= 320
    assert sum(row["origin"] == "hand" for row in held_out) >= 60
    assert set(Counter(row["kind"] for row in train)) == KINDS
    assert min(Counter(row["kind"] for row in train).values()) >= 60
    assert min(Counter(row["kind"] for row in held_out).values()) >= 10


def test_every_row_has_the_columns_and_the_same_system_prompt(train, held_out, pairs):
    for row in train + held_out:
        assert set(row) == {"system", "question", "sql", "kind", "origin"} and all(row.values())
    for row in pairs:
        assert set(row) == {"system", "question", "chosen", "rejected", "why", "kind"} and all(row.values())
    assert len({row["system"] for row in train + held_out + pairs}) == 1


def test_the_system_prompt_names_every_table_and_column(train, atlas):
    system = train[0]["system"]
    tables = [name for (name,) in atlas.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    assert len(tables) >= 5
    for table in tables:
        columns = [column[1] for column in atlas.execute(f"PRAGMA table_info({table})")]
        assert f"{table}({', '.join(columns)})" in system


def test_every_gold_query_runs_and_nine_in_ten_answers_are_not_empty(train, held_out, atlas):
    for part in (train, held_out):
        filled = [has_content(answer(atlas, row["sql"])) for row in part]
        assert sum(filled) / len(filled) >= 0.9


def test_joins_aggregates_grouping_ordering_and_nesting_are_all_in_training_and_test(train, held_out):
    for part, least in ((train, 80), (held_out, 12)):
        for form in (r" JOIN ", r"\b(COUNT|SUM|AVG|MIN|MAX)\(", r"GROUP BY", r"ORDER BY", r"\(SELECT"):
            assert sum(bool(re.search(form, row["sql"])) for row in part) >= least, form


def test_text_literals_are_values_of_the_database(train, held_out, pairs, atlas):
    values = set()
    for (table,) in atlas.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        for row in atlas.execute(f"SELECT * FROM {table}"):
            values.update(value for value in row if isinstance(value, str))
    for row in train + held_out + pairs:
        for literal in re.findall(r"'([^']*)'", row.get("sql") or row["chosen"]):
            assert literal in values, (literal, row["question"])


def test_rejected_queries_run_and_answer_differently(pairs, atlas):
    for row in pairs:
        chosen, rejected = answer(atlas, row["chosen"]), answer(atlas, row["rejected"])
        assert has_content(chosen), row["question"]
        if "ORDER BY" not in row["chosen"]:
            chosen, rejected = sorted(chosen, key=repr), sorted(rejected, key=repr)
        assert chosen != rejected, row["question"]


def test_rejected_queries_make_many_kinds_of_mistake(pairs):
    mistakes = Counter(row["why"] for row in pairs)
    assert len(mistakes) >= 12 and max(mistakes.values()) <= len(pairs) / 4


def test_no_question_is_asked_twice(train, held_out, pairs):
    questions = Counter(row["question"].casefold() for row in train + held_out + pairs)
    assert [question for question, times in questions.items() if times > 1] == []


def test_training_names_nothing_that_a_test_query_names(train, held_out, pairs):
    seen = "\n".join(f"{row['question']}\n{row.get('sql') or row['chosen'] + row['rejected']}" for row in train + pairs)
    asked = set().union(*(literals(row["sql"]) for row in held_out))
    assert len(asked) > 60
    assert [name for name in sorted(asked) if re.search(rf"(?<![\w,]){re.escape(name)}(?![\w,])", seen)] == []


def test_training_has_no_wording_and_no_query_of_the_test(train, held_out, pairs):
    def wording(row):
        text = row["question"].casefold()
        for literal in sorted(literals(row.get("sql") or row["chosen"]), key=len, reverse=True):
            text = text.replace(literal.casefold(), "_")
        return re.sub(r"\W+", " ", re.sub(r"[\d.,]*\d( million)?", "_", text).replace("the _", "_")).strip()

    seen = {wording(row) for row in train + pairs}
    assert len(seen) > 300
    assert [row["question"] for row in held_out if wording(row) in seen] == []
    queries = {row["sql"] for row in train}
    assert [row["question"] for row in held_out if row["sql"] in queries] == []


def test_the_database_is_whole_and_its_borders_go_both_ways(atlas):
    assert atlas.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert atlas.execute("PRAGMA foreign_key_check").fetchall() == []
    tied = [
        table
        for (table,) in atlas.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        if atlas.execute(f"PRAGMA foreign_key_list({table})").fetchall()
    ]
    assert len(tied) >= 5
    borders = set(atlas.execute("SELECT country, neighbor FROM borders"))
    assert borders == {(b, a) for a, b in borders} and all(a != b for a, b in borders)


@pytest.mark.parametrize(
    "sql, expected",
    [
        ("SELECT capital FROM countries WHERE name = 'Australia'", [("Canberra",)]),
        ("SELECT COUNT(*) FROM borders WHERE country = 'China'", [(14,)]),
        ("SELECT COUNT(*) FROM flows WHERE river = 'Danube'", [(10,)]),
        ("SELECT name FROM mountains ORDER BY height DESC LIMIT 2", [("Mount Everest",), ("K2",)]),
        ("SELECT name FROM lakes ORDER BY depth DESC LIMIT 1", [("Lake Baikal",)]),
        ("SELECT name FROM countries ORDER BY area DESC LIMIT 3", [("Russia",), ("Canada",), ("United States",)]),
        (
            "SELECT continent, COUNT(*) FROM countries GROUP BY continent HAVING COUNT(*) < 14",
            [("Oceania", 13), ("South America", 12)],
        ),
    ],
)
def test_the_atlas_knows_what_everybody_knows(atlas, sql, expected):
    assert answer(atlas, sql) == expected


def test_building_again_gives_the_same_bytes():
    done = subprocess.run([sys.executable, FOLDER / "build.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_database_does_not_depend_on_the_sqlite_that_wrote_it():
    header = (FOLDER / "atlas.sqlite").read_bytes()[:100]
    assert header[24:28] == header[92:96] == (1).to_bytes(4, "big")
    assert int.from_bytes(header[96:100], "big") == 3_040_000


def test_check_notices_a_changed_file(tmp_path):
    copy = tmp_path / "datasets"
    for path in FOLDER.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            (copy / path.relative_to(FOLDER)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(FOLDER)).write_bytes(path.read_bytes())
    with open(copy / "atlas_train.jsonl", "a", encoding="utf-8") as file:
        file.write("{}\n")
    before = hashlib.sha256((copy / "atlas_train.jsonl").read_bytes()).hexdigest()
    done = subprocess.run([sys.executable, copy / "build.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 1 and "atlas_train.jsonl" in done.stdout and "atlas_test" not in done.stdout
    assert hashlib.sha256((copy / "atlas_train.jsonl").read_bytes()).hexdigest() == before


def test_examples_are_short_for_the_default_model(tokenizer, train):
    assert len(tokenizer(train[0]["system"])["input_ids"]) <= 110
    sql = [len(tokenizer(row["sql"])["input_ids"]) for row in train]
    assert sum(length <= 40 for length in sql) / len(sql) >= 0.9
    longest = max(train, key=lambda row: len(row["question"]) + len(row["sql"]))
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": longest["system"]},
            {"role": "user", "content": longest["question"]},
            {"role": "assistant", "content": longest["sql"]},
        ],
        tokenize=False,
    )
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 180


def test_general_text_and_tasks_have_their_size_and_shape(tokenizer):
    text = rows("general_text")
    assert 8_000 <= sum(len(tokenizer(row["text"])["input_ids"]) for row in text) <= 12_000 and len(text) >= 60
    tasks = rows("general_tasks")
    assert len(tasks) >= 60 and len({row["question"] for row in tasks}) == len(tasks)
    for row in tasks:
        assert len(set(row["choices"])) == 4 and row["answer"] in range(4)
    assert max(Counter(row["answer"] for row in tasks).values()) <= len(tasks) / 3
    assert Counter(row["kind"] for row in rows("general_chat")) == {"manners": 100, "refusal": 80}


def test_dataset_info_names_files_and_columns_that_exist():
    info = json.loads((FOLDER / "dataset_info.json").read_text(encoding="utf-8"))
    assert {"atlas_train", "atlas_test", "atlas_preference"} <= set(info) and info["atlas_preference"][
        "ranking"
    ] is True
    for entry in info.values():
        first = json.loads((FOLDER / entry["file_name"]).read_text(encoding="utf-8").splitlines()[0])
        assert set(entry["columns"].values()) <= set(first)


def test_the_card_says_what_the_files_hold(train, held_out, pairs):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: cc0-1.0\n")
    for name, part in (("atlas_train", train), ("atlas_test", held_out), ("atlas_preference", pairs)):
        assert f"| `{name}.jsonl` | {len(part)} " in card
    for name in ("general_text", "general_tasks", "general_chat"):
        assert f"| `{name}.jsonl` | {len(rows(name))} |" in card


def test_the_folder_is_no_package_and_its_files_are_small():
    assert not list(FOLDER.rglob("__init__.py"))
    assert max(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 2 * 2**20
