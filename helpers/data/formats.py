"""Shapes of training rows, recognised or named, each turned into the one row of `helpers.data.tables`.

Nine shapes: alpaca, sharegpt, messages (OpenAI), prompt_completion, text, preference, kto, context_qa (a question about
a given text, with unanswerable ones) and whatever `dataset_info.json` describes. `auto` looks at every record by itself,
so one file may hold several shapes. A record that fits none, or lacks an answer, raises `RowError` and is counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

FORMATS = ("auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text", "preference", "kto", "context_qa")
UNANSWERABLE = "The text does not say."

# Column names that mean the same thing, the most specific first.
PROMPT = ("instruction", "question", "query", "prompt", "problem", "user", "inputs")
RESPONSE = (
    "output",
    "response",
    "answer",
    "answers",
    "completion",
    "sql",
    "target",
    "solution",
    "assistant",
    "targets",
)
MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
TEXT = ("text", "raw_content", "content", "document", "body")
SYSTEM = ("system", "system_prompt")
CONTEXT = ("context", "article", "passage")
CHOSEN = ("chosen", "chosen_response", "preferred")
REJECTED = ("rejected", "rejected_response", "dispreferred", "non_preferred")
LABEL = ("label", "kto_tag")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "function": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}


class RowError(Exception):
    """One record cannot be used. reason: a few fixed words to count by; detail: what was seen and what was wanted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Shape:
    """Which column plays which part, and how roles are spelt. "" means that no column does."""

    format: str
    prompt: str = ""
    query: str = ""
    response: str = ""
    history: str = ""
    system: str = ""
    messages: str = ""
    tools: str = ""
    chosen: str = ""
    rejected: str = ""
    label: str = ""
    context: str = ""
    roles: tuple[tuple[str, str], ...] = tuple(ROLES.items())
    role_tag: str = ""
    content_tag: str = ""
    unanswerable: str = UNANSWERABLE
    exact: bool = False  # described by a dataset_info.json: no column is replaced by a synonym

    def columns(self) -> dict[str, str]:
        """Part → column, for the parts that have one."""
        parts = (
            "prompt",
            "query",
            "response",
            "history",
            "system",
            "messages",
            "tools",
            "chosen",
            "rejected",
            "label",
            "context",
        )
        return {part: getattr(self, part) for part in parts if getattr(self, part)}

    def wanted(self) -> str:
        """The columns a record must have, for error messages."""
        must = {
            "alpaca": (self.prompt, self.response),
            "context_qa": (self.context, self.prompt),
            "text": (self.prompt,),
            "preference": (self.prompt or self.messages, self.chosen, self.rejected),
            "prompt_completion": (self.prompt, self.response),
            "kto": (self.messages or self.prompt, "" if self.messages else self.response, self.label),
        }.get(self.format, (self.messages,))
        return ", ".join(repr(column) for column in must if column)


DEFAULTS = {
    "alpaca": Shape(
        "alpaca",
        prompt="instruction",
        query="input",
        response="output",
        history="history",
        system="system",
        tools="tools",
    ),
    "sharegpt": Shape("sharegpt", messages="conversations", system="system", tools="tools"),
    "messages": Shape("messages", messages="messages", system="system", tools="tools"),
    "prompt_completion": Shape(
        "prompt_completion", prompt="prompt", response="completion", system="system", tools="tools"
    ),
    "text": Shape("text", prompt="text"),
    "preference": Shape(
        "preference", prompt="prompt", chosen="chosen", rejected="rejected", system="system", tools="tools"
    ),
    "kto": Shape("kto", prompt="prompt", response="completion", label="label", system="system", tools="tools"),
    "context_qa": Shape("context_qa", prompt="question", response="answer", context="context", system="system"),
}


def first(names: tuple[str, ...], columns: Mapping[str, Any]) -> str:
    """The first of `names` that is a column with something in it."""
    return next((name for name in names if columns.get(name) is not None), "")


def adapt(shape: Shape, record: Mapping[str, Any]) -> Shape:
    """A named format with each missing default column replaced by a synonym that the record does have."""
    synonyms = {
        "prompt": TEXT if shape.format == "text" else PROMPT,
        "response": RESPONSE,
        "messages": MESSAGES,
        "context": CONTEXT,
        "system": SYSTEM,
        "chosen": CHOSEN,
        "rejected": REJECTED,
        "label": LABEL,
    }
    found = {}
    for part, names in synonyms.items():
        column = getattr(shape, part)
        if column and record.get(column) is None and (other := first(names, record)):
            found[part] = other
    if shape.format in ("preference", "kto") and record.get(found.get("prompt", shape.prompt)) is None:
        found["messages"] = first(MESSAGES, record)
    return replace(shape, **found) if found else shape


