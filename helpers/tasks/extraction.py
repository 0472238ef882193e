"""What an answer says, whatever is written around it: without its thinking, the JSON and the queries in it.

Queries are found by SQLite's own parser: from each place where one may begin, the longest text that it takes as one
statement. Nothing is run for it.
"""

from __future__ import annotations

import bisect
import functools
import html
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from helpers import template_renderer
from helpers.tasks.sqlite_reader import Database, execute

Marks = tuple[tuple[str, str], ...]  # what opens and what closes a model's thinking
THINKING: Marks = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
LONGEST = 4000  # tokens of a statement


def thinking_marks(tokenizer: Any) -> Marks:
    """The marks that a chat template writes around an answer's thinking; () for one that has none."""
    asked = [{"role": "user", "content": "QQQ"}]
    for key in template_renderer.THINKING:
        told = [*asked, {"role": "assistant", "content": "AAA", key: "RRR"}]
        with suppress(Exception):  # a stranger's template raises what it likes: it does not render such a turn
            head = template_renderer.text(tokenizer, asked, generation=True)
            before, _, rest = template_renderer.text(tokenizer, told).partition("RRR")
            if closing := rest.partition("AAA")[0].strip() if "AAA" in rest else "":
                shared = next((i for i, (a, b) in enumerate(zip(before, head, strict=False)) if a != b), len(head))
                return ((before[shared:].strip(), closing),)
    return ()


def without_thinking(text: str, marks: Marks = ()) -> str:
    """The answer behind the thinking; "" for one that was cut off while it thought."""
    for opening, closing in dict.fromkeys((*marks, *THINKING)):
        while opening and (start := text.find(opening)) >= 0 and (end := text.find(closing, start)) >= 0:
            text = text[:start] + text[end + len(closing) :]
        if opening and text.lstrip().startswith(opening):
            return ""
        text = text.rpartition(closing)[2]  # the prompt may have opened it
    return text.strip()


def embedded_json(text: str) -> Iterator[tuple[Any, int, int]]:
    """(value, start, end) of the outermost JSON objects and lists in a text."""
    decoder, at = json.JSONDecoder(strict=False), re.compile(r"[{\[]")
    place = 0
    for _ in range(1000):
        if not (found := at.search(text, place)):
            return
        try:
            value, place = decoder.raw_decode(text, found.start())
            yield value, found.start(), place
        except ValueError:
            place = found.end()
        except RecursionError:
            return


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    if isinstance(value, dict):
        value = [v for k, v in value.items() if _KEY.search(k)] or list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _strings(inner)


class Statement(NamedTuple):
    """One statement in an answer. rank: 0 in a fence or JSON, 1 in the open, 2 in the middle of prose; start, end: its
    place; runs: the database compiles it; closed: nothing but its end follows on its line."""

    sql: str
    rank: int
    start: int
    end: int
    runs: bool
    closed: bool

    @property
    def preference(self) -> tuple[int, bool]:
        return self.rank, not re.search(r"\bFROM\b", self.sql, re.IGNORECASE)


_KEY = re.compile(r"sql|query|statement|answer", re.IGNORECASE)  # of a JSON object, what others only explain
_QUERY = r"SELECT|WITH|VALUES"
_WRITES = "INSERT|UPDATE|DELETE|DROP|CREATE|ALTER|ATTACH|DETACH|PRAGMA|REPLACE|VACUUM|EXPLAIN|BEGIN|REINDEX|ANALYZE"
_START = re.compile(
    rf"/\*(?:.*?\*/|.*)|^[ \t]*--[^\n]*|\b({_QUERY})\b|^[ \t]*(?-i:({_WRITES}))\b",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
# A query behind this is a part of another one.
_INNER = re.compile(
    r"(?:\b(?:UNION|UNION\s+ALL|EXCEPT|INTERSECT|(?-i:AS))|[\w,=<>+*/-]\(+"
    r"|\b(?:IN|FROM|EXISTS|AS|JOIN|MATERIALIZED|ANY|ALL|NOT|AND|OR|WHERE|ON|THEN|ELSE|WHEN|SELECT|BY)\s*\(+"
    r"|(?:[,=<>+/(])\s*\()\s*\Z",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]\n]{0,128}\]|--[^\n]*|/\*(?:.*?\*/|.*)|\w+|\s+|.", re.DOTALL
)
_KEYWORD = re.compile(
    r"(?:AND|AS|ASC|BETWEEN|BY|CASE|COLLATE|CROSS|DESC|ELSE|END|EXCEPT|FROM|FULL|GROUP|HAVING|IN|INNER|INTERSECT|IS|JOIN"
    r"|LEFT|LIKE|GLOB|LIMIT|NATURAL|NOT|NULL|OFFSET|ON|OR|ORDER|OUTER|OVER|RIGHT|SELECT|THEN|UNION|USING|VALUES|WHEN"
    r"|WHERE|WINDOW|WITH)\Z",
    re.IGNORECASE,
)
_REFUSED = re.compile(r"syntax error|unrecognized token|null character|too (?:large|big)|overflow|surrogates|codec")
_WITHDRAWN = re.compile(
    r"\A\W*(?:sql\W+)?(?:no|wait|oops|hmm+|nope)\b\s*(?:[,.!:;–—-]|that\b|this\b|I\b)"
    r"|\b(?:that|this|it|which|query|above|one|answer)(?:\W+(?:query|one))?(?:\s+(?:is|was|looks|seems)|['’]s)\s+(?:\w+\s+)?"
    r"(?:wrong|incorrect|mistaken|false|not\s+(?:right|correct|what)|a\s+mistake)\b"
    r"|\b(?:that|this|it|which)\s+(?:does|did|will|would)(?:n['’]t|\s+not)\s+(?:work|run|answer)"
    r"|\b(?:scratch|ignore|disregard|forget|strike|discard|cross\s+out)\s+(?:that|this|it|the|my|what)\b"
    r"|\bI\s+(?:made\s+a\s+mistake|was\s+wrong|take\s+(?:that|it|this)\s+back|withdraw|retract)|\b(?:isn['’]t|not)\s+(?:right|correct)\b",
    re.IGNORECASE,
)
_REJECTED = re.compile(
    r"(?:\b(?:do\s+not|don['’]t|never|not)\s+(?:use|run|write|do|try)|\bavoid|\binstead\s+of|\brather\s+than"
    r"|\b(?:wrong|incorrect|bad|naive|mistaken)\b(?:\s+\w+){0,3})\W*\Z",
    re.IGNORECASE,
)
_FINAL = re.compile(
    r"\b(?:final(?:ly)?|correct(?:ed|ion)?|instead|therefore|so\s+the|the\s+answer|answer\s+is|should\s+be|better|fixed"
    r"|revised|combin\w+|altogether|putting)\b",
    re.IGNORECASE,
)


