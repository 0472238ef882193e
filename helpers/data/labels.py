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

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

from helpers.data.chat_template import Rendering, Template, marked_spans, render
from helpers.data.tables import Rejects
from helpers.data.turns import Row, RowError

MAX_CHARS = 4_000_000  # of a row; ten million characters without a word among them took 3.7 GiB to tokenise
MOST_TAILS = 10_000  # prefix tails whose tokens are remembered


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


class Encoder:
    """Encodes batches of rows with one template. train_on: "last" turn, "all" assistant turns, or "everything".

    notes: what the template could not show, or changed → rows; examples: the first of each.
    """

    def __init__(self, template: Template, train_on: str = "last", rejects: Rejects | None = None) -> None:
        import numpy as np

        self.template, self.train_on, self.rejects = template, train_on, rejects or Rejects()
        self.notes: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._backend = template.tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._bos, self._eos = template.tokenizer.bos_token_id, template.tokenizer.eos_token_id
        self._tails: dict[str, list[int]] = {}
        # For every token id 0, 1 for a control token, 2 for one that ends an assistant turn.
        self._kinds: Any = np.zeros(max([len(template.tokenizer), *template.special_ids]) + 1, np.int8)
        self._kinds[list(template.special_ids)] = 1
        self._kinds[list(template.end_ids)] = 2

    def encode(self, rows: Iterable[list[Row]]) -> Iterator[list[Encoded]]:
        """Batches of sft, kto and text rows as tokens; what breaks the contract is rejected with file, row and reason.

        While one batch is tokenised (in Rust, without the interpreter's lock) the next is rendered.
        """
        with ThreadPoolExecutor(1) as pool:
            begun: tuple[list[Row], list[Row], list[Rendering], Future[list[list[int]]]] | None = None
            for batch in chain(rows, [[]]):  # the empty one pushes out the last
                texts = [row for row in batch if row["kind"] == "text"]
                chats, rendered = self._rendered([row for row in batch if row["kind"] != "text"])
                following = texts, chats, rendered, pool.submit(self._tokenised, rendered)
                if begun is not None:
                    texts, chats, rendered, ids = begun
                    yield self._texts(texts) + self._masked(chats, rendered, ids.result())
                begun = following

    def pairs(self, rows: Iterable[list[Row]]) -> Iterator[list[tuple[Row, Encoded, Encoded]]]:
        """Preference rows as (row, chosen, rejected); both share the prompt, and each ends with its one end of turn."""
        for batch in rows:
            left, sides = batch, []
            for side in ("chosen", "rejected"):
                whole = [
                    {**row, "messages": row["messages"] + row[side], "first": len(row["messages"])} for row in left
                ]
                ready, rendered = self._rendered(whole)
                sides.append({one.row["id"]: one for one in self._masked(ready, rendered, self._tokenised(rendered))})
                left = [row for row in left if row["id"] in sides[-1]]  # the others are rejected with their reason
            done = []
            for row in left:
                chosen, rejected = (side[row["id"]] for side in sides)
                with self._rejecting(row):
                    if list(chosen.ids[: chosen.prompt]) != list(rejected.ids[: rejected.prompt]):
                        detail = "the template writes another prompt for the chosen than for the rejected answer"
                        raise RowError("prompts differ", detail)
                    done.append((row, chosen, rejected))
            yield done

    # ------------------------------------------------------------ one batch

    def _rendered(self, rows: list[Row]) -> tuple[list[Row], list[Rendering]]:
        """The rows that may be rendered, as this template can show them, and their renderings."""
        ready = []
        for row in rows:
            with self._rejecting(row):
                ready.append(self._prepared(row))
        asked = [(row["messages"], row.get("tools"), self._trained_turns(row)) for row in ready]
        return ready, render(self.template.tokenizer, asked)

    def _tokenised(self, rendered: list[Rendering]) -> list[list[int]]:
        texts = [one.full if isinstance(one.full, str) else "" for one in rendered]
        return [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _texts(self, rows: list[Row]) -> list[Encoded]:
        """Plain text: the tokenizer's own beginning, every token trained, the end of sequence behind it."""
        import numpy as np

        ready, done = [], []
        for row in rows:
            with self._rejecting(row):
                self._may_be_read(row)
                ready.append(row)
        texts = [row["messages"][0]["content"] for row in ready]
        for row, encoding in zip(ready, self._backend.encode_batch_fast(texts), strict=True):
            ids = encoding.ids if encoding.ids[-1:] == [self._eos] else [*encoding.ids, self._eos]
            done.append(Encoded(row, np.array(ids, np.int32), np.ones(len(ids), np.int8), 0, [len(ids) - 1]))
        return done

    def _may_be_read(self, row: Row) -> None:
        """Raises RowError for a row of too many characters and for one with control tokens in its text."""
        size, texts = 0, [("the tools", row.get("tools") or "")]
        for message in row["messages"]:
            where = "the text" if row["kind"] == "text" else f"a {message['role']} turn"
            texts.append((where, message["content"] or ""))
        for where, content in texts:
            size += len(content)
            if found := self.template.special_text.search(content):
                detail = f"{where} holds {found.group()!r}, which the tokenizer reads as a control token"
                raise RowError("special token in text", detail)
        if size > MAX_CHARS:
            raise RowError("row too long", f"{size:,} characters; cut it into rows of at most {MAX_CHARS:,}")

    def _prepared(self, row: Row) -> Row:
        """The row with its tool turns as this template can show them. Raises RowError."""
        self._may_be_read(row)
        template, tools, messages = self.template, row.get("tools"), row["messages"]
        if tools and not template.shows_tools:
            self._note("tool list written into the system message, as the template shows none", tools)
            system = messages[0] if messages[0]["role"] == "system" else {"role": "system", "content": ""}
            others = messages[messages[0]["role"] == "system" :]
            messages, tools = [{**system, "content": f"{system['content']}\n\n{tools}".lstrip()}, *others], None
        if not template.shows_tool_calls and any(message.get("tool_calls") for message in messages):
            self._note("tool calls written as JSON text, as the template shows none")
            messages = [spelt_out(message) for message in messages]
        if not template.shows_tool_results and any(message["role"] == "tool" for message in messages):
            self._note("tool results written as user turns, as the template shows none")
            messages = [{**message, "role": "user"} if message["role"] == "tool" else message for message in messages]
        return row if messages is row["messages"] else {**row, "messages": messages, "tools": tools}

    def _trained_turns(self, row: Row) -> list[int]:
        first = row.get("first", 0)  # of a pair only the answer is looked at
        turns = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant" and i >= first]
        return turns[-1:] if self.train_on == "last" and "first" not in row else turns

    def _masked(self, rows: list[Row], rendered: list[Rendering], ids: list[list[int]]) -> list[Encoded]:
        """The rows with their masks; those that break the contract are rejected."""
        tokens, done = _Tokens(ids, self._kinds), []
        for number, (row, rendering) in enumerate(zip(rows, rendered, strict=True)):
            with self._rejecting(row):
                done.append(self._one_masked(row, rendering, tokens, number))
        return done

    def _one_masked(self, row: Row, rendering: Rendering, tokens: _Tokens, number: int) -> Encoded:
        """Mask the prompt, keep each trained turn with its end. Raises RowError when the contract is broken."""
        full, template = rendering.full, self.template
        if isinstance(full, RowError):
            raise full
        start, stop = tokens.starts[number], tokens.starts[number + 1]
        ids, mask = tokens.ids[start:stop], tokens.mask[start:stop]
        if self._bos is not None and tokens.rows[number][:2] == [self._bos, self._bos]:
            raise RowError("two beginnings", "the template and the text both begin the sequence")
        begins, ends = [], []
        for turn, (prefix, through) in zip(self._trained_turns(row), rendering.turns, strict=True):
            if isinstance(prefix, RowError):
                raise prefix
            kept = through is None or (isinstance(through, str) and full.startswith(through))
            if not (kept and full.startswith(prefix)):
                if template.has_markers:
                    return self._by_marks(row, full, ids)
                found = f"the template writes turn {turn + 1} otherwise once others follow it"
                raise RowError("template is no prefix", f"{found}; train_on='last' avoids this")
            begin = self._boundary(prefix, tokens, number)
            end = tokens.end_after(start + begin, stop)
            if end < 0:
                raise RowError("no end of turn", f"turn {turn + 1} has no {template.end_text} in its labels")
            begins.append(begin)
            ends.append(end - start)
            content = row["messages"][turn]["content"].strip()
            if content and content not in full[len(prefix) :]:
                self._note("the template changed an answer", content)
        return self._encoded(row, ids, mask, begins, ends)

    def _encoded(self, row: Row, ids: Any, mask: Any, begins: list[int], ends: list[int]) -> Encoded:
        for begin, end in zip(begins, ends, strict=True):
            mask[begin : end + 1] = 1
        if self.train_on == "everything":
            mask[:] = 1
        return Encoded(row, ids, mask, begins[0], ends)

    def _boundary(self, prefix: str, tokens: _Tokens, number: int) -> int:
        """How many tokens of the row the prefix is. Raises RowError when its tokens are not the row's first tokens."""
        ids, specials = tokens.rows[number], tokens.specials_of(number)
        found = list(self.template.special_text.finditer(prefix))
        begin, tail = 0, prefix
        if 0 < len(found) <= len(specials):
            begin, tail = specials[len(found) - 1], prefix[found[-1].start() :]
        known = self._tails.get(tail)
        if known is None:
            known = self._backend.encode(tail, add_special_tokens=False).ids
            if len(self._tails) < MOST_TAILS:
                self._tails[tail] = known
        if ids[begin : begin + len(known)] != known:
            why = "the first token of the answer joins the last of the prompt; does it begin with white space?"
            raise RowError("answer runs into the prompt", why)
        return begin + len(known)

    def _by_marks(self, row: Row, full: str, ids: Any) -> Encoded:
        """By the template's own `{% generation %}` marks, for templates that write earlier turns otherwise."""
        import numpy as np

        spans = marked_spans(self.template.tokenizer, row["messages"], row.get("tools"))
        encoding = self._backend.encode(full, add_special_tokens=False)
        if not spans:
            raise RowError("template is no prefix", "the template's marks do not fit its rendering")
        ends, begins = [], []
        for first, behind in spans[-1:] if self.train_on == "last" else spans:
            begin, last = encoding.char_to_token(first), encoding.char_to_token(behind - 1)
            # The end of turn may stand right behind the marks.
            held: Any = np.flatnonzero(self._kinds[ids[begin : last + 2]] == 2)
            if not len(held):
                raise RowError("no end of turn", f"the template's marks leave {self.template.end_text} out")
            begins.append(begin)
            ends.append(int(begin + held[-1]))
        self._note("masked by the template's own marks")
        return self._encoded(row, ids, np.zeros(len(ids), np.int8), begins, ends)

    def _note(self, what: str, example: str = "") -> None:
        self.notes[what] += 1
        self.examples.setdefault(what, example[:300])

    @contextmanager
    def _rejecting(self, row: Row) -> Iterator[None]:
        """A row that breaks the contract in here is rejected with its reason."""
        try:
            yield
        except RowError as error:
            self.rejects.add(row["file"], row["row"], error.reason, error.detail, step="chat template")


class _Tokens:
    """A batch's token ids in one array, int32 (tokens,), row i from starts[i] to starts[i + 1], with its mask and the
    places of its control tokens. Numpy is asked once a batch: for each row it would take as long as tokenising does.
    """

    def __init__(self, rows: list[list[int]], kinds: Any) -> None:
        import numpy as np

        self.rows, self.starts = rows, [0, *accumulate(map(len, rows))]
        self.ids = np.fromiter(chain.from_iterable(rows), np.int32, self.starts[-1])
        self.mask: Any = np.zeros(len(self.ids), np.int8)
        found = kinds[self.ids]
        specials = np.flatnonzero(found)
        self._ends = np.flatnonzero(found == 2).tolist()
        first: Any = np.searchsorted(specials, self.starts)
        self._specials, self._first = specials.tolist(), first.tolist()

    def specials_of(self, number: int) -> list[int]:
        """Places of the control tokens of a row, counted from its beginning."""
        start = self.starts[number]
        return [at - start for at in self._specials[self._first[number] : self._first[number + 1]]]

    def end_after(self, place: int, stop: int) -> int:
        """The first token from `place` on, before `stop`, that ends a turn; -1 when there is none."""
        at = bisect_left(self._ends, place)
        return self._ends[at] if at < len(self._ends) and self._ends[at] < stop else -1


def spelt_out(message: dict) -> dict:
    """A message with its tool calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = [call["function"] for call in message["tool_calls"]]
    text = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, [message["content"], text]))}
