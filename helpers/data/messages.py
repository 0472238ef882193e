"""Messages of any spelling, read as the turns of `helpers.data.turns`: every key has its part, or is counted.

OpenAI's messages and parts, ShareGPT's from and value, LLaMA-Factory's tags and parts, thoughts beside the answer or in
it, calls as objects or JSON text, and the marks by which OpenAI, Axolotl and LLaMA-Factory leave turns out of the loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from helpers.data.turns import RowError, Turn, as_text, from_json, kind_of, plain

ROLES = {
    "system": "system developer",
    "user": "user human",
    "assistant": "assistant gpt model bot chatgpt",
    "tool": "tool observation function_response ipython function",
    "function_call": "function_call tool_call",
}
SPELLINGS = {spelling: role for role, spellings in ROLES.items() for spelling in spellings.split()}
REASONING = ("reasoning_content", "reasoning", "thinking", "thoughts", "thought")
# What says whether a turn is trained, and whether a true or positive value says so (OpenAI, LLaMA-Factory, Axolotl).
WEIGHTS = dict.fromkeys(("weight", "loss_weight", "train", "training", "trained", "loss"), True)
WEIGHTS |= dict.fromkeys(("masked", "mask"), False)
DETAILS = ("train_detail", "training_detail")  # Axolotl's parts of a content
ARGUMENTS = ("arguments", "parameters", "args", "input")
OF_CALLS = {"id", "index", "type", "function", "name", *ARGUMENTS}
SAID_BY, SAID = ("from", "role", "speaker"), (("content", "value", "text"), ("value", "content", "text"))
TEXTS, THOUGHTS = ("text", "input_text", "output_text"), ("reasoning", "thinking")  # types of a content's parts
SWITCHES = dict.fromkeys(("true", "yes", "on"), 1.0) | dict.fromkeys(("false", "no", "off"), 0.0)


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
        said_by = role_tag or next((key for key in SAID_BY if key in message), "role")
        said = content_tag or next((key for key in SAID[said_by == "from"] if key in message), "content")
        spelling, content, calls = message.get(said_by), message.get(said), message.get("tool_calls") or []
        calls = calls or [call for call in [message.get("function_call")] if call]
        spelt = spelling.strip() if isinstance(spelling, str) else ""
        role = spellings.get(spelt) or spellings.get(spelt.lower())
        if role is None:
            found = f"{where} has {said_by!r} {str(spelling)[:40]!r}"
            raise RowError("unknown role", f"{found}; known are {', '.join(spellings)}")
        if role == "function_call":  # sharegpt's: the content is JSON text of one call, or of a list of calls
            role, content, calls = "assistant", "", from_json(as_text(content, where), "broken function call", where)
        if role == "tool" and isinstance(content, Mapping):
            content = json.dumps(plain(content, where), ensure_ascii=False)
        if content is None and not calls:
            keys = ", ".join(map(str, message))[:80]
            raise RowError("empty message", f"{where} ({role}) has no {said!r}; its keys are {keys}")
        text, thoughts, more = ("", "", []) if content is None else _content(content, where)
        turn: Turn = {"role": role, "content": text}
        if len(message) > 2 or thoughts or more:
            others = {key: value for key, value in message.items() if key not in (said_by, said) and value is not None}
            _add_keys(turn, others, thoughts, where)
        if calls := _calls([calls, more], where, turn):
            turn["tool_calls"] = calls
        turns.append(turn)
    answered = {turn.get("tool_call_id") or None for turn in turns}
    for call in (call for turn in turns for call in turn.get("tool_calls", ())):
        if call["id"] not in answered:  # a number that nobody refers to
            del call["id"]
    return turns


def _content(content: Any, where: str) -> tuple[str, str, list]:
    """(text, thoughts, calls) of a message's content: text, or a list of parts as OpenAI and LLaMA-Factory have it."""
    if not isinstance(content, (list, tuple)):
        return as_text(content, where), "", []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if not isinstance(part, Mapping) or kind not in (*TEXTS, *THOUGHTS, "tool_call"):
            raise RowError("not text", f"{where} has a part of type {str(kind)[:40]!r}; only text can be trained here")
        value = next((part[key] for key in ("value", "text", kind) if part.get(key) is not None), None)
        if kind == "tool_call":
            calls.append(part if value is None else value)
        else:
            (thoughts if kind in THOUGHTS else texts).append(as_text(value, where))
    return "".join(texts), "\n".join(thoughts), calls


