"""The row that every data step passes on, and its turns.

A row is a plain dict, so that it can be written as JSON and read in a notebook:

    {"id": "16 hex digits of the sha256 of its content",
     "source": "atlas_train", "file": "atlas_train.jsonl", "row": 12, "kind": "sft" | "preference" | "kto" | "text",
     "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}],
     "tools": None | "JSON text", "chosen": [...], "rejected": [...], "label": True, "meta": {"other": "columns"}}

`sft` rows end with an assistant turn, `preference` rows hold the prompt in `messages`, `kto` rows are `sft` rows with
a `label`, `text` rows hold one message with the role "text". `file` and `row` (from 1) say where a row came from; they
are not part of its content, nor is `source`. Steps take and give batches (`list[Row]`), never the whole set.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, NotRequired, TypedDict

Row = dict[str, Any]
BATCH_ROWS = 1000
EXAMPLE_CHARS = 400
PLACE = ("source", "file", "row")  # where a row came from
# What every chat template can render; tool results stand between an assistant's call and its answer.
NEXT = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
WHOLE_DIGITS = 40  # a Decimal of more is no whole number that anybody wrote
NAMES_OF_TYPES = {type(None): "null", bool: "true/false", int: "a number", float: "a number", str: "text"}
NAMES_OF_TYPES |= {list: "a list", tuple: "a list", dict: "an object"}
# Made once: json.dumps makes an encoder at each call, a quarter of its time for a row.
_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


class Turn(TypedDict):
    """One message. role: system, user, assistant, tool or text. tool_calls: OpenAI's, with arguments as an object.
    weight: in the loss, 0 for a turn that is not trained. untrained: parts of `content` that are not, [begin, end).
    unread: keys that play no part, until they are counted."""

    role: str
    content: str
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    weight: NotRequired[float]
    untrained: NotRequired[list[list[int]]]
    unread: NotRequired[list[str]]


class RowError(Exception):
    """One record cannot be used. reason: a few fixed words to count by; detail: what was seen and what was wanted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


# ---------------------------------------------------------------- rows


def content_id(row: Row) -> str:
    """Sixteen hex digits that depend on nothing but what the model would learn from."""
    get = row.get
    content = [row["kind"], row["messages"], get("tools"), get("chosen"), get("rejected"), get("label")]
    return hashlib.sha256(_canonical(content).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def make_row(
    kind: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    source: str = "",
    file: str = "",
    row: int = 0,
    tools: str | None = None,
    meta: dict | None = None,
    **answers: Any,
) -> Row:
    """A row with its id. row: from 1 inside `file`. answers: a pair's `chosen` and `rejected`, a KTO row's `label`."""
    made: Row = {"id": "", "source": source, "file": file, "row": row, "kind": kind, "messages": messages}
    made |= {"tools": tools, **answers, "meta": meta or {}}
    made["id"] = content_id(made)
    return made


def as_sft(row: Row) -> Row:
    """A row that is trained on its own: a pair gives its chosen answer, a KTO row what it holds."""
    kept = {name: row[name] for name in (*PLACE, "meta")}
    return make_row("sft", row["messages"] + row.get("chosen", []), tools=row.get("tools"), **kept)


def all_messages(row: Row) -> list[dict]:
    """Every message of a row, the chosen and rejected answers of a preference row last."""
    messages = row["messages"]
    return messages + row["chosen"] + row["rejected"] if "chosen" in row else messages


def map_contents(row: Row, change: Callable[[str], str]) -> Row:
    """A copy of `row` with `change` applied to every message's text, thoughts and arguments of calls, and a new id;
    `row` when nothing changed."""

    def changed(turns: list[dict]) -> list[dict]:
        return [map_turn(turn, change) for turn in turns]

    made = row | {part: changed(row[part]) for part in ("messages", "chosen", "rejected") if part in row}
    return row if made == row else made | {"id": content_id(made)}


def map_turn(turn: dict, change: Callable[[str], str]) -> dict:
    """A copy of a turn with `change` applied to its texts; parts of the content that are not trained move with it."""
    if len(turn) == 2:  # role and content
        return {"role": turn["role"], "content": change(turn["content"])} if turn.get("content") else turn
    made = turn | {key: map_strings(turn[key], change) for key in ("content", "reasoning") if turn.get(key)}
    if turn.get("tool_calls"):
        made["tool_calls"] = [call | {"function": map_strings(call["function"], change)} for call in turn["tool_calls"]]
    if turn.get("untrained") and made["content"] != turn["content"]:
        edges = [0, *sorted({edge for part in turn["untrained"] for edge in part}), len(turn["content"])]
        pieces = [change(turn["content"][begin:end]) for begin, end in itertools.pairwise(edges)]
        places = dict(zip(edges[1:], itertools.accumulate(map(len, pieces)), strict=True)) | {0: 0}
        made |= {"content": "".join(pieces), "untrained": [[places[b], places[e]] for b, e in turn["untrained"]]}
    return made


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with `change` applied to every text in it, the keys of objects too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): map_strings(item, change) for key, item in value.items()}
    return value


def said_in(turn: Mapping[str, Any]) -> str:
    """All that a turn says as one text: its thoughts, its content, its calls as JSON."""
    content = turn.get("content") or ""
    if not (calls := turn.get("tool_calls")) and not turn.get("reasoning"):
        return content
    spelt = json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else ""
    return "\n".join(filter(None, [turn.get("reasoning"), content, spelt]))