def detect(record: Mapping[str, Any]) -> Shape | None:
    """The shape of one record by its non-empty columns and their types; None when nothing fits."""
    chosen, rejected, messages = first(CHOSEN, record), first(REJECTED, record), first(MESSAGES, record)
    system, tools = first(SYSTEM, record), first(("tools", "functions"), record)
    prompt, response = first(PROMPT, record), first(RESPONSE, record)
    label = next((name for name in LABEL if isinstance(record.get(name), bool)), "")
    common = {"system": system, "tools": tools}
    if chosen and rejected:
        return Shape(
            "preference",
            prompt=prompt,
            messages="" if prompt else messages,
            chosen=chosen,
            rejected=rejected,
            query="input" if prompt == "instruction" else "",
            **common,
        )
    if messages and isinstance(record[messages], (list, tuple)):
        head = next((m for m in record[messages] if isinstance(m, Mapping)), {})
        if label:
            return Shape("kto", messages=messages, label=label, **common)
        return Shape("sharegpt" if "from" in head else "messages", messages=messages, **common)
    if label and prompt and response:
        return Shape("kto", prompt=prompt, response=response, label=label, **common)
    context = first(CONTEXT, record)
    if context and any(name in record for name in ("question", "unanswerable_question")):
        return Shape(
            "context_qa",
            prompt="question",
            response=first(("answer", "answers", "response", "output"), record) or "answer",
            context=context,
            system=system,
        )
    if (prompt and isinstance(record[prompt], (list, tuple))) or (prompt, response) == ("prompt", "completion"):
        return Shape("prompt_completion", prompt=prompt, response=response or "completion", **common)
    if prompt and (response or any(name in record for name in RESPONSE)):
        answer = response or next(name for name in RESPONSE if name in record)
        query = "input" if prompt == "instruction" and "input" in record else ""
        return Shape(
            "alpaca",
            prompt=prompt,
            query=query,
            response=answer,
            history="history" if "history" in record else "",
            **common,
        )
    if response and isinstance(record.get("input"), str):
        return Shape("alpaca", prompt="input", response=response, **common)
    if text := first(TEXT, record):
        return Shape("text", prompt=text)
    return None


def convert(record: Mapping[str, Any], shape: Shape) -> list[dict[str, Any]]:
    """The parts of the row (or rows: context_qa may hold two questions) that a record of this shape makes.

    Each is a dict of `kind`, `messages` and, where they apply, `tools`, `chosen`, `rejected`, `label`.
    Raises RowError with the reason when the record does not fit the shape, or has no answer.
    """
    from helpers.data import conversations as talk

    if shape.format == "text":
        value = text(record, shape.prompt, shape)
        if not value.strip():
            raise RowError("empty text", f"column {shape.prompt!r} is empty")
        return [{"kind": "text", "messages": [{"role": "text", "content": value}]}]
    if shape.format == "context_qa":
        return _context_qa(record, shape)
    tools = talk.tools_of(record.get(shape.tools)) if shape.tools else None
    if shape.format == "preference" or (shape.chosen and shape.rejected):
        return [{**_preference(record, shape), "tools": tools}]
    messages = _prompt(record, shape)
    if shape.label:
        label = record.get(shape.label)
        if not isinstance(label, bool):
            raise RowError("no label", f"column {shape.label!r} holds {kind_of(label)}; true or false was expected")
        return [
            {"kind": "kto", "messages": talk.checked(messages + _answer(record, shape)), "tools": tools, "label": label}
        ]
    return [{"kind": "sft", "messages": talk.checked(messages + _answer(record, shape)), "tools": tools}]


def _prompt(record: Mapping[str, Any], shape: Shape) -> list[dict]:
    """The system prompt, the history and the question."""
    from helpers.data import conversations as talk

    messages: list[dict] = []
    if shape.messages:
        messages = talk.read_messages(need(record, shape.messages, shape), shape)
    elif shape.prompt and isinstance(record.get(shape.prompt), (list, tuple)):
        messages = talk.read_messages(record[shape.prompt], shape)
    else:
        history = (record.get(shape.history) if shape.history else None) or []
        if not isinstance(history, (list, tuple)):
            raise RowError(
                "broken history",
                f"{shape.history!r} is {kind_of(history)}; a list of question and answer pairs was expected",
            )
        for turn in history:
            if not isinstance(turn, (list, tuple)) or len(turn) != 2:
                raise RowError(
                    "broken history",
                    f"a turn of {shape.history!r} is {kind_of(turn)}; pairs of question and answer were expected",
                )
            messages += [
                {"role": "user", "content": as_text(turn[0], shape.history)},
                {"role": "assistant", "content": as_text(turn[1], shape.history)},
            ]
        need(record, shape.prompt, shape)
        question = [
            text(record, column, shape) for column in (shape.prompt, shape.query) if column and record.get(column)
        ]
        if not any(part.strip() for part in question):
            raise RowError("no question", f"column {shape.prompt!r} is empty")
        messages.append({"role": "user", "content": "\n".join(question)})
    system = record.get(shape.system) if shape.system else None
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": as_text(system, shape.system)})
    return messages


