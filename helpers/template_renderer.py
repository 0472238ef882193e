"""Chat templates come from strangers: each is rendered in a process that can be ended, with limits on its time, its
memory and what it writes. transformers runs it in a sandbox there (no attributes, no writes)."""

from __future__ import annotations

import functools
import json
import re
import traceback
from typing import Any

from helpers import worker
from helpers.errors import TunebookError

MEMORY_GIB, SECONDS = 2.0, 10.0
THINKING = ("reasoning_content", "thinking", "reasoning")  # keys of a message under which templates look for thoughts
MAX_GROWTH = 20  # a rendering may be this many times its messages, and MAX_ADDED characters on top
MAX_ADDED = 200_000
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _Refused(Exception):
    """A rendering that is none."""


def render(tokenizer: Any, conversations: list[Any], seconds: float = SECONDS) -> list[dict[str, Any] | str]:
    """For each (messages, tools as JSON or None, places of turns) what `Renderer` finds: {"full", "turns", "spans"}, or
    why the template refuses it. Raises worker.Lost for a template that had to be stopped."""
    template, special = tokenizer.chat_template, tokenizer.special_tokens_map.items()
    settings = {"chat_template": template, "return_assistant_tokens_mask": bool(MARKS.search(str(template)))}
    settings |= {name: value for name, value in special if isinstance(value, str)}
    return _child().ask({"settings": settings, "conversations": conversations}, timeout_s=seconds)


def text(tokenizer: Any, messages: list[dict], generation: bool = False) -> str:
    """One conversation as text, with the generation prompt when `generation`. Raises TunebookError if it is refused."""
    (found,) = render(tokenizer, [(messages, None, [len(messages)] if generation else [])])
    if isinstance(found, str):
        raise TunebookError(f"The chat template refuses a conversation: {found}.")
    return found["turns"][0][0] if generation else found["full"]


@functools.cache
def _child() -> worker.Worker:
    """The one process that renders for this one; it is started again where it was stopped."""
    return worker.Worker("helpers.template_renderer:Renderer", name="The chat template", memory_gib=MEMORY_GIB)


class Renderer:
    """In the child: a Rendering's fields for each conversation, or why the template refuses it."""

    def __init__(self) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        self.render = render_jinja_template

    def __call__(self, request: dict[str, Any], event: worker.Event) -> list[dict[str, Any] | str]:
        def written(messages: list[dict], tools: list | None, generation: bool = False) -> tuple[str, list]:
            settings = {"tools": tools, "add_generation_prompt": generation, **request["settings"]}
            (text,), spans = self.render([messages], **settings)
            if len(text) > MAX_ADDED and len(text) > MAX_ADDED + MAX_GROWTH * sum(len(str(m)) for m in messages):
                refused = f"the template wrote {len(text):,} characters; that is no rendering of this conversation"
                raise _Refused(refused)
            return text, spans[0] if spans else []

        found: list[dict[str, Any] | str] = []
        for messages, tools, turns in request["conversations"]:
            listed = json.loads(tools) if tools else None
            try:
                full, spans = written(messages, listed)
                apart = []
                for turn in turns:
                    through = written(messages[: turn + 1], listed)[0] if turn < len(messages) - 1 else ""
                    apart.append((written(messages[:turn], listed, generation=True)[0], through))
            except MemoryError:
                raise
            except _Refused as error:
                found.append(str(error))
            except Exception as error:
                found.append(f"the chat template says{_line(error)}: {str(error)[:200] or type(error).__name__}")
            else:
                found.append({"full": full, "turns": apart, "spans": spans})
        return found


def _line(error: Exception) -> str:
    """The line of the template at which Jinja failed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)  # a syntax error, or one while rendering
    return f" in line {line}" if line else ""
