"""A tokenizer's chat template: what it does to a conversation, read off its renderings, made in a child process.

Nothing here knows any template by name. Whether it has a default system prompt, writes `<think>`, shows tools, tool
calls or tool results, and how it ends a turn, is read off small probes. Templates come from strangers: transformers
runs them in a sandbox (no attributes, no writes), and here that happens in a process that can be ended, with limits on
its time, its memory and what it writes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from dataclasses import dataclass
from typing import Any

from helpers import worker
from helpers.data.turns import RowError
from helpers.display import table, text_table
from helpers.errors import TunebookError
from helpers.model.stop_tokens import ANSWER, CALLING, QUESTION, special_pattern, special_tokens, turn_ends

PROBE_SECONDS = 10.0
BATCH_SECONDS = 120.0  # for a batch of 1,000 rows, which takes 0.05 s
MEMORY_GIB = 2.0
MOST_LOST = 3  # rows in a row on which the template was stopped, after which it is given up
MAX_GROWTH = 20  # a rendering may be this many times its messages, and MAX_ADDED characters on top
MAX_ADDED = 200_000
MEND = "Choose another model, or mend the template."
NO_PARAMETERS = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": "TTT", "description": "DDD", "parameters": NO_PARAMETERS}}
RESULT = {"role": "tool", "content": "RRR", "name": "FFF"}

Text = str | RowError  # a rendering, or why the template refuses it
Conversation = tuple[list[dict], str | None, list[int]]  # messages, tools as JSON, places of turns to be shown apart


@dataclass
class Rendering:
    """full: the whole conversation. turns: for each turn asked for what the model is given before it, and the
    conversation through its end (None for the last message: that is `full`)."""

    full: Text
    turns: list[tuple[Text, Text | None]]


@dataclass(frozen=True)
class Template:
    """What a tokenizer's chat template does, as its own renderings show.

    end_ids: tokens that end an assistant turn, the plain one first. before_answer: text between the generation prompt
    and the answer. default_system: text that the template adds when a conversation has no system message.
    """

    tokenizer: Any
    end_ids: tuple[int, ...]
    generation_prompt: str
    before_answer: str
    default_system: str
    shows_tools: bool
    shows_tool_calls: bool
    shows_tool_results: bool
    takes_system: bool
    keeps_thinking: bool
    has_markers: bool
    adds_bos: bool
    special_ids: frozenset[int]
    special_text: re.Pattern[str]

    @property
    def end_text(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.end_ids[0])

    def facts(self) -> list[tuple[str, str]]:
        """What a person should know about this template, as (what, how it is)."""
        yes = {True: "yes", False: "no"}
        seen = (self.shows_tools, self.shows_tool_calls, self.shows_tool_results)
        bos = "the tokenizer would add one; the template writes none" if self.adds_bos else "written by the template"
        return [
            ("end of turn", " or ".join(f"{self.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in self.end_ids)),
            ("generation prompt", repr(self.generation_prompt)),
            ("added before the answer", repr(self.before_answer) if self.before_answer else "nothing"),
            ("system prompt when a row has none", repr(self.default_system) if self.default_system else "none"),
            ("accepts a system message", yes[self.takes_system]),
            ("shows tool lists / calls / results", " / ".join(yes[value] for value in seen)),
            ("keeps <think> of earlier turns", yes[self.keeps_thinking]),
            ("beginning of sequence", bos),
        ]

    def _repr_html_(self) -> str:
        return table(self.facts(), ("chat template", "as its renderings show"))

    def __repr__(self) -> str:
        return text_table(self.facts())


def inspect(tokenizer: Any) -> Template:
    """Find out what the tokenizer's chat template does.

    Raises TunebookError when there is no template, when it cannot be rendered within the limits, or when it ends the
    assistant's turn with no special token: a model trained with it could not learn to stop.
    """
    if isinstance(tokenizer.chat_template, dict):
        raise TunebookError(
            "The tokenizer has several chat templates; keep the one to train with as chat_template.jinja."
        )
    if not tokenizer.chat_template:
        turn_ends(tokenizer)  # raises
    thought = {"role": "assistant", "content": "<think>HHH</think>AAA"}
    probes: list[Conversation] = [
        ([QUESTION, ANSWER], None, [1]),
        ([QUESTION], None, []),
        ([QUESTION, CALLING], None, []),
        ([QUESTION, CALLING, RESULT, ANSWER], None, []),
        ([QUESTION, thought, QUESTION, ANSWER], None, []),
        ([{"role": "system", "content": "SSS"}, QUESTION], None, []),
        ([QUESTION, ANSWER], json.dumps([TOOL]), []),
    ]
    try:
        first, *others = _asked(tokenizer, probes, PROBE_SECONDS)
    except worker.Lost as lost:
        raise TunebookError(f"{lost} {MEND}") from None
    full, prompt_open, prompt = _needed(first.full), _needed(first.turns[0][0]), _needed(others[0].full)
    called, result, thinking, system, tooled = (one.full if isinstance(one.full, str) else "" for one in others[1:])
    if "AAA" not in full or "QQQ" not in full:
        raise TunebookError(f"The chat template leaves out the question or the answer. {MEND}")
    known = {json.dumps([QUESTION, ANSWER]): full, json.dumps([QUESTION, CALLING]): called}
    pattern = special_pattern(tokenizer)
    bare = pattern.sub("", prompt[: prompt.index("QQQ")])
    around = pattern.sub("", system[: system.index("QQQ")].replace("SSS", "")) if "SSS" in system else ""
    bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return Template(
        tokenizer=tokenizer,
        end_ids=turn_ends(tokenizer, lambda messages: known[json.dumps(messages)]),
        generation_prompt=prompt_open[len(prompt) :] if prompt_open.startswith(prompt) else "",
        before_answer=full[len(prompt_open) : full.index("AAA")] if full.startswith(prompt_open) else "",
        default_system=_without_roles(bare, around),
        shows_tools="TTT" in tooled,
        shows_tool_calls="FFF" in called and "VVV" in called,
        shows_tool_results="RRR" in result,
        takes_system="SSS" in system,
        keeps_thinking="HHH" in thinking,
        has_markers=bool(re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template)),
        adds_bos=bos and not full.startswith(tokenizer.bos_token),
        special_ids=frozenset(special_tokens(tokenizer).values()),
        special_text=pattern,
    )


def _needed(text: Text) -> str:
    if isinstance(text, RowError):
        raise TunebookError(f"The chat template cannot render a question and an answer: {text.detail}. {MEND}")
    return text


def _without_roles(head: str, around: str) -> str:
    """The text before the first question, less what stands around any system message (role names, line breaks)."""
    for line in {line.strip() for line in around.splitlines() if line.strip()}:
        head = re.sub(rf"(?m)^\s*{re.escape(line)}\s*$", "", head)
    return head.strip()


# ---------------------------------------------------------------- rendering


def render(tokenizer: Any, conversations: list[Conversation], seconds: float = BATCH_SECONDS) -> list[Rendering]:
    """Conversations as the tokenizer's own template writes them; a RowError in place of what it refuses.

    A template that has to be stopped in the middle of a batch gets its rows one by one, and those that it stops at are
    refused. Raises TunebookError when that happens on several rows in a row.
    """
    with contextlib.suppress(worker.Lost):
        return _asked(tokenizer, conversations, seconds) if conversations else []
    found: list[Rendering] = []
    lost = 0
    for one in conversations:
        try:
            found += _asked(tokenizer, [one], PROBE_SECONDS)
            lost = 0
        except worker.Lost as error:
            lost += 1
            if lost == MOST_LOST:
                raise TunebookError(f"{error} It was stopped on {lost} rows in a row; mend the template.") from None
            refused = RowError("template refused", str(error))
            found.append(Rendering(refused, [(refused, None) for _ in one[2]]))
    return found


def prompt(tokenizer: Any, messages: list[dict], tools: list[dict] | None = None) -> str:
    """What the model is given to answer the last message. Raises RowError where the template refuses it."""
    asked = (messages, json.dumps(tools) if tools else None, [len(messages)])
    text = render(tokenizer, [asked], PROBE_SECONDS)[0].turns[0][0]
    if isinstance(text, RowError):
        raise text
    return text


def marked_spans(tokenizer: Any, messages: list[dict], tools: str | None) -> list[tuple[int, int]]:
    """Spans of characters that the template marks as its answers (`{% generation %}`). Raises RowError."""
    try:
        request = _request(tokenizer, [(messages, tools, [])], marks=True)
        ((found, _),) = _child().ask(request, timeout_s=PROBE_SECONDS)
    except worker.Lost as lost:
        raise RowError("template refused", str(lost)) from None
    if "refused" in found:
        raise RowError("template refused", found["refused"])
    return found["spans"]


def _asked(tokenizer: Any, conversations: list[Conversation], seconds: float) -> list[Rendering]:
    def text(value: Any) -> Any:
        return RowError("template refused", value["refused"]) if isinstance(value, dict) else value

    answers = _child().ask(_request(tokenizer, conversations), timeout_s=seconds)
    return [Rendering(text(full), [(text(a), text(b)) for a, b in turns]) for full, turns in answers]


def _request(tokenizer: Any, conversations: list[Conversation], marks: bool = False) -> dict[str, Any]:
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return {"template": tokenizer.chat_template, "special": special, "conversations": conversations, "marks": marks}


@functools.cache
def _child() -> worker.Worker:
    """The one process that renders for this one; it is started again where it was stopped."""
    return worker.Worker("helpers.data.chat_template:Renderer", name="The chat template", memory_gib=MEMORY_GIB)


class Renderer:
    """In the child: every rendering as text, or {"refused": why}."""

    def __init__(self) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        self.render = render_jinja_template

    def __call__(self, request: dict[str, Any], event: worker.Event) -> Any:
        shared = {"chat_template": request["template"], **request["special"]}

        def written(messages: list[dict], tools: list | None, generation: bool = False) -> Any:
            try:
                (text,), spans = self.render(
                    [messages],
                    tools=tools,
                    add_generation_prompt=generation,
                    return_assistant_tokens_mask=request["marks"],
                    **shared,
                )
            except MemoryError:
                raise
            except Exception as error:
                return {"refused": f"the chat template says: {str(error)[:200] or type(error).__name__}"}
            if len(text) > MAX_ADDED and len(text) > MAX_ADDED + MAX_GROWTH * sum(len(str(m)) for m in messages):
                refused = f"the template wrote {len(text):,} characters; that is no rendering of this conversation"
                return {"refused": refused}
            return {"spans": spans[0]} if request["marks"] else text

        found = []
        for messages, tools, turns in request["conversations"]:
            listed = json.loads(tools) if tools else None
            apart = []
            for turn in turns:
                through = written(messages[: turn + 1], listed) if turn < len(messages) - 1 else None
                apart.append((written(messages[:turn], listed, generation=True), through))
            found.append((written(messages, listed), apart))
        return found
