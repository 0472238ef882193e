"""Shapes of records, recognised, named or described, each turned into the parts of a row of `helpers.data.turns`.

Eight shapes: alpaca, sharegpt, messages (OpenAI), prompt_completion, text, preference, kto and context_qa (a question
about a given text, with unanswerable ones), and what a LLaMA-Factory `dataset_info.json` describes. `auto` looks at
every record by itself: one file may hold several shapes. A record that fits none, or lacks an answer, raises RowError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from helpers.data.messages import read_turns, tools_of
from helpers.data.turns import RowError, Turn, as_text, checked, kind_of, pair
from helpers.errors import TunebookError

UNANSWERABLE = "The text does not say."
Record = Mapping[str, Any]

# Part → column names that mean it, the most specific first.
SYNONYMS = {
    "prompt": ("instruction", "question", "query", "prompt", "problem", "user", "inputs"),
    "response": ("output", "response", "answer", "answers", "completion", "sql", "target", "solution", "targets"),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
    "text": ("text", "raw_content", "content", "document", "body"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "context": ("context", "article", "passage"),
    "chosen": ("chosen", "chosen_response", "preferred"),
    "rejected": ("rejected", "rejected_response", "dispreferred", "non_preferred"),
    "label": ("label", "kto_tag"),
}
PARTS = (*(part for part in SYNONYMS if part != "text"), "query", "history")


@dataclass(frozen=True)
class Shape:
    """Which column plays which part. `shape["prompt"]` is a part's column, "" for none."""

    format: str
    columns: Mapping[str, str]
    turns: Callable[[Any], list[Turn]] = read_turns  # how a conversation is read
    exact: bool = False  # described by a dataset_info.json: no column is replaced by a synonym

    def __getitem__(self, part: str) -> str:
        return self.columns.get(part, "")

    def value(self, record: Record, part: str) -> Any:
        return record.get(self[part]) if self[part] else None

    def need(self, record: Record, part: str) -> Any:
        """The value of a part that must be there and not null. Raises RowError."""
        value = record.get(self[part])
        if value is None:
            state = "is null" if self[part] in record else "is not there"
            found = f"column {self[part]!r} {state}; {self.format} wants {self.wanted()}"
            raise RowError("wrong columns", f"{found}; columns seen: {seen(record)}")
        return value

    def wanted(self) -> str:
        """The columns a record must have, for error messages."""
        asked = ("messages",) if self["messages"] else ("context", "prompt", "response")
        return ", ".join(repr(self[part]) for part in (*asked, "chosen", "rejected", "label") if self[part])

    def __str__(self) -> str:
        return self.format + ": " + ", ".join(f"{part}={column}" for part, column in self.columns.items() if column)


SYSTEM = {"system": "system", "tools": "tools"}
SHAPES = {  # format → part → the column it is expected in; a synonym stands in for one that a record lacks
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history", **SYSTEM},
    "sharegpt": {"messages": "conversations", **SYSTEM},
    "messages": {"messages": "messages", **SYSTEM},
    "prompt_completion": {"prompt": "prompt", "response": "completion", **SYSTEM},
    "text": {"prompt": "text"},
    "preference": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", **SYSTEM},
    "kto": {"prompt": "prompt", "response": "completion", "label": "label", **SYSTEM},
    "context_qa": {"prompt": "question", "response": "answer", "context": "context", "system": "system"},
}
DETECTED = (  # a format and the parts that tell it; the first that fits is taken
    ("preference", "chosen", "rejected"),
    ("kto", "messages", "label"),
    ("messages", "messages"),
    ("kto", "prompt", "response", "label"),
    ("context_qa", "context", "question"),
    ("alpaca", "prompt", "answer"),
    ("alpaca", "input", "response"),
    ("text", "text"),
)
# LLaMA-Factory's names for how a role is written
TAGS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
TAGS |= {"observation_tag": "tool", "function_tag": "function_call"}


# ---------------------------------------------------------------- which shape


def named_shape(format: str, columns: str = "") -> Shape | None:
    """The shape that `format` and `columns` ("prompt=question,response=sql") name; None for "auto" alone."""
    chosen = {}
    for text in filter(None, (text.strip() for text in columns.split(","))):
        part, _, column = (piece.strip() for piece in text.partition("="))
        if part not in PARTS or not column:
            known = ", ".join(PARTS)
            raise TunebookError(f"columns has {text!r}; part=column pairs with commas between; parts are {known}.")
        chosen[part] = column
    if format == "auto":
        if not chosen:
            return None
        telling = {"chosen": "preference", "label": "kto", "messages": "messages", "context": "context_qa"}
        telling["response"] = "alpaca"
        format = next((name for part, name in telling.items() if part in chosen), "text")
    return Shape(format, {**SHAPES[format], **chosen})


