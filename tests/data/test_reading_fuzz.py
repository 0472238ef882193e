"""Whatever a file holds, reading it ends: rows come out that every later step can take, the rest is counted."""

import gzip
import json
import string
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from helpers.data import chat_template as templates
from helpers.data import files, formats
from helpers.data.labels import Encoder
from helpers.data.sources import UNFORESEEN, read
from helpers.data.tables import Rejects
from helpers.data.turns import RowError, all_messages, content_id
from helpers.display import escape
from helpers.errors import TunebookError

QUICK = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
words = st.text(st.characters(codec=None), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)
roles = st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "wizard", "", None, 3]
)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": roles,
            "content": words | values,
            "from": roles,
            "value": words | values,
            "tool_calls": values,
        },
    )
    | values,
    max_size=5,
)
names = st.sampled_from(
    [
        "instruction",
        "input",
        "output",
        "history",
        "system",
        "tools",
        "conversations",
        "messages",
        "prompt",
        "completion",
        "chosen",
        "rejected",
        "label",
        "text",
        "context",
        "question",
        "answer",
        "answers",
        "unanswerable_question",
        "is_impossible",
    ]
)
records = st.dictionaries(names, words | messages | values, max_size=7)


def usable(row):
    """What every later step relies on."""
    assert row["id"] == content_id(row) and len(row["id"]) == 16 and row["kind"] in ("sft", "text", "preference", "kto")
    for message in all_messages(row):
        assert isinstance(message["content"], str) and "\x00" not in message["content"]
        message["content"].encode()
        assert message["role"] in ("system", "user", "assistant", "tool", "text")
    if row["kind"] in ("sft", "kto"):
        last = row["messages"][-1]
        assert last["role"] == "assistant" and (last["content"].strip() or last.get("tool_calls"))
    if row["kind"] == "preference":
        assert row["chosen"] != row["rejected"] and row["messages"][-1]["role"] in ("user", "tool")
    json.dumps(row, allow_nan=False).encode()


def read_bytes(name, content, **options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        rejects = Rejects(limit=1.0)
        try:
            rows = list(read(str(path), rejects, **options).table.rows())
        except TunebookError as error:
            assert UNFORESEEN not in rejects.invalid
            assert "\n" not in str(error).strip() and len(str(error)) < 3000
            return [], rejects
    for row in rows:
        usable(row)
    assert UNFORESEEN not in rejects.invalid
    assert all(entry["file"] and entry["reason"] for entry in rejects.first.values())
    return rows, rejects


@QUICK
@given(st.lists(records, max_size=6))
def test_any_records_are_each_read_or_rejected_on_their_own(found):
    lines = [json.dumps(record) for record in found]
    rows, rejects = read_bytes("a.jsonl", "\n".join(lines).encode())
    places = {row["row"] for row in rows}
    assert len(places) + sum(rejects.invalid.values()) == len(found)
    for number, one in enumerate(lines, 1):  # alone, each row fares as it does among the others
        alone, _ = read_bytes("a.jsonl", one.encode())
        assert bool(alone) == (number in places)


@QUICK
@given(st.sampled_from(list(formats.SHAPES)), st.lists(records, min_size=1, max_size=4))
def test_any_records_under_any_named_format_are_read_or_rejected(format, found):
    rows, rejects = read_bytes("a.json", json.dumps(found).encode(), format=format)
    assert len({row["row"] for row in rows}) + sum(rejects.invalid.values()) == len(found)


@QUICK
@given(
    st.binary(max_size=600),
    st.sampled_from(
        ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.jsonl.gz", "a.json.zst", "a.csv.gz", "a.md"]
    ),
)
def test_any_bytes_under_any_name_end_in_rows_or_a_sentence(content, name):
    cut = {"tokenizer": lambda: pytest.fail("no text that short is cut"), "tokens": 9, "overlap": 0, "least_chars": 700}
    read_bytes(name, content, documents=cut)


@QUICK
@given(st.data(), st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz"]))
def test_a_good_file_damaged_anywhere_still_ends_and_invents_no_row(data, name):
    good = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(20)]
    content = json.dumps(good).encode() if name == "a.json" else "\n".join(map(json.dumps, good)).encode()
    content = gzip.compress(content, mtime=0) if name.endswith("gz") else content
    at = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["cut", "byte", "insert"]))
    damaged = (
        content[:at]
        if how == "cut"
        else content[:at] + data.draw(st.binary(min_size=1, max_size=3)) + content[at + (how == "byte") :]
    )
    rows, _ = read_bytes(name, damaged)
    assert len(rows) <= 20
    if how == "cut" and not name.endswith("gz"):
        wanted = [f"q{i}" for i in range(20)]
        assert [row["messages"][0]["content"] for row in rows] == wanted[: len(rows)]


@QUICK
@given(st.lists(st.lists(st.text(max_size=12), min_size=2, max_size=2), min_size=1, max_size=6))
def test_what_a_csv_writer_wrote_is_read_back(table):
    import csv
    import io

    assume(all(a.strip() and b.strip() and "\x00" not in a + b for a, b in table))
    assume(not {"NaN", "nan", "<NA>"} & {cell for row in table for cell in row})  # pandas' spellings of no value
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["prompt", "completion"], *table])
    try:
        content = buffer.getvalue().encode()
    except UnicodeEncodeError:
        return
    rows, rejects = read_bytes("a.csv", content)
    assert [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows] == [
        tuple(pair) for pair in table
    ] and not rejects.invalid


@QUICK
@given(values)
def test_what_json_can_say_is_parsed_as_json_parses_it(value):
    text = json.dumps(value)
    try:
        found = files.parse(text)
    except (ValueError, RowError):
        assert "Infinity" in text
        return
    assert found == json.loads(text, parse_constant=lambda _: None)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.lists(st.text(string.printable + "é日🙂\u200b", min_size=1, max_size=40), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["last", "all"]),
)
def test_any_conversation_is_rendered_as_the_tokenizer_does_or_rejected(tokenizer, talks, train_on):
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": ("user", "assistant")[i % 2], "content": text}
                    for i, text in enumerate(texts + ["x"] * (len(texts) % 2))
                ]
            }
        )
        for texts in talks
    ]
    rows, _ = read_bytes("a.jsonl", "\n".join(lines).encode())
    rejects = Rejects(limit=1.0)
    done = [one for batch in Encoder(templates.inspect(tokenizer), train_on, rejects).encode([rows]) for one in batch]
    assert len(done) + sum(rejects.invalid.values()) == len(rows)
    for one in done:
        messages = one.row["messages"]
        assert one.ids.tolist() == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        answer = one.ids[len(prompt) :].tolist()
        assert (
            one.ids[: len(prompt)].tolist() == prompt
            and one.mask[len(prompt) : one.ends[-1] + 1].all()
            and tokenizer.eos_token_id in answer
        )
        assert tokenizer.decode(one.ids[len(prompt) : one.ends[-1]]) == messages[-1]["content"]


@QUICK
@given(words)
def test_no_text_becomes_markup(text):
    shown = escape(text)
    assert not set("<>\"'") & set(
        shown.replace("&lt;", "").replace("&gt;", "").replace("&quot;", "").replace("&#x27;", "")
    )
    shown.encode()
