"""Texts and conversations on which a GGUF file's tokenizer and template must agree with the trained model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.data import chat_template
from helpers.data.turns import RowError

_KEPT = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TEXTS: list[str] = _KEPT["texts"]
TOOL: dict[str, Any] = _KEPT["tool"]
# shape -> (messages, needed): a needed shape that differs in the Go template makes it unusable, another is reported
SHAPES: dict[str, tuple[list[dict[str, str]], bool]] = {
    c["shape"]: (c["messages"], c["needed"]) for c in _KEPT["conversations"]
}
QUESTION = SHAPES["one question"][0]


def conversations() -> dict[str, tuple[list[dict[str, str]], list[dict[str, Any]] | None]]:
    """Shape -> (messages, tools) that every runtime must render as the trained tokenizer does."""
    needed = {shape: (messages, None) for shape, (messages, needed) in SHAPES.items() if needed}
    return {**needed, "tools": (QUESTION, [TOOL])}


def token_texts(tokenizer: Any) -> list[str]:
    """TEXTS, and each added token between plain words: the place where conversions lose them."""
    added = sorted(str(t) for t in tokenizer.added_tokens_decoder.values())[:64]
    return [*TEXTS, *(f"before{t}after {t}\n{t}" for t in added)]


def render(tokenizer: Any, messages: list[dict], tools: list[dict] | None) -> tuple[str | None, str]:
    """The prompt of the tokenizer's own template; (None, why) where the template has no such shape."""
    try:
        text = chat_template.prompt(tokenizer, messages, tools)
        if tools and text == chat_template.prompt(tokenizer, messages):
            return None, "the template does not print tools"
    except RowError as error:
        return None, str(error)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if system and system.splitlines()[0] not in text:
        return None, "the template drops the system message"
    return text, ""
