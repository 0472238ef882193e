"""Messages of any spelling become typed turns: no key is lost without a count."""

import json
from datetime import date, datetime
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.data.messages import DETAILS, REASONING, WEIGHTS, read_turns, tools_of
from helpers.data.turns import RowError, answer_of, make_row, map_contents, pop_unread, text_of

CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"name": "Ida", "before": null}'}}


def answer(**more):
    """The turn that an answer with these keys becomes."""
    return read_turns([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **more}])[1]


@pytest.mark.parametrize("key", REASONING)
def test_thoughts_under_any_name_are_one_field(key):
    assert answer(**{key: "hm"}) == {"role": "assistant", "content": "a", "reasoning": "hm"}


@pytest.mark.parametrize(
    "given, weight",
    [
        ({"weight": 0}, 0),
        ({"weight": 1}, None),
        ({"weight": 0.5}, 0.5),
        ({"weight": "0"}, 0),
        ({"loss_weight": 0.0}, 0),
        ({"train": False}, 0),
        ({"training": "false"}, 0),
        ({"loss": False}, 0),
        ({"loss": None}, None),
        ({"masked": True}, 0),
        ({"masked": False}, None),
        ({"weight": 1, "train": False}, 0),
        ({"train": "no"}, 0),
        ({"loss": "off"}, 0),
        ({"masked": "yes"}, 0),
    ],
)
def test_every_mark_that_takes_a_turn_out_of_the_loss_is_its_weight(given, weight):
    assert answer(**given).get("weight") == weight and "unread" not in answer(**given)


def test_parts_that_axolotl_leaves_out_are_kept_and_move_with_the_text():
    parts = [{"begin_offset": 0, "end_offset": 4, "train": False}, {"begin_offset": 5, "end_offset": 9, "train": True}]
    turn = answer(content="héllo world", train_detail=parts)
    assert turn["untrained"] == [[0, 5]]
    row = map_contents(make_row("sft", [turn]), lambda text: text.replace("é", "ee"))
    assert row["messages"][0] == {"role": "assistant", "content": "heello world", "untrained": [[0, 6]]}


def test_parts_of_a_content_are_text_thoughts_and_calls():
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "a"},
        {"type": "tool_call", "value": '{"name": "find", "arguments": {"name": "Ida"}}'},
        {"type": "text", "text": "b"},
    ]
    turn = answer(content=parts)
    assert (turn["content"], turn["reasoning"]) == ("ab", "hm")
    assert turn["tool_calls"][0]["function"] == {"name": "find", "arguments": {"name": "Ida"}}
    with pytest.raises(RowError, match="image_url"):
        answer(content=[{"type": "image_url"}])


def test_nulls_in_arguments_and_schemas_are_kept_and_an_id_that_is_referred_to():
    talk = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
        {"role": "tool", "content": "1 hit", "tool_call_id": "c1"},
        {"role": "assistant", "content": "a", "function_call": CALL["function"]},
    ]
    turns = read_turns(talk)
    assert turns[1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"name": "Ida", "before": None}}}
    ]
    assert turns[2]["tool_call_id"] == "c1" and "id" not in turns[3]["tool_calls"][0]
    assert json.loads(tools_of([{"name": "f", "parameters": {"default": None}}]))[0]["parameters"] == {"default": None}


FOUND = {"name": "find", "arguments": {"name": "Ida"}}


@pytest.mark.parametrize(
    "calls",
    [
        FOUND,
        [[FOUND]],
        json.dumps([FOUND]),
        [json.dumps([FOUND])],
        [{"function": {**FOUND, "arguments": json.dumps(json.dumps(FOUND["arguments"]))}}],
        [{"name": "find", "args": {"name": "Ida"}}],
        [{"type": "tool_use", "id": "x", "name": "find", "input": {"name": "Ida"}}],
        [{"function": {"name": "find", "parameters": {"name": "Ida"}, "arguments": None}}],
    ],
)
def test_a_call_is_the_same_however_it_was_nested(calls):
    turn = answer(content=None, tool_calls=calls)
    assert [call["function"] for call in turn["tool_calls"]] == [FOUND] and "unread" not in turn
    part = {"type": "tool_call", "value": calls}
    assert answer(content=[part])["tool_calls"][0]["function"] == FOUND


def test_arguments_that_are_no_object_reject_the_row_and_none_are_an_empty_one():
    assert answer(tool_calls=[{"name": "now", "arguments": None}])["tool_calls"][0]["function"]["arguments"] == {}
    for arguments in ([1, 2], "[1]", 3, '"Ida"'):
        with pytest.raises(RowError, match="arguments of 'find'"):
            answer(tool_calls=[{"name": "find", "arguments": arguments}])


