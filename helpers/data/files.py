"""Files to records: json, jsonl, csv, tsv, txt, plain or in gzip or zstd, and parquet; streamed, and never trusted.

`read` yields (row number from 1, record). A row that cannot be read is rejected with its number and reading goes on; a
file that ends too early or unpacks without measure gives the rows before. Nothing here holds more than one row and one
block, except parquet, which holds one batch of rows.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.data.tables import Rejects, open_parquet
from helpers.data.turns import BATCH_ROWS, RowError
from helpers.errors import TunebookError

MAX_LINE = 32 * 2**20  # characters of one row; a longer one is rejected without being held
MAX_DEPTH = 64  # nested lists and objects of one record
MAX_EXPANSION = 1000  # gzip and zstd may unpack to this many times their size, once past MAX_UNPACKED
MAX_UNPACKED = 2**30
BLOCK = 2**20
PACKED_BLOCK = 2**14  # what is lost before a damage
PACKED = {".gz": "gzip", ".zst": "zstd"}
BROKEN = "malformed JSON"
MARKS = dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32")  # 32 bits first: it begins as 16 do
MARKS |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16")
# What cannot be decoded becomes half a surrogate pair, which costs its row and no other.
codecs.register_error("half-surrogate", lambda error: ("\ud800", error.end))  # type: ignore[attr-defined]
UNDECODED = re.compile("[\ud800-\udfff]")
LIST = re.compile(
    r'(?:\{.*?"(?:data|rows|train|examples|instances)"\s*:\s*)?\[', re.DOTALL
)  # of rows, in an object or not
BETWEEN = re.compile(r"[ \t\r\n,]*")
Found = Iterator[tuple[int, Any]]  # (row number, what stands there or the RowError that says why nothing does)


def kind(file: Path) -> str:
    """The ending that says how a file is read, without that of its compression: ".jsonl" for "a.jsonl.gz"."""
    return next((ending for ending in reversed(file.suffixes) if ending.lower() not in PACKED), "").lower()


def read(file: Path, rejects: Rejects, where: str) -> Iterator[tuple[int, dict]]:
    """The records of a file by its kind. where: its name in rejects. Raises TunebookError if it cannot be opened."""
    ending, number = kind(file), 0
    with Unpacked(file) as content:
        if ending == ".parquet":
            rows = _parquet(file)
        elif ending in (".csv", ".tsv"):
            rows = _csv(opened(content, newline=""), "\t" if ending == ".tsv" else ",")
        elif ending == ".txt":  # one record a line, as in Hugging Face's text reader
            rows = _lines(opened(content), lambda line: {"text": decoded(line.rstrip("\r\n"))})
        else:
            with Unpacked(file) as again:
                head = opened(again).read(BLOCK)
            rows = _json(opened(content), head.lstrip(), ending == ".json")

        for number, record in rows:
            if isinstance(record, dict):
                yield number, record
                continue
            if not isinstance(record, RowError):
                found = f"the row is {type(record).__name__}; a JSON object of columns was expected"
                record = RowError("not an object", found)
            rejects.add(where, number, record.reason, record.detail)
            rejects.total_seen += 1
        if content.problem:
            rejects.add(where, number + 1, "file ends early", f"{content.problem}; the rows before are read")
            rejects.total_seen += 1


# ---------------------------------------------------------------- text


class Unpacked(io.RawIOBase):
    """A file's bytes, unpacked, up to its end or to the first damage. problem: why they end before the file does."""

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        self.packed, self.problem, self.given = PACKED.get(file.suffix.lower()), "", 0
        try:
            self.raw: Any = None
            self.limit = max(MAX_UNPACKED, MAX_EXPANSION * file.stat().st_size)
            self.raw = pa.CompressedInputStream(str(file), self.packed) if self.packed else file.open("rb")
        except OSError as error:
            why = error.strerror or error
            raise TunebookError(f"{file} cannot be opened ({why}); check its permissions.") from None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        if self.packed and self.given > self.limit:
            self.problem = f"it unpacks to more than {MAX_EXPANSION} times its size; the rest was not read"
        try:
            data = b"" if self.problem else self.raw.read(min(len(buffer), PACKED_BLOCK if self.packed else BLOCK))
        except OSError as error:
            self.problem = f"the data is damaged or ends early ({error})"
        buffer[: len(data)] = data
        self.given += len(data)
        return len(data)

    def close(self) -> None:
        if self.raw is not None:
            self.raw.close()
        super().close()


def opened(content: Unpacked, newline: str = "\n") -> io.TextIOWrapper:
    """The text of a file, in UTF-8 or in what its byte order mark says. newline: as in `open`."""
    blocks = io.BufferedReader(content)
    begin = blocks.peek(4)
    encoding = next((name for mark, name in MARKS.items() if begin.startswith(mark)), "utf-8-sig")
    return io.TextIOWrapper(blocks, encoding, "half-surrogate", newline)


def _lines(text: io.TextIOWrapper, work: Callable[[str], Any]) -> Found:
    """(line number, what `work` makes of the line), blank lines left out."""
    for number, line in enumerate(iter(functools.partial(text.readline, MAX_LINE + 1), ""), 1):
        if len(line) > MAX_LINE:
            while line and not line.endswith("\n"):
                line = text.readline(MAX_LINE)
            yield number, RowError("line too long", f"over {MAX_LINE // 2**20} million characters")
        elif not line.isspace():
            yield number, attempt(work, line)


