"""What other runtimes need to run the exported model as it was trained: an Ollama Modelfile, and exact commands.

The Modelfile is explicit (template, stops, context, sampling), because Ollama's own guess replaces the model's
template by a stock one, and Ollama renders prompts with a template in Go's text/template, never with the Jinja that a
model was trained with. The Jinja is not read: it is rendered on conversations of marker words, the literals between
the markers become the Go template, and both are compared on every shape of conversation. So any template made of turns
is found (ChatML, Llama 3, Mistral, Gemma, Phi), and one that is not made of turns is refused with the reason.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from helpers import display
from helpers.data import chat_template
from helpers.data.turns import RowError
from helpers.errors import TunebookError
from helpers.gguf.probes import QUESTION, SHAPES, TOOL
from helpers.model import loading
from helpers.model.stop_tokens import stop_tokens
from helpers.runs import write_atomic

LONGEST_CONTEXT = 8192  # tokens asked for by default: a context costs memory in every runtime
PRE = "<pre style='font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere'>"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
COMPLETION = "{{ .Prompt }}"
NO_GO = (
    "The chat template cannot be said in Ollama's Go template: {}. Serve the GGUF with llama.cpp or the merged model "
    "with vLLM, which run the Jinja itself."
)
Message = dict[str, str]
Render = Callable[..., "str | None"]
S, U1, A1, U2, A2, U3 = "MarkSystem", "MarkUserOne", "MarkAnswerOne", "MarkUserTwo", "MarkAnswerTwo", "MarkUserThree"
# What a template prints for each message, in this order: (CONDITIONS that must hold, text or CONTENT or SYSTEM).
Pieces = list[tuple[tuple[str, ...], Any]]
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


class Inexpressible(Exception):
    """The Jinja template is not made of turns that a Go template over role and content can print; says why."""


def jinja_renderer(tokenizer: Any) -> Render:
    """render(messages, generation, tools, begun) -> the Jinja's text, or None where the template refuses.

    begun: the last message is the beginning of an answer. A BOS that the tokenizer itself will put first is cut off,
    as Ollama and llama.cpp do. The template runs in a process that can be ended.
    """
    bos, ids = tokenizer.bos_token, tokenizer("a").input_ids
    adds = bool(bos) and ids[:1] == [tokenizer.bos_token_id]

    def render(messages: Sequence[Message], generation: bool = True, tools: Any = None, begun: bool = False) -> Any:
        turns = [len(messages)] if generation and not begun else []
        asked = (list(messages), json.dumps(tools) if tools else None, turns)
        made = chat_template.render(tokenizer, [asked], chat_template.PROBE_SECONDS)[0]
        if isinstance(made, RowError):
            return None
        text = made.turns[0][0] if turns else made.full
        if begun and (start := messages[-1]["content"].strip()) in text:
            text = text[: text.rindex(start) + len(start)]
        return text.removeprefix(bos) if adds else text

    return render


def derive(render: Render, bos: str = "") -> Pieces:
    """Find the literals around every turn by rendering marker words. Raises Inexpressible with the reason."""
    turns = [("user", U1), ("assistant", A1), ("user", U2), ("assistant", A2), ("user", U3)]
    head, ua, au, ua_again, au_again, tail = _gaps(render, turns)
    if (ua, au) != (ua_again, au_again):
        raise Inexpressible("it prints later turns differently from earlier ones")
    user_end = _gaps(render, turns[:1], generation=False, missing=[None, ""])[-1]
    answer_end = _gaps(render, turns[:2], generation=False, missing=[None, None, ""])[-1]
    # what is printed only at the very end of a conversation (Phi) is in no gap: then split where the turns are alike
    before_user = au.removeprefix(answer_end)
    if not au.startswith(answer_end) or not head.endswith(before_user):
        before_user = _common((au, head), -1)
    after_user = user_end if ua.startswith(user_end) and tail.startswith(user_end) else _common((ua, tail), 1)
    # printed when the first message is not the system's: a default system prompt, or nothing
    opening, start = head[: len(head) - len(before_user)], ""
    own: Pieces = []  # a system turn of its own
    inside: Pieces = []  # the system prompt inside a user's turn
    with_system = [("system", S), *turns[:1]]
    if S in (render(_chat(with_system)) or ""):
        lead, between, _ = _gaps(render, with_system)
        if between.endswith(before_user) and before_user:
            start = bos if bos and opening == bos and lead.startswith(bos) else ""
            opening = opening[len(start) :]
            after_system = between[: len(between) - len(before_user)]
            own = [(("system",), what) for what in (lead[len(start) :], CONTENT, after_system)]
        elif lead.startswith(opening + before_user):
            later = render(_chat([("system", S), *turns[:3]])) or ""
            spot = "first two" if 0 <= later.find(S) < later.find(U1) else "last"
            parts = (lead[len(opening + before_user) :], SYSTEM, between)
            inside = [(("user", "after system", spot), what) for what in parts]
        else:
            raise Inexpressible("it prints the system prompt neither in a turn of its own nor inside a user's turn")
    pieces = [(("first",), start), (("first", "not system") if own else ("first",), opening), *own]
    pieces += [(("user",), before_user), *inside, (("user",), CONTENT), (("user",), after_user)]
    pieces += [(("assistant",), ua[len(after_user) :]), (("assistant",), CONTENT)]
    pieces += [(("assistant", "not last"), au[: len(au) - len(before_user)])]
    pieces += [(("last", "not assistant"), tail[len(after_user) :])]  # where the model goes on
    return [piece for piece in pieces if piece[1] != ""]


def printed(pieces: Pieces, messages: Sequence[Message]) -> str:
    """What the Go template prints: the same pieces in Python, so that a machine without Go can check it."""
    out: list[Any] = []
    for i, message in enumerate(messages):
        role, last = message["role"], i == len(messages) - 1
        holds = {role, "last" if last else "not last"} | {f"not {r}" for r in ("system", "assistant") if r != role}
        holds |= ({"first"} if i == 0 else set()) | ({"first two"} if i <= 1 else set())
        holds |= {"after system"} if messages[0]["role"] == "system" else set()
        text_of = {CONTENT: message["content"], SYSTEM: messages[0]["content"]}
        out += [text_of.get(what, what) for conditions, what in pieces if holds.issuperset(conditions)]
    return "".join(out)


def go_template(pieces: Pieces) -> str:
    """The text for Ollama's TEMPLATE. Literals are quoted, so that no line end is lost to Go's trimming."""
    said = {CONTENT: ".Content", SYSTEM: "(index $.Messages 0).Content"}
    lines = ["{{- range $i, $_ := .Messages }}", "{{- $last := eq (len (slice $.Messages $i)) 1 }}"]
    for conditions, what in pieces:
        tests = [CONDITIONS[c] for c in conditions]
        test = tests[0] if len(tests) == 1 else "and " + " ".join(f"({t})" for t in tests)
        lines.append(f"{{{{- if {test} }}}}{{{{ {said.get(what) or _quoted(what)} }}}}{{{{ end }}}}")
    return "\n".join([*lines, "{{- end }}"])


def collate(messages: Sequence[Message]) -> list[Message]:
    """Ollama's own first step (template/template.go): consecutive messages of one role become one."""
    groups = itertools.groupby(messages, key=lambda message: message["role"])
    return [{"role": role, "content": "\n\n".join(m["content"] for m in group)} for role, group in groups]


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


