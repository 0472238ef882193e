"""Rows to token ids and the mask of what is trained, by the tokenizer's own template, each promise checked on each row.

The mask is found by rendering prefixes: what the model will be given when it has to answer, `render(messages[:i],
add_generation_prompt=True)`, must be a prefix of the row's rendering, and its tokens a prefix of the row's tokens. Then the
trained part of a turn begins right after it and ends with the end of turn. A row that breaks this is rejected; where the
template marks its own answers (`{% generation %}`), its marks are used instead.

Only one text a row is tokenised. Special tokens cut a text before it is tokenised, so the tokens up to the last special
token of the prefix are the same in both, and only the prefix's tail behind it ("assistant\\n") has to be compared.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

from helpers.data import chat_template as templates
from helpers.data.chat_template import Template
from helpers.data.tables import Rejects
from helpers.data.turns import Row, RowError

TRAIN_ON = ("last", "all", "everything")
MAX_CHARS = 4_000_000  # of a row; ten million characters without a word among them took 3.7 GiB to tokenise
Prefix = tuple[
    str | RowError, str | RowError | None
]  # what the model is given before a turn, the row up to the turn's end


@dataclass
class Encoded:
    """One row as tokens. ids: (length,) int32; mask: (length,) int8, 1 = trained; turns: trained turns.

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
        import numpy as np

        return int(np.count_nonzero(self.mask))


@dataclass
class ChatReport:
    """What rendering showed: rows in and out, trained tokens, and what the template did to the content."""

    seen: int = 0
    kept: int = 0
    tokens: int = 0
    trained: int = 0
    turns: int = 0
    notes: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, example: str = "") -> None:
        self.notes[what] += 1
        self.examples.setdefault(what, example[:300])

    def as_dict(self) -> dict:
        return {
            "seen": self.seen,
            "kept": self.kept,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "trained_turns": self.turns,
            "trained_share": self.trained / self.tokens if self.tokens else 0.0,
            "notes": dict(self.notes),
            "examples": self.examples,
        }


