"""A chat template in Go's text/template, derived from the tokenizer's Jinja by asking it, then compared with it.

Ollama renders prompts with a Go template, never with the Jinja that a model was trained with. The Jinja is not read:
it is rendered on conversations of marker words, the literals between the markers become the Go template, and both are
compared on every shape of conversation below. So any template made of turns is found (ChatML, Llama 3, Mistral,
Gemma, Phi), and one that is not made of turns is refused with the reason.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.data import chat_template
from helpers.data.turns import RowError
from helpers.gguf.probes import QUESTION, SHAPES, TOOL

Message = dict[str, str]
Render = Callable[..., "str | None"]
S, U1, A1, U2, A2, U3 = "MarkSystem", "MarkUserOne", "MarkAnswerOne", "MarkUserTwo", "MarkAnswerTwo", "MarkUserThree"
CONTENT, SYSTEM = object(), object()  # the message's own text; the first message's
CONDITIONS = {
    "first": "eq $i 0",
    "first two": "le $i 1",
    "last": "$last",
    "not last": "not $last",
    "after system": 'eq (index $.Messages 0).Role "system"',
    "system": 'eq .Role "system"',
    "user": 'eq .Role "user"',
    "assistant": 'eq .Role "assistant"',
    "not system": 'ne .Role "system"',
    "not assistant": 'ne .Role "assistant"',
}


@dataclass(frozen=True)
class Turns:
    """What a template prints around each message. `before` and `after` go by role: "system", "user", "assistant"."""

    start: str  # printed once, before everything
    without_system: str  # printed when the first message is not the system's: a default system prompt, or nothing
    before: dict[str, str]
    after: dict[str, str]
    generation: str  # printed after the last message, where the model goes on
    system_place: str  # "own" turn, "first_user" or "last_user" (inside that turn), or "none" (refused or ignored)

    def pieces(self) -> list[tuple[tuple[str, ...], Any]]:
        """(CONDITIONS that must hold, text or CONTENT or SYSTEM) in the order of printing, for every message."""
        own, before, after = self.system_place == "own", self.before, self.after
        spot = {"first_user": ("first two",), "last_user": ("last",)}.get(self.system_place)
        inside = [before["system"], SYSTEM, after["system"]] if spot else []
        pieces: list[tuple[tuple[str, ...], Any]] = [(("first",), self.start)]
        pieces += [(("first", "not system") if own else ("first",), self.without_system)]
        pieces += [(("system",), what) for what in (before["system"], CONTENT, after["system"]) if own]
        pieces += [(("user",), before["user"]), *((("user", "after system", *(spot or ())), what) for what in inside)]
        pieces += [(("user",), CONTENT), (("user",), after["user"])]
        pieces += [(("assistant",), before["assistant"]), (("assistant",), CONTENT)]
        pieces += [(("assistant", "not last"), after["assistant"]), (("last", "not assistant"), self.generation)]
        return [piece for piece in pieces if piece[1] != ""]

    def render(self, messages: Sequence[Message]) -> str:
        """What the Go template prints: the same pieces in Python, so that a machine without Go can check it."""
        out = []
        for i, message in enumerate(messages):
            role, last = message["role"], i == len(messages) - 1
            holds = {role, "last" if last else "not last"} | {f"not {r}" for r in ("system", "assistant") if r != role}
            holds |= ({"first"} if i == 0 else set()) | ({"first two"} if i <= 1 else set())
            holds |= {"after system"} if messages[0]["role"] == "system" else set()
            text_of = {CONTENT: message["content"], SYSTEM: messages[0]["content"]}
            out += [text_of.get(what, what) for conditions, what in self.pieces() if holds.issuperset(conditions)]
        return "".join(out)

    def go(self) -> str:
        """The same as text for Ollama's TEMPLATE. Literals are quoted, so that no line end is lost to Go's trimming."""
        said = {CONTENT: ".Content", SYSTEM: "(index $.Messages 0).Content"}
        lines = ["{{- range $i, $_ := .Messages }}", "{{- $last := eq (len (slice $.Messages $i)) 1 }}"]
        for conditions, what in self.pieces():
            tests = [CONDITIONS[c] for c in conditions]
            test = tests[0] if len(tests) == 1 else "and " + " ".join(f"({t})" for t in tests)
            lines.append(f"{{{{- if {test} }}}}{{{{ {said.get(what) or _quoted(what)} }}}}{{{{ end }}}}")
        return "\n".join([*lines, "{{- end }}"])


class Inexpressible(Exception):
    """The Jinja template is not made of turns that a Go template over role and content can print; says why."""


def jinja_renderer(tokenizer: Any) -> Render:
    """render(messages, generation, tools, begun) -> the Jinja's text, or None where the template refuses.

    begun: the last message is the beginning of an answer. A BOS that the tokenizer itself will put first is cut off,
    as Ollama and llama.cpp do. The template runs in a process that can be ended.
    """
    bos, ids = tokenizer.bos_token, tokenizer("a").input_ids
    adds = bool(bos) and ids[:1] == [tokenizer.bos_token_id]

    def render(
        messages: Sequence[Message], generation: bool = True, tools: Any = None, begun: bool = False
    ) -> str | None:
        turns = [len(messages)] if generation and not begun else []
        asked = (list(messages), json.dumps(tools) if tools else None, turns)
        made = chat_template.render(tokenizer, [asked], chat_template.PROBE_SECONDS)[0]
        text = made.turns[0][0] if turns else made.full
        if isinstance(text, RowError):
            return None
        if begun and (start := messages[-1]["content"].strip()) in text:
            text = text[: text.rindex(start) + len(start)]
        return text.removeprefix(bos) if adds else text

    return render


def derive(render: Render, bos: str = "") -> Turns:
    """Find the literals around every turn by rendering marker words. Raises Inexpressible with the reason."""
    turns = [("user", U1), ("assistant", A1), ("user", U2), ("assistant", A2), ("user", U3)]
    head, ua, au, ua_again, au_again, tail = _gaps(render, turns)
    if (ua, au) != (ua_again, au_again):
        raise Inexpressible("it prints later turns differently from earlier ones")
    user_end = _gaps(render, turns[:1], generation=False, missing=[None, ""])[-1]
    answer_end = _gaps(render, turns[:2], generation=False, missing=[None, None, ""])[-1]
    # what is printed only at the very end of a conversation (Phi) is in no gap: then split where the turns are alike
    before_user = (
        au[len(answer_end) :]
        if au.startswith(answer_end) and head.endswith(au[len(answer_end) :])
        else _common_end(au, head)
    )
    after_user = user_end if ua.startswith(user_end) and tail.startswith(user_end) else _common_start(ua, tail)
    opening = head[: len(head) - len(before_user)]
    before = {"user": before_user, "assistant": ua[len(after_user) :], "system": ""}
    after = {"user": after_user, "assistant": au[: len(au) - len(before_user)], "system": ""}
    place = "none"
    with_system = [("system", S), *turns[:1]]
    start = ""
    if S in (render(_chat(with_system)) or ""):
        lead, between, _ = _gaps(render, with_system)
        if between.endswith(before_user) and before_user:
            place, after["system"] = "own", between[: len(between) - len(before_user)]
            start = bos if bos and opening == bos and lead.startswith(bos) else ""
            before["system"], opening = lead[len(start) :], opening[len(start) :]
        elif lead.startswith(opening + before_user):
            before["system"], after["system"] = lead[len(opening + before_user) :], between
            later = render(_chat([("system", S), *turns[:3]])) or ""
            place = "first_user" if 0 <= later.find(S) < later.find(U1) else "last_user"
        else:
            raise Inexpressible("it prints the system prompt neither in a turn of its own nor inside a user's turn")
    return Turns(start, opening, before, after, tail[len(after_user) :], place)


def collate(messages: Sequence[Message]) -> list[Message]:
    """Ollama's own first step (template/template.go): consecutive messages of one role become one."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"] != "tool":
            merged[-1] = {**message, "content": merged[-1]["content"] + "\n\n" + message["content"]}
        else:
            merged.append(dict(message))
    return merged


