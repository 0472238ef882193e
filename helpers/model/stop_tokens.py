"""Which tokens end a turn: the one answer, for labels, generation, samples, GGUF checks and Modelfiles.

Nothing is known by name. A conversation with a marked answer is rendered with the tokenizer's own chat template; the
special token behind the mark ends the turn.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from helpers import template_renderer
from helpers.errors import TunebookError

QUESTION, ANSWER = {"role": "user", "content": "QQQ"}, {"role": "assistant", "content": "AAA"}
CALL = {"type": "function", "function": {"name": "FFF", "arguments": {"KKK": "VVV"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text → id of every control token."""
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {t: tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Finds control tokens in a text, the longest first."""
    texts = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def turn_ends(tokenizer: Any, render: Callable[[list[dict]], str] | None = None) -> tuple[int, ...]:
    """Ids of the tokens that end an assistant's turn: behind an answer, then behind a tool call where that differs.

    render: messages → text, where they have been rendered already. Raises
    TunebookError when there is no template, or when it ends the turn with no special token.
    """

    def own(messages: list[dict]) -> str:
        return template_renderer.text(tokenizer, messages)

    if not tokenizer.chat_template:
        raise TunebookError(
            "The tokenizer has no chat template; set chat_template in notebook 01 to a name (chatml, alpaca …), "
            "a .jinja file or its text, or choose an instruct model."
        )
    special, pattern = special_tokens(tokenizer), special_pattern(tokenizer)
    found: list[int] = []
    probes: tuple[tuple[list[dict], str], ...] = (([QUESTION, ANSWER], "AAA"), ([QUESTION, CALLING], "VVV"))
    for messages, mark in probes:
        try:
            text = (render or own)(messages)
        except Exception:  # a stranger's template raises what it likes: it has no such turn
            text = ""
        behind = [special[one.group()] for one in pattern.finditer(text, text.rindex(mark))] if mark in text else []
        if behind:  # what ends a call may stand before the end of the turn
            found.append(found[0] if found and found[0] in behind else behind[-1 if found else 0])
        elif not found:
            raise TunebookError(
                "The chat template ends the assistant's turn with no special token, so a model trained with it could "
                "not learn to stop; choose another one by chat_template, or let it end answers with {{ eos_token }}."
            )
    return tuple(dict.fromkeys(found))


def end_of_turn(tokenizer: Any) -> int:
    """Id of the token that ends an assistant's turn, without a template a text. Raises TunebookError when none does."""
    return turn_ends(tokenizer)[0] if tokenizer.chat_template or not tokenizer.eos_token else tokenizer.eos_token_id


def stop_tokens(tokenizer: Any, configured: int | Sequence[int] | None = None) -> list[int]:
    """Ids at which generation stops: the ends of a turn, the tokenizer's end of sequence, and `configured`, the
    `eos_token_id` of the model's generation_config. A base model without a template has the latter two alone."""
    found: list[int | None] = []
    if tokenizer.chat_template:
        with contextlib.suppress(TunebookError):  # said where the data is prepared; the end of sequence is left
            found += turn_ends(tokenizer)
    found += [tokenizer.eos_token_id, *(configured if isinstance(configured, Sequence) else [configured])]
    return list(dict.fromkeys(int(token) for token in found if token is not None))
