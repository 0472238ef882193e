"""Rows to token ids and the mask of what is trained, each promise of the chat contract checked on each row.

The mask is found by rendering prefixes: what the model will be given when it has to answer, the conversation before the
turn with the generation prompt, must be a prefix of the row's rendering, and its tokens a prefix of the row's tokens.
Then the trained part of a turn begins right after it and ends with the end of turn. A row that breaks this is rejected;
where the template marks its own answers (`{% generation %}`), its marks are used instead.

    <|im_start|>user\\nq<|im_end|>\\n<|im_start|>assistant\\n | a<|im_end|> | \\n
    0 0 0 …                          prefix                   1 1            0

Only one text a row is tokenised. Special tokens cut a text before it is tokenised, so the tokens up to the last special
token of the prefix are the same in both, and only the prefix's tail behind it ("assistant\\n") has to be compared.
"""

from __future__ import annotations

import contextlib
import functools
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, TypeVar

from helpers.data.chat_template import Rendering, Template, render
from helpers.data.tables import Rejects
from helpers.data.turns import Row, RowError

MAX_CHARS = 4_000_000  # of a row; ten million characters without a word among them took 3.7 GiB to tokenise
MOST_TAILS = 10_000  # prefix tails whose tokens are remembered
T = TypeVar("T")


@dataclass
class Encoded:
    """One row as tokens. ids: (length,) int32; mask: (length,) int8, 1 = trained.

    prompt: tokens before the first trained one. ends: positions of the end of turn of each trained turn.
    """

    row: Row
    ids: Any
    mask: Any
    prompt: int
    ends: list[int]

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return int(self.mask.sum())

    def part(self, begin: int, end: int) -> Encoded:
        """The tokens from `begin` on, before `end`."""
        ends = [at - begin for at in self.ends if begin <= at < end]
        return Encoded(self.row, self.ids[begin:end], self.mask[begin:end], max(0, self.prompt - begin), ends)


