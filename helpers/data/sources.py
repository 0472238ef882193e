"""What a dataset parameter names, read: files, folders, globs, names in a dataset_info.json and hub sets, to rows.

A spec is a comma-separated list. Each part is a path (`data/*.jsonl.gz`), a folder, the name of a set in a
`dataset_info.json`, or a hub id `owner/name[@revision][:subset[:split]]`. No data file ever runs code. Every record is
read, its shape found, converted or rejected, and all of it counted.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import compat, display, machine
from helpers.cache import write_atomic
from helpers.data import documents, files, formats, public_sets
from helpers.data.formats import Shape
from helpers.data.tables import Rejects, Table, records_of
from helpers.data.turns import BATCH_ROWS, Row, RowError, answer_of, batches, make_row, pop_unread, said_in
from helpers.errors import TunebookError
from helpers.model.loading import hub_error
from helpers.params import DataParams

READABLE = (*files.TABLES, *documents.KINDS)
INFO = "dataset_info.json"
UNFORESEEN = "row that cannot be read"  # no known row ends here; the tests say so
MEDIA = ("images", "videos", "audios")
NAME = {"type": ["string", "null"]}
ENTRY = {  # what this project reads of an entry of LLaMA-Factory's dataset_info.json
    "properties": dict.fromkeys(("file_name", "hf_hub_url", "subset", "split", "folder"), NAME)
    | {key: {"type": ["object", "null"], "additionalProperties": NAME} for key in ("columns", "tags")}
    | {"formatting": {"enum": ["alpaca", "sharegpt", "openai"]}, "ranking": {"type": "boolean"}}
    | {"num_samples": {"type": ["integer", "null"], "minimum": 0}}
}
Described = dict[str, Any]
UPLOADS = "uploads"  # in the project
PEEKED, PEEKED_CHARS = 20, 300  # rows that are looked at for a first impression, and characters shown of one
SIDE_CHARS = 2000  # what is kept of a column that plays no part
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
HUB = re.compile(
    r"(?P<path>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<name>[\w.-]*))?(?::(?P<split>[\w.\[\]%:-]+))?"
)


@dataclass
class Source:
    """One set of records, a local file or a hub set, and what was read from it.

    where: what rejects call it. hub: the arguments of `datasets.load_dataset`. limit: rows to take, 0 for all. whole:
    a .txt is one document. split: what a folder says of its file, as `files.in_folder` has it. shapes: mapping as
    text → rows; unused: column that plays no part → rows; kinds: kind of row → rows.
    """

    name: str
    file: Path | None = None
    hub: dict[str, str] = field(default_factory=dict)
    shape: Shape | None = None
    limit: int = 0
    whole: bool = False
    where: str = ""
    split: str = ""
    rows: int = 0
    rejected: int = 0
    shapes: Counter = field(default_factory=Counter)
    unused: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)


@dataclass
class Reading:
    """The rows of a spec, the sources that they came from, and those of other splits, which were not read."""

    table: Table
    sources: list[Source]
    aside: list[Source] = field(default_factory=list)

    def held(self) -> list[Source]:
        """What a folder holds for tests and was not read: its test files, else its validation files."""
        test, other = ([one for one in self.aside if one.split == split] for split in ("test", "validation"))
        return test or other

    def shown(self) -> display.Html:
        """What was read from where, and as what."""
        header = ("source", "where", "rows", "rejected", "read as (rows)", "columns kept aside")
        lines = []
        for one in self.sources:
            shapes = "; ".join(f"{shape} ({count:,})" for shape, count in one.shapes.most_common(4)) or "not read"
            shapes = f"{one.split}: {shapes}" if one.split else shapes
            aside = ", ".join(name for name, _ in one.unused.most_common(8))
            lines.append((one.name, one.where, f"{one.rows:,}", f"{one.rejected:,}", shapes, aside))
        return display.shown(lines, header)


# ---------------------------------------------------------------- what a spec names


def find(spec: str, info: str = "") -> list[Source]:
    """The sources that a spec names, in a fixed order.

    info: path of a dataset_info.json, or of its folder; "" for the project's own, and always for the one beside a file.
    Raises TunebookError for a part that is no file, folder, known name or hub id, and for kinds that can't be read.
    """
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise TunebookError("No dataset is named; give files, folders, globs, dataset_info names or hub ids.")
    path = machine.PROJECT / (info or "datasets")
    if info and machine.path(info).exists():
        path = machine.path(info)
    if info and not path.exists():
        raise TunebookError(f"dataset_info {info!r} is not there; name a dataset_info.json, or leave it empty.")
    path = path / INFO if path.is_dir() else path
    named = _described_sets(path) if path.is_file() or info else {}
    found = [source for part in parts for source in _find_part(part, named)]
    paths = {source.file.absolute() for source in found if source.file is not None}
    alike = Counter(path.name for path in paths)
    taken: set[str] = set()
    for source in found:
        name, number = source.name, 1
        while source.name in taken:
            number += 1
            source.name = f"{name}-{number}"
        taken.add(source.name)
        if source.file is None:
            source.where = source.hub["path"]
        elif alike[source.file.name] == 1:
            source.where = source.file.name
        else:
            source.where = os.path.relpath(source.file.absolute(), os.path.commonpath(paths))
    return found


def _find_part(part: str, named: dict[str, Described]) -> list[Source]:
    if part in named:
        return _of_entry(part, named[part])
    if found := _matches(part):
        every = [source for file, split in found for source in _of_file(file, split)]
        for source in every:  # a .txt that is named alone, or described, holds a text a line
            file = source.file
            if file and source.shape is None and file.name != Path(part).name and files.kind(file) == ".txt":
                source.whole = documents.is_document(file)
        return every
    is_file_name = Path(part).suffix in (*READABLE, *files.PACKED) or part.startswith(("datasets/", "data/", "."))
    if not is_file_name and (hub := HUB.fullmatch(part)):
        return [Source(hub["path"], hub={name: value for name, value in hub.groupdict().items() if value})]
    near = difflib.get_close_matches(part, [*named, *map(str, Path(part).parent.glob("*"))], n=3, cutoff=0.6)
    advice = (
        f"Did you mean {' or '.join(near)}?"
        if near
        else f"Check the spelling and the folders ({', '.join(str(p.absolute()) for p in machine.places())})."
    )
    wanted = f"no readable file matches, no folder and no hub id, and no set of that name in {INFO}"
    raise TunebookError(f"The dataset {part!r} is not there: {wanted}. {advice}")


def _matches(part: str) -> list[tuple[Path, str]]:
    """The files that a path, a folder or a pattern names, here or under the project, each with its split."""
    for root in machine.places():
        path = root / machine.path(part)
        if path.is_dir():
            return files.in_folder(path, READABLE)
        named = [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True)))
        if found := [file for file in named if files.kind(file) in READABLE]:
            return [(path, "")] if path.exists() else files.in_splits(found, Path(os.path.commonpath(found)))
        if path.exists():
            raise TunebookError(f"{path.name} is not read as data; {', '.join(READABLE)} are, also with .gz or .zst.")
    return []


def _of_file(file: Path, split: str) -> list[Source]:
    if (file.parent / INFO).is_file() and split != files.LEFT_OUT:
        for name, entry in _described_sets(file.parent / INFO).items():
            if entry["file"] == Path(os.path.abspath(file)):
                return _of_entry(name, entry)
    return [Source(file.name.rsplit(files.kind(file), 1)[0] or file.name, file=file, split=split)]


# ---------------------------------------------------------------- dataset_info.json


def _described_sets(path: Path) -> dict[str, Described]:
    """Every set that a LLaMA-Factory dataset_info.json describes; none for the datasets library's file of that name."""
    described = files.json_object(path)
    if isinstance(described.get("features"), dict) or described.keys() >= {"citation", "description"}:
        return {}
    if not all(isinstance(value, dict) for value in described.values()):
        raise TunebookError(f"{path} is not a dataset_info.json; a JSON object of dataset names was expected.")
    for entry in described.values():
        name = entry.get("file_name")
        entry["file"] = Path(os.path.abspath(path.parent / name)) if isinstance(name, str) and name else None
        entry["info"] = path
    return described


