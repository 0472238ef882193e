"""Turns of a conversation: any spelling of roles read into `role` and `content`, and the order of turns checked.

The order that every chat template can render: an optional system message first, then a question, its answer, and so on;
tool results stand between an assistant's call and its answer; the last turn is the assistant's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from helpers.data.formats import RowError, Shape, as_text, kind_of

NEXT = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}


def read_messages(value: Any, shape: Shape) -> list[dict]:
    """Messages of any spelling as `{"role", "content"}` (with `tool_calls`, `name` where they are). Raises RowError."""
    if not isinstance(value, (list, tuple)):
        raise RowError("wrong type", f"the conversation is {kind_of(value)}; a list of messages was expected")
    roles = dict(shape.roles)
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise RowError(
                "wrong type",
                f"message {number} is {kind_of(message)}; an object with a role and a content was expected",
            )
        role_tag = shape.role_tag or ("from" if "from" in message else "role")
        content_tag = shape.content_tag or ("value" if role_tag == "from" and "value" in message else "content")
        spelt = message.get(role_tag)
        role = roles.get(spelt) if isinstance(spelt, str) else None
        if role is None:
            raise RowError(
                "unknown role", f"message {number} has {role_tag!r} {str(spelt)[:40]!r}; known are {', '.join(roles)}"
            )
        if role == "function_call":
            messages.append(_function_call(message.get(content_tag), number))
            continue
        calls = _tool_calls(message.get("tool_calls"), number)
        content = message.get(content_tag)
        if content is None and calls:
            content = ""
        if content is None:
            raise RowError(
                "empty message",
                f"message {number} ({role}) has no {content_tag!r}; its keys are {', '.join(map(str, message))[:80]}",
            )
        made: dict[str, Any] = {"role": role, "content": _content(content, number)}
        if calls:
            made["tool_calls"] = calls
        if isinstance(message.get("name"), str):
            made["name"] = message["name"]
        messages.append(made)
    return messages


def _content(content: Any, number: int) -> str:
    """A message's text; OpenAI's list of parts is joined when every part is text."""
    if not isinstance(content, (list, tuple)):
        return as_text(content, f"message {number}")
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise RowError(
                "not text",
                f"message {number} has a part of type {str(part.get('type') if isinstance(part, Mapping) else part)[:40]!r}; "
                "only text can be trained here",
            )
        parts.append(as_text(part.get("text"), f"message {number}"))
    return "".join(parts)


def _function_call(value: Any, number: int) -> dict:
    """sharegpt's function_call turn: JSON text of one call, or a list of calls. `content` keeps the text as it was."""
    text = as_text(value, f"message {number}")
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        raise RowError("broken function call", f"message {number} is no JSON: {text[:80]!r}") from None
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "content": "", "tool_calls": _tool_calls(calls, number) or []}


def _tool_calls(value: Any, number: int) -> list[dict] | None:
    """Calls as `{"type": "function", "function": {"name", "arguments": object}}`, whichever way they were nested."""
    if not value:
        return None
    if not isinstance(value, (list, tuple)):
        raise RowError(
            "broken function call", f"message {number} holds {kind_of(value)} as tool calls; a list was expected"
        )
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("broken function call", f"message {number} has a call without a name")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                raise RowError(
                    "broken function call",
                    f"message {number} calls {function['name']!r} with arguments that are no JSON",
                ) from None
        calls.append(
            {
                "type": "function",
                "function": {"name": as_text(function["name"], "function name"), "arguments": _clean(arguments)},
            }
        )
    return calls


def _clean(value: Any) -> Any:
    """`value` with its texts checked, and without the nulls that columnar files put where a key was absent."""
    if isinstance(value, Mapping):
        return {as_text(str(key), "argument"): _clean(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return as_text(value, "argument") if isinstance(value, str) else value


def tools_of(value: Any) -> str | None:
    """A tools column as JSON text of a list; None when there are none."""
    if value is None or value == "" or value == [] or value == "[]":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(as_text(value, "tools"))
        except (ValueError, RecursionError):
            raise RowError("broken tools", f"the tools are no JSON: {value[:80]!r}") from None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("broken tools", f"the tools are {kind_of(value)}; a list of objects was expected")
    return json.dumps(_clean(value), ensure_ascii=False) if value else None


def checked(messages: list[dict], answered: bool = True) -> list[dict]:
    """The messages when their order can be rendered and, if `answered`, the last one is an answer. Raises RowError."""
    if not messages:
        raise RowError("no messages", "the conversation is empty")
    allowed: tuple[str, ...] = ("system", "user")
    for number, message in enumerate(messages, 1):
        if message["role"] not in allowed:
            before = "at the start" if number == 1 else f"after {messages[number - 2]['role']!r}"
            raise RowError(
                "roles out of order",
                f"message {number} is {message['role']!r} {before}; {' or '.join(allowed)} was expected",
            )
        allowed = NEXT[message["role"]]
    last = messages[-1]
    if answered and last["role"] != "assistant":
        raise RowError(
            "no answer", f"the last of {len(messages)} messages is {last['role']!r}; an assistant's answer was expected"
        )
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise RowError("no answer", f"message {number} (assistant) is empty")
    return messages


def checked_pair(prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> dict[str, Any]:
    """A preference row's parts. Whole conversations are cut where chosen and rejected part ways, the prompt before that.

    Raises RowError when the two do not answer the same prompt, or are the same answer.
    """
    if not chosen or not rejected:
        raise RowError("no answer", "the chosen or the rejected answer is empty")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    head, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    bare = [message for message in prompt if message["role"] != "system"]
    if (
        head and bare and head[-len(bare) :] == bare
    ):  # the conversations repeat the prompt that stands in its own column
        prompt = prompt[: len(prompt) - len(bare)] + head if head[0]["role"] != "system" else head
    else:
        prompt = prompt + head
    if not prompt:
        raise RowError("no question", "there is no prompt, and chosen and rejected share no first message")
    if chosen == rejected:
        raise RowError("same answer twice", "chosen and rejected are the same")
    for answer in (chosen, rejected):
        checked(prompt + answer)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError("roles out of order", f"the prompt ends with {prompt[-1]['role']!r}; a question was expected")
    return {"kind": "preference", "messages": prompt, "chosen": chosen, "rejected": rejected}
