"""Files to records: json, jsonl, csv, tsv, parquet, txt, plain or in gzip or zstd, streamed, and never trusted.

Every reader yields (row number from 1, record). A row that cannot be read is rejected with its number and the reading
goes on; a file that ends too early gives up the rows before the damage. Nothing here holds more than one row and one
buffer, except parquet, which holds one batch of rows.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.data.streams import BLOCK, MAX_LINE, Unpacked
from helpers.data.tables import Rejects, open_parquet

MAX_DEPTH = 64  # nested lists and objects of one record
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8


def read(file: Path, suffix: str, rejects: Rejects) -> Iterator[tuple[int, Any]]:
    """The records of a file by its kind. Raises TunebookError only when the file itself cannot be opened."""
    if suffix == ".parquet":
        yield from _parquet(file, rejects)
        return
    reader = {".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _text}.get(suffix, _json_lines)
    with Unpacked(file, rejects) as stream:
        yield from reader(stream, file, suffix, rejects)


class _Unusable(ValueError):
    """A value that parsed, yet may not be used. args: (reason, detail)."""


def _parse(text: str) -> Any:
    """One JSON value. Raises ValueError for broken JSON, a key that stands twice, NaN, and values nested too deeply."""
    return _checked_depth(DECODER.decode(text))


def _pairs(pairs: list[tuple[str, Any]]) -> dict:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Unusable("duplicated key", f"the key {twice[:60]!r} stands twice in one object")
    return made


def _constant(name: str) -> Any:
    raise _Unusable("malformed JSON", f"{name} is no JSON value")


DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def _checked_depth(value: Any) -> Any:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _Unusable("nested too deeply", f"lists and objects are nested over {MAX_DEPTH} deep")
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, (dict, list))
        ]
    return value


def _reject(rejects: Rejects, file: Path, number: int, error: Exception) -> None:
    reason, detail = "malformed JSON", str(error)
    if isinstance(error, UnicodeDecodeError):
        reason, detail = (
            "not UTF-8",
            f"byte {error.object[error.start]:#04x} at position {error.start}; save the file as UTF-8",
        )
    elif isinstance(error, RecursionError):
        reason, detail = "nested too deeply", "lists and objects are nested past the parser's limit"
    elif isinstance(error, _Unusable):
        reason, detail = error.args
    rejects.add(file, number, reason, detail)
    rejects.saw(1)


def _record(rejects: Rejects, file: Path, number: int, value: Any) -> bool:
    """True when a JSON value is an object; otherwise it is rejected."""
    if isinstance(value, dict):
        return True
    rejects.add(
        file, number, "not an object", f"the row is {type(value).__name__}; a JSON object of columns was expected"
    )
    rejects.saw(1)
    return False


def _json_lines(stream: Unpacked, file: Path, suffix: str, rejects: Rejects) -> Iterator[tuple[int, Any]]:
    number = 0
    for number, line in stream.split():
        if line is None:
            rejects.add(file, number, "line too long", f"over {MAX_LINE // 2**20} MiB")
            rejects.saw(1)
            continue
        if not line.strip():
            continue
        try:
            value = _parse(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            _reject(rejects, file, number, error)
            continue
        if _record(rejects, file, number, value):
            yield number, value
    stream.finish(number + 1)


def _json(stream: Unpacked, file: Path, suffix: str, rejects: Rejects) -> Iterator[tuple[int, Any]]:
    """A JSON list of objects, read element by element; also one object, an object that holds the list, and JSON lines."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")(
        "surrogateescape"
    )  # a wrong byte costs its row and not the rest of the file
    buffer, position, ended = "", 0, False

    def more(size: int = 1) -> None:
        nonlocal buffer, position, ended
        parts = [buffer[position:]]
        while size > 0 and not ended:
            data = stream.block()
            ended = not data
            parts.append(decoder.decode(data, final=ended))
            size -= max(1, len(data))
        buffer, position = "".join(parts), 0

    def skip(signs: str) -> str:
        nonlocal position
        while True:
            while position < len(buffer) and buffer[position] in signs:
                position += 1
            if position < len(buffer) or ended:
                return buffer[position : position + 1]
            more()

    number = 1
    try:
        start = skip(" \t\r\n")
        if start == "{":
            yield from _objects(stream, file, rejects, more, lambda: (buffer, ended))
            return
        if start != "[":
            raise ValueError(f"the file begins with {start!r}; a list or an object was expected")
        position += 1
        while True:
            sign = skip(" \t\r\n,")
            if sign == "]":
                break
            if not sign:
                raise ValueError("the list is not closed: the file ends early")
            wanted = BLOCK
            while True:
                try:
                    value, end = DECODER.raw_decode(buffer, position)
                    if end == len(buffer) and not ended:
                        raise ValueError("a number may go on in the next block")
                    break
                except _Unusable as error:
                    value, end = error, _skip_value(buffer, position)
                    if end is not None:
                        break
                    if ended:
                        raise
                except ValueError as error:
                    broken = getattr(error, "pos", len(buffer))
                    if ended or broken < len(buffer) - BLOCK:
                        raise
                if len(buffer) - position > MAX_LINE:
                    raise ValueError(f"a row is longer than {MAX_LINE // 2**20} MiB")
                more(wanted)
                wanted *= 2
            begin, position = position, end
            try:
                if isinstance(value, Exception):
                    raise value
                _checked_bytes(buffer[begin:end])
                if _record(rejects, file, number, _checked_depth(value)):
                    yield number, value
            except _Unusable as error:
                _reject(rejects, file, number, error)
            number += 1
    except (ValueError, RecursionError) as error:
        detail = f"{error.args[-1]}; nothing after row {number - 1} of {file.name} could be read"
        _reject(rejects, file, number, error if isinstance(error, RecursionError) else ValueError(detail))
    stream.finish(number)


