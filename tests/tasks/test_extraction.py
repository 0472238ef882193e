"""Claims about reading answers: every spelling of a right query is right, and no wrong one becomes right by reading."""

import json
import sqlite3

import pytest

from helpers.tasks import extraction, questions, text_to_sql

QUERY = "SELECT name FROM item WHERE kind = 'kitchen'"
OTHER = "SELECT name FROM item WHERE kind = 'light'"
ALL = "SELECT name FROM item"
FENCE = f"```sql\n{QUERY}\n```"
ITEMS = [
    (1, "kettle", 19.99, "kitchen", 5),
    (2, "lamp", 35.0, "light", None),
    (3, "mug", 4.5, "kitchen", 5),
    (4, "desk", 120.0, "office", 1),
    (5, "torch", 4.5, "light", 9),
    (6, "a;b", 0.1, "odd", 0),
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("shop") / "shop.sqlite"
    with sqlite3.connect(path) as made:
        made.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL, kind TEXT, stock INTEGER)")
        made.executemany("INSERT INTO item VALUES (?, ?, ?, ?, ?)", ITEMS)
        made.execute("CREATE TABLE move (item_id INTEGER, delta REAL)")
        made.executemany("INSERT INTO move VALUES (?, ?)", [(1, 0.1), (1, 0.2), (1, -0.3), (3, 1.0)])
    made.close()
    found = text_to_sql.Judge([text_to_sql.open_readonly(path)])
    yield found
    found.close()


RIGHT = {
    "inline code": f"`{QUERY}`",
    "empty line in a fence": "```sql\nSELECT name\n\nFROM item\nWHERE kind = 'kitchen'\n```",
    "empty line behind a CTE": "WITH k AS (\n  SELECT * FROM item WHERE kind = 'kitchen'\n)\n\nSELECT name FROM k",
    "schema in the first fence": f"The table is\n```sql\nCREATE TABLE item(id, name, kind)\n```\nso\n{FENCE}",
    "draft while thinking": f"<think>\nMaybe SELECT * FROM item? No.\n</think>\n\n{QUERY}",
    "thinking that the prompt opened": f"SELECT * FROM item?\n</think>\n{QUERY}",
    "comment with select": f"-- select name from item\n{QUERY}",
    "prose with select and from": f"To select the names from the item table, use:\n{QUERY}",
    "prose that is a query": f"To select name from item, use {QUERY}.",
    "recursive CTE behind prose": f"Answer:\nWITH RECURSIVE k(n) AS ({QUERY}) SELECT n FROM k",
    "parentheses": f"({QUERY});",
    "explanation on the next line": f"{QUERY}\nThis returns all kitchen items.",
    "explanation on the same line": f"{QUERY} to get all kitchen items.",
    "explanation with select": f"{QUERY}\n\nExplanation: this will select name from item where kind is kitchen.",
    "explanation behind a semicolon": f"{QUERY}; this works, because we filter.",
    "JSON": json.dumps({"sql": QUERY}),
    "JSON with an explanation": json.dumps({"query": QUERY, "explanation": "select name from item"}),
    "JSON in a fence": "```json\n" + json.dumps([{"thought": "I select", "sql": f"{QUERY};"}], indent=1) + "\n```",
    "JSON with a line break": '{"sql": "SELECT name\nFROM item\nWHERE kind = \'kitchen\'"}',
    "a Python call": f'```python\ncursor.execute("""\n{QUERY}\n""").fetchall()\n```',
    "empty line in a string": "SELECT name FROM item WHERE name <> 'x\n\ny' AND kind = 'kitchen'",
    "select in a string": "SELECT name FROM item WHERE name <> 'select a from b; c' AND kind = 'kitchen'",
    "second fence": f"First\n```bash\nsqlite3 shop.sqlite\n```\nthen\n{FENCE}\nDone.",
    "result in a second fence": f"{FENCE}\nwhich gives\n```\nkettle\nmug\n```",
    "open fence": f"```\n{QUERY}",
    "fence on one line": f"```sql {QUERY} ```",
    "tildes": f"~~~sql\n{QUERY}\n~~~",
    "label": f"sql\n{QUERY}",
    "bold": f"**{QUERY}**",
    "heading": f"### Query\n\n{QUERY}\n\n### Explanation\n\nIt selects names.",
    "numbered": f"1. Look at the item table.\n2. Filter.\n3. {QUERY}\n4. Run it.",
    "table": f"| query |\n|---|\n| {QUERY} |",
    "table of the result": f"{QUERY}\n\n| name |\n|---|\n| kettle |",
    "tags": f"<sql>{QUERY}</sql>",
    "HTML": "<pre>SELECT name<br>FROM item<br>WHERE kind = &#39;kitchen&#39; AND price &lt; 500</pre>",
    "quoted": f'"{QUERY}"',
    "quoted as SQL": "'SELECT name FROM item WHERE kind = ''kitchen'''",
    "typographic quotes": "SELECT name FROM item WHERE kind = ‘kitchen’",
    "no-break spaces": QUERY.replace(" ", "\xa0"),
    "quoted names": "SELECT `name` FROM [item] WHERE \"kind\" = 'kitchen'",
    "VALUES": "VALUES ('kettle'), ('mug')",
    "lower case": QUERY.lower(),
    "prompt": f"sqlite> {QUERY};\nkettle\nmug",
    "block quote": "> SELECT name\n> FROM item\n> WHERE kind = 'kitchen'",
    "escapes": "SELECT name\\nFROM item\\nWHERE kind = \\'kitchen\\'",
    "EXPLAIN as a word": f"EXPLAIN: we filter by kind.\n{QUERY}",
    "statement before": f"PRAGMA case_sensitive_like = ON;\n{QUERY}",
    "twice": f"{QUERY}\n\nAgain, with an alias:\nSELECT i.name FROM item AS i WHERE i.kind = 'kitchen'",
    "a part named": f"{FENCE}\nThe `SELECT name` picks the column, `SELECT COUNT(*) FROM item` would count.",
    "another withdrawn": f"{ALL}\nWait, that is wrong. Only these:\n{QUERY}",
    "another advised against": f"Do not use {ALL}; use {QUERY}",
    "called final": f"First look at all: {ALL}\nThe final query is: {QUERY}",
    "another struck out": f"~~{ALL}~~ {QUERY}",
    "boxed": f"\\boxed{{{QUERY}}}",
    "qualified, then prose": "SELECT item.name FROM item WHERE item.kind = 'kitchen'\nThis lists them",
}


