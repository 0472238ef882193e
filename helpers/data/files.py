"""Files to records: json, jsonl, csv, tsv, txt, plain or in gzip or zstd, and parquet; streamed, and never trusted.

`read` yields (row number from 1, record). A row that cannot be read is rejected with its number and reading goes on; a
file that ends too early or unpacks without measure gives the rows before. Nothing here holds more than one row and one
block, except parquet, which holds one batch of rows.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from helpers.data.tables import Rejects, open_parquet
from helpers.data.turns import BATCH_ROWS, RowError
from helpers.errors import TunebookError

MAX_LINE = 32 * 2**20  # bytes of one row; a longer one is rejected without being held
MAX_DEPTH = 64  # nested lists and objects of one record
MAX_EXPANSION = 1000  # gzip and zstd may unpack to this many times their size, once past MAX_UNPACKED
MAX_UNPACKED = 2**30
BLOCK = 2**20
PACKED = (".gz", ".zst")
HOLDERS = ("data", "rows", "train", "examples", "instances")  # keys under which an object holds the list of rows
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8
BETWEEN = re.compile(r"[ \t\r\n,]*")
TWO_LINES = re.compile(rb"\s*(\S[^\n]*)\n\s*(\S)")
Records = Iterator[tuple[int, Any]]


def kind(file: Path) -> str:
    """The ending that says how a file is read, without that of its compression: ".jsonl" for "a.jsonl.gz"."""
    return next((ending for ending in reversed(file.suffixes) if ending.lower() not in PACKED), "").lower()


def read(file: Path, rejects: Rejects) -> Records:
    """The records of a file by its kind. Raises TunebookError only when the file itself cannot be opened."""
    ending = kind(file)
    if ending == ".parquet":
        yield from _parquet(file, rejects)
        return
    stream = Stream(file, rejects)
    if ending in (".csv", ".tsv"):
        yield from _csv(stream, "\t" if ending == ".tsv" else ",")
    elif ending == ".txt":
        yield from _text(stream)
    else:
        yield from _json(stream, ending == ".json")
    if stream.problem:
        stream.lost(stream.number + 1, RowError("file ends early", f"{stream.problem}; the rows before are read"))


# ---------------------------------------------------------------- bytes


class Stream:
    """A file in blocks of UTF-8, unpacked, without BOM; UTF-16 and UTF-32 are recoded.

    number: the last row that was read. problem: why the blocks ended before the file did.
    """

    def __init__(self, file: Path, rejects: Rejects) -> None:
        self.file, self.rejects = file, rejects
        self.number, self.problem = 0, ""
        try:
            self._raw = file.open("rb")
        except OSError as error:
            raise TunebookError(f"{file} cannot be opened ({error.strerror}); check its permissions.") from None
        self.blocks = self._recoded()

    def lost(self, number: int, error: Exception) -> None:
        """Reject a row that cannot be read."""
        reason, detail = "malformed JSON", str(error)
        if isinstance(error, UnicodeDecodeError):
            byte = f"byte {error.object[error.start]:#04x} at position {error.start}"
            reason, detail = "not UTF-8", f"{byte}; save the file as UTF-8"
        elif isinstance(error, RecursionError):
            reason, detail = "nested too deeply", "lists and objects are nested past the parser's limit"
        elif isinstance(error, RowError):
            reason, detail = error.reason, error.detail
        self.rejects.add(self.file, number, reason, detail)
        self.rejects.saw(1)

    def lines(self, empty: bool = False) -> Iterator[bytes]:
        """Lines without their ends, `empty` ones only if wanted; `number` counts all. One over MAX_LINE is lost."""
        parts: list[bytes] = []
        size = 0
        for data in itertools.chain(self.blocks, [b"\n"]):
            *ended, rest = data.split(b"\n")
            for piece in ended:
                self.number += 1
                size += len(piece)
                if size > MAX_LINE:
                    self.lost(self.number, RowError("line too long", f"over {MAX_LINE // 2**20} MiB"))
                elif size or empty:
                    yield b"".join([*parts, piece])
                parts, size = [], 0
            size += len(rest)
            parts = [*parts, rest] if size <= MAX_LINE else []

    def _recoded(self) -> Iterator[bytes]:
        pieces, head = self.pieces(), b""
        while len(head) < 4 and (data := next(pieces, b"")):
            head += data
        encodings = {codecs.BOM_UTF8: "", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be"}
        encodings |= {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
        mark = next((mark for mark in encodings if head.startswith(mark)), b"")
        pieces = itertools.chain([head.removeprefix(mark)], pieces)
        if not encodings.get(mark):
            yield from pieces
            return
        decoder = codecs.getincrementaldecoder(encodings[mark])("half-surrogate")
        for data in itertools.chain(pieces, [b""]):
            yield decoder.decode(data, final=not data and not self.problem).encode("utf-8", "surrogatepass")

    def pieces(self) -> Iterator[bytes]:
        """The unpacked bytes up to the end or to the first damage."""
        packed, given = self.file.suffix.lower(), 0
        limit = max(MAX_UNPACKED, MAX_EXPANSION * self.file.stat().st_size) if packed in PACKED else 0
        with self._raw:
            pieces = _unpacked(self._raw, packed) if packed in PACKED else iter(lambda: self._raw.read(BLOCK), b"")
            while not self.problem:
                try:
                    data = next(pieces)
                except StopIteration:
                    return
                except Exception as error:  # zlib's, zstandard's, the file system's
                    self.problem = f"the packed data is damaged or ends early ({error})"
                    return
                if data:
                    yield data
                given += len(data)
                if limit and given > limit:
                    self.problem = (
                        f"the file unpacks to more than {MAX_EXPANSION} times its size; the rest was not read"
                    )


# What is no UTF-16 or UTF-32 becomes half a surrogate pair, which costs its row and no other.
codecs.register_error("half-surrogate", lambda error: ("\ud800", error.end))  # type: ignore[attr-defined]


def _unpacked(raw: BinaryIO, packed: str) -> Iterator[bytes]:
    """gzip or zstd, one or several members, giving all that can be unpacked before it says that something is wrong.

    The libraries' own file objects lose the last block of a damaged gzip, and end a cut zstd as if it were whole.
    """
    import zstandard

    portion = 2**15 if packed == ".gz" else 2**10  # one KiB of zstd unpacks to 32 MiB at most
    unpacker, left = None, b""
    while data := left or raw.read(portion):
        left = b""
        if unpacker is None:
            data = data.lstrip(b"\0") if packed == ".gz" else data  # gzip may be padded with zeros
            if not data:
                continue
            unpacker = zlib.decompressobj(wbits=31) if packed == ".gz" else zstandard.ZstdDecompressor().decompressobj()
        yield unpacker.decompress(data)
        if unpacker.eof:
            left, unpacker = unpacker.unused_data, None
    if unpacker is not None:
        raise EOFError("there is no end marker")


# ---------------------------------------------------------------- JSON


class Decoder(json.JSONDecoder):
    """JSON that notes what no row may hold: a key that stands twice in one object, NaN and infinities."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._pairs, parse_constant=self._constant)
        self.problem: RowError | None = None

    def parse(self, text: str) -> Any:
        """One JSON value. Raises ValueError for broken JSON, RowError for what may not be used."""
        self.problem = None
        return self.check(self.decode(text), text)

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self.problem = RowError("duplicated key", f"the key {twice[:60]!r} stands twice in one object")
        return made

    def _constant(self, name: str) -> None:
        self.problem = RowError("malformed JSON", f"{name} is not a JSON value")

    def check(self, value: Any, text: str) -> Any:
        """`value`, which was decoded from `text`, when it may be used. Raises RowError."""
        if not text.isascii() and (wrong := ESCAPED_BYTE.search(text)):
            raise RowError("not UTF-8", f"byte {ord(wrong.group()) - 0xDC00:#04x}; save the file as UTF-8")
        if self.problem:
            raise self.problem
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