def described_shape(described: dict[str, Any]) -> Shape:
    """The shape of an entry of LLaMA-Factory's dataset_info.json.

    An entry's `columns` replaces the whole default mapping: a column that it does not list plays no part, even when the
    file has it (`{"prompt", "response"}` leaves `input` out). That is how LLaMA-Factory reads it; `tags` likewise.
    Format: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
    """
    given, tags = described.get("columns"), described.get("tags") or {}
    formatting = described.get("formatting", "alpaca")
    if given is None:
        given = {"prompt": "instruction", "query": "input", "response": "output"} if formatting == "alpaca" else {}
    columns = {part: given.get("kto_tag" if part == "label" else part) or "" for part in PARTS}
    kind = formatting.replace("openai", "messages")
    if described.get("ranking"):
        kind = "preference"
    elif columns["label"]:
        kind = "kto"
    elif kind == "alpaca" and not columns["response"]:
        kind = "text"
    if formatting == "alpaca":
        return Shape(kind, columns, exact=True)
    columns["messages"] = columns["messages"] or "conversations"
    role, content = ("role", "content") if formatting == "openai" else ("from", "value")
    reading: dict[str, Any] = {
        "role_tag": tags.get("role_tag") or role,
        "content_tag": tags.get("content_tag") or content,
    }
    if spellings := {tags[tag]: role for tag, role in TAGS.items() if tags.get(tag)}:
        reading["spellings"] = {"system": "system"} | spellings
    return Shape(kind, columns, functools.partial(read_turns, **reading), exact=True)


def shape_of(record: Record, named: Shape | None) -> Shape:
    """The shape of one record: the named one with the columns that the record has, else the one that its columns tell.

    Raises RowError when nothing fits. Records of the same `look` have the same shape.
    """
    if named is not None and named.exact:
        return named
    shape = named or detect(record)
    if shape is None:
        fits = f"fit none of {', '.join(SHAPES)}; name the format or the columns"
        raise RowError("unknown shape", f"the columns {seen(record)} {fits}")
    found = dict(shape.columns)
    for part, column in shape.columns.items():
        if record.get(column) is None:
            other = first("text" if shape.format == "text" else part, record)
            found[part] = other or ("" if part in ("query", "history", *SYSTEM) else column)
    asked = {"preference": ["prompt"], "kto": ["prompt", "response"]}.get(shape.format, [])
    if any(record.get(found[part]) is None for part in asked):
        found["messages"] = first("messages", record)
    return replace(shape, columns=found)


def look(record: Record) -> tuple:
    """What the shape of a record depends on: its columns and the types of their values."""
    return tuple((name, list if is_talk(value) else type(value)) for name, value in record.items())


def first(part: str, record: Record) -> str:
    """The first column that means `part` and holds what may play it: true or false as a label, turns as messages."""
    kinds = {"label": lambda value: isinstance(value, bool), "messages": is_talk}
    fits = kinds.get(part, lambda value: value is not None)
    return next((name for name in SYNONYMS.get(part, ()) if fits(record.get(name))), "")


def detect(record: Record) -> Shape | None:
    """The shape that a record's columns and the types of what they hold tell; None when nothing fits."""
    has = {part: first(part, record) for part in SYNONYMS}
    has["answer"] = has["response"] or next((name for name in SYNONYMS["response"] if name in record), "")
    has["question"] = next((name for name in ("question", "unanswerable_question") if name in record), "")
    has["input"] = "input" if isinstance(record.get("input"), str) else ""
    format = next((format for format, *parts in DETECTED if all(has[part] for part in parts)), "")
    if not format:
        return None
    columns = dict(SHAPES[format])
    if format in ("alpaca", "preference"):
        columns["query"] = "input" if has["prompt"] == "instruction" else ""
    if format == "alpaca":
        columns |= {"prompt": has["prompt"] or "input", "response": has["answer"]}
    if format == "kto":
        columns |= {"label": has["label"], "messages": has["messages"]}
    return Shape(format, columns)


def is_talk(value: Any) -> bool:
    """Whether a value may be a conversation: a list, or the JSON of one, as CSV and parquet files hold them."""
    return isinstance(value, (list, tuple)) or (isinstance(value, str) and value.startswith("[{"))


# ---------------------------------------------------------------- a record's parts