def _common(texts: tuple[str, str], step: int) -> str:
    """What two texts begin with (step 1) or end with (-1), in whole control tokens, line ends and pieces between."""
    cut = ([p for p in re.split(r"(<[^<>\s]+>|\[/?[A-Z_]+\]|\n)", text) if p][::step] for text in texts)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*cut, strict=False))
    return "".join([piece for piece, _ in same][::step])


def _quoted(literal: str) -> str:
    """A Go string."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in literal) + '"'


# ---------------------------------------------------------------- the Modelfile


@dataclass(repr=False)
class Modelfile:
    """An Ollama Modelfile and how far its template is the model's own.

    path: None when the Jinja template cannot be said in Go (`reason` tells why); then nothing was written. checks: the
    conversation shapes compared. notes: what differs in shapes this job may not use.
    """

    reason: str = ""
    template: str = ""
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    path: Path | None = None
    stops: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)

    def shown(self) -> display.Html:
        """What was compared, what is to be known, and the commands."""
        refused = "refused by the model's own template"
        rows = [(c.shape, "same prompt" if c.equal else refused if c.jinja is None else "differs") for c in self.checks]
        found = display.shown(rows, ("conversation", "Go template against Jinja"))
        commands = {display.escape(runtime): display.escape(command) for runtime, command in self.commands.items()}
        markup = "".join(f"<h4>{runtime}</h4>{PRE}{command}</pre>" for runtime, command in commands.items())
        text = "\n\n".join(f"{runtime}\n{command}" for runtime, command in self.commands.items())
        return found + display.said(self.reason, *self.notes) + display.Html(markup, text)


def write(merged: Path, gguf: Path, out: Path, *, name: str = "tunebook", context: int = 0) -> Modelfile:
    """Write the Modelfile for `gguf` to `out` and compare its template with the model's own on every shape.

    context: tokens; 0 takes the model's, at most 8192. Sampling is generation_config.json's, greedy where that says
    nothing: so it was measured.
    """
    check_name(name)
    if not gguf.is_file():
        raise TunebookError(f"There is no GGUF file at {gguf}; run 04_gguf_export first.")
    tokenizer = loading.load_tokenizer(merged)
    made = from_tokenizer(tokenizer)
    longest = getattr(loading.load_config(merged).get_text_config(), "max_position_embeddings", None)
    settings = merged / "generation_config.json"
    config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    drawn = SAMPLING if config.get("do_sample") is not False else ("repetition_penalty",)
    sampling = {"temperature": 0} | {k: config[k] for k in drawn if isinstance(config.get(k), (int, float))}
    made.parameters = {"num_ctx": context or min(longest or 4096, LONGEST_CONTEXT)}
    made.parameters |= {k.replace("repetition_", "repeat_"): value for k, value in sampling.items()}
    ends = stop_tokens(tokenizer, config.get("eos_token_id"))
    made.stops = [tokenizer.convert_ids_to_tokens(i) for i in ends if i < len(tokenizer)]
    if not made.reason:
        path = os.path.relpath(gguf.resolve(), out.resolve().parent)
        if not path.isprintable() or '"' in path:
            raise TunebookError(f"A Modelfile cannot hold the file name {path!r}; rename it without quotes, line ends.")
        text = _rendered("modelfile.j2", **vars(made) | {"gguf": path if path.startswith("../") else f"./{path}"})
        made.path = write_atomic(out, text)
    made.commands = _commands(merged, gguf, name, made)
    return made


def from_tokenizer(tokenizer: Any) -> Modelfile:
    """The Go template of a tokenizer and its comparison, without a file; `reason` where it cannot be said in Go. One
    without a chat template completes plain text."""
    if not tokenizer.chat_template:
        return Modelfile(template=COMPLETION, notes=["The model completes plain text: it has no turns and no roles."])
    render = jinja_renderer(tokenizer)
    try:
        pieces = derive(render, tokenizer.bos_token or "")
    except Inexpressible as error:
        return Modelfile(NO_GO.format(error))
    checks = [
        Check(shape, needed, render(messages, begun=shape == "answer begun"), printed(pieces, collate(messages)))
        for shape, (messages, needed) in SHAPES.items()
    ]
    different = [c for c in checks if not c.equal and c.jinja is not None]
    why = {
        "blanks at the edges": " (the Jinja trims every message, Go cannot)",
        "instruction with an input": " (its preamble is another, which Go cannot choose)",
        "two questions running": " (Ollama joins them before the template sees them)",
    }
    notes = [f"The prompt differs from the training one for: {c.shape}{why.get(c.shape, '')}." for c in different]
    if not any("system" in conditions or what is SYSTEM for conditions, what in pieces):
        notes.append("The model's template takes no system prompt; a SYSTEM line or system message is not printed.")
    if render(QUESTION, tools=[TOOL]) not in (None, render(QUESTION)):
        notes.append("Go writes tools differently: recent Ollama renders them with the GGUF's own Jinja instead.")
    if "strftime_now" in str(tokenizer.chat_template):
        notes.append("The model's template prints today's date; this one prints the date on which it was written.")
    broken = ", ".join(c.shape for c in different if c.needed)
    return Modelfile(
        NO_GO.format(f"the prompts differ for {broken}") if broken else "", go_template(pieces), checks, notes
    )


def check_name(name: str) -> None:
    """Raises TunebookError for a model name that a shell, a path or Ollama would trip over."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", name):
        raise TunebookError(
            f"model_name is {name!r}, which is not a valid name for Ollama and its like; use at most 80 small letters, "
            "digits, '.', '_' and '-'."
        )


def _commands(merged: Path, gguf: Path, name: str, made: Modelfile) -> dict[str, str]:
    """Exact commands for this very model: runtime -> shell lines. All of them listen on this machine alone."""
    sampling = {k.replace("repeat_", "repetition_"): v for k, v in made.parameters.items() if k != "num_ctx"}
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if made.template != COMPLETION else {"prompt": "Once"}
    body = {"model": name, **asked, "stop": made.stops, **sampling}
    values = {"merged": merged, "gguf": gguf, "name": name, "sampling": sampling, "body": body}
    values |= {"modelfile": made.path, "context": made.parameters["num_ctx"]}
    template = merged / "chat_template.jinja"
    text = _rendered("runtimes.j2", **values, template=template if template.is_file() else None)
    parts = [part.partition("\n") for part in re.split("(?m)^== ", text)[1:]]
    return {runtime: commands.rstrip() for runtime, _, commands in parts}


def _rendered(file: str, **values: Any) -> str:
    """Shell lines or a Modelfile from a template of this folder; nothing in it is HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    made = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, **options)
    made.filters |= {"q": lambda value: shlex.quote(str(value)), "json": partial(json.dumps, ensure_ascii=False)}
    return made.get_template(file).render(**values)