def queries(text: str, compiles: Callable[[str], bool] | None = None) -> list[str]:
    """The different queries that an answer stands by, as written; one in all but ambiguous answers.

    Fenced ones come before those in the open, those that `compiles` takes before others; one that the text withdraws
    does not count, and of several the last that is called final. Where there is no query, the statement that there is.
    """
    text = re.sub(r"(?<!~)~~(?!~)[^~\n]{1,2000}~~(?!~)", "", text)  # struck out
    if re.match(rf"(['\"])\s*(?:{_QUERY})\b.*\1[.\s]*\Z", text, re.IGNORECASE | re.DOTALL):  # quoted as a whole
        text = text.rstrip(" .\n")[1:-1].replace(text[0] * 2, text[0])
    versions = [(v, list(_statements(v, compiles))) for v in dict.fromkeys((text, _plain(text)))]
    ready = next((v for v in versions if any(s.runs for s in v[1])), None)
    text, found = ready or next((v for v in versions if v[1]), versions[0])
    reads = [s for s in found if re.match(_QUERY, s.sql, re.IGNORECASE)] or found
    kept = [s for s in reads if s.runs] or [s for s in reads if s.rank < 2]
    ends = [s.start for s in kept[1:]] + [len(text)]
    kept = [
        s
        for s, end in zip(kept, ends, strict=False)
        if not _WITHDRAWN.search(text[s.end : min(end, s.end + 160)])
        and not _REJECTED.search(text[max(0, s.start - 80) : s.start])
    ]
    kept = [s for s in kept if s.preference == min(k.preference for k in kept)]
    for place in range(len(kept) - 1, 0, -1):
        if _FINAL.search(text[kept[place - 1].end : kept[place].start]):
            kept = kept[place:]
            break
    return list({" ".join(s.sql.split()).lower(): s.sql for s in kept}.values())


def query(reference: str, compiles: Callable[[str], bool] | None = None) -> str:
    """The query of a reference, which may be fenced, quoted or JSON; the text itself where there is none."""
    return next(iter(queries(without_thinking(reference), compiles)), reference)


def is_query(reference: str) -> bool:
    """Whether a reference is a query, and not prose with SQL's words in it."""
    text = without_thinking(reference)
    return any(s.rank < 2 and s.closed and re.match(_QUERY, s.sql, re.IGNORECASE) for s in _statements(text, None))


def _plain(text: str) -> str:
    """Without HTML, typographic quotes, escapes, quote marks and prompts at the start of a line."""
    text = re.sub(r"</?[A-Za-z][^<>]{0,80}>", "\n", html.unescape(text))
    text = text.translate(str.maketrans("‘’‚“”„\xa0", "'''\"\"\" ", "\u200b\ufeff"))
    text = re.sub(r"\\([\\'\"_*`<>])", r"\1", text.replace("\\n", "\n").replace("\\t", " "))
    text = re.sub(r"^[ \t]*(?:>+|sqlite>|\.{3}>|[-*•]|\d+[.):|])[ \t]+", "", text, flags=re.MULTILINE)
    return text


