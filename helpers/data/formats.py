"""Shapes of records, recognised, named or described, each turned into the parts of a row of `helpers.data.turns`.

Eight shapes: alpaca, sharegpt, messages (OpenAI), prompt_completion, text, preference, kto and context_qa (a question
about a given text, with unanswerable ones), and what a LLaMA-Factory `dataset_info.json` describes. `auto` looks at
every record by itself: one file may hold several shapes. A record that fits none, or lacks an answer, raises RowError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from helpers.data.turns import SPELLINGS, RowError, Turn, as_text, checked, kind_of, pair, read_turns, tools_of
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
    """Which column plays which part, and how roles are written. `shape["prompt"]` is a part's column, "" for none."""

    format: str
    columns: Mapping[str, str]
    spellings: Mapping[str, str] = field(default_factory=lambda: SPELLINGS)
    role_tag: str = ""
    content_tag: str = ""
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

    def turns(self, value: Any) -> list[Turn]:
        return read_turns(value, self.spellings, self.role_tag, self.content_tag)

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
        format = next((name for part, name in telling.items() if part in chosen), "")
        format = format or ("alpaca" if "response" in chosen else "text")
    return Shape(format, {**SHAPES[format], **chosen})


def described_shape(described: dict[str, Any]) -> Shape:
    """The shape of an entry of LLaMA-Factory's dataset_info.json.

    An entry's `columns` replaces the whole default mapping: a column that it does not list plays no part, even when the
    file has it (`{"prompt", "response"}` leaves `input` out). That is how LLaMA-Factory reads it; `tags` likewise.
    Format: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
    """
    given, tags, formatting = described.get("columns"), described.get("tags"), described.get("formatting", "alpaca")
    if given is None:
        given = {"prompt": "instruction", "query": "input", "response": "output"}
    alpaca, ranking = formatting == "alpaca", described.get("ranking")
    column = {part: given.get("kto_tag" if part == "label" else part) or "" for part in PARTS}
    unused = {"messages"} if alpaca else {"prompt", "query", "response", "history"}
    unused |= {"response", "label"} if ranking else {"chosen", "rejected"}
    columns = {part: name for part, name in column.items() if part not in unused}
    plain = "text" if alpaca and not column["response"] else formatting.replace("openai", "messages")
    kind = "preference" if ranking else "kto" if column["label"] else plain
    if alpaca:
        return Shape(kind, columns, exact=True)
    columns["messages"] = columns["messages"] or "conversations"
    if tags is None:
        keys = ("role", "content") if formatting == "openai" else ("from", "value")
        return Shape(kind, columns, SPELLINGS, *keys, exact=True)
    meanings = {"user": "user", "assistant": "assistant", "observation": "tool", "function": "function_call"}
    spellings = {tags[f"{tag}_tag"]: role for tag, role in meanings.items() if tags.get(f"{tag}_tag")}
    spellings.setdefault(tags.get("system_tag") or "system", "system")
    keys = (tags.get("role_tag") or "from", tags.get("content_tag") or "value")
    return Shape(kind, columns, spellings, *keys, exact=True)


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
    return tuple((name, "[{" if is_json_list(value) else type(value)) for name, value in record.items())


def first(part: str, record: Record) -> str:
    """The first column that means `part` and has something in it."""
    return next((name for name in SYNONYMS.get(part, ()) if record.get(name) is not None), "")


def detect(record: Record) -> Shape | None:
    """The shape that a record's non-empty columns and their types tell; None when nothing fits."""
    prompt, response, messages, context = (
        first(part, record) for part in ("prompt", "response", "messages", "context")
    )
    label = next((name for name in SYNONYMS["label"] if isinstance(record.get(name), bool)), "")
    answer = response or next((name for name in SYNONYMS["response"] if name in record), "")
    talk = record.get(messages)
    own = {}
    if first("chosen", record) and first("rejected", record):
        format = "preference"
    elif isinstance(talk, (list, tuple)) or is_json_list(talk):
        format = "kto" if label else "sharegpt" if messages == "conversations" else "messages"
    elif label and prompt and response:
        format, own = "kto", {"label": label}
    elif context and ("question" in record or "unanswerable_question" in record):
        format = "context_qa"
    elif (prompt, response) == ("prompt", "completion"):
        format = "prompt_completion"
    elif prompt and answer:
        format, own = "alpaca", {"response": answer}
    elif response and isinstance(record.get("input"), str):
        format, own = "alpaca", {"prompt": "input"}
    elif first("text", record):
        format = "text"
    else:
        return None
    if format in ("alpaca", "preference"):
        own["query"] = "input" if prompt == "instruction" else ""
    return Shape(format, SHAPES[format] | own)