class Encoder:
    """Encodes batches of rows with one template. train_on: "last" turn, "all" assistant turns, or "everything".

    notes: what the template could not show, or changed → rows.
    """

    def __init__(self, template: Template, train_on: str = "last", rejects: Rejects | None = None) -> None:
        self.template, self.train_on, self.rejects = template, train_on, rejects or Rejects()
        self.notes: Counter[str] = Counter()
        self._bos, self._eos = template.tokenizer.bos_token_id, template.tokenizer.eos_token_id
        self._backend = template.tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        tokenised = functools.partial(self._backend.encode, add_special_tokens=False)
        self._tail = functools.lru_cache(MOST_TAILS)(tokenised)

    def encode(self, rows: Iterable[list[Row]]) -> Iterator[list[Encoded]]:
        """Batches of sft, kto and text rows as tokens; what breaks the contract is rejected with file, row and reason.

        While one batch is tokenised (in Rust, without the interpreter's lock) the next is rendered.
        """
        with ThreadPoolExecutor(1) as pool:

            def begun(batch: list[Row]) -> tuple[list[Row], list[Row], list[Rendering | RowError], Future]:
                texts = [row for row in batch if row["kind"] == "text"]
                chats, rendered = self._rendered([row for row in batch if row["kind"] != "text"])
                return texts, chats, rendered, pool.submit(self._tokenised, rendered)

            for (texts, chats, rendered, ids), _ in pairwise(map(begun, chain(rows, [[]]))):
                yield self._texts(texts) + list(self._accepted(self._masked, chats, rendered, ids.result()))

    def pairs(self, rows: Iterable[list[Row]]) -> Iterator[list[tuple[Row, Encoded, Encoded]]]:
        """Preference rows as (row, chosen, rejected); both share the prompt, and each ends with its one end of turn."""

        def pair(row: Row) -> tuple[Row, Encoded, Encoded]:
            chosen, rejected = (side[row["id"]] for side in sides)
            if list(chosen.ids[: chosen.prompt]) != list(rejected.ids[: rejected.prompt]):
                detail = "the template writes another prompt for the chosen than for the rejected answer"
                raise RowError("prompts differ", detail)
            return row, chosen, rejected

        for batch in rows:
            left, sides = batch, []
            for side in ("chosen", "rejected"):
                whole = [row | {"messages": row["messages"] + row[side], "first": len(row["messages"])} for row in left]
                ready, rendered = self._rendered(whole)
                done = self._accepted(self._masked, ready, rendered, self._tokenised(rendered))
                sides.append({one.row["id"]: one for one in done})
                left = [row for row in left if row["id"] in sides[-1]]  # the others are rejected with their reason
            yield list(self._accepted(pair, left))

    # ------------------------------------------------------------ one batch

    def _accepted(self, work: Callable[..., T], rows: Iterable[Row], *columns: Iterable[Any]) -> Iterator[T]:
        """What `work` makes of each row; one that breaks the contract is rejected with its reason."""
        for row, *more in zip(rows, *columns, strict=True):
            try:
                made = work(row, *more)
            except RowError as error:
                self.rejects.add(row["file"], row["row"], error.reason, error.detail, step="chat template")
            else:
                yield made

    def _rendered(self, rows: list[Row]) -> tuple[list[Row], list[Rendering | RowError]]:
        """The rows that may be rendered, as this template can show them, and their renderings."""
        ready = list(self._accepted(self._prepared, rows))
        asked = [(row["messages"], row.get("tools"), self._trained_turns(row)) for row in ready]
        return ready, render(self.template.tokenizer, asked)

    def _tokenised(self, rendered: list[Rendering | RowError]) -> list[list[int]]:
        texts = ["" if isinstance(one, RowError) else one.full for one in rendered]
        return [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _texts(self, rows: list[Row]) -> list[Encoded]:
        """Plain text: the tokenizer's own beginning, every token trained, the end of sequence behind it."""
        import numpy as np

        ready, done = list(self._accepted(self._readable, rows)), []
        texts = [row["messages"][0]["content"] for row in ready]
        for row, encoding in zip(ready, self._backend.encode_batch_fast(texts), strict=True):
            ends = self._eos is None or encoding.ids[-1:] == [self._eos]
            ids = encoding.ids if ends else [*encoding.ids, self._eos]
            done.append(Encoded(row, np.array(ids, np.int32), np.ones(len(ids), np.int8), 0, [len(ids) - 1]))
        return done

    # ------------------------------------------------------------ one row

    def _readable(self, row: Row) -> Row:
        """The row. Raises RowError when it has too many characters, or control tokens in its text."""
        texts = [(f"a {message['role']} turn", message["content"] or "") for message in row["messages"]]
        texts.append(("the tool list", row.get("tools") or ""))
        for where, content in texts:
            if found := self.template.special_text.search(content):
                detail = f"{where} holds {found.group()!r}, which the tokenizer reads as a control token"
                raise RowError("special token in text", detail)
        if (size := sum(len(content) for _, content in texts)) > MAX_CHARS:
            raise RowError("row too long", f"{size:,} characters; cut it into rows of at most {MAX_CHARS:,}")
        return row

    def _prepared(self, row: Row) -> Row:
        """The row with its tool turns as this template can show them. Raises RowError."""
        self._readable(row)
        template, tools, messages = self.template, row.get("tools"), row["messages"]
        if tools and not template.shows_tools:
            self.notes["tool list written into the system message, as the template shows none"] += 1
            system = messages[0] if messages[0]["role"] == "system" else {"role": "system", "content": ""}
            others = messages[messages[0]["role"] == "system" :]
            messages, tools = [{**system, "content": f"{system['content']}\n\n{tools}".lstrip()}, *others], None
        if not template.shows_tool_calls and any(message.get("tool_calls") for message in messages):
            self.notes["tool calls written as JSON text, as the template shows none"] += 1
            messages = [spelt_out(message) for message in messages]
        if not template.shows_tool_results and any(message["role"] == "tool" for message in messages):
            self.notes["tool results written as user turns, as the template shows none"] += 1
            messages = [{**message, "role": "user"} if message["role"] == "tool" else message for message in messages]
        return row if messages is row["messages"] else {**row, "messages": messages, "tools": tools}

    def _trained_turns(self, row: Row) -> list[int]:
        first = row.get("first", 0)  # of a pair only the answer is looked at
        turns = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant" and i >= first]
        return turns[-1:] if self.train_on == "last" and "first" not in row else turns

    def _masked(self, row: Row, rendering: Rendering | RowError, ids: list[int]) -> Encoded:
        """Mask the prompt, keep each trained turn with its end. Raises RowError when the contract is broken."""
        import numpy as np

        if isinstance(rendering, RowError):
            raise rendering
        if ids[:2] == [self._bos, self._bos]:
            raise RowError("two beginnings", "the template and the text both begin the sequence")
        spans = self._by_prefixes(row, rendering, ids) or self._by_marks(rendering, ids)
        mask: Any = np.zeros(len(ids), np.int8)
        for begin, end in spans:
            mask[begin : end + 1] = 1
        if self.train_on == "everything":
            mask[:] = 1
        return Encoded(row, np.fromiter(ids, np.int32, len(ids)), mask, spans[0][0], [end for _, end in spans])

    def _by_prefixes(self, row: Row, rendering: Rendering, ids: list[int]) -> list[tuple[int, int]]:
        """The first token and the end of turn of each trained turn; [] where the template marks its answers and writes
        earlier turns otherwise once others follow them. Raises RowError when a prefix's tokens are not the row's."""
        full, template, spans, changed = rendering.full, self.template, [], False
        controls, at = [(0, 0)], -1  # where the control tokens are, as (character, token)
        with contextlib.suppress(ValueError):  # the tokenizer reads one otherwise: then more of the prefix is compared
            for found in template.special_text.finditer(full):
                at = ids.index(template.special[found.group()], at + 1)
                controls.append((found.start(), at))
        for turn, (prefix, through) in zip(self._trained_turns(row), rendering.turns, strict=True):
            if not (full.startswith(through) and full.startswith(prefix)):
                if rendering.spans:
                    return []
                why = f"the template writes turn {turn + 1} otherwise once others follow it"
                raise RowError("template is no prefix", f"{why}; train_on='last' avoids this")
            following = bisect_left(controls, (len(prefix), -1))
            character, begin = controls[max(0, following - 1)]
            tail = self._tail(prefix[character:]).ids
            if ids[begin : begin + len(tail)] != tail:
                why = "the first token of the answer joins the last of the prompt; does it begin with white space?"
                raise RowError("answer runs into the prompt", why)
            end = next((at for _, at in controls[following:] if ids[at] in template.end_ids), None)
            if end is None:
                raise RowError("no end of turn", f"turn {turn + 1} has no {template.end_text} in its labels")
            spans.append((begin + len(tail), end))
            changed |= full.find(row["messages"][turn]["content"].strip(), len(prefix)) < 0
        if changed:
            self.notes["the template changed an answer"] += 1
        return spans

    def _by_marks(self, rendering: Rendering, ids: list[int]) -> list[tuple[int, int]]:
        """The same by the template's own `{% generation %}` marks."""
        encoding = self._backend.encode(rendering.full, add_special_tokens=False)
        spans = []
        for first, behind in rendering.spans[-1:] if self.train_on == "last" else rendering.spans:
            begin, last = encoding.char_to_token(first), encoding.char_to_token(behind - 1)
            # The end of turn may stand right behind the marks.
            ends = [at for at, token in enumerate(ids[: last + 2]) if at >= begin and token in self.template.end_ids]
            if not ends:
                raise RowError("no end of turn", f"the template's marks leave {self.template.end_text} out")
            spans.append((begin, ends[-1]))
        self.notes["masked by the template's own marks"] += 1
        return spans


def spelt_out(message: dict) -> dict:
    """A message with its tool calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = [call["function"] for call in message["tool_calls"]]
    text = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, [message["content"], text]))}