@pytest.mark.parametrize(
    "said",
    [
        {"role": "Assistant", "content": "a"},
        {"role": "assistant", "value": "a"},
        {"from": "gpt", "text": "a"},
        {"speaker": "bot", "text": "a"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
    ],
)
def test_a_message_is_read_by_whatever_names_its_keys_have(said):
    assert read_turns([{"role": "USER", "content": [{"type": "input_text", "text": "q"}]}, said]) == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]


def test_a_tools_result_that_is_an_object_is_its_json():
    (turn,) = read_turns([{"role": "tool", "content": {"hits": 1, "next": None}}])
    assert turn["content"] == '{"hits": 1, "next": null}'
    with pytest.raises(RowError, match="an object"):
        read_turns([{"role": "user", "content": {"hits": 1}}])


def test_values_of_any_type_in_arguments_become_json_or_reject_the_row():
    given = {
        "price": Decimal("12.50"),
        "count": Decimal("3"),
        "day": date(2024, 5, 1),
        "at": datetime(2024, 5, 1, 9),
        "raw": b"abc",
        "size": np.int64(7),
        "share": np.float32(0.5),
        "list": np.array([1, 2]),
    }
    call = {"function": {"name": "book", "arguments": given}}
    found = answer(tool_calls=[call])["tool_calls"][0]["function"]["arguments"]
    assert found == {
        "price": 12.5,
        "count": 3,
        "day": "2024-05-01",
        "at": "2024-05-01T09:00:00",
        "raw": "abc",
        "size": 7,
        "share": 0.5,
        "list": [1, 2],
    }
    for value in (b"\xff", Decimal("NaN"), Decimal("1E+999999"), float("inf"), object()):
        with pytest.raises(RowError):
            answer(tool_calls=[{"function": {"name": "book", "arguments": {"x": value}}}])


def test_an_answer_that_is_only_a_call_has_a_length_and_every_text_of_it_is_cleaned():
    turn = answer(content=None, tool_calls=[CALL], thinking="secret")
    row = make_row("sft", [{"role": "user", "content": "q"}, turn])
    assert "find" in answer_of(row) and "secret" in answer_of(row) and "Ida" in text_of(row)
    cleaned = map_contents(row, lambda text: text.replace("Ida", "X").replace("secret", "Y"))["messages"][1]
    assert cleaned["reasoning"] == "Y"
    assert cleaned["tool_calls"][0]["function"]["arguments"] == {"name": "X", "before": None}


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(), st.text("ab", max_size=3), st.just([]))
KEYS = st.sampled_from(
    [*REASONING, *WEIGHTS, *DETAILS, "name", "tool_call_id", "score", "emotion", "id", "function_call"]
)


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"weight": True, "loss_weight": 2.0}, 2.0),
        ({"train": True, "weight": 0.5}, 0.5),
        ({"train": False, "weight": 2.0}, 0.0),
        ({"loss_weight": 2.0, "weight": 2, "masked": False}, 2.0),
        ({"loss": True, "weight": 1}, 1.0),
    ],
)
def test_a_weight_beside_a_switch_is_kept(keys, weight):
    assert answer(**keys).get("weight", 1) == weight
    with pytest.raises(RowError, match="weights"):
        answer(weight=0.5, loss_weight=2.0)


@given(st.dictionaries(KEYS, VALUES, max_size=6), st.sampled_from(["user", "assistant", "system", "tool"]))
def test_no_key_of_a_message_is_lost_without_a_count(more, role):
    try:
        (turn,) = read_turns([{"role": role, "content": "c", **more}])
    except RowError:
        return  # the row is rejected and counted
    kept, counted = dict(turn), pop_unread(make_row("sft", [turn]))
    for key, value in more.items():
        if value is None or f"messages: {key}" in counted or f"messages: {key} of {role} turns" in counted:
            continue
        if key in REASONING:
            assert value in kept.get("reasoning", "")
        elif key in WEIGHTS:
            assert role != "assistant" or float(value) in (0, 1) or kept["weight"] is not None
            dropped = (not value or value in ("0", "false")) == WEIGHTS[key]
            assert role != "assistant" or kept.get("weight", 1) == 0 or not dropped
        elif key in DETAILS:
            assert kept["untrained"] == []
        elif key == "function_call":
            assert not value
        else:
            assert kept[key] == value