def _of_entry(name: str, entry: Described) -> list[Source]:
    """The entry's file, each file of its folder, or its hub set."""
    import jsonschema

    path, file, hub = entry["info"], entry["file"], entry.get("hf_hub_url") or ""
    if wrong := jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(ENTRY).iter_errors(entry)):
        found = f"{'.'.join(map(str, wrong.path))}: {wrong.message}"
        raise TunebookError(f"Dataset {name!r} in {path} is in another way than LLaMA-Factory reads ({found}).")
    if media := [column for part in MEDIA if (column := (entry.get("columns") or {}).get(part))]:
        found = f"has pictures, videos or sounds ({', '.join(media)})"
        raise TunebookError(f"The set {name!r} {found}; only text can be prepared here.")
    if file is None and not hub:
        found = "names no file_name and no hf_hub_url; a script would have to run code, which data never does here"
        raise TunebookError(f"Dataset {name!r} in {path} {found}.")
    shape, limit = formats.described_shape(entry), entry.get("num_samples") or 0
    if file is None:
        folder = Path(entry.get("folder") or "")
        if not HUB_ID.fullmatch(hub) or Path(hub).exists() or folder.is_absolute() or ".." in folder.parts:
            found = f"names {hub!r} and the folder {str(folder)!r}; an id of the hub and a folder in it were expected"
            raise TunebookError(f"Dataset {name!r} in {path} {found}.")
        given = {"path": hub, "name": entry.get("subset"), "split": entry.get("split"), "data_dir": entry.get("folder")}
        return [Source(name, hub={key: value for key, value in given.items() if value}, shape=shape, limit=limit)]
    if not files.is_inside(file, path.parent):
        raise TunebookError(f"Dataset {name!r} in {path} names {file}, outside of its folder; copy the file into it.")
    if not file.exists():
        raise TunebookError(f"The file {file} of the set {name!r} in {path} is not there; put it there.")
    inside = [file]
    if file.is_dir():
        inside = [one for one, split in files.in_folder(file, READABLE) if split in ("", "train")]
    if limit and len(inside) > 1:
        found = f"takes num_samples of a folder of {len(inside)} files"
        raise TunebookError(f"The set {name!r} {found}; name one file, or leave it out.")
    return [Source(name, file=one, shape=shape, limit=limit) for one in inside]