def _checked_bytes(text: str) -> str:
    """`text`, decoded with surrogateescape, when every byte of it was UTF-8."""
    if not text.isascii() and (wrong := ESCAPED_BYTE.search(text)):
        raise _Unusable("not UTF-8", f"byte {ord(wrong.group()) - 0xDC00:#04x}; save the file as UTF-8")
    return text


def _skip_value(text: str, position: int) -> int | None:
    """Where the JSON value that begins at `position` ends, read without judging it; None when it doesn't end here."""
    try:
        return json.JSONDecoder().raw_decode(text, position)[1]
    except (ValueError, RecursionError):
        return None


def _objects(stream: Unpacked, file: Path, rejects: Rejects, more: Any, state: Any) -> Iterator[tuple[int, Any]]:
    """A file that begins with "{": one record, an object holding a list of records, or JSON lines under the wrong name."""
    while not state()[1] and len(state()[0]) <= MAX_LINE:
        more(BLOCK)
    text = state()[0]
    try:
        value = _parse(_checked_bytes(text))
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or not lines[0].rstrip().endswith("}"):
            _reject(rejects, file, 1, error)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                value = _parse(_checked_bytes(line))
            except (ValueError, RecursionError) as broken:
                _reject(rejects, file, number, broken)
                continue
            if _record(rejects, file, number, value):
                yield number, value
        return
    lists = [
        item
        for item in value.values()
        if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)
    ]
    holder = len(lists) == 1 and any(
        value.get(name) is lists[0] for name in ("data", "rows", "train", "examples", "instances")
    )
    yield from enumerate(lists[0] if holder else [value], 1)


def _csv(stream: Unpacked, file: Path, suffix: str, rejects: Rejects) -> Iterator[tuple[int, Any]]:
    """Comma- or tab-separated values under a header line. Values stay text, whatever they begin with."""
    csv.field_size_limit(MAX_LINE)
    lines = io.TextIOWrapper(io.BufferedReader(stream, BLOCK), encoding="utf-8", errors="surrogateescape", newline="")
    table = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            values = next(table)
        except StopIteration:
            break
        except csv.Error as error:
            rejects.add(file, number + 1, "malformed csv", f"line {table.line_num}: {error}")
            rejects.saw(1)
            number += 1
            continue
        if header is None:
            header = values
            if len(set(header)) != len(header) or not any(header):
                rejects.add(
                    file,
                    0,
                    "duplicated column",
                    f"the header is {', '.join(header)[:200]}; every column needs its own name",
                )
                rejects.saw(1)
                return
            continue
        if not values:
            continue
        number += 1
        problem = ""
        if len(values) != len(header):
            problem = f"{len(values)} values under {len(header)} columns"
        elif any(not value.isascii() and ESCAPED_BYTE.search(value) for value in values):
            problem = "not UTF-8"
        if problem:
            reason = "not UTF-8" if problem == "not UTF-8" else "wrong number of values"
            rejects.add(file, number, reason, f"line {table.line_num}: {problem}")
            rejects.saw(1)
            continue
        yield number, {name: value if value != "" else None for name, value in zip(header, values, strict=True)}
    stream.finish(number + 1)


def _text(stream: Unpacked, file: Path, suffix: str, rejects: Rejects) -> Iterator[tuple[int, Any]]:
    """One record a line, as in Hugging Face's text reader; empty lines are skipped."""
    number = 0
    for number, line in stream.split():
        if line is None:
            rejects.add(file, number, "line too long", f"over {MAX_LINE // 2**20} MiB")
            rejects.saw(1)
            continue
        try:
            text = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            _reject(rejects, file, number, error)
            continue
        if text.strip():
            yield number, {"text": text}
    stream.finish(number + 1)


def _parquet(file: Path, rejects: Rejects) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa

    number = 0
    try:
        with open_parquet(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        rejects.add(
            file,
            number + 1,
            "broken parquet",
            f"{str(error).splitlines()[0][:200] if str(error) else type(error).__name__}; nothing after row {number} could be read",
        )
        rejects.saw(1)
