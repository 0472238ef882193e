"""Files to records: json, jsonl, csv, tsv, txt, plain or in gzip or zstd, and parquet; streamed, and never trusted.

`read` yields (row number from 1, record). A row that cannot be read is rejected with its number and reading goes on; a
file that ends too early or unpacks without measure gives the rows before. Nothing here holds more than one row and one
block, except parquet, which holds one batch of rows.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
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
HOLDERS = ("data", "rows", "train", "examples", "instances")  # keys under which an object holds the list of rows
ENCODINGS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be"}
ENCODINGS |= {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
# What cannot be decoded becomes half a surrogate pair, which costs its row and no other.
codecs.register_error("half-surrogate", lambda error: ("\ud800", error.end))  # type: ignore[attr-defined]
UNDECODED = re.compile("[\ud800-\udfff]")
BETWEEN = re.compile(r"[ \t\r\n,]*")
TWO_LINES = re.compile(r"\s*(\S[^\n]*)\n\s*(\S)")
Found = Iterator[tuple[int, Any]]  # (row number, what stands there or the RowError that says why nothing does)


def kind(file: Path) -> str:
    """The ending that says how a file is read, without that of its compression: ".jsonl" for "a.jsonl.gz"."""
    return next((ending for ending in reversed(file.suffixes) if ending.lower() not in PACKED), "").lower()


def read(file: Path, rejects: Rejects, where: str) -> Iterator[tuple[int, dict]]:
    """The records of a file by its kind. where: its name in rejects. Raises TunebookError if it cannot be opened."""
    ending, stream, number = kind(file), Stream(file), 0
    if ending == ".parquet":
        rows = _parquet(file)
    elif ending in (".csv", ".tsv"):
        rows = _csv(stream, "\t" if ending == ".tsv" else ",")
    elif ending == ".txt":  # one record a line, as in Hugging Face's text reader
        rows = stream.lines(lambda line: {"text": decoded(line.removesuffix("\r"))})
    else:
        rows = _json(stream, ending == ".json")

    for number, record in rows:
        if isinstance(record, dict):
            yield number, record
            continue
        if not isinstance(record, RowError):
            found = f"the row is {type(record).__name__}; a JSON object of columns was expected"
            record = RowError("not an object", found)
        rejects.add(where, number, record.reason, record.detail)
        rejects.saw(1)
    if stream.problem:
        rejects.add(where, number + 1, "file ends early", f"{stream.problem}; the rows before are read")
        rejects.saw(1)


# ---------------------------------------------------------------- text


class Stream:
    """A file's text in blocks, unpacked and decoded. problem: why it ended before the file did."""

    def __init__(self, file: Path) -> None:
        self.file, self.problem = file, ""
        self.blocks = self._decoded()

    def lines(self, work: Callable[[str], Any], empty: bool = False) -> Found:
        """(line number, what `work` makes of the line); blank lines only if wanted."""
        parts: list[str] = []
        size = number = 0
        for block in itertools.chain(self.blocks, [""]):
            *ended, rest = block.split("\n") if block or not size else ("", "")  # the last line needs no end
            for piece in ended:
                number += 1
                size += len(piece)
                if size > MAX_LINE:
                    yield number, RowError("line too long", f"over {MAX_LINE // 2**20} million characters")
                elif empty or (size and not piece.isspace()) or parts:
                    yield number, attempt(work, "".join([*parts, piece]))
                parts, size = [], 0
            size += len(rest)
            parts = [*parts, rest] if rest and size <= MAX_LINE else []

    def _decoded(self) -> Iterator[str]:
        pieces, head = self.pieces(), b""
        while len(head) < 4 and (data := next(pieces, b"")):
            head += data
        mark = next((mark for mark in ENCODINGS if head.startswith(mark)), b"")
        decode = codecs.getincrementaldecoder(ENCODINGS.get(mark, "utf-8"))("half-surrogate").decode
        for data in itertools.chain([head.removeprefix(mark)], pieces):
            if text := decode(data):
                yield text
        if not self.problem and (text := decode(b"", True)):
            yield text

    def pieces(self) -> Iterator[bytes]:
        """The unpacked bytes up to the end or to the first damage."""
        import pyarrow as pa

        packed, given = PACKED.get(self.file.suffix.lower()), 0
        try:
            limit = max(MAX_UNPACKED, MAX_EXPANSION * self.file.stat().st_size)
            raw = pa.CompressedInputStream(str(self.file), packed) if packed else self.file.open("rb")
        except OSError as error:
            why = error.strerror or error
            raise TunebookError(f"{self.file} cannot be opened ({why}); check its permissions.") from None
        with raw:
            try:
                while data := raw.read(PACKED_BLOCK if packed else BLOCK):
                    given += len(data)
                    yield data
                    if packed and given > limit:
                        self.problem = f"it unpacks to more than {MAX_EXPANSION} times its size; the rest was not read"
                        return
            except OSError as error:
                self.problem = f"the data is damaged or ends early ({error})"


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


class Decoder(json.JSONDecoder):
    """JSON that notes what no row may hold: a key that stands twice in one object, NaN and infinities."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._pairs, parse_constant=self._constant)
        self.problem: RowError | None = None

    def parse(self, text: str) -> Any:
        """One JSON value. Raises ValueError for broken JSON, RowError for what may not be used."""
        self.problem = None
        return self.checked(self.decode(text), text)

    def checked(self, value: Any, text: str) -> Any:
        """`value`, just decoded from `text`, when it may be used. Raises RowError."""
        decoded(text)
        if self.problem:
            raise self.problem
        level, depth = [value], 0
        while level := [item for one in level for item in _inside(one)]:
            depth += 1
            if depth >= MAX_DEPTH:
                raise RowError("nested too deeply", f"lists and objects are nested over {MAX_DEPTH} deep")
        return value

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self.problem = RowError("duplicated key", f"the key {twice[:60]!r} stands twice in one object")
        return made

    def _constant(self, name: str) -> None:
        self.problem = RowError(BROKEN, f"{name} is not a JSON value")


def _inside(value: Any) -> list:
    """The lists and objects directly inside a list or an object."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, (dict, list))]