@dataclass(frozen=True)
class Check:
    """One shape of conversation: what both templates made of it. jinja None: the Jinja refuses such a conversation."""

    shape: str
    needed: bool
    jinja: str | None
    go: str

    @property
    def equal(self) -> bool:
        return self.jinja == self.go


def _chat(pairs: Sequence[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in pairs]


def compare(render: Render, turns: Turns) -> list[Check]:
    """Both templates on every shape."""
    return [
        Check(shape, needed, render(messages, begun=shape == "answer begun"), turns.render(collate(messages)))
        for shape, (messages, needed) in SHAPES.items()
    ]


def takes_tools(render: Render) -> bool:
    """Does the Jinja print tools it is given?"""
    return render(QUESTION, tools=[TOOL]) not in (None, render(QUESTION))


def _gaps(
    render: Render, pairs: Sequence[tuple[str, str]], generation: bool = True, missing: list[Any] | None = None
) -> list[str]:
    """The literals before, between and after the markers; `missing` where the template refuses."""
    text = render(_chat(pairs), generation=generation)
    if text is None and missing is not None:
        return missing
    if text is None:
        raise Inexpressible("it refuses a conversation of plain user and assistant turns")
    gaps = []
    for _, mark in pairs:
        head, found, text = text.partition(mark)
        if not found or mark in text:
            raise Inexpressible("it does not print every message exactly once and in order")
        gaps.append(head)
    return [*gaps, text]


def _pieces(text: str) -> list[str]:
    """Cut into control tokens, line ends and the rest, so that a common part never ends inside a token."""
    return [p for p in re.split(r"(<[^<>\s]+>|\[/?[A-Z_]+\]|\n)", text) if p]


def _common_start(a: str, b: str) -> str:
    return "".join(_common(_pieces(a), _pieces(b)))


def _common_end(a: str, b: str) -> str:
    return "".join(reversed(_common(_pieces(a)[::-1], _pieces(b)[::-1])))


def _common(a: list[str], b: list[str]) -> list[str]:
    return [x for x, y in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))]


def _quoted(literal: str) -> str:
    """A Go string."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in literal) + '"'
