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
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, TypeVar

from helpers.data.chat_template import Rendering, Template, render
from helpers.data.rendering import LITERAL, Chat, thoughts_of
from helpers.data.tables import Rejects
from helpers.data.turns import Row, RowError, text_of
from helpers.template_renderer import THINKING

MAX_CHARS = 4_000_000  # of a row; ten million characters without a word among them took 3.7 GiB to tokenise
MOST_TAILS = 10_000  # prefix tails whose tokens are remembered
OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*$")  # a generation prompt that opens the thoughts
CLOSED = re.compile(r"\s*(</\w+>|\[/\w+\])?\s*")  # what ends thoughts
NO_THOUGHTS = re.compile(r"\s*(?:<\w+>\s*)?</\w+>\s*")  # an empty block of thoughts
T = TypeVar("T")
Asked = tuple[list[dict], str | None, list[int]]  # messages and tools as the template takes them; trained turns


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
    """Encodes batches of rows with one template. train_on: "last" turn, "all" assistant turns, or "everything";
    "last_no_thoughts" and "all_no_thoughts" leave the thoughts of those turns out. control_tokens: as of `Chat`.
    """

    def __init__(
        self, template: Template, train_on: str = "last", rejects: Rejects | None = None, control_tokens: str = "reject"
    ) -> None:
        self.template, self.train_on, self.rejects = template, train_on, rejects or Rejects()
        self.chat = Chat(template, control_tokens)
        self.notes = self.chat.notes
        self._scope, _, self._left_out = train_on.partition("_no_")
        self._bos, self._eos = template.tokenizer.bos_token_id, template.tokenizer.eos_token_id
        self._tail = functools.lru_cache(MOST_TAILS)(self.chat.ids)

    def encode(self, rows: Iterable[list[Row]]) -> Iterator[list[Encoded]]:
        """Batches of sft, kto and text rows as tokens; what breaks the contract is rejected with file, row and reason.

        While one batch is tokenised (in Rust, without the interpreter's lock) the next is rendered.
        """
        with ThreadPoolExecutor(1) as pool:

            def begun(batch: list[Row]) -> tuple[list[Row], list[Row], list[Asked], list[Rendering | RowError], Future]:
                texts = [row for row in batch if row["kind"] == "text"]
                chats, asked, rendered = self._rendered([row for row in batch if row["kind"] != "text"])
                return texts, chats, asked, rendered, pool.submit(self._tokenised, rendered)

            for (texts, chats, asked, rendered, ids), _ in pairwise(map(begun, chain(rows, [[]]))):
                done = self._accepted(self._masked, chats, asked, rendered, ids.result())
                yield self._texts(texts) + list(done)

    def pairs(self, rows: Iterable[list[Row]]) -> Iterator[list[tuple[Row, Encoded, Encoded]]]:
        """Preference rows as (row, chosen, rejected); both share the prompt, and each ends with its one end of turn."""

        def pair(row: Row) -> tuple[Row, Encoded, Encoded]:
            chosen, rejected = (side[row["id"]] for side in sides)
            if list(chosen.ids[: chosen.prompt]) != list(rejected.ids[: rejected.prompt]):
                detail = "the template writes another prompt for the chosen than for the rejected answer"
                raise RowError("prompts differ", detail)
            if list(chosen.ids) == list(rejected.ids):
                raise RowError("same answer twice", "chosen and rejected are the same once they are rendered")
            return row, chosen, rejected

        for batch in rows:
            left, sides = batch, []
            for side in ("chosen", "rejected"):
                whole = [
                    {**row, "messages": row["messages"] + row[side], "first": len(row["messages"])} for row in left
                ]
                chats = self._rendered(whole)
                done = self._accepted(self._masked, *chats, self._tokenised(chats[-1]))
                sides.append({one.row["id"]: one for one in done})
                left = [row for row in left if row["id"] in sides[-1]]  # the others are rejected with their reason
            yield list(self._accepted(pair, left))

    def answered(self, messages: list[dict], tools: str | None, turns: list[dict]) -> list[tuple[Any, Any]]:
        """(what comes before, trained tokens) of each trained run of tokens in the answer `turns`. Raises RowError."""
        row = {"messages": [*messages, *turns], "tools": tools, "first": len(messages)}
        _, asked = self._ready(row)
        (rendering,) = self._shown([asked])
        one = self._masked(row, asked, rendering, self._tokenised([rendering])[0])
        return trained_runs(one.ids.tolist(), one.mask)

    def questions(self, rows: Iterable[list[Row]]) -> Iterator[list[tuple[Row, int]]]:
        """(row, tokens of its prompt) of test rows; one whose question cannot be asked is rejected."""

        def shown(row: Row) -> tuple[Row, Asked]:
            messages = (row["messages"] + row.get("chosen", []))[:-1]
            turns, tools = self.chat.shown({"messages": messages, "tools": row.get("tools")})
            return row, (turns, tools, [len(turns)])

        def counted(row: Row, rendering: Rendering | RowError) -> tuple[Row, int]:
            if isinstance(rendering, RowError):
                raise rendering
            return row, len(self.chat.ids(rendering.turns[0][0]))

        for batch in rows:
            texts = [row for row in batch if row["kind"] == "text"]  # asked nothing
            ready = list(self._accepted(shown, (row for row in batch if row["kind"] != "text")))
            rendered = render(self.template.tokenizer, [asked for _, asked in ready])
            yield [(row, 0) for row in texts] + list(self._accepted(counted, (row for row, _ in ready), rendered))

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

    def _rendered(self, rows: list[Row]) -> tuple[list[Row], list[Asked], list[Rendering | RowError]]:
        """The rows that may be rendered, as this template can show them, and their renderings."""
        ready = list(self._accepted(self._ready, rows))
        asked = [one for _, one in ready]
        return [row for row, _ in ready], asked, self._shown(asked)

    def _shown(self, asked: list[Asked]) -> list[Rendering | RowError]:
        rendered = render(self.template.tokenizer, asked)
        for (messages, _, turns), rendering in zip(asked, rendered, strict=True):
            if not isinstance(rendering, RowError) and turns[-1] == len(messages) - 1:
                self._opened(messages[-1], rendering)
        return rendered

    def _ready(self, row: Row) -> tuple[Row, Asked]:
        _check_size(row)
        (messages, tools), turns = self.chat.shown(row), self._trained_turns(row)
        added = len(messages) - len(row["messages"])  # a system message for the tools
        return row, (messages, tools, [turn + added for turn in turns])

    def _opened(self, turn: dict, rendering: Rendering) -> None:
        """Where the generation prompt opens the thoughts and the template leaves them out of its answers, they stand in
        the rendering as the model will write them: behind that prompt, closed before the answer."""
        full, prefix = rendering.full, rendering.turns[-1][0]
        if full.startswith(prefix) or not (opened := OPENED.search(prefix)):
            return
        if full.startswith(stem := prefix[: opened.start()]):
            thoughts, rest = next((turn[key].strip() for key in THINKING if turn.get(key)), ""), full[len(stem) :]
            if rest.startswith(f"<{opened[1]}>"):
                thoughts, _, rest = (part.strip() for part in rest[len(opened[1]) + 2 :].partition(f"</{opened[1]}>"))
            if not thoughts:
                self.notes["thoughts that the prompt opens are closed at once, as the row has none"] += 1
            rendering.full, rendering.spans = f"{prefix}{thoughts}\n</{opened[1]}>\n\n{rest.lstrip()}", []

    def _tokenised(self, rendered: list[Rendering | RowError]) -> list[list[int]]:
        texts = ["" if isinstance(one, RowError) or LITERAL in one.full else one.full for one in rendered]
        return [one.ids for one in self.chat.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _texts(self, rows: list[Row]) -> list[Encoded]:
        """Plain text: the tokenizer's own beginning, every token trained, the end of sequence behind it."""
        import numpy as np

        def readable(row: Row) -> Row:
            _check_size(row)
            self.chat.control_token(row)
            return row

        ready = list(self._accepted(readable, rows))
        done, literal = [], self.chat._literally[0] if self.chat.control_tokens == "text" else self.chat.backend
        texts = [row["messages"][0]["content"] for row in ready]
        for row, encoding in zip(ready, literal.encode_batch_fast(texts), strict=True):
            ids, ended = encoding.ids, encoding.ids[-1:] == [self._eos]
            if "piece" in row["meta"] and row["meta"].get("goes_on"):  # the document does not end here
                ids = ids[: len(ids) - ended]
            elif self._eos is not None and not ended:
                ids = [*ids, self._eos]
            last = [len(ids) - 1] if ids[-1:] == [self._eos] or self._eos is None else []
            done.append(Encoded(row, np.array(ids, np.int32), np.ones(len(ids), np.int8), 0, last))
        return done

    # ------------------------------------------------------------ one row

    def _trained_turns(self, row: Row) -> list[int]:
        """The places of the turns whose tokens are looked for. Raises RowError when every answer's weight is 0."""
        first, turns = row.get("first", 0), row["messages"]  # of a pair only the answer is looked at
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= first]
        trained = [i for i in answers if turns[i].get("weight", 1)]
        if not trained:
            raise RowError("no trained turn", "every answer is left out of the loss (weight 0, train false, masked)")
        if any(turns[i].get("weight", 1) != 1 for i in trained):
            self.notes["weights that are neither 0 nor 1 are trained as 1"] += 1
        if self._scope == "everything":
            return answers
        return trained[-1:] if self._scope == "last" and "first" not in row else trained

    def _masked(self, row: Row, asked: Asked, rendering: Rendering | RowError, ids: list[int]) -> Encoded:
        """Mask the prompt, keep each trained turn with its end. Raises RowError when the contract is broken."""
        import numpy as np

        if isinstance(rendering, RowError):
            raise rendering
        full, cuts, turns = rendering.full, [0], asked[2]
        names = [turn["name"] for turn in asked[0] if "name" in turn]
        if names and not all(name in full for name in names):
            self.notes["names of turns left out, as the template shows none"] += 1
        if LITERAL in full:
            ids = self.chat.ids(full)
        if ids[:2] == [self._bos, self._bos]:
            raise RowError("two beginnings", "the template and the text both begin the sequence")
        rewritten: set[int] | None = set() if "first" in row else None
        spans, ids = self._by_prefixes(asked, rendering, ids, cuts, rewritten)
        if not spans:
            turns, spans = self._by_marks(asked, rendering, ids)
        whole = self._scope == "everything"
        mask: Any = np.full(len(ids), whole, np.int8)
        typed = [row["messages"][turn - len(asked[0])] for turn in turns]  # the same from the end, whatever was added
        for place, turn, (begin, end) in zip(turns, typed, spans, strict=True):
            mask[begin : end + 1] = bool(turn.get("weight", 1)) and place not in (rewritten or ())
        if self._left_out or any(turn.get("untrained") for turn in typed):
            self._leave_out(typed, rendering, spans, mask, cuts)
        if not mask.any():
            raise RowError("no trained turn", "nothing is left of the answers behind their thoughts")
        ends = [end for _, end in spans if mask[end]]
        return Encoded(row, np.fromiter(ids, np.int32, len(ids)), mask, spans[0][0], ends)

    def _by_prefixes(
        self, asked: Asked, rendering: Rendering, ids: list[int], cuts: list[int], rewritten: set[int] | None
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """(the first token and the end of turn of each trained turn, the row's ids); no turns where the template marks
        its answers and writes earlier turns otherwise once others follow them. Raises RowError for such a row.

        cuts: where the text is cut before it is tokenised, as the tokenizer would join prompt and answer. rewritten: a
        pair's earlier answers that the template writes so (without their thoughts); they are not trained.
        """
        full, template, spans, changed = rendering.full, self.template, [], False
        controls = self._controls(full, ids)
        for turn, (prefix, through) in zip(asked[2], rendering.turns, strict=True):
            if not (full.startswith(through) and full.startswith(prefix)):
                if rendering.spans:
                    return [], ids
                if rewritten is None or not full.startswith(prefix):
                    raise RowError("template is no prefix", self._no_prefix(asked, turn))
                rewritten.add(turn)
                self.notes["earlier answers that the template writes otherwise later on are not trained"] += 1
            following = bisect_left(controls, (len(prefix), -1))
            character, begin = controls[max(0, following - 1)]
            tail = self._tail(prefix[character:])
            if ids[begin : begin + len(tail)] != tail:
                if asked[0][turn]["content"][:1].isspace():
                    why = "the answer begins with white space, which the tokenizer joins to the prompt; strip it"
                    raise RowError("answer runs into the prompt", why)
                self.notes["answers cut from a prompt that the tokenizer would join them to"] += 1
                cuts.append(len(prefix))
                ids = [token for piece in _pieces(full, cuts) for token in self.chat.ids(piece, LITERAL in full)]
                controls = self._controls(full, ids)
            end = next((at for _, at in controls[following:] if ids[at] in template.end_ids), None)
            if end is None:
                raise RowError("no end of turn", f"turn {turn + 1} has no {template.end_text} in its labels")
            spans.append((begin + len(tail), end))
            changed |= full.find(asked[0][turn]["content"].strip(), len(prefix)) < 0
        if changed:
            self.notes["the template changed an answer"] += 1
        return spans, ids

    def _controls(self, full: str, ids: list[int]) -> list[tuple[int, int]]:
        """Where the control tokens are, as (character, token), the beginning first."""
        controls, at = [(0, 0)], -1
        with contextlib.suppress(ValueError):  # the tokenizer reads one otherwise: then more of the prefix is compared
            for found in self.template.special_text.finditer(full):
                at = ids.index(self.template.special[found.group()], at + 1)
                controls.append((found.start(), at))
        return controls

    def _no_prefix(self, asked: Asked, turn: int) -> str:
        """Why a turn cannot be trained, and what helps."""
        if turn == len(asked[0]) - 1:
            return "the template writes an answer otherwise than behind its generation prompt; mend the template"
        remedy = "train_on='last' avoids this" if self._scope != "last" else "end the row with the turn that is trained"
        return f"the template writes turn {turn + 1} otherwise once others follow it; {remedy}"

    def _by_marks(self, asked: Asked, rendering: Rendering, ids: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """(the trained turns, their tokens) by the template's own `{% generation %}` marks."""
        answers = [i for i, message in enumerate(asked[0]) if message["role"] == "assistant"]
        if len(answers) != len(rendering.spans):
            raise RowError("template is no prefix", "the template marks other answers than the row has")
        chosen = {turn: span for turn, span in zip(answers, rendering.spans, strict=True) if turn in asked[2]}
        literally, spans = LITERAL in rendering.full, []
        encoding = self.chat.encoding(rendering.full, literally)
        for places in chosen.values():
            first, behind = (len(self.chat.marked(rendering.full[:at])) if literally else at for at in places)
            begin, last = encoding.char_to_token(first), encoding.char_to_token(behind - 1)
            # The end of turn may stand right behind the marks.
            ends = [at for at, token in enumerate(ids[: last + 2]) if at >= begin and token in self.template.end_ids]
            if not ends:
                raise RowError("no end of turn", f"the template's marks leave {self.template.end_text} out")
            spans.append((begin, ends[-1]))
        self.notes["masked by the template's own marks"] += 1
        return list(chosen), spans

    def _leave_out(
        self, turns: list[dict], rendering: Rendering, spans: list[tuple[int, int]], mask: Any, cuts: list[int]
    ) -> None:
        """Take thoughts, and parts of an answer that its row leaves out of the loss, out of the mask."""
        full, literally = rendering.full, LITERAL in rendering.full
        pieces = _pieces(full, cuts)
        sizes = [len(self.chat.marked(piece)) if literally else len(piece) for piece in pieces]
        places: list[tuple[int, int]] = []
        for before, piece in zip(accumulate(sizes, initial=0), pieces, strict=False):
            places += [(b + before, e + before) for b, e in self.chat.encoding(piece, literally).offsets]

        def place(at: int) -> int:
            return len(self.chat.marked(full[:at])) if literally else at

        for turn, (prefix, _), (begin, end) in zip(turns, rendering.turns, spans, strict=True):
            at = len(prefix) if full.startswith(prefix) else places[begin][0]
            for first, behind in self._parts(turn, full, at, literally):
                a, b = place(first), place(behind)
                for token in range(begin, end):
                    mask[token] &= not (places[token][0] < b and places[token][1] > a)

    def _parts(self, turn: dict, full: str, begin: int, literally: bool) -> Iterator[tuple[int, int]]:
        """The characters of a rendering, from `begin` on, that are not trained of an answer. Raises RowError."""
        thoughts, content = thoughts_of(turn)
        gone, whole = len(turn["content"]) - len(content), content
        if literally:
            thoughts, whole = self.chat.literal(thoughts), self.chat.literal(content)
        found = full.find(thoughts.strip(), begin) if thoughts.strip() else -1
        behind = found + len(thoughts.strip()) if found >= 0 else begin
        at = full.find(whole.strip(), behind) if whole.strip() else -1
        if self._left_out and found >= 0:
            yield begin, max(at, CLOSED.match(full, behind).end())  # type: ignore[union-attr]
        elif self._left_out and (empty := NO_THOUGHTS.match(full, begin)):
            yield begin, empty.end()
        for first, last in turn.get("untrained", ()):
            if at < 0:
                raise RowError("part not found", "the template changed an answer of which a part is not trained")
            start = at - gone - (len(content) - len(content.lstrip()))
            texts = (content[: max(0, edge - gone)] for edge in (first, last))
            shift = [len(self.chat.literal(text)) - len(text) if literally else 0 for text in texts]
            yield start + first + shift[0], start + last + shift[1]


def _check_size(row: Row) -> None:
    plain = all(len(turn) == 2 for turn in row["messages"]) and not row.get("tools")
    size = sum(len(turn["content"] or "") for turn in row["messages"]) if plain else len(text_of(row))
    if size > MAX_CHARS:
        raise RowError("row too long", f"{size:,} characters; cut it into rows of at most {MAX_CHARS:,}")


def trained_runs(ids: list[int], mask: Any) -> list[tuple[list[int], list[int]]]:
    """(what comes before, the run) of each run of trained tokens."""
    edges = [at for at, (a, b) in enumerate(pairwise([0, *mask, 0])) if a != b]
    return [(ids[:begin], ids[begin:end]) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def _pieces(full: str, cuts: list[int]) -> list[str]:
    """A text in pieces that begin at `cuts`, the first at 0."""
    return [full[begin:end] for begin, end in pairwise([*cuts, len(full)])]
