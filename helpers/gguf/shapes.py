"""Texts and conversations on which a GGUF's tokenizer and template must agree with the trained model's."""

from __future__ import annotations

from typing import Any

TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "tabs\tand\n\nnewlines\r\n\n\n",
    "don't can't I'll we've SHE'S",
    "0 12 345 6789 3.14159 1,000,000 2026-11-22T17:30:00Z",
    "SELECT name, COUNT(*) AS n FROM lakes WHERE depth_m >= 100.5 GROUP BY name;",
    "def f(x):\n    return {'a': [x ** 2, -1]}  # ok",
    "Où est l'été ? Ärger, żółć, naïve façade",
    "最深的湖是哪个？贝加尔湖，1642米。",
    "日本語とかなカナ、한국어 텍스트",
    "Съешь ещё этих мягких булок",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "🙂🏔️👩‍👩‍👧‍👦🇫🇷 ok",
    "e\u0301 \u00e9 \u200b zero\u200dwidth \u2028",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "<b>&amp;</b> https://example.org/a?b=c#d",
    "C:\\path\\to\\file $HOME `ls -la` %20",
    "ﬁ ½ ² №",
    "\x00\x01\x7f",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
QUESTION = [{"role": "user", "content": "Which lake is deepest?"}]


def conversations() -> dict[str, tuple[list[dict], list[dict] | None]]:
    """Shape -> (messages, tools)."""
    turns = [
        *QUESTION,
        {"role": "assistant", "content": "Lake Baikal."},
        {"role": "user", "content": "How deep is it?"},
    ]
    system = [{"role": "system", "content": "You answer with one SQL query.\n\nTables: lakes(name, depth_m)"}]
    return {
        "question": (QUESTION, None),
        "system": ([*system, *QUESTION], None),
        "multi-turn": (turns, None),
        "system and multi-turn": ([*system, *turns], None),
        "unicode": ([{"role": "user", "content": "Où est l’été ? 🏔️ “quoted” – naïve\tτέλος"}], None),
        "Chinese": (
            [{"role": "system", "content": "你是一个助手。"}, {"role": "user", "content": "最深的湖是哪个？"}],
            None,
        ),
        "markup": (
            [{"role": "user", "content": 'Print {{ x }} {% raw %} \\n <b>&amp;</b> "quotes" and `code`\n\n\tend'}],
            None,
        ),
        "tools": (QUESTION, [WEATHER]),
    }


def added_token_texts(tokenizer: Any) -> list[str]:
    """Each added token between plain words: the place where conversions lose them."""
    return [
        f"before{token}after {token}\n{token}"
        for token in sorted(str(t) for t in tokenizer.added_tokens_decoder.values())[:64]
    ]


def render(tokenizer: Any, messages: list[dict], tools: list[dict] | None) -> tuple[str | None, str]:
    """The prompt of the tokenizer's own template, with the generation prompt; (None, why) where the template has no such shape."""
    from helpers.data.chat_template import prompt
    from helpers.data.turns import RowError

    try:
        text = prompt(tokenizer, messages, tools)
        if tools and text == prompt(tokenizer, messages):
            return None, "the template does not print tools"
    except RowError as error:
        return None, str(error)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if system and system.splitlines()[0] not in text:
        return None, "the template drops the system message"
    return text, ""
