"""The row that every data step passes on, its turns, and how turns of any spelling are read.

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
ROLES = {
    "system": "system developer",
    "user": "user human",
    "assistant": "assistant gpt model bot chatgpt",
    "tool": "tool observation function_response ipython function",
    "function_call": "function_call tool_call",
}
SPELLINGS = {spelling: role for role, spellings in ROLES.items() for spelling in spellings.split()}
# What every chat template can render; tool results stand between an assistant's call and its answer.
NEXT = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
NAMES_OF_TYPES = {type(None): "null", bool: "true/false", int: "a number", float: "a number", str: "text"}
NAMES_OF_TYPES |= {list: "a list", tuple: "a list", dict: "an object"}
# Made once: json.dumps makes an encoder at each call, a quarter of its time for a row.
_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


class Turn(TypedDict):
    """One message. role: system, user, assistant, tool or text. tool_calls: OpenAI's, with arguments as an object."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    name: NotRequired[str]


class RowError(Exception):
    """One record cannot be used. reason: a few fixed words to count by; detail: what was seen and what was wanted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


# ---------------------------------------------------------------- rows


def content_id(row: Row) -> str:
    """Sixteen hex digits that depend on nothing but what the model would learn from."""
    content = [row["kind"], row["messages"], *(row.get(part) for part in ("tools", "chosen", "rejected", "label"))]
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


def all_messages(row: Row) -> list[dict]:
    """Every message of a row, the chosen and rejected answers of a preference row last."""
    return row["messages"] + row.get("chosen", []) + row.get("rejected", [])


def map_contents(row: Row, change: Callable[[str], str]) -> Row:
    """A copy of `row` with `change` applied to every message's text, and a new id; `row` when nothing changed."""

    def changed(turns: list[dict]) -> list[dict]:
        return [turn | {"content": change(turn["content"])} if turn.get("content") else turn for turn in turns]

    made = row | {part: changed(row[part]) for part in ("messages", "chosen", "rejected") if part in row}
    return row if made == row else made | {"id": content_id(made)}


def text_of(row: Row) -> str:
    """The whole example as one text: every message, call and tool, for comparing rows with each other."""
    parts = [turn.get("content") or "" for turn in all_messages(row)]
    calls = [turn["tool_calls"] for turn in row["messages"] if turn.get("tool_calls")]
    parts += [json.dumps(made, ensure_ascii=False, sort_keys=True) for made in calls]
    return "\n".join([*parts, row["tools"]] if row.get("tools") else parts)


def spoken(row: Row) -> list[str]:
    """The texts of a row that are its own: every message but the system prompt, which all rows of a set may share."""
    return [turn.get("content") or "" for turn in all_messages(row) if turn["role"] != "system"]


def shown(row: Row, chars: int = EXAMPLE_CHARS) -> str:
    """The start of an example for people: without the system prompt, which every row of a set may share."""
    said = [turn for turn in all_messages(row) if turn["role"] != "system"]
    return "\n".join(turn.get("content") or json.dumps(turn.get("tool_calls") or "") for turn in said)[:chars]


def answer_of(row: Row) -> str:
    """What the model would learn to say: the chosen answer, the last assistant turn, or the text itself."""
    return (row.get("chosen") or row["messages"])[-1].get("content") or ""


def batches(rows: Iterable[Row], size: int = BATCH_ROWS) -> Iterator[list[Row]]:
    """Consecutive lists of up to `size` rows."""
    remaining = iter(rows)
    while batch := list(itertools.islice(remaining, size)):
        yield batch


# ---------------------------------------------------------------- turns


def read_turns(
    value: Any, spellings: Mapping[str, str] = SPELLINGS, role_tag: str = "", content_tag: str = ""
) -> list[Turn]:
    """Messages of any spelling, a list or its JSON text, as turns. Raises RowError.

    spellings: how a role is written → role. role_tag, content_tag: the keys of role and text; "" looks at each message.
    """
    if isinstance(value, str):
        value = from_json(value, "wrong type", "the conversation")
    if not isinstance(value, (list, tuple)):
        raise RowError("wrong type", f"the conversation is {kind_of(value)}; a list of messages was expected")
    turns: list[Turn] = []
    for number, message in enumerate(value, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise RowError("wrong type", f"{where} is {kind_of(message)}; an object with role and content was expected")
        said_by = role_tag or ("from" if "from" in message else "role")
        said = content_tag or ("value" if said_by == "from" and "value" in message else "content")
        spelling, content, calls = message.get(said_by), message.get(said), message.get("tool_calls") or []
        role = spellings.get(spelling) if isinstance(spelling, str) else None
        if role is None:
            found = f"{where} has {said_by!r} {str(spelling)[:40]!r}"
            raise RowError("unknown role", f"{found}; known are {', '.join(spellings)}")
        if role == "function_call":  # sharegpt's: the content is JSON text of one call, or of a list of calls
            calls = from_json(as_text(content, where), "broken function call", where)
            role, content, calls = "assistant", "", calls if isinstance(calls, list) else [calls]
        if content is None and not calls:
            keys = ", ".join(map(str, message))[:80]
            raise RowError("empty message", f"{where} ({role}) has no {said!r}; its keys are {keys}")
        turn: Turn = {"role": role, "content": "" if content is None else _content(content, where)}
        if calls := _calls(calls, where):
            turn["tool_calls"] = calls
        if isinstance(message.get("name"), str):
            turn["name"] = message["name"]
        turns.append(turn)
    return turns


def _content(content: Any, where: str) -> str:
    """A message's text; OpenAI's list of parts is joined when every part is text."""
    if not isinstance(content, (list, tuple)):
        return as_text(content, where)
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if not isinstance(part, Mapping) or kind != "text":
            raise RowError("not text", f"{where} has a part of type {str(kind)[:40]!r}; only text can be trained here")
    return "".join(as_text(part.get("text"), where) for part in content)


def _calls(value: Any, where: str) -> list[dict]:
    """Calls as `{"type": "function", "function": {"name", "arguments": object}}`, whichever way they were nested."""
    if not isinstance(value, (list, tuple)):
        raise RowError("broken function call", f"{where} holds {kind_of(value)} as tool calls; a list was expected")
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("broken function call", f"{where} has a call without a name")
        name = as_text(function["name"], "function name")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            called = f"{where}, the arguments of {name!r}"
            arguments = from_json(arguments, "broken function call", called) if arguments.strip() else {}
        calls.append({"type": "function", "function": {"name": name, "arguments": plain(arguments, "argument")}})
    return calls


def tools_of(value: Any) -> str | None:
    """A tools column as JSON text of a list; None when there are none."""
    if isinstance(value, str) and value:
        value = from_json(as_text(value, "tools"), "broken tools", "the tools")
    if not value:
        return None
    tools = [value] if isinstance(value, Mapping) else value
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("broken tools", f"the tools are {kind_of(value)}; a list of objects was expected")
    return json.dumps(plain(tools, "tools"), ensure_ascii=False)


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
    """`value` as plain JSON with its texts checked: parquet's decimals become numbers, its dates ISO 8601 text."""
    if isinstance(value, str):
        return as_text(value, where)
    if isinstance(value, Mapping):
        return {as_text(str(key), where): plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, where) for item in value]
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
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