@pytest.mark.parametrize("spelling", RIGHT)
def test_every_spelling_of_a_right_query_is_right(judge, spelling):
    entry = judge.score(RIGHT[spelling], QUERY)
    assert entry["score"] == 1.0, entry
    assert judge.score(QUERY, RIGHT[spelling])["score"] == 1.0


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (f"{QUERY}\nNo, that is wrong. I do not know.", "no_sql"),
        (f"`{QUERY}` is not right, use {ALL}", "wrong_count"),
        (f"{FENCE}\nWait, this is incorrect.\n```sql\n{ALL}\n```", "wrong_count"),
        (f"Do not use {QUERY}. Use {OTHER}.", "wrong_values"),
        (f"Instead of {QUERY} I use {ALL}", "wrong_count"),
        (f"{QUERY}\n\nor\n\n{ALL}", "several"),
        (f"{FENCE}\n```sql\n{OTHER}\n```", "several"),
        (f"{QUERY};\nSELECT * FROM move;", "several"),
        (f"Either {ALL} or {QUERY}", "several"),
        (f"{QUERY}\nBetter: {ALL}", "wrong_count"),
        (QUERY[:-1], "syntax"),
        (f"{QUERY} AND (", "syntax"),
        (f"{QUERY} AND colour = 'red'", "unknown_column"),
        (f"SELECT name FROM item WHERE name IN ({QUERY}", "syntax"),
        (f"SELECT nme FRM item WHERE name IN ({QUERY})", "syntax"),
        (f"WITH k AS ({QUERY} SELECT * FROM k", "several"),
        (f"SELECT a FRM b UNION {QUERY}", "syntax"),
        (f"SELEC name FROM item UNION {QUERY}", "no_sql"),
        (f"INSERT INTO item {QUERY}", "forbidden"),
        (f"CREATE TABLE x AS {QUERY}", "forbidden"),
        ("WITH k AS (SELECT 1) DELETE FROM item", "forbidden"),
        (f"-- {QUERY}", "no_sql"),
        (f"<think>{QUERY}</think>I do not know.", "no_sql"),
        ("Select the kitchen items from the table.", "no_sql"),
        ("", "empty"),
    ],
)
def test_what_is_wrong_stays_wrong(judge, answer, kind):
    entry = judge.score(answer, QUERY)
    assert entry["score"] == 0.0
    assert entry["error"] == kind or (kind == "several" and entry["error"] in ("syntax", "unknown_table")), entry


