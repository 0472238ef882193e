"""Shapes of records, recognised, named or described, each turned into the parts of a row of `helpers.data.turns`.

Eight shapes: alpaca, sharegpt, messages (OpenAI), prompt_completion, text, preference, kto and context_qa (a question
about a given text, with unanswerable ones), what a LLaMA-Factory `dataset_info.json` describes, and known public sets.
`auto` looks at every record by itself: one file may hold several shapes. A record that fits none, lacks an answer, or
has a column of a known meaning that would play no part, raises RowError.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from helpers.data import public_sets
from helpers.data.messages import REASONING, read_turns, tools_of
from helpers.data.public_sets import LABELS, MISSING, NOTHING, form, is_marked, is_talk, name_of, names_in, talk
from helpers.data.turns import RowError, Turn, as_text, checked, pair
from helpers.errors import TunebookError

UNANSWERABLE = "The text does not say."
Record = Mapping[str, Any]

# Part → column names that mean it, the most specific first; capitals, blanks and hyphens in a name do not matter.
SYNONYMS = {
    "prompt": ("instruction", "question", "query", "prompt", "problem", "user", "inputs"),
    "response": ("output", "response", "answer", "answers", "completion", "sql", "target", "solution", "targets"),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "data"),
    "text": ("text", "raw_content", "content", "document", "body"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "context": ("context", "article", "passage", "schema", "paragraph"),
    "chosen": ("chosen", "chosen_response", "preferred", "chosen_messages"),
    "rejected": ("rejected", "rejected_response", "dispreferred", "non_preferred", "rejected_messages"),
    "label": ("label", "kto_tag"),
    "reasoning": (*REASONING, "cot", "complex_cot", "chain_of_thought", "thinking_trajectory"),
    "summary": ("summary", "highlights"),
    "source": ("document", "article", "text", "dialogue", "dialog", "content", "body", "passage"),
    "stem": ("question_stem", "ctx", "goal", "premise", "sentence"),
}
BESIDE = {  # what else belongs to a question and is never put aside in silence
    "context": ("evidence", "support", "background", "knowledge"),
    "query": ("input",),
    "history": ("history",),
    "choices": ("choices", "options", "endings"),
}
PARTS = (*(part for part in SYNONYMS if part not in ("text", "summary", "source", "stem")), *BESIDE)


@dataclass(frozen=True)
class Shape:
    """Which column plays which part. `shape["prompt"]` is a part's column, "" for none."""

    format: str
    columns: Mapping[str, str]
    turns: Callable[[Any], list[Turn]] = read_turns  # how a conversation is read
    exact: bool = False  # described by a dataset_info.json: no column is replaced by a synonym
    mapped: tuple[str, ...] = ()  # columns that the user named: the others are put aside on purpose
    compared: str = ""  # the columns of one of `public_sets.COMPARED`
    guarded: tuple[tuple[str, str], ...] = ()  # (part, column) that must not be lost in silence

    def __getitem__(self, part: str) -> str:
        return self.columns.get(part, "")

    def value(self, record: Record, part: str) -> Any:
        return record.get(self[part]) if self[part] else None

    def text(self, record: Record, part: str) -> str:
        """The text of a part whose column may be a list of texts, or several columns ("schema+evidence")."""
        if not (column := self.columns.get(part)):
            return ""
        if isinstance(value := record.get(column), str):
            return "" if value in NOTHING else as_text(value, column)
        values = [record.get(name) for name in ([column] if column in record else column.split("+"))]
        texts = [one for value in values for one in (value if isinstance(value, (list, tuple)) else [value])]
        return "\n".join(as_text(text, column) for text in texts if text not in NOTHING)

    def has_choices(self, record: Record) -> bool:
        return (column := self.columns.get("choices", "")) != "" and (column in record or "+" in column)

    def need(self, record: Record, part: str) -> Any:
        """The value of a part that must be there and not null. Raises RowError."""
        value = record.get(self[part])
        if value is None:
            state = "is null" if self[part] in record else "is not there"
            found = f"column {self[part]!r} {state}; {self.format} wants {self.wanted()}"
            raise RowError("wrong columns", f"{found}; columns seen: {seen(record)}")
        return value

    def used(self) -> set[str]:
        """The columns that play a part."""
        columns = (*self.columns.values(), *self.compared.split())
        return {name for column in columns for name in (column, *column.split("+"))}

    def wanted(self) -> str:
        """The columns a record must have, for error messages."""
        asked = ("messages",) if self["messages"] else ("context", "prompt", "response")
        return ", ".join(repr(self[part]) for part in (*asked, "chosen", "rejected", "label") if self[part])

    def __str__(self) -> str:
        if self.compared:
            return f"preference: {self.compared}"
        return self.format + ": " + ", ".join(f"{part}={column}" for part, column in self.columns.items() if column)


