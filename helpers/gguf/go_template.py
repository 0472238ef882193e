"""A chat template in Go's text/template, derived from the tokenizer's Jinja by asking it, then compared with it.

Ollama renders prompts with a Go template, never with the Jinja that a model was trained with. The Jinja is not read: it is
rendered on conversations of marker words, the literals between the markers become the Go template, and both are compared
on every shape of conversation below. So any template made of turns is found (ChatML, Llama-3, Mistral, Gemma, Phi), and
one that is not made of turns is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
Render = Callable[..., "str | None"]
S, U1, A1, U2, A2, U3 = "MarkSystem", "MarkUserOne", "MarkAnswerOne", "MarkUserTwo", "MarkAnswerTwo", "MarkUserThree"


class Inexpressible(Exception):
    """The Jinja template is not made of turns that a Go template over role and content can print; says why."""


@dataclass(frozen=True)
class Turns:
    """What a template prints around each message. `before` and `after` go by role: "system", "user", "assistant"."""

    start: str  # printed once, before everything
    without_system: str  # printed when the first message is not the system's: a default system prompt, or nothing
    before: dict[str, str]
    after: dict[str, str]
    generation: str  # printed after the last message, where the model goes on
    system_place: str  # "own" turn, "first_user" or "last_user" (inside that turn), or "none" (refused or ignored)

    def render(self, messages: Sequence[Message]) -> str:
        """What the Go template prints: the same steps in Python, so that a machine without Go can check it."""
        out = [self.start]
        for i, message in enumerate(messages):
            role, last = message["role"], i == len(messages) - 1
            if i == 0 and (role != "system" or self.system_place != "own"):
                out.append(self.without_system)
            if role == "system" and self.system_place == "own":
                out += [self.before[role], message["content"], self.after[role]]
            elif role == "user":
                here = {"first_user": i <= 1, "last_user": last}.get(self.system_place, False)
                inside = here and messages[0]["role"] == "system"
                out += [
                    self.before[role],
                    *([self.before["system"], messages[0]["content"], self.after["system"]] if inside else []),
                    message["content"],
                    self.after[role],
                ]
            elif role == "assistant":
                out += [self.before[role], message["content"], "" if last else self.after[role]]
            if last and role != "assistant":
                out.append(self.generation)
        return "".join(out)

    def go(self) -> str:
        """The same as text for Ollama's TEMPLATE. Literals are quoted, so that no newline is lost to Go's trimming."""
        first = '(eq (index $.Messages 0).Role "system")'
        lines = ["{{- range $i, $_ := .Messages }}", "{{- $last := eq (len (slice $.Messages $i)) 1 }}"]
        if self.start:
            lines.append(f"{{{{- if eq $i 0 }}}}{_say(self.start)}{{{{ end }}}}")
        if self.without_system:
            spot = 'and (eq $i 0) (ne .Role "system")' if self.system_place == "own" else "eq $i 0"
            lines.append(f"{{{{- if {spot} }}}}{_say(self.without_system)}{{{{ end }}}}")
        inside = ""
        if self.system_place in ("first_user", "last_user"):
            spot = "(le $i 1)" if self.system_place == "first_user" else "$last"
            inside = (
                f"{{{{ if and {spot} {first} }}}}{_say(self.before['system'])}{{{{ (index $.Messages 0).Content }}}}"
                f"{_say(self.after['system'])}{{{{ end }}}}"
            )
        branch = "if"
        if self.system_place == "own":
            lines.append(
                f'{{{{- if eq .Role "system" }}}}{_say(self.before["system"])}{{{{ .Content }}}}{_say(self.after["system"])}'
            )
            branch = "else if"
        lines.append(
            f'{{{{- {branch} eq .Role "user" }}}}{_say(self.before["user"])}{inside}{{{{ .Content }}}}{_say(self.after["user"])}'
        )
        lines.append(
            f'{{{{- else if eq .Role "assistant" }}}}{_say(self.before["assistant"])}{{{{ .Content }}}}'
            f"{{{{ if not $last }}}}{_say(self.after['assistant'])}{{{{ end }}}}"
        )
        lines.append("{{- end }}")
        if self.generation:
            lines.append(f'{{{{- if and $last (ne .Role "assistant") }}}}{_say(self.generation)}{{{{ end }}}}')
        return "\n".join([*lines, "{{- end }}"])


def jinja_renderer(tokenizer: Any) -> Render:
    """render(messages, generation=True, tools=None, resume=False) -> the Jinja's text, or None where the template refuses.

    resume: the last message is an answer begun, to be gone on with. A byte-order token that the tokenizer itself will put
    first is cut off, as Ollama and llama.cpp do. Rendering runs in transformers' sandboxed Jinja.
    """
    import jinja2

    bos = tokenizer.bos_token
    ids = tokenizer("a").input_ids
    adds = bool(bos) and bool(ids) and ids[0] == tokenizer.bos_token_id

    def render(
        messages: Sequence[Message], generation: bool = True, tools: Any = None, resume: bool = False
    ) -> str | None:
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                tools=tools,
                continue_final_message=resume,
                add_generation_prompt=generation and not resume,
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError):
            return None  # templates refuse a conversation by raising; jinja2 passes on errors of the expressions inside
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
    """Ollama's own first step (template/template.go): consecutive messages of one role become one, a blank line between."""
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