# ---------------------------------------------------------------- rows


def read(
    spec: str | list[Source],
    rejects: Rejects,
    *,
    format: str = "auto",
    info: str = "",
    columns: str = "",
    written: dict[str, Any] | None = None,
    documents: dict[str, Any] | None = None,
    check: Callable[[dict], None] | None = None,
    split: str = "train",
) -> Reading:
    """Every row of the sources that `spec` names; of a folder with files for training and others the former.

    format: a key of `formats.SHAPES`, or "auto", with which a dataset_info.json beside a file comes first. columns: the
    user's own mapping, "prompt=question,response=sql". written: options of `formats.convert`; documents: of
    `documents.chunks`. check: raises RowError for a row that is not wanted. split: which of a
    folder's splits is meant; of "test" the records that lack a column of `columns` tell their shape themselves.
    Raises TunebookError when nothing can be read, or too much is wrong.
    """
    named = formats.named_shape(format, columns)
    every_source = find(spec, info) if isinstance(spec, str) else spec
    found = [one for one in every_source if one.split in ("", split)] or every_source
    options = (rejects, written or {}, documents or {}, check, split)
    every = (_rows(source, named or source.shape, *options) for source in found)
    table = Table.collect(batches(itertools.chain.from_iterable(every)))
    rejects.check_rows_left(table, ", ".join(one.where for one in found))
    rejects.check()
    return Reading(table, found, [one for one in every_source if one not in found])


def _rows(
    source: Source, named: Shape | None, rejects: Rejects, written: dict, options: dict, check: Any, split: str
) -> Iterator[Row]:
    """The rows of a source. What cannot be read or used goes to `rejects` with its row number."""
    before = rejects.invalid.total()
    known: dict[tuple, tuple[Shape, set[str]]] = {}
    if source.file is None:
        records = _of_hub(source.hub)
    elif (kind := files.kind(source.file)) in documents.KINDS and (kind != ".txt" or source.whole):
        records = documents.chunks(source.file, rejects, source.where, **options)
    else:
        records = files.read(source.file, rejects, source.where)
    for number, record in public_sets.stitched(iter(records)) if named is None else records:
        if source.limit and number > source.limit:
            break
        rejects.total_seen += 1
        try:
            look = formats.look(record)
            if look not in known:
                fits = named is None or split == "train" or record.keys() >= set(named.mapped)
                found = formats.shape_of(record, named if fits else None)
                known[look] = found, found.used()
            shape, used = known[look]
            parts = formats.convert(record, shape, **written)
            for part in parts if check else ():
                check(part)
        except (RowError, TypeError, ValueError, AttributeError, LookupError, RecursionError) as wrong:
            error = wrong if isinstance(wrong, RowError) else RowError(UNFORESEEN, f"{type(wrong).__name__}: {wrong}")
            rejects.add(source.where, number, error.reason, error.detail, step="format")
            continue
        aside = {
            str(key): _aside(value) for key, value in record.items() if key not in used and value not in (None, "")
        }
        source.shapes[str(shape)] += 1
        for part in parts:
            aside_too = pop_unread(part)
            if aside or aside_too:
                source.unused.update([*aside, *aside_too])
            source.rows += 1
            source.kinds[part["kind"]] += 1
            yield make_row(**part, source=source.name, file=source.where, row=number, meta=aside)
    source.rejected = rejects.invalid.total() - before