def _json(stream: Stream, one_value: bool) -> Records:
    """JSON lines, a list of objects, one object or one that holds the list, whatever the file's name says.

    one_value: the file's name is that of one JSON value, not of lines.
    """
    head = b""
    for data in stream.blocks:
        head += data
        if TWO_LINES.match(head) or len(head) > MAX_LINE:
            break
    stream.blocks = itertools.chain([head], stream.blocks)
    start, two = head.lstrip()[:1], TWO_LINES.match(head)
    line, below = (two[1].rstrip(), two[2]) if two else (b"", b"")
    if start == b"[" and (one_value or not _is_json(line)):
        yield from _json_list(stream)
    elif start == b"{" and one_value and not (line.endswith(b"}") and below == b"{"):
        yield from _json_object(stream)
    elif start and start not in b"[{" and one_value:
        stream.lost(1, ValueError(f"the file begins with {start!r}; a list or an object was expected"))
    else:
        decoder = Decoder()
        for line in stream.lines():
            if not line.strip():
                continue
            try:
                yield stream.number, _record(decoder.parse(line.decode("utf-8")))
            except (ValueError, RecursionError, RowError) as error:
                stream.lost(stream.number, error)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _record(value: Any) -> dict:
    if not isinstance(value, dict):
        found = f"the row is {type(value).__name__}"
        raise RowError("not an object", f"{found}; a JSON object of columns was expected")
    return value


