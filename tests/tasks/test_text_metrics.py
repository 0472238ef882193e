"""Claims about comparing texts: numbers as numbers, symbols kept, calls as calls in any family's spelling."""

import json

import pytest

from helpers.tasks import text_metrics

CALL = {"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}
GIVEN = json.dumps(CALL["arguments"])
FAMILIES = {
    "Hermes": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
    "Llama 3": '<|python_tag|>{"name": "get_weather", "parameters": {"days": 3.0, "city": "Paris"}}',
    "Mistral": f"[TOOL_CALLS] {json.dumps([CALL])}",
    "Mistral, tokens as text": f"[TOOL_CALLS]get_weather[CALL_ID]a1[ARGS]{GIVEN}",
    "Mistral, tokens skipped": f"get_weather{GIVEN}",
    "OpenAI": json.dumps({"tool_calls": [{"id": "x", "function": {"name": "get_weather", "arguments": GIVEN}}]}),
    "OpenAI's list": json.dumps([{"id": "x", "type": "function", "function": CALL}]),
    "DeepSeek": f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{GIVEN}\n```<｜tool▁call▁end｜>",
    "Qwen3-Coder": "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>",
    "tagged": f"<function=get_weather>{GIVEN}</function>",
    "Python": '<|tool_call_start|>[get_weather(days=3, city="Paris")]<|tool_call_end|>',
    "in a fence": f"Sure.\n```json\n{json.dumps(CALL)}\n```",
    "behind thinking": f'<think>{{"name": "x", "arguments": {{}}}}</think>{json.dumps(CALL)}',
}


def score(answer, reference, metric="exact"):
    return text_metrics.entry(answer, reference, metric)["score"]


@pytest.mark.parametrize("metric", ["exact", "f1"])
@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("", "A", False),
        ("The", "A", False),
        ("a cat", "The cat.", True),
        ("5", "-5", False),
        ("−5", "-5", True),
        ("35", "3.5", False),
        ("12", "1/2", False),
        ("500", "500.00", True),
        ("1,000", "1000", True),
        ("1,00", "100", False),
        ("$5.00", "$5", True),
        ("007", "7", False),
        ("12:30", "1230", False),
        ("2020-01-05", "20200105", False),
        ("x = -1", "x = 1", False),
        ("C", "C++", False),
        ("C++.", "C++", True),
        ("!=", "=", False),
        ("👎", "👍", False),
        (":)", ":(", False),
        ("**Lima**", "“Lima”", True),
        ("<think>\n\n</think>\n\nLima", "Lima", True),
        ("<think>Lima", "Lima", False),
        ("New York, USA", "new york USA", True),
        ("well-known", "well known", True),
    ],
)
def test_texts_are_right_that_a_reader_takes_for_the_same(answer, reference, right, metric):
    assert (score(answer, reference, metric) == 1.0) is right


def test_symbols_count_in_every_metric():
    for name in text_metrics.METRICS:
        assert score("👍", "👍", name) == pytest.approx(1.0) and score("👎", "👍", name) == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", 42),
        ("The answer is 42. It took 5 steps.", 42),
        ("so 3 + 4 = 7", 7),
        ("\\boxed{-3.5}", -3.5),
        ("\\boxed{\\frac{1}{2}}", 0.5),
        ("$1,234.50", 1234.5),
        ("answer: −7 apples for 3 kids", -7),
        ("5-3", 3),
        ("1/2", 0.5),
        ("none", None),
    ],
)
def test_the_final_number_of_an_answer_is_found(text, number):
    found = text_metrics.number(text)
    assert found == number if number is None else float(found) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("**B**", "B"),
        ("B) Paris", "B"),
        ("The answer is B.", "B"),
        ("I wavered between A and B. The answer is B.", "B"),
        ("B is wrong, so C", "C"),
        ("C, because B is wrong", "C"),
        ("\\boxed{D}", "D"),
        ("The answer is A or B", ""),
        ("A cat", ""),
        ("I think so", ""),
    ],
)
def test_the_letter_that_an_answer_chooses_is_found(text, letter):
    assert text_metrics.choice(text) == letter


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "value"),
    [
        ("number", "It is 3.50 euros", "3.5", 1.0),
        ("number", "5", "-5", 0.0),
        ("number", "five", "5", 0.0),
        ("number", "5", "five", None),
        ("choice", "The answer is (C).", "C", 1.0),
        ("choice", "Paris", "B) Paris", 1.0),
        ("choice", "B", "Paris", None),
        ("regex", "on 2024-01-05", r"\d{4}-\d\d", 1.0),
        ("regex", "never", r"\d", 0.0),
        ("regex", "x", "(", None),
        ("regex", "a" * 60 + "!", r"(a|aa)+$", None),
    ],
)
def test_named_metrics_say_right_wrong_or_undefined(metric, answer, reference, value):
    assert score(answer, reference, metric) == value


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_is_the_same_in_every_familys_spelling(family):
    assert score(FAMILIES[family], json.dumps(CALL)) == score(FAMILIES["Hermes"], FAMILIES[family]) == 1.0


def test_calls_are_compared_by_name_arguments_and_count_and_in_any_order():
    other = {"name": "book", "arguments": {"seats": [1, 2], "when": None}}
    both = json.dumps([CALL, other])
    assert score("".join(f"<tool_call>{json.dumps(c)}</tool_call>" for c in (other, CALL)), both) == 1.0
    for wrong in ([CALL], [CALL, CALL, other], [CALL, {**other, "arguments": {"seats": [2, 1], "when": None}}]):
        assert score(json.dumps(wrong), both) == 0.0
    for days in ("3", 4, True):
        assert score(json.dumps({**CALL, "arguments": {"city": "Paris", "days": days}}), json.dumps(CALL)) == 0.0
    assert not text_metrics.calls('{"a": 1} and [2]') and score("I cannot do that.", json.dumps(CALL)) == 0.0
