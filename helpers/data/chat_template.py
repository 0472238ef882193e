"""A tokenizer's chat template: what it does to a conversation, read off its renderings, made in a child process.

Nothing here knows any template by name. Whether it has a default system prompt, writes `<think>`, shows tools, tool
calls or tool results, and how it ends a turn, is read off small probes. Templates come from strangers: transformers
runs them in a sandbox (no attributes, no writes), and here that happens in a process that can be ended, with limits on
its time, its memory and what it writes.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any

from helpers import template_renderer, worker
from helpers.data.turns import RowError
from helpers.display import table, text_table
from helpers.errors import TunebookError
from helpers.model.packed_attention import common_length
from helpers.model.stop_tokens import ANSWER, CALLING, QUESTION, special_pattern, special_tokens, turn_ends
from helpers.template_renderer import THINKING

PROBE_SECONDS = 10.0
BATCH_SECONDS = 120.0  # for a batch of 1,000 rows, which takes 0.05 s
MOST_LOST = 3  # rows in a row on which the template was stopped, after which it is given up
MEND = "Mend it, or choose another one by chat_template."
PLACES = {"content": "kept as text in the answer", "": "left out", "opened": "opened by the generation prompt"}
DATED = (
    "training shows the day of preparation, later prompts theirs; fix it by template_arguments, if it has one for it"
)
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
NO_PARAMETERS = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": "TTT", "description": "DDD", "parameters": NO_PARAMETERS}}
RESULT = {"role": "tool", "content": "RRR", "name": "FFF"}

Conversation = tuple[list[dict], str | None, list[int]]  # messages, tools as JSON, places of turns to be shown apart


@dataclass
class Rendering:
    """full: the whole conversation. turns: for each turn asked for what the model is given before it, and the
    conversation through its end ("" for the last message: that is `full`). spans: of characters that the template
    marks as its answers (`{% generation %}`)."""

    full: str
    turns: list[tuple[str, str]]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Template:
    """What a tokenizer's chat template does, as its own renderings show.

    end_ids: tokens that end an assistant turn, the plain one first. before_answer: text between the generation prompt
    and the answer. default_system: text that the template adds when a conversation has no system message.
    thinking: where the template looks for an answer's thoughts: a key of the message, its "content", "opened" behind a
    generation prompt that begins them, "" nowhere. special: control tokens and their ids; special_text finds them.
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
    thinking: str
    adds_bos: bool
    special: dict[str, int]
    special_text: re.Pattern[str]
    chosen: tuple[tuple[str, str], ...] = ()  # what the parameters chose, as facts

    @property
    def end_text(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.end_ids[0])

    def facts(self) -> list[tuple[str, str]]:
        """What a person should know about this template, as (what, how it is)."""
        yes = {True: "yes", False: "no"}
        if not self.tokenizer.chat_template:
            return [*self.chosen]
        seen = (self.shows_tools, self.shows_tool_calls, self.shows_tool_results)
        bos = "the tokenizer would add one; the template writes none" if self.adds_bos else "written by the template"
        return [
            *self.chosen,
            ("end of turn", " or ".join(f"{self.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in self.end_ids)),
            ("generation prompt", repr(self.generation_prompt)),
            ("added before the answer", repr(self.before_answer) if self.before_answer else "nothing"),
            ("system prompt when a row has none", repr(self.default_system) if self.default_system else "none"),
            ("accepts a system message", yes[self.takes_system]),
            ("shows tool lists / calls / results", " / ".join(yes[value] for value in seen)),
            ("thoughts", PLACES.get(self.thinking, f"taken from the message's {self.thinking}")),
            ("keeps <think> of earlier turns", yes[self.keeps_thinking]),
            *([("writes the date", DATED)] if "strftime_now" in str(self.tokenizer.chat_template) else []),
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
        *(([QUESTION, {**ANSWER, key: "HHH"}], None, []) for key in THINKING),
        ([QUESTION, thought], None, []),
    ]
    try:
        renderings = _asked(tokenizer, probes, PROBE_SECONDS)
    except worker.Lost as lost:
        raise TunebookError(f"{lost} {MEND}") from None
    first, asked, *others = renderings
    if isinstance(first, RowError) or isinstance(asked, RowError):
        why = next(one.detail for one in renderings if isinstance(one, RowError))
        raise TunebookError(f"The chat template cannot render a question and an answer: {why}. {MEND}")
    full, prompt, prompt_open = first.full, asked.full, first.turns[0][0]
    texts = ["" if isinstance(one, RowError) else one.full for one in others]
    called, result, thinking, system, tooled, *thoughtful = texts
    opened = "opened" if re.search(r"<(think|thinking|thought|reasoning)>\s*$", prompt_open) else ""
    keys = [key for key, text in zip((*THINKING, opened or "content"), thoughtful, strict=True) if "HHH" in text]
    for content, what in (("QQQ", "question"), ("AAA", "answer")):
        if content not in full:
            raise TunebookError(f"The chat template leaves out the {what}. {MEND}")
    known = {json.dumps([QUESTION, ANSWER]): full, json.dumps([QUESTION, CALLING]): called}
    pattern = special_pattern(tokenizer)
    bare, taken = (pattern.sub("", text.partition("QQQ")[0]) for text in (prompt, system))
    return Template(
        tokenizer=tokenizer,
        end_ids=turn_ends(tokenizer, lambda messages: known[json.dumps(messages)]),
        generation_prompt=prompt_open[len(prompt) :] if prompt_open.startswith(prompt) else "",
        before_answer=full[len(prompt_open) : full.index("AAA")] if full.startswith(prompt_open) else "",
        default_system=_without_roles(bare, *taken.split("SSS", 1)),
        shows_tools="TTT" in tooled,
        shows_tool_calls="FFF" in called and "VVV" in called,
        shows_tool_results="RRR" in result,
        takes_system="SSS" in system,
        keeps_thinking="HHH" in thinking,
        thinking=keys[0] if keys else opened,
        adds_bos=adds_bos(tokenizer) and not full.startswith(tokenizer.bos_token),
        special=special_tokens(tokenizer),
        special_text=pattern,
    )


def plain(tokenizer: Any) -> Template:
    """Of a tokenizer without a chat template, for plain text alone, which ends with the end of sequence."""
    end = tokenizer.eos_token
    said = (
        ("chat template", "none, and plain text needs none"),
        ("end of a text", end or "none: the tokenizer has none"),
    )
    special, ends = special_tokens(tokenizer), () if end is None else (tokenizer.eos_token_id,)
    texts: dict[str, Any] = dict.fromkeys(("generation_prompt", "before_answer", "default_system", "thinking"), "")
    shown = ("shows_tools", "shows_tool_calls", "shows_tool_results", "takes_system", "keeps_thinking", "adds_bos")
    what = texts | dict.fromkeys(shown, False) | {"special_text": special_pattern(tokenizer)}
    return Template(tokenizer, ends, special=special, chosen=said, **what)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a beginning of sequence before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _without_roles(head: str, before: str, behind: str = "") -> str:
    """The text before the first question, less what stands before and behind a system message (role names)."""
    left = head[common_length([head, before]) :]
    return left[: len(left) - common_length([left[::-1], behind[::-1]])].strip()


def set_arguments(tokenizer: Any, arguments: str) -> None:
    """Put `template_arguments` into the tokenizer's template."""
    if arguments.strip():
        tokenizer.chat_template = with_arguments(tokenizer.chat_template or "", arguments)


def with_arguments(template: str, arguments: str) -> str:
    """The template with values for its own switches in front: "enable_thinking=false, date_string=1 May 2026", or JSON.

    In the template itself they hold wherever it goes: adapter, merged model, GGUF, any server. Raises TunebookError for
    what is no value, for names that rendering itself sets, and for a switch that the template does not have.
    """
    text = arguments.strip()
    try:
        pairs = (part.partition("=") for part in re.split(r",\s*(?=\w+\s*=)", text) if part)
        values = json.loads(text) if text.startswith("{") else {k.strip(): _value(v.strip()) for k, _, v in pairs}
    except ValueError as error:
        raise TunebookError(f"template_arguments is {text[:80]!r}, which is not valid JSON ({error}).") from None
    lines = []
    for name, value in values.items():
        known = name.isidentifier() and name not in RESERVED and re.search(rf"\b{name}\b", template)
        if not known or isinstance(value, (dict, list)):
            why = "that is set by the rendering" if name in RESERVED else "which the chat template does not ask for"
            why = "whose value is no text, number or true/false" if known else why
            raise TunebookError(f"template_arguments sets {name[:40]!r}, {why}; it takes name=value, by commas.")
        lines.append(f"{{%- set {name} = {'none' if value is None else json.dumps(value, ensure_ascii=False)} -%}}")
    return "".join(lines) + template


def _value(text: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(text.lower() if text.lower() in ("true", "false", "null") else text)
    return None if text.lower() == "none" else text


def render(
    tokenizer: Any, conversations: list[Conversation], seconds: float = BATCH_SECONDS
) -> list[Rendering | RowError]:
    """Conversations as the tokenizer's own template writes them; a RowError in place of what it refuses.

    A template that has to be stopped in the middle of a batch gets its rows one by one, and those that it stops at are
    refused. Raises TunebookError when that happens on several rows in a row.
    """
    with contextlib.suppress(worker.Lost):
        return _asked(tokenizer, conversations, seconds) if conversations else []
    found: list[Rendering | RowError] = []
    lost = 0
    for one in conversations:
        try:
            found += _asked(tokenizer, [one], PROBE_SECONDS)
            lost = 0
        except worker.Lost as error:
            lost += 1
            if lost == MOST_LOST:
                raise TunebookError(f"{error} It was stopped on {lost} rows in a row; mend the template.") from None
            found.append(RowError("template refused", str(error)))
    return found


def prompt(tokenizer: Any, messages: list[dict], tools: list[dict] | None = None) -> str:
    """What the model is given to answer the last message. Raises RowError where the template refuses it."""
    asked = (messages, json.dumps(tools) if tools else None, [len(messages)])
    (rendering,) = render(tokenizer, [asked], PROBE_SECONDS)
    if isinstance(rendering, RowError):
        raise rendering
    return rendering.turns[0][0]


def _asked(tokenizer: Any, conversations: list[Conversation], seconds: float) -> list[Rendering | RowError]:
    found = template_renderer.render(tokenizer, conversations, seconds)
    return [RowError("template refused", one) if isinstance(one, str) else Rendering(**one) for one in found]