def _json_list(stream: Stream) -> Records:
    """A JSON list of objects, read element by element."""
    decoder = Decoder()
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode  # a wrong byte costs its row alone
    buffer, position, wanted, closed = "", 0, 0, False
    for block, data in enumerate(itertools.chain(stream.blocks, [b""])):
        buffer = buffer[position:] + decode(data, final=not data)
        position = 0 if block else buffer.index("[") + 1
        while not closed and (len(buffer) >= wanted or not data):
            between = BETWEEN.match(buffer, position)
            position = between.end() if between else position
            if buffer[position : position + 1] in ("", "]"):
                closed = position < len(buffer)
                position += closed
                break
            decoder.problem = None
            try:
                value, end = decoder.raw_decode(buffer, position)
                if end == len(buffer) and data:
                    raise ValueError("a number may go on in the next block")
            except (ValueError, RecursionError) as error:
                broken = getattr(error, "pos", len(buffer))
                size = len(buffer) - position
                if data and isinstance(error, ValueError) and broken >= len(buffer) - BLOCK and size <= MAX_LINE:
                    wanted = 2 * size
                    break
                if size > MAX_LINE:
                    error = ValueError(f"a row is longer than {MAX_LINE // 2**20} MiB")
                after = f"nothing after row {stream.number} of {stream.file.name} could be read"
                lost = error if isinstance(error, RecursionError) else ValueError(f"{error}; {after}")
                stream.lost(stream.number + 1, lost)
                return
            stream.number, wanted = stream.number + 1, 0
            begin, position = position, end
            try:
                yield stream.number, _record(decoder.check(value, buffer[begin:end]))
            except RowError as error:
                stream.lost(stream.number, error)
        if closed and (rest := buffer[position:].strip()):
            stream.lost(stream.number + 1, ValueError(f"{rest[:60]!r} stands behind the end of the list"))
            return
    if not closed and not stream.problem:
        stream.lost(stream.number + 1, ValueError("the list is not closed: the file ends early"))


def _json_object(stream: Stream) -> Records:
    """One object: a record, or what holds the list of records."""
    content = bytearray()
    for data in stream.blocks:
        content += data
        if len(content) > MAX_LINE:
            stream.lost(1, RowError("line too long", f"one object of over {MAX_LINE // 2**20} MiB; use JSON lines"))
            return
    try:
        value = _record(Decoder().parse(content.decode("utf-8", "surrogateescape")))
    except (ValueError, RecursionError, RowError) as error:
        stream.lost(1, error)
        return
    lists = [key for key, item in value.items() if item and isinstance(item, list) and len(_inside(item)) == len(item)]
    held = value[lists[0]] if len(lists) == 1 and lists[0] in HOLDERS else [value]
    for stream.number, record in enumerate(held, 1):
        try:
            yield stream.number, _record(record)
        except RowError as error:
            stream.lost(stream.number, error)


# ---------------------------------------------------------------- lines and tables


def _text(stream: Stream) -> Records:
    """One record a line, as in Hugging Face's text reader; empty lines are skipped."""
    for line in stream.lines():
        try:
            text = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            stream.lost(stream.number, error)
            continue
        if text.strip():
            yield stream.number, {"text": text}


def _csv(stream: Stream, delimiter: str) -> Records:
    """Values under a header line. They stay text, whatever they begin with; an empty one is null."""
    csv.field_size_limit(MAX_LINE)
    lines = (line.decode("utf-8", "surrogateescape") + "\n" for line in stream.lines(empty=True))
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    row = 0
    while True:
        before, problem = table.line_num, None
        try:
            values = next(table)
        except StopIteration:
            stream.number = row
            return
        except csv.Error as error:  # an open quotation mark swallows lines: each of them is a lost row
            detail = f"lines {before + 1} to {table.line_num}: {error}"
            for _ in range(max(1, table.line_num - before)):
                row += 1
                stream.lost(row, RowError("malformed csv", detail))
            continue
        if not values:
            continue
        if not header:
            header = values
            if len(set(header)) != len(header):
                found = f"the header is {', '.join(header)[:200]}"
                stream.lost(0, RowError("duplicated column", f"{found}; every column needs its own name"))
                return
            continue
        row += 1
        if len(values) != len(header):
            found = f"line {table.line_num}: {len(values)} values under {len(header)} columns"
            problem = RowError("wrong number of values", found)
        elif any(not value.isascii() and ESCAPED_BYTE.search(value) for value in values):
            problem = RowError("not UTF-8", f"line {table.line_num}; save the file as UTF-8")
        if problem:
            stream.lost(row, problem)
        else:
            yield row, {name: value or None for name, value in zip(header, values, strict=True)}


def _parquet(file: Path, rejects: Rejects) -> Records:
    import pyarrow as pa

    number = 0
    try:
        with open_parquet(file) as table:
            for batch in table.iter_batches(batch_size=BATCH_ROWS):
                for record in records_of(batch):
                    number += 1
                    yield number, record
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        rejects.add(file, number + 1, "broken parquet", f"{why}; nothing after row {number} could be read")
        rejects.saw(1)


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
