"""Folders to files, and files to records: json, jsonl, csv, tsv, txt, plain or in gzip or zstd, parquet and arrow;
streamed, and never trusted.

`read` yields (row number from 1, record). A row that cannot be read is rejected with its number and reading goes on; a
file that ends too early or unpacks without measure gives the rows before. Nothing here holds more than one row and one
block, except parquet, which holds one batch of rows.
"""

from __future__ import annotations

import codecs
import csv
import fnmatch
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.data.public_sets import MISSING
from helpers.data.tables import Rejects, arrow_batches, records_of, rows_of
from helpers.data.turns import RowError
from helpers.errors import TunebookError

MAX_LINE = 32 * 2**20  # characters of one row; a longer one is rejected without being held
MAX_DEPTH = 64  # nested lists and objects of one record
MAX_EXPANSION = 1000  # gzip and zstd may unpack to this many times their size, once past MAX_UNPACKED
MAX_UNPACKED = 2**30
BLOCK = 2**20
PACKED_BLOCK = 2**14  # what is lost before a damage
PACKED = {".gz": "gzip", ".zst": "zstd"}
BROKEN = "malformed JSON"
TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}  # as the hub names them
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")
SHARD = re.compile(r"-\d{5}-of-\d{5}.*")  # train-00000-of-00002.parquet
ABOUT = re.compile(r"(readme|license|licence|citation|changelog|dataset_infos?|dataset_dict|state|croissant)\b.*", re.I)
LEFT_OUT = "no data"
MARKS = dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32")  # 32 bits first: it begins as 16 do
MARKS |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16")
# What cannot be decoded becomes half a surrogate pair, which costs its row and no other.
codecs.register_error("half-surrogate", lambda error: ("\ud800", error.end))  # type: ignore[attr-defined]
UNDECODED = re.compile("[\ud800-\udfff]")
# Of rows, in an object or not.
LIST = re.compile(r'(?:\{.*?"(?:data|rows|train|examples|instances)"\s*:\s*)?\[', re.DOTALL)
BETWEEN = re.compile(r"[ \t\r\n,]*")
Found = Iterator[tuple[int, Any]]  # (row number, what stands there or the RowError that says why nothing does)


def kind(file: Path) -> str:
    """The ending that says how a file is read, without that of its compression: ".jsonl" for "a.jsonl.gz"."""
    return next((ending for ending in reversed(file.suffixes) if ending.lower() not in PACKED), "").lower()


# ---------------------------------------------------------------- folders