def test_an_answer_cut_off_while_thinking_is_unfinished(judge):
    assert judge.score(f"<think>{QUERY}", QUERY, stopped=False)["error"] == "unfinished"


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("SELECT name, price FROM item ORDER BY price, name DESC", "SELECT name, price FROM item ORDER BY price", 1),
        ("SELECT name, price FROM item ORDER BY price DESC", "SELECT name, price FROM item ORDER BY price", 0),
        ("SELECT name FROM item ORDER BY price, name DESC", "SELECT name FROM item ORDER BY price", 1),
        (
            "SELECT kind FROM item GROUP BY 1 ORDER BY count(*) DESC, kind",
            "SELECT kind FROM item GROUP BY kind ORDER BY count(*) DESC",
            1,
        ),
        ("SELECT name FROM item WHERE id IN (5, 6) ORDER BY price", "SELECT name FROM item ORDER BY price LIMIT 2", 1),
        ("SELECT name FROM item WHERE id IN (4, 6) ORDER BY price", "SELECT name FROM item ORDER BY price LIMIT 2", 0),
        ("SELECT name FROM item WHERE id = 5", "SELECT name FROM item ORDER BY price LIMIT 1 OFFSET 1", 1),
        ("SELECT name FROM item WHERE id = 5", "SELECT name FROM item ORDER BY price LIMIT 2, 1", 1),
        ("SELECT name FROM item WHERE id = 1", "SELECT name FROM item ORDER BY price LIMIT 1 OFFSET 1", 0),
        (
            "SELECT name FROM item WHERE id IN (1, 5) ORDER BY price",
            "SELECT name FROM item ORDER BY price LIMIT 2 OFFSET 2",
            1,
        ),
        (
            "SELECT name FROM item WHERE id IN (3, 5) ORDER BY price",
            "SELECT name FROM item ORDER BY price LIMIT 2 OFFSET 2",
            0,
        ),
        ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item ORDER BY id", 0),
        ("SELECT SUM(delta) FROM move WHERE item_id = 1", "SELECT 0.0", 1),
        ("SELECT 12345678.91", "SELECT 12345678.94", 0),
        ("SELECT 987654321.01", "SELECT 987654321.02", 0),
        ("SELECT 0.1 + 0.2, 'x' UNION SELECT 0.3, 'y'", "SELECT 0.3, 'x' UNION SELECT 0.1 + 0.2, 'y'", 1),
        ("SELECT 1.0", "SELECT 1", 1),
        ("SELECT '1'", "SELECT 1", 0),
        ("SELECT 9007199254740993", "SELECT 9007199254740992", 0),
    ],
)
def test_rows_are_compared_as_a_reader_of_the_reference_would(judge, answer, reference, score):
    assert judge.score(answer, reference)["score"] == score


@pytest.mark.parametrize(
    "reference", [FENCE, json.dumps({"sql": QUERY}), f"`{QUERY}`", f"({QUERY})", f"{QUERY}\nIt lists."]
)
def test_references_in_any_spelling_are_text_to_sql(reference):
    item = questions.Item(
        "1", [{"role": "user", "content": "CREATE TABLE item (name TEXT, kind TEXT)\nWhich?"}], reference
    )
    assert questions.task_kind([item], None) == "text_to_sql"


@pytest.mark.parametrize(
    "reference", ["Select the best option from the list.", "With pleasure.", "Values matter (a lot)."]
)
def test_prose_with_words_of_sql_is_no_query(reference):
    assert not extraction.is_query(reference)


@pytest.mark.parametrize(
    ("template", "thought", "answer"),
    [
        ("<t>{r}</t>{c}", "<t>SELECT 1</t>Lima", "Lima"),
        ("◁think▷{r}◁/think▷{c}", "◁think▷\nhm\n◁/think▷\nLima", "Lima"),
        ("<t>{r}</t>{c}", "hm</t>Lima", "Lima"),
        ("<t>{r}</t>{c}", "<t>hm", ""),
        ("<t>{r}</t>{c}", "Lima", "Lima"),
    ],
)
def test_thinking_is_taken_off_by_the_templates_own_marks(tokenizer, template, thought, answer):
    import copy

    opening, closing = template.replace("{r}", " ").replace("{c}", "").split()
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}" + opening
        + "\n{{ m.reasoning_content }}\n" + closing + "\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip
    marks = extraction.thinking_marks(changed)
    assert marks == ((opening, closing),) and extraction.thinking_marks(tokenizer) == ()
    assert extraction.without_thinking(thought, marks) == answer