def with_system(row: Row, system: str) -> Row:
    """The row with a system prompt where it has none; plain text takes none."""
    if row["kind"] == "text" or row["messages"][0]["role"] == "system":
        return row
    made = row | {"messages": [{"role": "system", "content": system}, *row["messages"]]}
    return made | {"id": content_id(made)}


def text_of(row: Row) -> str:
    """The whole example as one text: every message, call and tool, for comparing rows with each other."""
    parts = [said_in(turn) for turn in all_messages(row)]
    return "\n".join([*parts, row["tools"]] if row.get("tools") else parts)


def spoken(row: Row) -> list[str]:
    """The texts of a row that are its own: every message but the system prompt, which all rows of a set may share."""
    every = (turn for turn in all_messages(row) if turn["role"] != "system")
    return ["\n".join(filter(None, (turn.get("reasoning"), turn.get("content")))) for turn in every]


def shown(row: Row, chars: int = EXAMPLE_CHARS) -> str:
    """The start of an example for people: without the system prompt, which every row of a set may share."""
    said = [turn for turn in all_messages(row) if turn["role"] != "system"]
    return "\n".join(map(said_in, said))[:chars]


def answer_of(row: Row) -> str:
    """What the model would learn to say: the chosen answer, the last assistant turn with its calls, or the text."""
    return said_in((row.get("chosen") or row["messages"])[-1])


def batches(rows: Iterable[Row], size: int = BATCH_ROWS) -> Iterator[list[Row]]:
    """Consecutive lists of up to `size` rows."""
    remaining = iter(rows)
    while batch := list(itertools.islice(remaining, size)):
        yield batch


# ---------------------------------------------------------------- turns


def pop_unread(parts: Row) -> set[str]:
    """The keys of messages that play no part, taken out of a row's turns."""
    return {f"messages: {key}" for turn in all_messages(parts) for key in turn.pop("unread", ())}


def checked(turns: list[Turn]) -> list[Turn]:
    """The turns, when their order can be rendered and the last one is an answer. Raises RowError."""
    if not turns:
        raise RowError("no messages", "the conversation is empty")
    before = ""
    for number, turn in enumerate(turns, 1):
        role, allowed = turn["role"], NEXT[before]
        if role not in allowed:
            found = f"message {number} is {role!r} " + (f"after {before!r}" if before else "at the start")
            raise RowError("roles out of order", f"{found}; {' or '.join(allowed)} was expected")
        if role == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise RowError("no answer", f"message {number} (assistant) is empty")
        before = role
    if before != "assistant":
        found = f"the last of {len(turns)} messages is {before!r}"
        raise RowError("no answer", f"{found}; an assistant's answer was expected")
    return turns


def pair(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """Prompt and the two answers. Whole conversations are cut where they part ways, the prompt before that.

    Raises RowError when the two do not answer the same prompt, or are the same answer.
    """
    if not chosen or not rejected:
        raise RowError("no answer", "the chosen or the rejected answer is empty")
    alike = itertools.takewhile(lambda turns: turns[0] == turns[1], zip(chosen[:-1], rejected[:-1], strict=False))
    head = [turn for turn, _ in alike]
    chosen, rejected = chosen[len(head) :], rejected[len(head) :]
    bare = [turn for turn in prompt if turn["role"] != "system"]
    if head and bare and head[-len(bare) :] == bare:  # the conversations repeat the prompt that has its own column
        prompt = head if head[0]["role"] == "system" else prompt[: len(prompt) - len(bare)] + head
    else:
        prompt = prompt + head
    if not prompt:
        raise RowError("no question", "there is no prompt, and chosen and rejected share no first message")
    if chosen == rejected:
        raise RowError("same answer twice", "chosen and rejected are the same")
    for answer in (chosen, rejected):
        checked(prompt + answer)
    if (last := prompt[-1]["role"]) not in ("user", "tool"):
        raise RowError("roles out of order", f"the prompt ends with {last!r}; a question was expected")
    return prompt, chosen, rejected


# ---------------------------------------------------------------- values


def as_text(value: Any, where: str) -> str:
    """`value` as text: text stays, a number is written out. Raises RowError for all else and unusable characters."""
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


def plain(value: Any, where: str) -> Any:
    """`value` as plain JSON with its texts checked: parquet's decimals become numbers, its dates ISO 8601 text, bytes
    the text that they hold, numpy's values Python's."""
    if isinstance(value, str):
        return as_text(value, where)
    if isinstance(value, Mapping):
        return {as_text(str(key), where): plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, where) for item in value]
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal) and value.is_finite():
        whole = value.adjusted() < WHOLE_DIGITS and value == value.to_integral_value()
        return int(value) if whole else plain(float(value), where)
    if isinstance(value, bytes):
        return as_text(value.decode("utf-8", "surrogateescape"), where)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where)
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    found = value if isinstance(value, float) else kind_of(value)
    raise RowError("wrong type", f"{where!r} holds {found}; text, finite numbers, lists and objects were expected")


def from_json(text: str, reason: str, what: str) -> Any:
    """The value of a JSON text that stands in a column. Raises RowError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(reason, f"{what} should be JSON and is {text[:80]!r}") from None


def kind_of(value: Any) -> str:
    """A value's type in words, for error messages."""
    return NAMES_OF_TYPES.get(type(value), type(value).__name__)