class Encoder:
    """Encodes batches of rows with one template. train_on: "last" turn, "all" assistant turns, or "everything"."""

    def __init__(self, template: Template, train_on: str = "last", rejects: Rejects | None = None):
        self.template, self.train_on = template, train_on
        self.rejects = rejects or Rejects()
        self.report = ChatReport()
        self._backend = template.tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._tails: dict[str, list[int]] = {}
        self._bos, self._eos = (
            template.tokenizer.bos_token_id,
            template.tokenizer.eos_token_id,
        )  # transformers looks these up anew at each use
        self._kinds = _kinds(template)

    def encode(self, rows: Iterable[list[Row]]) -> Iterator[list[Encoded]]:
        """Batches of sft, kto and text rows as tokens; what breaks the contract is rejected with file, row and reason.

        While one batch is tokenised (in Rust, without the interpreter's lock) the next is rendered.
        """
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            for batch in rows:
                begun = self._begin(batch, pool)
                if waiting is not None:
                    yield self._end(*waiting)
                waiting = begun
            if waiting is not None:
                yield self._end(*waiting)

    def _begin(self, batch: list[Row], pool: ThreadPoolExecutor) -> tuple[list[Row], tuple, Future]:
        rendered = self._rendered([row for row in batch if row["kind"] != "text"])
        texts = [full if isinstance(full, str) else "" for full in rendered[1]]
        return batch, rendered, pool.submit(self._backend.encode_batch_fast, texts, add_special_tokens=False)

    def _end(self, batch: list[Row], rendered: tuple, encodings: Future) -> list[Encoded]:
        chats, broken = self._collected(*rendered, encodings.result())
        done = self._texts([row for row in batch if row["kind"] == "text"]) + chats
        for row, error in broken:
            self._reject(row, error)
        self.report.seen += len(batch)
        self.report.kept += len(done)
        for one in done:
            self.report.tokens += len(one.ids)
            self.report.trained += one.trained
            self.report.turns += len(one.ends)
        return done

    def pairs(self, rows: Iterable[list[Row]]) -> Iterator[list[tuple[Row, Encoded, Encoded]]]:
        """Preference rows as (row, chosen, rejected); both share the prompt, and each ends with its one end of turn."""
        for batch in rows:
            self.report.seen += len(batch)
            sides = [
                self._chats(
                    [{**row, "messages": row["messages"] + row[side], "first": len(row["messages"])} for row in batch]
                )
                for side in ("chosen", "rejected")
            ]
            whole = [{one.row["id"]: one for one in encoded} for encoded, _ in sides]
            errors = {row["id"]: error for _, broken in sides for row, error in broken}
            done = []
            for row in batch:
                chosen, rejected = (side.get(row["id"]) for side in whole)
                if row["id"] in errors:
                    self._reject(row, errors[row["id"]])
                elif list(chosen.ids[: chosen.prompt]) != list(rejected.ids[: rejected.prompt]):
                    self._reject(
                        row,
                        RowError(
                            "prompts differ",
                            "the template writes another prompt for the chosen than for the rejected answer",
                        ),
                    )
                else:
                    done.append((row, chosen, rejected))
            self.report.kept += len(done)
            yield done

    # ------------------------------------------------------------ one batch

    def _texts(self, rows: list[Row]) -> list[Encoded]:
        """Plain text: the tokenizer's own beginning, every token trained, the end of sequence behind it."""
        import numpy as np

        ready = []
        for row in rows:
            try:
                self._check(row)
                ready.append(row)
            except RowError as error:
                self._reject(row, error)
        done = []
        for row, encoding in zip(
            ready, self._backend.encode_batch_fast([row["messages"][0]["content"] for row in ready]), strict=True
        ):
            ids = encoding.ids
            if not ids or ids[-1] != self._eos:
                ids = [*ids, self._eos]
            done.append(Encoded(row, np.array(ids, np.int32), np.ones(len(ids), np.int8), 0, [len(ids) - 1]))
        return done

    def _check(self, row: Row) -> None:
        """Raises RowError for a row of too many characters, and for control tokens in its text."""
        size = 0
        for message in row["messages"]:
            content = message["content"] or ""
            size += len(content)
            if found := self.template.special_text.search(content):
                where = "the text" if row["kind"] == "text" else f"a {message['role']} turn"
                raise RowError(
                    "special token in text",
                    f"{where} holds {found.group()!r}, which the tokenizer reads as a control token",
                )
        if size > MAX_CHARS:
            raise RowError("row too long", f"{size:,} characters; cut it into rows of at most {MAX_CHARS:,}")

    def _chats(self, rows: list[Row]) -> tuple[list[Encoded], list[tuple[Row, RowError]]]:
        """Conversations as tokens, and those that break the contract with what they break."""
        rendered = self._rendered(rows)
        texts = [full if isinstance(full, str) else "" for full in rendered[1]]
        return self._collected(*rendered, self._backend.encode_batch_fast(texts, add_special_tokens=False))

    def _rendered(
        self, rows: list[Row]
    ) -> tuple[list[Row], list[str | RowError], list[list[Prefix]], list[tuple[Row, RowError]]]:
        """(rows that can be rendered, their renderings, the prefixes of their trained turns, the others with what is wrong)."""
        ready, broken = [], []
        for row in rows:
            try:
                ready.append(self._prepared(row))
            except RowError as error:
                broken.append((row, error))
        fulls = templates.render(self.template, [(row["messages"], row.get("tools")) for row in ready])
        return ready, fulls, self._prefixes(ready), broken

    def _collected(
        self, ready: list[Row], fulls: list, prefixes: list, broken: list, encodings: list
    ) -> tuple[list[Encoded], list[tuple[Row, RowError]]]:
        tokens = _Tokens([encoding.ids for encoding in encodings], self._kinds)
        done = []
        for number, (row, full, prefix) in enumerate(zip(ready, fulls, prefixes, strict=True)):
            try:
                if isinstance(full, RowError):
                    raise full
                done.append(self._masked(row, full, prefix, tokens, number))
            except RowError as error:
                broken.append((row, error))
        return done, broken

    def _prepared(self, row: Row) -> Row:
        """The row with its tool turns as this template can show them. Raises RowError for control tokens in its text."""
        self._check(row)
        template, tools, messages = self.template, row.get("tools"), row["messages"]
        if tools and (found := template.special_text.search(tools)):
            raise RowError(
                "special token in text",
                f"the tools hold {found.group()!r}, which the tokenizer reads as a control token",
            )
        if tools and not template.shows_tools:
            self.report.note("tool list written into the system message, as the template shows none", tools)
            messages = _with_system(messages, tools)
            tools = None
        if any(message.get("tool_calls") for message in messages) and not template.shows_tool_calls:
            self.report.note("tool calls written as JSON text, as the template shows none")
            messages = [spelt_out(message) for message in messages]
        if not template.shows_tool_results and any(message["role"] == "tool" for message in messages):
            self.report.note("tool results written as user turns, as the template shows none")
            messages = [{**message, "role": "user"} if message["role"] == "tool" else message for message in messages]
        if messages is row["messages"] and tools == row.get("tools"):
            return row
        return {**row, "messages": messages, "tools": tools}

    def _trained_turns(self, row: Row) -> list[int]:
        turns = [
            i
            for i, message in enumerate(row["messages"])
            if message["role"] == "assistant" and i >= row.get("first", 0)
        ]
        return turns[-1:] if self.train_on == "last" and "first" not in row else turns

    def _prefixes(self, rows: list[Row]) -> list[list[Prefix]]:
        """For each trained turn what the model is given before it, and the row up to its end (None for the last turn: that is all of it)."""
        turns = [(number, turn) for number, row in enumerate(rows) for turn in self._trained_turns(row)]
        inner = [(number, turn) for number, turn in turns if turn < len(rows[number]["messages"]) - 1]
        before = templates.render(
            self.template, [(rows[n]["messages"][:turn], rows[n].get("tools")) for n, turn in turns], generation=True
        )
        through = templates.render(
            self.template, [(rows[n]["messages"][: turn + 1], rows[n].get("tools")) for n, turn in inner]
        )
        ends = dict(zip(inner, through, strict=True))
        result: list[list[Prefix]] = [[] for _ in rows]
        for (number, turn), text in zip(turns, before, strict=True):
            result[number].append((text, ends.get((number, turn))))
        return result

    def _masked(self, row: Row, full: str, prefixes: list[Prefix], tokens: _Tokens, number: int) -> Encoded:
        """Mask the prompt, keep each trained turn with its end. Raises RowError when the template breaks the contract."""
        template = self.template
        start, stop = tokens.starts[number], tokens.starts[number + 1]
        ids, mask = tokens.ids[start:stop], tokens.mask[start:stop]
        if self._bos is not None and tokens.rows[number][:2] == [self._bos, self._bos]:
            raise RowError("two beginnings", "the template and the text both begin the sequence")
        spans: list[tuple[int, int]] = []
        for turn, (prefix, through) in zip(self._trained_turns(row), prefixes, strict=True):
            if isinstance(prefix, RowError):
                raise prefix
            if not full.startswith(prefix) or (
                through is not None and (isinstance(through, RowError) or not full.startswith(through))
            ):
                if template.has_markers:
                    return self._by_markers(row, ids)
                raise RowError(
                    "template is no prefix",
                    f"the template writes turn {turn + 1} otherwise once others follow it than when the model has to say it; "
                    "train_on='last' avoids this",
                )
            begin = self._boundary(prefix, tokens, number)
            end = tokens.end_after(start + begin, stop)
            if end < 0:
                raise RowError("no end of turn", f"turn {turn + 1} has no {template.end_text} in its labels")
            spans.append((begin, end + 1 - start))
            content = row["messages"][turn]["content"].strip()
            if content and content not in full[len(prefix) :]:
                self.report.note("the template changed an answer", content)
        for begin, end in spans:
            mask[begin:end] = 1
        if self.train_on == "everything":
            mask[:] = 1
        return Encoded(row, ids, mask, spans[0][0], [end - 1 for _, end in spans])

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
            if len(self._tails) < 10_000:
                self._tails[tail] = known
        if ids[begin : begin + len(known)] != known:
            raise RowError(
                "answer runs into the prompt",
                "the first token of the answer joins the last of the prompt, often because the answer begins with white space",
            )
        return begin + len(known)

    def _by_markers(self, row: Row, ids: Any) -> Encoded:
        """The template's own `{% generation %}` marks, for templates that write earlier turns otherwise than the last."""
        import numpy as np

        tools = json.loads(row["tools"]) if row.get("tools") else None
        with templates.guarded(templates.PROBE_SECONDS):
            marked = self.template.tokenizer.apply_chat_template(
                row["messages"], tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        mask = np.array(marked["assistant_masks"], np.int8)
        if len(mask) != len(ids) or not mask.any():
            raise RowError("template is no prefix", "the template's marks do not fit its rendering")
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        if self.train_on == "last":
            spans = spans[-1:]
        mask = np.zeros(len(ids), np.int8)
        ends = []
        for begin, end in spans:
            if ids[end - 1] not in self.template.end_ids and end < len(ids) and ids[end] in self.template.end_ids:
                end += 1
            held = np.flatnonzero(np.isin(ids[begin:end], self.template.end_ids))
            if not len(held):
                raise RowError(
                    "no end of turn", f"the template's marks leave {self.template.end_text} out of the labels"
                )
            mask[begin : begin + held[-1] + 1] = 1
            ends.append(int(begin + held[-1]))
        if self.train_on == "everything":
            mask[:] = 1
        self.report.note("masked by the template's own marks")
        return Encoded(row, ids, mask, int(spans[0][0]), ends)

    def _reject(self, row: Row, error: RowError) -> None:
        self.rejects.add(row["file"], row["row"], error.reason, error.detail, step="chat template")


class _Tokens:
    """A batch's token ids in one array, int32 (tokens,), row `i` from starts[i] to starts[i + 1], with its mask and the places
    of its control tokens. Numpy is asked once a batch: asked for each row it takes as long as tokenising does.
    """

    def __init__(self, rows: list[list[int]], kinds: Any):
        import numpy as np

        self.rows = rows
        self.starts = [0, *accumulate(map(len, rows))]
        self.ids = np.fromiter(chain.from_iterable(rows), np.int32, self.starts[-1])
        self.mask = np.zeros(len(self.ids), np.int8)
        found = kinds[self.ids]  # 1: control token, 2: one that ends a turn
        specials = np.flatnonzero(found)
        self._ends = np.flatnonzero(found == 2).tolist()
        self._specials, self._first = specials.tolist(), np.searchsorted(specials, self.starts).tolist()

    def specials_of(self, number: int) -> list[int]:
        """Places of the control tokens of a row, counted from its beginning."""
        start = self.starts[number]
        return [at - start for at in self._specials[self._first[number] : self._first[number + 1]]]

    def end_after(self, place: int, stop: int) -> int:
        """The first token from `place` on, before `stop`, that ends a turn; -1 when there is none."""
        at = bisect_left(self._ends, place)
        return self._ends[at] if at < len(self._ends) and self._ends[at] < stop else -1


def _kinds(template: Template) -> Any:
    """For every token id 0, 1 for a control token, 2 for one that ends an assistant turn: (vocabulary,) int8."""
    import numpy as np

    kinds = np.zeros(max([len(template.tokenizer), *template.special_ids]) + 1, np.int8)
    kinds[list(template.special_ids)] = 1
    kinds[list(template.end_ids)] = 2
    return kinds


def _with_system(messages: list[dict], text: str) -> list[dict]:
    """The data's own tool list in the system message, where the template has no place for it."""
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def spelt_out(message: dict) -> dict:
    if not message.get("tool_calls"):
        return message
    calls = [call["function"] for call in message["tool_calls"]]
    text = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, [message["content"], text]))}