def _add_keys(turn: Turn, message: dict[str, Any], thoughts: str, where: str) -> None:
    """Put into a turn what its message says besides role, content and calls; what plays no part is listed in UNREAD."""
    given, texts, unread, weights = [thoughts], ("name", "tool_call_id"), list[str](), list[float]()
    for key, value in message.items():
        if key in ("tool_calls", "function_call"):
            continue
        if key in REASONING and isinstance(value, str) and turn["role"] == "assistant":
            given += [as_text(value, where)] * (value not in given)
        elif key in texts and isinstance(value, str):
            turn.update({key: as_text(value, where)})  # type: ignore[misc]
        elif key in WEIGHTS and (weight := _weight(value, WEIGHTS[key])) is not None:
            if turn["role"] == "assistant":
                weights.append(weight)
            elif weight:  # only answers are trained
                unread.append(f"{key} of {turn['role']} turns")
        elif key in DETAILS and turn["role"] == "assistant" and (parts := _parts_left_out(value)) is not None:
            turn["untrained"] = [[begin, min(end, len(turn["content"]))] for begin, end in parts]
        else:
            unread.append(str(key)[:80])
    if reasoning := "\n".join(filter(None, given)):
        turn["reasoning"] = reasoning
    if len(factors := {weight for weight in weights if weight != 1}) > 1 and 0 not in factors:
        raise RowError("two weights", f"{where} gives its answer the weights {sorted(factors)}; keep one of them")
    if factors:
        turn["weight"] = min(factors)  # 0 leaves the answer out, whatever the others say
    if unread:
        turn["unread"] = unread


def _weight(value: Any, trained: bool) -> float | None:
    """A turn's weight by a key's value, where `trained` says what a true one means; None when it is no weight."""
    known = SWITCHES.get(str(value).strip().lower())
    try:
        weight = float(value) if known is None else known
    except (TypeError, ValueError, OverflowError):
        return None
    if not 0 <= weight < math.inf:
        return None
    return weight if trained else float(not weight)


def _parts_left_out(value: Any) -> list[tuple[int, int]] | None:
    """The parts [begin, end) of a content that Axolotl's `train_detail` leaves out; None when it is something else."""
    try:
        parts = [(int(part["begin_offset"]), int(part["end_offset"]) + 1) for part in value if not part["train"]]
    except (TypeError, ValueError, LookupError):
        return None
    return sorted(parts) if all(0 <= begin < end for begin, end in parts) else None


def _calls(value: Any, where: str, turn: Turn) -> list[dict]:
    """Calls as `{"type": "function", "function": {"name", "arguments": object}}`, whichever way they were nested."""
    calls = []
    for call in _each(value, where):
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("broken function call", f"{where} has a call without a name")
        name = as_text(function["name"], "function name")
        arguments: Any = next((function[key] for key in ARGUMENTS if function.get(key) is not None), {})
        called = f"{where}, the arguments of {name!r},"
        for _ in range(2):  # some are the JSON text of a JSON text
            if isinstance(arguments, str):
                arguments = from_json(arguments, "broken function call", called) if arguments.strip() else {}
        if not isinstance(arguments, Mapping):
            raise RowError("broken function call", f"{called} are {kind_of(arguments)}; an object was expected")
        number = call["id"] if isinstance(call.get("id"), str) else ""
        made = {"name": name, "arguments": plain(arguments, "argument")}
        calls.append({"id": as_text(number, where), "type": "function", "function": made})
        if unread := {f"tool_calls: {key}" for key in {*call, *function} - OF_CALLS}:
            turn["unread"] = sorted(unread.union(turn.get("unread", ())))
    return calls


def _each(value: Any, where: str) -> Iterator[Any]:
    """The calls in lists within lists, any of them as JSON text."""
    if isinstance(value, str):
        value = from_json(value, "broken function call", where)
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _each(one, where)
    elif value is not None:
        yield value


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
