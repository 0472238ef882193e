"""How typed turns are shown by one chat template and become tokens: the one way for all that is trained or asked.

Training rows, preference pairs, test questions and what notebook 05 asks go through `Chat`: tools, calls, results and
thoughts in the form that the template knows, control tokens in a text refused or taken as text.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from helpers.data.chat_template import PROBE_SECONDS, Template, render
from helpers.data.turns import Row, RowError, all_messages, map_strings, map_turn
from helpers.template_renderer import THINKING

LITERAL = "\U0010fffe"  # a noncharacter, put into a control token's text that is to stay text
MARKER = 0xF0000  # the first of the private characters that stand for control tokens where such texts are
IN_TEMPLATES = {"role", "content", "name", "tool_calls", "tool_call_id"}  # what templates know of a turn
THOUGHTS = re.compile(r"\s*(?:<(think|thinking|thought|reasoning)>(.*?)</\1>|(?!.*<think>)(.*?)</think>)\s*", re.DOTALL)
OFFER = "set control_tokens to 'text' to have it tokenised as ordinary text"


def openai_form(messages: list[dict]) -> list[dict]:
    """Turns as OpenAI-compatible servers take them: arguments of calls as JSON text."""
    made = []
    for turn in messages:
        turn = {"reasoning_content" if key == "reasoning" else key: value for key, value in turn.items()}
        made.append({key: value for key, value in turn.items() if key not in ("weight", "untrained")})
        if calls := turn.get("tool_calls"):
            spelt = [
                {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}
                for c in calls
            ]
            both = zip(calls, spelt, strict=True)
            made[-1]["tool_calls"] = [{"id": f"call{i}", **c, "function": f} for i, (c, f) in enumerate(both)]
    return made


def thoughts_of(turn: dict) -> tuple[str, str]:
    """(thoughts, content without them) of an answer: a field of their own, or a block in front of the content."""
    content = turn.get("content") or ""
    if turn.get("reasoning") or "</" not in content or not (found := THOUGHTS.match(content)):
        return turn.get("reasoning") or "", content
    return (found[2] or found[3] or "").strip(), content[found.end() :]


class Chat:
    """Turns as one template shows them, and their tokens: the one way for training rows, pairs, test questions and what
    candidates are asked. control_tokens: "reject" rows whose texts hold control tokens, or take them as "text".

    notes: what the template could not show, or changed → rows.
    """

    def __init__(self, template: Template, control_tokens: str = "text") -> None:
        self.template, self.control_tokens = template, control_tokens
        self.notes: Counter[str] = Counter()
        self.backend = template.tokenizer.backend_tokenizer
        self.backend.no_padding()
        self.backend.no_truncation()

    def prompt(self, messages: list[dict], tools: str | None = None) -> list[int]:
        """Token ids of what the model is given to answer a conversation. tools: JSON text. Raises RowError."""
        return self.ids(self.text(messages, tools))

    def text(self, messages: list[dict], tools: str | None = None) -> str:
        """The same as text, in which control tokens that are ordinary text are marked."""
        shown, listed = self.shown({"messages": messages, "tools": tools})
        (rendering,) = render(self.template.tokenizer, [(shown, listed, [len(shown)])], PROBE_SECONDS)
        if isinstance(rendering, RowError):
            raise rendering
        return rendering.turns[0][0]

    # ------------------------------------------------------------ turns

    def shown(self, row: Row) -> tuple[list[dict], str | None]:
        """(messages, tools as JSON) of a row in the keys that this template takes, in the only form in which it can
        show them. Raises RowError for control tokens in a text."""
        template, tools, turns = self.template, row.get("tools"), row["messages"]
        if template.thinking != "content":
            turns = [self._thoughts_apart(turn) if turn["role"] == "assistant" else turn for turn in turns]
        if self.control_token({"messages": turns, "tools": tools}):
            self.notes["control tokens in a text taken as text"] += 1
            turns = [map_turn(turn, self.literal) for turn in turns]
            tools = json.dumps(map_strings(json.loads(tools), self.literal), ensure_ascii=False) if tools else None
        if not tools and {len(turn) for turn in turns} == {2} and "tool" not in [turn["role"] for turn in turns]:
            return turns, tools
        if tools and not template.shows_tools:
            role = "system" if template.takes_system else "user"
            self.notes[f"tool list written into the {role} message, as the template shows none"] += 1
            first = turns[0] if turns[0]["role"] == role else {"role": role, "content": ""}
            told = [first["content"], tools] if template.takes_system else [tools, first["content"]]
            turns, tools = (
                [{**first, "content": "\n\n".join(filter(None, told))}, *turns[turns[0]["role"] == role :]],
                None,
            )
        if not template.shows_tool_calls and any(turn.get("tool_calls") for turn in turns):
            self.notes["tool calls written as JSON text, as the template shows none"] += 1
            turns = [spelt_out(turn) for turn in turns]
        if not template.shows_tool_results and any(turn["role"] == "tool" for turn in turns):
            self.notes["tool results written as user turns, as the template shows none"] += 1
            turns = [{**turn, "role": "user"} if turn["role"] == "tool" else turn for turn in turns]
        where = {"content": "written into the answer as <think> …", "": "left out"}.get(template.thinking)
        if where and any(turn.get("reasoning") for turn in turns):
            self.notes[f"thoughts {where}, as the template has no place for them"] += 1
        return [turn if turn.keys() <= IN_TEMPLATES else self._in_keys(turn) for turn in turns], tools

    def _thoughts_apart(self, turn: dict) -> dict:
        """An answer with its thoughts in a field of their own, where the template would take them out of the text."""
        thoughts, content = thoughts_of(turn)
        if not self.template.thinking or content == turn["content"]:
            return turn
        gone = len(turn["content"]) - len(content)
        parts = [[max(0, b - gone), e - gone] for b, e in turn.get("untrained", ()) if e > gone]
        return {**turn, "content": content, "reasoning": thoughts, "untrained": parts}

    def _in_keys(self, turn: dict) -> dict:
        """A turn with nothing but keys that templates know, its thoughts where this one looks for them."""
        made = {key: value for key, value in turn.items() if key in IN_TEMPLATES}
        if (thoughts := turn.get("reasoning")) and self.template.thinking == "content":
            made["content"] = f"<think>\n{thoughts.strip()}\n</think>\n\n{turn['content']}"
        elif thoughts:
            made[self.template.thinking if self.template.thinking in THINKING else THINKING[0]] = thoughts
        return made

    def control_token(self, row: Row) -> bool:
        """Whether a text of a row holds a control token. Raises RowError where that is to be rejected."""
        if self.control_tokens == "reject":
            refuse_control_tokens(row, self.template.special_text)
            return False
        pattern = self.template.special_text
        return not _is_free(row, pattern) and any(pattern.search(text) for _, text in _texts(row))

    # ------------------------------------------------------------ tokens

    def literal(self, text: str) -> str:
        """A text whose control tokens are marked as ordinary text."""
        return self.template.special_text.sub(lambda found: found[0][0] + LITERAL + found[0][1:], text)

    def marked(self, text: str) -> str:
        """A rendering with a private character for each of its control tokens; those that are text lose their mark."""
        return self.template.special_text.sub(lambda found: self._literally[1][found[0]], text).replace(LITERAL, "")

    @functools.cached_property
    def _literally(self) -> tuple[Any, dict[str, str], dict[int | None, int]]:
        """A tokenizer to which control tokens are text (as `split_special_tokens` does it) and private characters stand
        for them; character by control token; control token's id by character's."""
        from tokenizers import AddedToken, Tokenizer

        made, special = Tokenizer.from_str(self.backend.to_str()), self.template.special
        made.encode_special_tokens = True
        marks = {text: chr(MARKER + place) for place, text in enumerate(special)}
        known = self.template.tokenizer.added_tokens_decoder
        for text, mark in marks.items():
            blanks = {side: getattr(known.get(special[text]), side, False) for side in ("lstrip", "rstrip")}
            made.add_tokens([AddedToken(mark, normalized=False, **blanks)])
        return made, marks, {made.token_to_id(mark): special[text] for text, mark in marks.items()}

    def encoding(self, text: str, literally: bool) -> Any:
        """The tokenizer's encoding of a rendering, or of what `marked` makes of it."""
        if not literally:
            return self.backend.encode(text, add_special_tokens=False)
        return self._literally[0].encode(self.marked(text), add_special_tokens=False)

    def parts(self, text: str) -> list[tuple[str, bool]]:
        """(part, whether it is a control token) of a rendering in which some control tokens are text."""
        found, at = [], 0
        for one in self.template.special_text.finditer(text):
            found += [(text[at : one.start()].replace(LITERAL, ""), False), (one.group(), True)]
            at = one.end()
        return [part for part in [*found, (text[at:].replace(LITERAL, ""), False)] if part[0]]

    def ids(self, text: str, literally: bool = False) -> list[int]:
        """Token ids of a rendering; literally: some of its control tokens are text."""
        if not (literally or LITERAL in text):
            return self.encoding(text, False).ids
        return [self._literally[2].get(i, i) for i in self.encoding(text, True).ids]