def _statements(text: str, compiles: Callable[[str], bool] | None) -> Iterator[Statement]:
    """Every statement in an answer, in order."""
    pieces: list[tuple[int, int, int, str]] = []  # rank, place, content; -1 for one whose places are its own
    for value, start, end in embedded_json(text):
        inside = [s for s in _strings(value) if re.search(rf"\b(?:{_QUERY})\b", s, re.IGNORECASE)]
        pieces += [(0, start, end, s) for s in inside]
        if inside:
            text = text[:start] + " " * (end - start) + text[end:]
    rest = 0
    for fence in re.finditer(r"(`{3,}|~{3,})(.*?)(?:\1|\Z)", text, re.DOTALL):
        pieces += [(1, rest, -1, text[rest : fence.start()]), (0, fence.start(2), -1, fence[2])]
        rest = fence.end()
    for rank, start, end, content in sorted([*pieces, (1, rest, -1, text[rest:])], key=lambda piece: piece[1]):
        for found in _scan(content, rank, compiles):
            yield (
                found._replace(start=start, end=end)
                if end >= 0
                else found._replace(start=start + found.start, end=start + found.end)
            )


def _scan(content: str, rank: int, compiles: Callable[[str], bool] | None) -> Iterator[Statement]:
    place = tries = 0
    while (begin := _START.search(content, place)) and tries < 100:
        place, start = begin.end(), begin.start(begin.lastindex or 0)
        word, before = begin[begin.lastindex or 0], content[max(0, start - 80) : start]
        if not begin.lastindex or _INNER.search(before) or (word.upper() == "VALUES" != word and before.strip()):
            continue
        tries += 1
        if found := _read(content, start, rank, compiles):
            prose = not word.isupper() and bool(re.search(r"\w[ \t]+\Z", before) or not found.closed)
            place = found.end if found.runs or found.closed else place
            yield found._replace(rank=2) if prose else found


def _read(content: str, start: int, rank: int, compiles: Callable[[str], bool] | None) -> Statement | None:
    """The statement that begins at `start`. One that cannot be parsed is the whole text up to its end, unless its first
    word was an ordinary one."""
    code = re.search(r"`+\Z", content[:start])
    limit = content.find(code[0], start) if code else -1
    tokens: list[re.Match[str]] = []
    for token in islice(_TOKEN.finditer(content, start, limit if limit >= 0 else len(content)), LONGEST):
        after = content[token.end() : token.end() + 1]
        if token[0] == ";" or (token[0] == "." and rank and not after.strip()):
            break
        tokens += [token] if token[0].strip() else []

    def upto(count: int) -> str:
        return content[start : tokens[count - 1].end()]

    def gap(count: int) -> str:
        return content[tokens[count - 1].end() : tokens[count].start()]

    def closed(count: int) -> bool:
        return count >= len(tokens) or "\n" in gap(count) or not tokens[count][0][0].isalnum()

    def boundary(count: int) -> bool:
        """Whether a paragraph may end after so many tokens: at the end of a line, and no clause goes on behind it."""
        following = tokens[count][0]
        apart = following[0].isalnum() or following[0] in "|#`" or gap(count).count("\n") > 1
        return "\n" in gap(count) and apart and not _KEYWORD.match(following)

    def refused(count: int) -> bool:
        return _state(upto(count)) == "refused"

    accepted = len(tokens)
    if refused(accepted):
        ahead = next(n for n in (1 << power for power in range(13)) if n >= accepted or refused(n))
        accepted = bisect.bisect_left(range(1, min(ahead, accepted)), True, key=refused)
    stopped, whole = accepted < len(tokens), accepted
    marks = "|*<_~,-"  # read as operators, though they stand behind the statement
    while whole and (tokens[whole - 1][0] in marks or (stopped and tokens[whole - 1][0].lower() in ("or", "and"))):
        if _state(upto(whole)) == "whole":
            break
        whole -= 1
    ends = [whole] if whole and _state(upto(whole)) == "whole" else []
    breaks = (n for n in range(accepted - 1, 0, -1) if boundary(n) and _state(upto(n)) == "whole")
    early = list(islice(breaks, 3))
    ends = early + ends if stopped and ends and "\n" not in gap(whole) else ends + early
    if compiles:
        best = next((n for n in ends if compiles(upto(n))), None)
        count = best or next((n for n in ends if closed(n)), len(tokens))
    else:
        best = count = ends[0] if ends else len(tokens)
    if not ends and not (content[start : start + 4].isupper() or not content[:start].strip()):
        return None
    runs, sound = best is not None and bool(ends), count in ends and closed(count)
    return Statement(upto(count).strip(), rank, start, tokens[count - 1].end(), runs, sound)


@functools.cache
def _parser() -> Database:
    return Database({"tables": []})


@functools.lru_cache(4096)
def _state(sql: str) -> str:
    """How SQLite's parser takes a text: "whole", "unfinished" (more may follow) or "refused"."""
    said = execute(_parser(), sql if sql[:7].upper() == "EXPLAIN" else f"EXPLAIN {sql}", timeout_s=1.0).error
    return "refused" if _REFUSED.search(said) else "unfinished" if "incomplete input" in said else "whole"