def in_folder(folder: Path, readable: tuple[str, ...]) -> list[tuple[Path, str]]:
    """The files below a folder that can be read, each with its split: train, test, validation, "" or LEFT_OUT.

    A snapshot of a hub set goes by its card's `configs`, else by the names of its files; of what `save_to_disk` wrote
    the files count that its state names. Beside tables, what is about them is no data. Raises TunebookError for none.
    """
    every = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    every = [file for file in every if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    known = [file for file in every if kind(file) in readable and file.name != "dataset_info.json"]
    if not known:
        found = f"has no file that can be read ({', '.join(readable)}, also with .gz or .zst)"
        raise TunebookError(f"The folder {folder} {found}; it has {len(every)} others.")
    if not any(kind(file) in TABLES and not ABOUT.fullmatch(file.name) for file in known):
        return [(file, "") for file in known]
    saved = {state.parent: json_object(state).get("_data_files") or [] for state in every if state.name == "state.json"}
    names = {place: [one.get("filename") for one in found] for place, found in saved.items()}
    data = [one for one in known if not ABOUT.fullmatch(one.name) and one.name in names.get(one.parent, (one.name,))]
    given = _configured(folder, data) or in_splits(data, folder)
    return given + [(file, LEFT_OUT) for file in known if file not in dict(given)]


def in_splits(found: list[Path], folder: Path) -> list[tuple[Path, str]]:
    """Each file with the split that its name says, if one of them is for training, or is called by its split alone."""
    splits = {file: _split_of(file.relative_to(folder)) for file in found}
    sharded = {SHARD.sub("", file.name): file for file in found if SHARD.search(file.name) and splits[file] == "train"}
    if len(sharded) > 1:
        names = " or ".join(f"{file.parent}/{name}-*" for name, file in sharded.items())
        raise TunebookError(f"{folder} has {len(sharded)} sets of training files; name one as the dataset: {names}.")
    if "train" not in splits.values():
        splits = {file: SPLITS.get(file.name.split(".")[0].lower(), "") for file in found}
        return [(file, split if "" in splits.values() else "") for file, split in splits.items()]
    return [(file, split or LEFT_OUT * bool(sharded)) for file, split in splits.items()]


def _split_of(file: Path) -> str:
    """The split that the first or last word of a file's or a folder's name says: "sft_test", "train-00000-of-…"."""
    for part in (SHARD.sub("", file.name).split(".")[0], *reversed(file.parts[:-1])):
        words = re.findall("[a-z]+", part.lower()) or [""]
        if split := SPLITS.get(words[0]) or SPLITS.get(words[-1], ""):
            return split
    return ""


def _configured(folder: Path, data: list[Path]) -> list[tuple[Path, str]]:
    """The files that the `configs` of a data card (README.md) name, each with its split; none where it has none."""
    import yaml

    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace")[:BLOCK] if card.is_file() else ""
    try:
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        configs = {str(one["config_name"]): one for one in head.get("configs") or [] if one.get("data_files")}
        chosen = [one for name, one in configs.items() if one.get("default") or name == "default" or len(configs) == 1]
        given = chosen[0]["data_files"] if chosen else []
        listed = [given] if isinstance(given, str) else given
        entries = [one if isinstance(one, dict) else {"path": one} for one in listed]
        pairs = given.items() if isinstance(given, dict) else [(e.get("split", "train"), e["path"]) for e in entries]
        lists = [(str(split), [names] if isinstance(names, str) else names) for split, names in pairs]
        wanted = [(split, str(name)) for split, names in lists for name in names]
    except (yaml.YAMLError, RecursionError, AttributeError, TypeError, LookupError):
        return []
    if configs and not chosen:
        found = f"describes the sets {', '.join(configs)}"
        raise TunebookError(f"{card} {found}; name the files of one as the dataset: {folder}/NAME/*.")
    paths = {file: file.relative_to(folder).as_posix() for file in data}
    told = {file: split for split, name in reversed(wanted) for file, path in paths.items() if _fits(path, name)}
    return [(file, SPLITS.get(re.split(r"\W|_", told[file])[0], told[file])) for file in data if file in told]


def _fits(path: str, pattern: str) -> bool:
    """Whether a path inside a folder fits a card's pattern: "data/train-*", "**/*.jsonl", "en/test.parquet"."""
    return fnmatch.fnmatchcase(path, pattern.removeprefix("./")) or fnmatch.fnmatchcase("/" + path, pattern)


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, links followed; the hub's cache links its snapshots to blobs beside them."""
    root = folder.resolve()
    blobs = [above.parent / "blobs" for above in (root, *root.parents) if above.name == "snapshots"]
    return any(file.resolve().is_relative_to(place) for place in (root, *blobs))


def json_object(path: Path) -> dict[str, Any]:
    """The object of a small JSON file. Raises TunebookError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise TunebookError(f"{path} cannot be read ({error}); a JSON object was expected.") from None
    if not isinstance(found, dict):
        raise TunebookError(f"{path} is not a {path.name}; a JSON object was expected.")
    return found


# ---------------------------------------------------------------- files


def read(file: Path, rejects: Rejects, where: str) -> Iterator[tuple[int, dict]]:
    """The records of a file by its kind. where: its name in rejects. Raises TunebookError if it cannot be opened."""
    ending, number = kind(file), 0
    with Unpacked(file) as content:
        if ending in (".parquet", ".arrow", ".feather"):
            rows = _arrow(file)
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
        advice = 'save the file as UTF-8 (a spreadsheet\'s "CSV UTF-8", or iconv -f WINDOWS-1252 -t UTF-8 FILE)'
        raise RowError("not UTF-8", f"character {wrong.start() + 1} cannot be decoded; {advice}")
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
    """The elements of a JSON list, read one by one. begin: what stands before the first, "[" and what it is held by.

    Where the list breaks off, the rest of the file counts as the rows that it may hold, by the size of those before."""
    number, position, buffer, taken = 0, 0, text.read(BLOCK).lstrip().removeprefix(begin), 0

    def lost(wrong: RowError, size: int) -> Found:
        size += sum(map(len, iter(functools.partial(text.read, BLOCK), "")))
        return ((number + at, wrong) for at in range(1, max(1, size * number // max(1, taken)) + 1))

    while True:
        position = BETWEEN.match(buffer, position).end()  # type: ignore[union-attr]
        if buffer.startswith("]", position):
            behind = (buffer[position + 1 :] + text.read(BLOCK)).strip()
            if behind != "}" * begin.startswith("{"):
                wrong = RowError(BROKEN, f"{behind[:60]!r} stands behind the end of the list")
                yield from lost(wrong, len(behind)) if "{" in behind else [(number + 1, wrong)]
            return
        size = len(buffer) - position
        found = attempt(LENIENT.raw_decode, buffer, position)
        if isinstance(found, RowError):
            broken = found.reason == BROKEN and size <= MAX_LINE
            if broken and (more := text.read(max(BLOCK, size))):  # it may end in the next block
                buffer, position = buffer[position:] + more, 0
                continue
            why = found.detail if size else "the list is not closed: the file ends early"
            yield from lost(RowError(found.reason, f"{why}; nothing after row {number} could be read"), size)
            return
        number, start, position = number + 1, position, found[1]
        taken += position - start
        yield number, attempt(parse, buffer[start:position])


# ---------------------------------------------------------------- tables


def _csv(text: io.TextIOWrapper, delimiter: str) -> Found:
    """Values under a header line. They stay text, whatever they begin with; an empty one is null."""
    csv.field_size_limit(MAX_LINE)
    lines = iter(functools.partial(text.readline, MAX_LINE), "")
    head = next(lines, "")
    if delimiter == "," and "," not in head:  # as spreadsheets write it where the comma is decimal
        delimiter = max(";\t|", key=head.count) if any(mark in head for mark in ";\t|") else ","
    table = csv.reader(itertools.chain([head], lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    while True:
        before = table.line_num
        try:
            values = next(table, None)
        except csv.Error as error:  # an open quotation mark swallows lines: each of them is a lost row
            why = f"lines {before + 1} to {table.line_num}: {error}; look for a quotation mark that is not closed"
            wrong = RowError("malformed csv", f"{why} in line {before + 1}")
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
            found = f"the header is {', '.join(map(repr, values))[:200]}"
            yield 0, RowError("duplicated column", f"{found}; every column needs its own name")
            return
        else:
            header = header or values


def _record(header: list[str], values: list[str], line: int) -> dict[str, str | None]:
    if len(values) != len(header):
        raise RowError("wrong number of values", f"line {line}: {len(values)} values under {len(header)} columns")
    decoded("".join(values))
    return {name: None if value in MISSING else value for name, value in zip(header, values, strict=True)}


def _arrow(file: Path) -> Found:
    import pyarrow as pa

    number = 0
    try:
        every = (record for batch in arrow_batches(file) for record in records_of(batch))
        for number, record in enumerate(every, 1):
            yield number, record
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, OverflowError) as error:
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        wrong = RowError(f"broken {kind(file)[1:]}", f"{why}; nothing after row {number} could be read")
        yield from ((lost, wrong) for lost in range(number + 1, max(number + 1, rows_of(file)) + 1))