def convert(
    record: Record, shape: Shape, unanswerable: str = UNANSWERABLE, joints: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The parts of the row (or rows: context_qa may hold two questions) that a record of this shape makes.

    Each is a dict of `kind`, `messages` and, where they apply, `tools`, `chosen`, `rejected`, `label`. joints: what
    stands before an instruction's "input" and behind a question's "context", where it is not a line end or two.
    Raises RowError with the reason when the record does not fit the shape, or has no answer.
    """
    joints = joints or {}
    if shape.format == "text":
        text = as_text(shape.need(record, "prompt"), shape["prompt"])
        if not text.strip():
            raise RowError("empty text", f"column {shape['prompt']!r} is empty")
        return [{"kind": "text", "messages": _said("text", text)}]
    if shape.format == "context_qa":
        return _context_qa(record, shape, unanswerable, joints.get("context", "\n\n"))
    tools = tools_of(shape.value(record, "tools"))
    if shape.format == "preference":
        sides = [_answer(record, shape, side) for side in ("chosen", "rejected")]
        asked = shape["messages"] or shape.value(record, "prompt") is not None
        prompt, chosen, rejected = pair(_prompt(record, shape, joints) if asked else [], *sides)
        return [{"kind": "preference", "messages": prompt, "tools": tools, "chosen": chosen, "rejected": rejected}]
    turns = _prompt(record, shape, joints)
    if not shape["messages"] and shape["response"]:
        if shape.value(record, "response") in (None, "", []):
            state = "is not there" if shape["response"] not in record else "is empty"
            raise RowError("no answer", f"column {shape['response']!r} {state}; columns seen: {seen(record)}")
        turns += _answer(record, shape, "response")
    if not shape["label"]:
        return [{"kind": "sft", "messages": checked(turns), "tools": tools}]
    label = record.get(shape["label"])
    if not isinstance(label, bool):
        raise RowError("no label", f"column {shape['label']!r} holds {kind_of(label)}; true or false was expected")
    return [{"kind": "kto", "messages": checked(turns), "tools": tools, "label": label}]


def _said(role: str, text: Any, column: str = "") -> list[Turn]:
    return [{"role": role, "content": as_text(text, column or role)}]


def _answer(record: Record, shape: Shape, part: str) -> list[Turn]:
    """An answer: its text, a message, or a list of messages."""
    value = shape.need(record, part)
    if isinstance(value, (list, tuple, Mapping)):
        return shape.turns([value] if isinstance(value, Mapping) else value)
    return _said("assistant", value, shape[part])


def _prompt(record: Record, shape: Shape, joints: Mapping[str, str]) -> list[Turn]:
    """The system prompt, the history and the question."""
    asked = shape.need(record, "messages" if shape["messages"] else "prompt")
    if shape["messages"] or isinstance(asked, (list, tuple)):
        turns = shape.turns(asked)
    else:
        turns, history = [], shape.value(record, "history") or []
        for said in history if isinstance(history, (list, tuple)) else [history]:
            if not isinstance(said, (list, tuple)) or len(said) != 2:
                found = f"{shape['history']!r} should be a list of pairs of question and answer"
                raise RowError("broken history", found)
            turns += _said("user", said[0], shape["history"]) + _said("assistant", said[1], shape["history"])
        columns = [column for column in (shape["prompt"], shape["query"]) if record.get(column)]
        text = joints.get("input", "\n").join(as_text(record[column], column) for column in columns)
        if not text.strip():
            raise RowError("no question", f"column {shape['prompt']!r} is empty")
        turns += _said("user", text)
    system = shape.value(record, "system")
    given = system and not (turns and turns[0]["role"] == "system")
    return _said("system", system, shape["system"]) + turns if given else turns


def _context_qa(record: Record, shape: Shape, unanswerable: str, joint: str) -> list[dict[str, Any]]:
    """A text, a question about it and the answer; a question that the text does not answer gets `unanswerable`."""
    context = as_text(shape.need(record, "context"), shape["context"])
    question, answer = record.get(shape["prompt"]), record.get(shape["response"])
    if isinstance(answer, Mapping):  # SQuAD's {"text": [...], "answer_start": [...]}
        answer = answer.get("text") or []
    if isinstance(answer, (list, tuple)):
        answer = next(iter(answer), "")
    impossible = record.get("is_impossible") is True or record.get("unanswerable") is True
    if answer is None and not impossible and shape["response"] not in record and question is not None:
        raise RowError("no answer", f"column {shape['response']!r} is not there; columns seen: {seen(record)}")
    asked = [] if question is None else [(question, unanswerable if impossible or not answer else answer)]
    if other := record.get("unanswerable_question"):
        asked.append((other, unanswerable))
    if not asked or not context.strip():
        raise RowError("no question", f"wanted {shape.wanted()}; columns seen: {seen(record)}")
    rows, plain = [], Shape("prompt_completion", SHAPES["prompt_completion"])
    for question, answer in asked:
        text = context + joint + as_text(question, shape["prompt"])
        rows += convert({"prompt": text, "completion": answer, "system": shape.value(record, "system")}, plain)
    return rows


def seen(record: Record) -> str:
    """The columns of a record, for error messages."""
    names = [repr(str(name))[:40] for name in list(record)[:12]]
    return ", ".join(names) + (" …" if len(record) > 12 else "")