def refuse_control_tokens(row: Row, pattern: re.Pattern[str]) -> None:
    """Raise RowError where a text of a row that is rendered holds a control token."""
    for where, text in () if _is_free(row, pattern) else _texts(row):
        if at := pattern.search(text):
            detail = f"{where} holds {at.group()!r}, which the tokenizer reads as a control token; {OFFER}"
            raise RowError("special token in text", detail)


def _is_free(row: Row, pattern: re.Pattern[str]) -> bool:
    """Whether a row surely holds no control token, by one search: its turns have nothing but role and content."""
    turns = all_messages(row)
    plain = not row.get("tools") and all(len(turn) == 2 for turn in turns)
    return plain and not pattern.search("\n".join(turn["content"] or "" for turn in turns))


def _texts(row: Row) -> Iterator[tuple[str, str]]:
    """(where it stands, text) of every text of a row that is rendered."""
    for turn in all_messages(row):
        parts = thoughts_of(turn) if turn["role"] == "assistant" else [turn["content"]]
        yield from ((f"a {turn['role']} turn", part or "") for part in parts)
        if len(turn) > 2:
            yield from ((f"the {key} of a turn", turn[key]) for key in ("name", "tool_call_id") if key in turn)
            yield from (("a tool call", text) for text in _strings(turn.get("tool_calls", ())))
    if row.get("tools"):
        yield from (("the tool list", text) for text in _strings(json.loads(row["tools"])))


def _strings(value: Any) -> list[str]:
    """Every text in a JSON value."""
    found: list[str] = []
    map_strings(list(value), lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return found


def spelt_out(message: dict) -> dict:
    """A message with its tool calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = [call["function"] for call in message["tool_calls"]]
    text = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, [message["content"], text]))}