SYSTEM = {"system": "system", "tools": "tools"}
ASKED = {"prompt": "prompt", "context": "context", "choices": "choices", **SYSTEM}
ANSWERED = {**ASKED, "reasoning": "reasoning"}
OPTIONAL = ("query", "history", "context", "choices", "reasoning", *SYSTEM)
SHAPES = {  # format → part → the column it is expected in; a synonym stands in for one that a record lacks
    "alpaca": {**ANSWERED, "prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    "sharegpt": {"messages": "conversations", **SYSTEM},
    "messages": {"messages": "messages", **SYSTEM},
    "prompt_completion": {**ANSWERED, "response": "completion"},
    "text": {"prompt": "text"},
    "preference": {**ASKED, "chosen": "chosen", "rejected": "rejected"},
    "kto": {**ANSWERED, "response": "completion", "label": "label"},
    "context_qa": {**ANSWERED, "prompt": "question", "response": "answer"},
}
DETECTED = (  # a format and the parts that tell it; the first that fits is taken
    ("preference", "chosen", "rejected"),
    ("kto", "messages", "verdict"),
    ("messages", "messages"),
    ("kto", "prompt", "response", "verdict"),
    ("alpaca", "choices"),
    ("alpaca", "source", "summary"),
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
    left = dict.fromkeys(("context", "choices", "query", "reasoning") if chosen else (), "")
    if chosen.get("prompt", "instruction") == "instruction":
        left.pop("query", None)
    mapped = tuple(name for column in chosen.values() for name in column.split("+"))
    return Shape(format, {**SHAPES[format], **left, **chosen}, mapped=mapped)


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
    reading: dict[str, Any] = {t: tags.get(t) or key for t, key in (("role_tag", role), ("content_tag", content))}
    if spellings := {tags[tag]: role for tag, role in TAGS.items() if tags.get(tag)}:
        reading["spellings"] = {"system": "system"} | spellings
    return Shape(kind, columns, functools.partial(read_turns, **reading), exact=True)


def shape_of(record: Record, named: Shape | None) -> Shape:
    """The shape of one record: the named one with the columns that the record has, else the one that its columns tell.

    Raises RowError when nothing fits. Records of the same `look` have the same shape.
    """
    if named is not None and named.exact:
        return named
    names = names_in(record)
    if named is None and (told := public_sets.told_by(record, names, public_sets.COMPARED)):
        return Shape("preference", SHAPES["preference"], compared=told)
    shape = named or named_shape("auto", public_sets.mapped(record, names)) or detect(record, names)
    if shape is None:
        fits = f"fit none of {', '.join(SHAPES)}; name the format or the columns"
        raise RowError("unknown shape", f"the columns {seen(record)} {fits}")
    found = dict(shape.columns)
    for part, column in shape.columns.items():
        if record.get(column) is None and "+" not in column:
            other = column and first("text" if shape.format == "text" else part, record, names)
            found[part] = other or ("" if part in OPTIONAL else column)
    asked = {"preference": ["prompt"], "kto": ["prompt", "response"]}.get(shape.format, [])
    if any(record.get(found[part]) is None for part in asked):
        found["messages"] = first("messages", record, names)
    shape = replace(shape, columns=found)
    is_named, is_mapped = named is not None, bool(shape.mapped)  # public sets are mapped too
    return shape if is_named and is_mapped else replace(shape, guarded=_guarded(shape, names, is_named or is_mapped))


def _guarded(shape: Shape, names: Mapping[str, str], is_named: bool) -> tuple[tuple[str, str], ...]:
    """The columns with a known meaning that play no part. A format that was named decides what it says itself."""
    parts = [part for part in SYNONYMS if part not in ("system", "source", "stem", "reasoning")]
    if is_named:
        parts = [] if shape.format == "text" else ["context", "summary"]
    elif shape.format == "text":
        parts = ["prompt", "response", "summary", "label"]
    meant = [(part, name) for part in parts for name in SYNONYMS[part] if name not in ("user", "data")]
    if shape.format != "text":
        meant += [(part, name) for part, others in BESIDE.items() for name in others]
        meant += [("context", name) for name in SYNONYMS["stem"] if shape["choices"]]
    used, templated = shape.used(), [("template", shape["prompt"])] * (shape.format == "text" and not is_named)
    return (*((part, names[name]) for part, name in meant if names.get(name, "") not in {"", *used}), *templated)


def look(record: Record) -> tuple:
    """What the shape of a record depends on: its columns and the forms of their values."""
    return tuple((name, form(value)) for name, value in record.items())


def first(part: str, record: Record, names: Mapping[str, str]) -> str:
    """The first column that means `part` and holds what may play it: turns as messages, a text or turns as answer."""
    fits: Callable[[Any], bool] = {"messages": is_talk, "response": public_sets.is_answer}.get(
        part, functools.partial(operator.is_not, None)
    )
    return next((names[name] for name in SYNONYMS.get(part, ()) if name in names and fits(record[names[name]])), "")


def detect(record: Record, names: Mapping[str, str]) -> Shape | None:
    """The shape that a record's columns and the types of what they hold tell; None when nothing fits."""
    has = {part: first(part, record, names) for part in SYNONYMS}
    empty = (names[name] for name in SYNONYMS["response"] if name in names and record[names[name]] is None)
    has["answer"] = has["response"] or next(empty, "")
    has["question"] = next((names[name] for name in ("question", "unanswerable_question") if name in names), "")
    has["input"] = names["input"] if isinstance(record.get(names.get("input", "input")), str) else ""
    if not has["messages"] and is_marked(record.get(has["text"])):
        has["messages"] = has["text"]
    choices, key = public_sets.choices_in(record, names)
    has["choices"] = choices if has["prompt"] or has["stem"] else ""
    judged = has["messages"] and isinstance(record.get(has["label"]), bool)
    sure = bool(judged) or {"prompt", "completion"} <= names.keys()
    has["label"] = has["label"] or (names.get("label", "") if sure else "")  # an empty one is no verdict
    has["verdict"] = has["label"] if has["label"] and (sure or name_of(has["label"]) == "kto_tag") else ""
    has["source"] = "" if has["prompt"] else has["source"]
    format = next((format for format, *parts in DETECTED if all(has[part] for part in parts)), "")
    columns = dict(SHAPES.get(format, {}))
    if format in ("alpaca", "preference"):
        columns["query"] = has["input"] if name_of(has["prompt"]) == "instruction" else ""
        columns["prompt"] = has["prompt"] or has["input"] or columns["prompt"]
    if format == "alpaca" and has["choices"]:
        columns |= {"prompt": has["prompt"] or has["stem"], "choices": has["choices"], "response": key}
    elif format == "alpaca" and has["source"] and has["summary"]:
        columns |= {"prompt": has["source"], "response": has["summary"], "context": ""}
    elif format == "alpaca":
        columns["response"] = has["answer"]
    columns |= {part: has[part] for part in {"messages": ["messages"], "kto": ["messages", "label"]}.get(format, ())}
    return Shape(format, columns) if format else None


# ---------------------------------------------------------------- a record's parts


def convert(
    record: Record, shape: Shape, unanswerable: str = UNANSWERABLE, joints: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The parts of the row (or rows: context_qa may hold two questions) that a record of this shape makes.

    Each is a dict of `kind`, `messages` and, where they apply, `tools`, `chosen`, `rejected`, `label`. joints: what
    stands before an "input" and behind a "context". Raises RowError where it does not fit, or fits in two ways.
    """
    given, joints = public_sets.compared(record, shape.compared) if shape.compared else record, joints or {}
    qa = shape.format == "context_qa"
    rows = _context_qa(given, shape, unanswerable, joints) if qa else [_convert(given, shape, joints)]
    for part, column in shape.guarded:
        if (value := record.get(column)) not in NOTHING and not public_sets.is_told(value, part, rows):
            aside = dict(reversed(shape.guarded)) | {part: column}
            raise RowError("two readings", public_sets.readings(record, shape.format, shape.columns, aside, part))
    return rows


def _convert(record: Record, shape: Shape, joints: Mapping[str, str]) -> dict[str, Any]:
    if shape.format == "text":
        text = as_text(shape.need(record, "prompt"), shape["prompt"])
        if not text.strip():
            raise RowError("empty text", f"column {shape['prompt']!r} is empty")
        return {"kind": "text", "messages": _said("text", text)}
    tools = tools_of(shape.value(record, "tools"))
    if shape.format == "preference":
        sides = [_answer(record, shape, side) for side in ("chosen", "rejected")]
        asked = shape["messages"] or shape.value(record, "prompt") is not None
        prompt = _prompt(record, shape, joints) if asked else []
        prompt, chosen, rejected = pair(prompt, *public_sets.without_prompt(prompt, sides))
        return {"kind": "preference", "messages": prompt, "tools": tools, "chosen": chosen, "rejected": rejected}
    turns = _prompt(record, shape, joints)
    if not shape["messages"] and shape["response"]:
        if shape.value(record, "response") in (*MISSING, []):
            state = "is not there" if shape["response"] not in record else "is empty"
            raise RowError("no answer", f"column {shape['response']!r} {state}; columns seen: {seen(record)}")
        turns += _answer(record, shape, "response")
        if thoughts := shape.text(record, "reasoning"):
            turns[-1].setdefault("reasoning", thoughts)
    if not shape["label"]:
        return {"kind": "sft", "messages": checked(turns), "tools": tools}
    value = record.get(shape["label"])
    if (label := LABELS.get(str(value).strip().casefold())) is None:
        found = f"column {shape['label']!r} holds {str(value)[:40]!r}; format=kto wants true or false"
        raise RowError("no label", f"{found}. To leave it out: {public_sets.setting(record, shape.columns, label='')}")
    return {"kind": "kto", "messages": checked(turns), "tools": tools, "label": label}


# ---------------------------------------------------------------- turns of a record


def _said(role: str, text: Any, column: str = "") -> list[Turn]:
    return [{"role": role, "content": as_text(text, column or role)}]


def _answer(record: Record, shape: Shape, part: str) -> list[Turn]:
    """An answer: its text, a message, or a list of messages."""
    value = shape.need(record, part)
    if part == "response" and shape.has_choices(record):
        choices = public_sets.choices_of(record, shape["choices"])
        value = public_sets.picked(value, choices, "+" in shape["choices"])
    if part == "response" and shape["tools"] and public_sets.CALLS.match(str(value)) and shape.value(record, "tools"):
        return shape.turns([{"role": "function_call", "content": value}])
    value = value.get("value") if isinstance(value, Mapping) and "aliases" in value else value  # TriviaQA's
    if isinstance(value, (list, tuple, Mapping)) or is_marked(value) or public_sets.MESSAGES.match(str(value)):
        value = [value] if isinstance(value, Mapping) else value
        bare = isinstance(value, (list, tuple)) and any(isinstance(one, str) for one in value)
        return shape.turns(value if bare else talk(value))
    return _said("assistant", str(value).lower() if isinstance(value, bool) else value, shape[part])


def _prompt(record: Record, shape: Shape, joints: Mapping[str, str]) -> list[Turn]:
    """The system prompt, the history and the question."""
    asked = shape.need(record, "messages" if shape["messages"] else "prompt")
    if shape["messages"] or isinstance(asked, (list, tuple)) or is_marked(asked):
        turns = shape.turns(talk(asked))
    else:
        turns, history = [], shape.value(record, "history") or []
        for said in history if isinstance(history, (list, tuple)) else [history]:
            if not isinstance(said, (list, tuple)) or len(said) != 2:
                raise RowError("broken history", f"{shape['history']!r} should be a list of pairs, question and answer")
            turns += _said("user", said[0], shape["history"]) + _said("assistant", said[1], shape["history"])
        text = joints.get("input", "\n").join(filter(None, (shape.text(record, "prompt"), shape.text(record, "query"))))
        if not text.strip():
            raise RowError("no question", f"column {shape['prompt']!r} is empty")
        if shape.has_choices(record):
            choices = public_sets.choices_of(record, shape["choices"])
            text = "\n".join([text, *(f"{label}. {choice}" for label, choice in choices)])
        turns += _said("user", joints.get("context", "\n\n").join(filter(None, (shape.text(record, "context"), text))))
    system = shape.text(record, "system")
    given = system and not (turns and turns[0]["role"] == "system")
    return _said("system", system, shape["system"]) + turns if given else turns


def _context_qa(record: Record, shape: Shape, unanswerable: str, joints: Mapping[str, str]) -> list[dict[str, Any]]:
    """A text, a question about it and the answer; a question that the text does not answer gets `unanswerable`.

    What says so is `is_impossible`, `unanswerable` or an empty list of answers; an empty text is no answer.
    """
    if "+" not in shape["context"]:
        shape.need(record, "context")
    question, answer = record.get(shape["prompt"]), record.get(shape["response"])
    if isinstance(answer, Mapping):  # SQuAD's {"text": [...], "answer_start": [...]}
        answer = answer.get("text") or []
    impossible = record.get("is_impossible") is True or record.get("unanswerable") is True or answer == []
    if isinstance(answer, (list, tuple)):
        answer = next(iter(answer), "")
    asked = [] if question is None else [(question, unanswerable if impossible else answer)]
    if other := record.get("unanswerable_question"):
        asked.append((other, unanswerable))
    if not asked:
        raise RowError("no question", f"wanted {shape.wanted()}; columns seen: {seen(record)}")
    plain = replace(shape, format="alpaca")
    return [_convert({**record, shape["prompt"]: q, shape["response"]: a}, plain, joints) for q, a in asked]


def seen(record: Record) -> str:
    """The columns of a record, for error messages."""
    return ", ".join(repr(str(name))[:40] for name in list(record)[:12]) + " …" * (len(record) > 12)