def _json(stream: Stream, one_value: bool) -> Found:
    """JSON lines, a list of objects, one object or one that holds the list. one_value: the file's name says so."""
    head = ""
    for block in stream.blocks:
        head += block
        if TWO_LINES.match(head) or len(head) > BLOCK or not (one_value or head.lstrip().startswith("[")):
            break
    stream.blocks = itertools.chain([head] if head else [], stream.blocks)
    start, two = head.lstrip()[:1], TWO_LINES.match(head)
    line, below = (two[1].rstrip(), two[2]) if two else ("", "")
    if start == "[" and (one_value or isinstance(attempt(json.loads, line), RowError)):
        return _json_list(stream)
    if start == "{" and one_value and not (line.endswith("}") and below == "{"):
        return _json_object(stream)
    if start and start not in "[{" and one_value:
        return iter([(1, RowError(BROKEN, f"the file begins with {start!r}; a list or an object was expected"))])
    return stream.lines(Decoder().parse)


def _json_list(stream: Stream) -> Found:
    """The elements of a JSON list, read one by one."""
    decoder, buffer, position, number, wanted = Decoder(), "", -1, 0, 0
    for block in itertools.chain(stream.blocks, [""]):
        buffer = buffer[max(0, position) :] + block
        position = 0 if position >= 0 else buffer.index("[") + 1
        while len(buffer) >= wanted or not block:
            position = BETWEEN.match(buffer, position).end()  # type: ignore[union-attr]
            if buffer[position : position + 1] == "]":
                rest = itertools.chain([buffer[position + 1 :]], stream.blocks)
                if behind := next((text.strip() for text in rest if text.strip()), ""):
                    yield number + 1, RowError(BROKEN, f"{behind[:60]!r} stands behind the end of the list")
                return
            if position == len(buffer):
                break
            decoder.problem, size = None, len(buffer) - position
            found = attempt(decoder.raw_decode, buffer, position)
            if isinstance(found, RowError):
                if found.reason == BROKEN and block and size <= MAX_LINE:  # it may end in the next block
                    wanted = 2 * size
                    break
                yield number + 1, RowError(found.reason, f"{found.detail}; nothing after row {number} could be read")
                return
            value, end = found
            number, wanted = number + 1, 0
            yield number, attempt(decoder.checked, value, buffer[position:end])
            position = end
    if not stream.problem:
        yield number + 1, RowError(BROKEN, "the list is not closed: the file ends early")


def _json_object(stream: Stream) -> Found:
    """One object: a record, or what holds the list of records."""
    text = ""
    for block in stream.blocks:
        text += block
        if len(text) > MAX_LINE:
            found = f"an object has over {MAX_LINE // 2**20} million characters; use JSON lines"
            yield 1, RowError("line too long", found)
            return
    value = attempt(Decoder().parse, text)
    held = [item for key, item in value.items() if key in HOLDERS] if isinstance(value, dict) else []
    held = [item for item in held if isinstance(item, list) and item and len(_inside(item)) == len(item)]
    yield from enumerate(held[0] if len(held) == 1 else [value], 1)


# ---------------------------------------------------------------- tables


def _csv(stream: Stream, delimiter: str) -> Found:
    """Values under a header line. They stay text, whatever they begin with; an empty one is null."""

    def lines() -> Iterator[str]:
        for number, line in stream.lines(str, empty=True):
            if isinstance(line, RowError):
                raise csv.Error(f"line {number} is too long; nothing after it could be read")
            yield from io.StringIO(line + "\n", newline="")  # a bare \r ends a line too

    csv.field_size_limit(MAX_LINE)
    table = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] = []
    row = 0
    while True:
        before = table.line_num
        try:
            values = next(table, None)
        except csv.Error as error:  # an open quotation mark swallows lines: each of them is a lost row
            wrong = RowError("malformed csv", f"lines {before + 1} to {table.line_num}: {error}")
            swallowed = max(1, table.line_num - before)
            yield from ((row + at, wrong) for at in range(1, swallowed + 1))
            row += swallowed
            continue
        if values is None:
            return
        if not header:
            header = values
            if len(set(header)) != len(header):
                found = f"the header is {', '.join(header)[:200]}"
                yield 0, RowError("duplicated column", f"{found}; every column needs its own name")
                return
        elif len(values) == len(header):
            row += 1
            wrong = attempt(decoded, "".join(values))
            record = {name: value or None for name, value in zip(header, values, strict=True)}
            yield row, wrong if isinstance(wrong, RowError) else record
        elif values:
            row += 1
            found = f"line {table.line_num}: {len(values)} values under {len(header)} columns"
            yield row, RowError("wrong number of values", found)


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
    import pyarrow as pa

    records = batch.to_pylist()
    floats = [column.name for column in batch.schema if pa.types.is_floating(column.type)]
    nested = [column.name for column in batch.schema if pa.types.is_nested(column.type)]
    for record in records if floats or nested else ():
        for name in floats:
            if record[name] != record[name]:
                record[name] = None
        for name in nested:
            record[name] = _without_nulls(record[name])
    return records


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
