"""Small inputs from public reports are read right; what is lost is counted."""

import json
from pathlib import Path

import pytest

from helpers.data.sources import read
from helpers.data.tables import Rejects
from helpers.errors import TunebookError

CASES = Path(__file__).parent / "cases"


def rows(name, **options):
    rejects = Rejects(limit=1.0)
    return list(read(str(CASES / name), rejects, **options).table.rows()), rejects


@pytest.mark.parametrize("name", ["nan.parquet", "lines-2028.json", "array-pretty.jsonl"])
def test_every_row_is_read_and_none_holds_a_nan(name):
    found, rejects = rows(name)
    assert len(found) == 6 if name != "nan.parquet" else found
    assert not rejects.invalid
    for number, row in enumerate(found):
        question, answer = (message["content"] for message in row["messages"])
        assert question == f"Say number {number}" and answer.startswith(f"The number is {number}.")
    assert ("\u2028" in found[0]["messages"][1]["content"]) == (name == "lines-2028.json")


def test_nulls_in_the_arguments_and_in_a_tool_stay():
    (row,), _ = rows("null-json.jsonl")
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"name": "Ida", "before": None}
    assert json.loads(row["tools"])[0]["function"]["parameters"]["properties"]["before"]["default"] is None


def test_dates_and_decimals_in_arguments_are_plain_json():
    (row, *_), rejects = rows("toolargs-types.parquet")
    arguments = row["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"when": "2024-05-01T09:00:00", "price": 12.5} and not rejects.invalid


def test_a_conversation_that_stands_as_json_text_in_a_column_is_a_conversation():
    (row,), _ = rows("columns-messages-string.jsonl")
    assert [message["content"] for message in row["messages"]] == ["Hi", "Hello"]


def test_each_line_that_an_open_quotation_mark_swallows_is_a_lost_row():
    found, rejects = rows("unclosed-quote.csv")
    assert len(found) == 300 and rejects.invalid == {"malformed csv": 100} and rejects.total_seen == 400
    with pytest.raises(
        TunebookError, match=r"100 of 400 rows \(25.0 %\).*unclosed-quote.csv, row 301: lines 302 to 401"
    ):
        read(str(CASES / "unclosed-quote.csv"), Rejects())