def peek(params: DataParams) -> display.Html:
    """The first rows of `dataset` and what they would be read as; nothing is fetched, counted or kept."""
    named = formats.named_shape(params.format, params.columns)
    table, shown = [], []
    for one in find(params.dataset, params.dataset_info)[:5]:
        if one.file is None or (files.kind(one.file) in documents.KINDS and (one.whole or ".txt" not in one.file.name)):
            what = "a set of the hub, read when the job runs" if one.file is None else "a document, cut into pieces"
            table.append((one.where, what, "", ""))
            continue
        one.limit, rejects = min(one.limit or PEEKED, PEEKED), Rejects()
        written = {"unanswerable": params.unanswerable}
        rows = list(_rows(one, named or one.shape, rejects, written, {}, None, "train"))
        lost = "; ".join(f"{reason}: {about['detail']}" for reason, about in rejects.first.items())
        lost = f"{one.rejected}: {lost}" if lost else "none"
        read_as = "; ".join(f"{shape} ({count})" for shape, count in one.shapes.most_common(3))
        read_as = read_as or ("not read" if one.rejected else "it holds no row")
        table.append((one.where, read_as, ", ".join(one.unused), lost))
        for row in rows[:3]:
            asked = row["messages"] if "chosen" in row else row["messages"][:-1]
            asked = [turn for turn in asked if turn["role"] != "system"] or asked
            texts = (" ⏎ ".join(map(said_in, asked)), answer_of(row))
            shown.append((one.where, row["row"], *(text[:PEEKED_CHARS] for text in texts)))
    found = display.shown(table, ("file", "first rows read as", "columns kept aside", "unusable"))
    return found + display.shown(shown, ("file", "row", "prompt", "answer")) if shown else found


def keep(name: str, content: bytes) -> str:
    """Keep an uploaded file in the project's folder UPLOADS; its path there, to be named as a dataset. Another file of
    that name stays. Raises TunebookError for one that could not be read as data."""
    plain = re.sub(r"[^\w. -]", "_", name.replace("\\", "/").rsplit("/", 1)[-1]).strip(" .")[-120:]
    if files.kind(Path(plain)) not in READABLE or not content:
        wanted = f"{', '.join(READABLE)} are read as data, also with .gz or .zst"
        raise TunebookError(f"The file {name!r} {'is not read' if content else 'is empty'}; {wanted}.")
    (stem, dot, ending), folder = plain.partition("."), machine.PROJECT / UPLOADS
    names = itertools.chain([plain], (f"{stem}-{number}{dot}{ending}" for number in itertools.count(2)))
    path = next(p for p in map(folder.joinpath, names) if not p.exists() or p.read_bytes() == content)
    write_atomic(path, content)
    return f"{UPLOADS}/{path.name}"


def _aside(value: Any) -> Any:
    """A column that plays no part as plain JSON, cut where it is long: it travels along, but nobody trains on it."""
    if isinstance(value, (bool, int)) or display.finite(value):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:SIDE_CHARS].encode("utf-8", "replace").decode()


def _of_hub(hub: dict[str, str]) -> Iterator[tuple[int, dict]]:
    """Rows of a hub set by Hugging Face's own library, memory-mapped. It refuses sets that are a script."""
    from huggingface_hub import constants, errors

    import datasets

    given = {"split": "train", **hub}
    compat.hub_in_time()
    try:
        table = datasets.load_dataset(**given)
    except Exception as error:  # the library raises many kinds; each becomes a message with its own remedy
        what = f"the dataset {hub['path']!r}" + (f" at revision {hub['revision']!r}" if "revision" in hub else "")
        what += f" (subset {hub.get('name', 'default')}, split {given['split']})"
        if "gated dataset" in str(error):
            remedy = f"accept its terms on its page; for the token {machine.login()}"
            raise TunebookError(f"The hub does not let you read {what}: {remedy}.") from None
        offline = constants.HF_HUB_OFFLINE and isinstance(error, ConnectionError)
        raise hub_error(errors.OfflineModeIsEnabled() if offline else error, what) from error
    batches = table.with_format("arrow").iter(BATCH_ROWS)
    yield from enumerate((record for batch in batches for record in records_of(batch)), 1)