def _answer(record: Mapping[str, Any], shape: Shape) -> list[dict]:
    from helpers.data import conversations as talk

    if not shape.response or shape.messages:
        return []
    value = record.get(shape.response)
    if value is None or value == "" or value == []:
        missing = "is not there" if shape.response not in record else "is empty"
        raise RowError("no answer", f"column {shape.response!r} {missing}; columns seen: {seen(record)}")
    if isinstance(value, (list, tuple, Mapping)):
        return talk.read_messages(value if isinstance(value, (list, tuple)) else [value], shape)
    return [{"role": "assistant", "content": as_text(value, shape.response)}]


def _preference(record: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """Prompt, chosen and rejected: texts, messages, or whole conversations that begin with the same prompt."""
    from helpers.data import conversations as talk

    answers = {}
    for part in ("chosen", "rejected"):
        value = need(record, getattr(shape, part), shape)
        if isinstance(value, Mapping):
            value = [value]
        if isinstance(value, (list, tuple)):
            answers[part] = talk.read_messages(value, shape)
        else:
            answers[part] = [{"role": "assistant", "content": as_text(value, getattr(shape, part))}]
    prompt = _prompt(record, shape) if shape.messages or (shape.prompt and record.get(shape.prompt) is not None) else []
    return talk.checked_pair(prompt, answers["chosen"], answers["rejected"])


def _context_qa(record: Mapping[str, Any], shape: Shape) -> list[dict[str, Any]]:
    """A text, a question about it and the answer; a question that the text does not answer gets `shape.unanswerable`."""
    from helpers.data import conversations as talk

    context = as_text(need(record, shape.context, shape), shape.context)
    system = (
        [{"role": "system", "content": as_text(record[shape.system], shape.system)}]
        if shape.system and record.get(shape.system)
        else []
    )
    answer = record.get(shape.response)
    if isinstance(answer, Mapping):  # SQuAD's {"text": [...], "answer_start": [...]}
        answer = next(iter(answer.get("text") or []), "")
    elif isinstance(answer, (list, tuple)):
        answer = next(iter(answer), "")
    impossible = record.get("is_impossible") is True or record.get("unanswerable") is True
    if answer is None and not impossible and shape.response not in record and record.get(shape.prompt) is not None:
        raise RowError("no answer", f"column {shape.response!r} is not there; columns seen: {seen(record)}")
    asked = []
    if record.get(shape.prompt) is not None:
        asked.append(
            (
                as_text(record[shape.prompt], shape.prompt),
                shape.unanswerable if impossible or not answer else as_text(answer, shape.response),
            )
        )
    if record.get("unanswerable_question"):
        asked.append((as_text(record["unanswerable_question"], "unanswerable_question"), shape.unanswerable))
    if not asked or not context.strip():
        raise RowError("no question", f"wanted {shape.wanted()}; columns seen: {seen(record)}")
    return [
        {
            "kind": "sft",
            "messages": talk.checked(
                [
                    *system,
                    {"role": "user", "content": f"{context}\n\n{question}"},
                    {"role": "assistant", "content": reply},
                ]
            ),
        }
        for question, reply in asked
    ]


# ---------------------------------------------------------------- values


def need(record: Mapping[str, Any], column: str, shape: Shape) -> Any:
    """The value of a column that must be there and not null."""
    value = record.get(column)
    if value is None:
        state = "is null" if column in record else "is not there"
        raise RowError(
            "wrong columns",
            f"column {column!r} {state}; {shape.format} wants {shape.wanted()}; columns seen: {seen(record)}",
        )
    return value


def text(record: Mapping[str, Any], column: str, shape: Shape) -> str:
    return as_text(need(record, column, shape), column)


def as_text(value: Any, where: str) -> str:
    """`value` as text: text stays, a number is written out. Raises RowError for everything else and for unusable characters."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str):
        raise RowError("wrong type", f"{where!r} holds {kind_of(value)}; text was expected")
    if "\x00" in value:
        raise RowError("NUL byte", f"{where!r} holds a NUL character at position {value.index(chr(0))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError("broken Unicode", f"{where!r} holds half a surrogate pair at position {error.start}") from None
    return value


def seen(record: Mapping[str, Any]) -> str:
    names = [repr(str(name))[:40] for name in list(record)[:12]]
    return ", ".join(names) + (" …" if len(record) > 12 else "")


def kind_of(value: Any) -> str:
    """A value's type in words, for error messages."""
    names = {
        type(None): "null",
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        tuple: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