def is_json_list(value: Any) -> bool:
    """Whether a text is the JSON of a list of objects, as CSV and parquet files hold conversations."""
    return isinstance(value, str) and value.startswith("[{")


# ---------------------------------------------------------------- a record's parts


def convert(record: Record, shape: Shape, unanswerable: str = UNANSWERABLE) -> list[dict[str, Any]]:
    """The parts of the row (or rows: context_qa may hold two questions) that a record of this shape makes.

    Each is a dict of `kind`, `messages` and, where they apply, `tools`, `chosen`, `rejected`, `label`.
    Raises RowError with the reason when the record does not fit the shape, or has no answer.
    """
    if shape.format == "text":
        text = as_text(shape.need(record, "prompt"), shape["prompt"])
        if not text.strip():
            raise RowError("empty text", f"column {shape['prompt']!r} is empty")
        return [{"kind": "text", "messages": _said("text", text)}]
    if shape.format == "context_qa":
        return _context_qa(record, shape, unanswerable)
    tools = tools_of(shape.value(record, "tools"))
    if shape.format == "preference":
        sides = [_answer(record, shape, side) for side in ("chosen", "rejected")]
        asked = shape["messages"] or shape.value(record, "prompt") is not None
        prompt, chosen, rejected = pair(_prompt(record, shape) if asked else [], *sides)
        return [{"kind": "preference", "messages": prompt, "tools": tools, "chosen": chosen, "rejected": rejected}]
    turns = _prompt(record, shape)
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


def _prompt(record: Record, shape: Shape) -> list[Turn]:
    """The system prompt, the history and the question."""
    asked = shape.need(record, "messages" if shape["messages"] else "prompt")
    if shape["messages"] or isinstance(asked, (list, tuple)):
        turns = shape.turns(asked)
    else:
        turns, history = [], shape.value(record, "history") or []
        pairs = isinstance(history, (list, tuple)) and all(isinstance(pair, (list, tuple)) for pair in history)
        if not pairs or any(len(pair) != 2 for pair in history):
            raise RowError("broken history", f"{shape['history']!r} should be a list of pairs of question and answer")
        for question, answer in history:
            turns += _said("user", question, shape["history"]) + _said("assistant", answer, shape["history"])
        columns = [column for column in (shape["prompt"], shape["query"]) if column and record.get(column)]
        text = "\n".join(as_text(record[column], column) for column in columns)
        if not text.strip():
            raise RowError("no question", f"column {shape['prompt']!r} is empty")
        turns += _said("user", text)
    system = shape.value(record, "system")
    given = system and not (turns and turns[0]["role"] == "system")
    return _said("system", system, shape["system"]) + turns if given else turns


def _context_qa(record: Record, shape: Shape, unanswerable: str) -> list[dict[str, Any]]:
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
    system = shape.value(record, "system")
    opening = _said("system", system, shape["system"]) if system else []
    rows = []
    for question, answer in asked:
        text = f"{context}\n\n{as_text(question, shape['prompt'])}"
        turns = opening + _said("user", text) + _said("assistant", answer, shape["response"])
        rows.append({"kind": "sft", "messages": checked(turns)})
    return rows


def seen(record: Record) -> str:
    """The columns of a record, for error messages."""
    names = [repr(str(name))[:40] for name in list(record)[:12]]
    return ", ".join(names) + (" …" if len(record) > 12 else "")