def attempt(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, or the RowError that says why a row cannot be used."""
    try:
        return work(*arguments)
    except RowError as error:
        return error
    except RecursionError:
        return RowError("nested too deeply", "lists and objects are nested past the parser's limit")
    except ValueError as error:
        return RowError(BROKEN, str(error))


def decoded(text: str) -> str:
    """`text`, when every byte of it could be decoded. Raises RowError."""
    if not text.isascii() and (wrong := UNDECODED.search(text)):
        raise RowError("not UTF-8", f"character {wrong.start() + 1} cannot be decoded; save the file as UTF-8")
    return text


# ---------------------------------------------------------------- JSON


def parse(text: str) -> Any:
    """One JSON value. Raises ValueError for broken JSON, RowError for what no row may hold."""
    value = STRICT.decode(decoded(text).removeprefix("\ufeff"))  # where files that have one were joined
    level, depth = [value], 0
    while level := [item for one in level for item in _inside(one)]:
        depth += 1
        if depth >= MAX_DEPTH:
            raise RowError("nested too deeply", f"lists and objects are nested over {MAX_DEPTH} deep")
    return value


def _inside(value: Any) -> list:
    """The lists and objects directly inside a list or an object."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, (dict, list))]


def _object(pairs: list[tuple[str, Any]]) -> dict:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError("duplicated key", f"the key {twice[:60]!r} stands twice in one object")
    return made


def _no_constant(name: str) -> None:
    if name != "NaN":  # as json.dumps writes a missing value of pandas
        raise RowError(BROKEN, f"{name} is not a JSON value")


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
LENIENT = json.JSONDecoder()


def _json(text: io.TextIOWrapper, head: str, one_value: bool) -> Found:
    """JSON lines, a list of objects, or an object that holds the list. one_value: the file's name says so."""
    line, _, below = head.partition("\n")
    several = bool(below.strip()) and not isinstance(attempt(json.loads, line), RowError)
    is_list = one_value or not several if head.startswith("[") else one_value and not several
    if is_list and (begin := LIST.match(head)):
        return _json_list(text, begin[0])
    return _lines(text, parse)


def _json_list(text: io.TextIOWrapper, begin: str) -> Found:
    """The elements of a JSON list, read one by one. begin: what stands before the first, "[" and what it is held by."""
    number, position, buffer = 0, 0, text.read(BLOCK).lstrip().removeprefix(begin)
    while True:
        position = BETWEEN.match(buffer, position).end()  # type: ignore[union-attr]
        if buffer.startswith("]", position):
            behind = (buffer[position + 1 :] + text.read(BLOCK)).strip()
            if behind != "}" * begin.startswith("{"):
                yield number + 1, RowError(BROKEN, f"{behind[:60]!r} stands behind the end of the list")
            return
        size = len(buffer) - position
        found = attempt(LENIENT.raw_decode, buffer, position)
        if isinstance(found, RowError):
            broken = found.reason == BROKEN and size <= MAX_LINE
            if broken and (more := text.read(max(BLOCK, size))):  # it may end in the next block
                buffer, position = buffer[position:] + more, 0
                continue
            why = found.detail if size else "the list is not closed: the file ends early"
            yield number + 1, RowError(found.reason, f"{why}; nothing after row {number} could be read")
            return
        number, start, position = number + 1, position, found[1]
        yield number, attempt(parse, buffer[start:position])


# ---------------------------------------------------------------- tables


def _csv(text: io.TextIOWrapper, delimiter: str) -> Found:
    """Values under a header line. They stay text, whatever they begin with; an empty one is null."""
    csv.field_size_limit(MAX_LINE)
    table = csv.reader(iter(functools.partial(text.readline, MAX_LINE), ""), delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    while True:
        before = table.line_num
        try:
            values = next(table, None)
        except csv.Error as error:  # an open quotation mark swallows lines: each of them is a lost row
            wrong = RowError("malformed csv", f"lines {before + 1} to {table.line_num}: {error}")
            for _ in range(max(1, table.line_num - before)):
                number += 1
                yield number, wrong
            continue
        if values is None:
            return
        if header and values:
            number += 1
            yield number, attempt(_record, header, values, table.line_num)
        elif len(set(values)) < len(values):
            found = f"the header is {', '.join(values)[:200]}"
            yield 0, RowError("duplicated column", f"{found}; every column needs its own name")
            return
        else:
            header = header or values


def _record(header: list[str], values: list[str], line: int) -> dict[str, str | None]:
    if len(values) != len(header):
        raise RowError("wrong number of values", f"line {line}: {len(values)} values under {len(header)} columns")
    decoded("".join(values))
    return {name: value or None for name, value in zip(header, values, strict=True)}


def _parquet(file: Path) -> Found:
    import pyarrow as pa

    number = 0
    try:
        with open_parquet(file) as table:
            batches = table.iter_batches(batch_size=BATCH_ROWS)
            for number, record in enumerate((record for batch in batches for record in records_of(batch)), 1):
                yield number, record
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        yield number + 1, RowError("broken parquet", f"{why}; nothing after row {number} could be read")


def records_of(batch: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow batch as JSON has them: NaN is null, and a nested object has no key that holds nothing."""
    return [{name: _as_json(value) for name, value in record.items()} for record in batch.to_pylist()]


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return value if value == value else None