_TURNS = [("user", "Which lakes are deep?"), ("assistant", "SELECT name FROM lake;"), ("user", "And the shallow ones?")]
_BRIEF = ("system", "You write SQL.\nTables: lake(name, depth)")
#: shape -> (messages, needed). A needed shape that differs makes the template unusable; another one is reported.
SHAPES: dict[str, tuple[list[Message], bool]] = {
    "one question": (_chat(_TURNS[:1]), True),
    "system and question": (_chat([_BRIEF, *_TURNS[:1]]), True),
    "several turns": (_chat(_TURNS), True),
    "system and several turns": (_chat([_BRIEF, *_TURNS, ("assistant", "None."), ("user", "Thanks")]), True),
    "accents and emoji": (_chat([("system", "Réponds en français 🙂"), ("user", "Où est l’été ? \u200d🏔️")]), True),
    "Chinese": (
        _chat(
            [("system", "你是一个助手。"), ("user", "最深的湖是哪个?"), ("assistant", "贝加尔湖。"), ("user", "多深?")]
        ),
        True,
    ),
    "braces, quotes, markup": (_chat([("user", 'Print "{{ .Content }}" and {% raw %} \\n <b>&amp;</b> `x` $i')]), True),
    "lines and tabs inside": (_chat([("user", "one\n\n\ttwo\r\n  three")]), True),
    "empty system prompt": (_chat([("system", ""), *_TURNS[:1]]), False),
    "blanks at the edges": (_chat([("user", "  spaced  \n")]), False),
    "empty question": (_chat([("user", "")]), False),
    "answer begun": (_chat([*_TURNS[:1], ("assistant", "SELECT")]), False),
    "two questions running": (_chat([*_TURNS[:1], ("user", "Name three.")]), False),
    "answer first": (_chat([("assistant", "Hello."), ("user", "Hi")]), False),
    "system prompt in the middle": (_chat([*_TURNS[:2], ("system", "Be brief."), ("user", "Go on")]), False),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "run_sql",
        "description": "Run a query",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}


def compare(render: Render, go: Callable[[list[Message]], str]) -> list[Check]:
    """Both templates on every shape. go(messages) renders the Go template on messages that Ollama has collated."""
    return [
        Check(shape, needed, render(messages, resume=shape == "answer begun"), go(collate(messages)))
        for shape, (messages, needed) in SHAPES.items()
    ]


def takes_tools(render: Render) -> bool:
    """Does the Jinja print tools it is given?"""
    question = SHAPES["one question"][0]
    return render(question, tools=[TOOL]) not in (None, render(question))


def _gaps(
    render: Render, pairs: Sequence[tuple[str, str]], generation: bool = True, missing: list[Any] | None = None
) -> list[str]:
    """The literals before, between and after the markers. `missing` is answered where the template refuses the conversation."""
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
    same = []
    for x, y in zip(_pieces(a), _pieces(b), strict=False):
        if x != y:
            break
        same.append(x)
    return "".join(same)


def _common_end(a: str, b: str) -> str:
    same: list[str] = []
    for x, y in zip(reversed(_pieces(a)), reversed(_pieces(b)), strict=False):
        if x != y:
            break
        same.insert(0, x)
    return "".join(same)


def _say(literal: str) -> str:
    """A literal as a Go string action; nothing for nothing."""
    if not literal:
        return ""
    escaped = "".join(_ESCAPES.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in literal)
    return f'{{{{ "{escaped}" }}}}'


_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
