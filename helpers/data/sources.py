"""Where rows come from: files, folders, globs, names in a dataset_info.json and hub sets, each yielding plain records.

A spec is a comma-separated list. Each part is a path (`data/*.jsonl.gz`), a folder, the name of a set in a
`dataset_info.json`, or a hub id `owner/name[@revision][:subset[:split]]`. No data file ever runs code.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import machine
from helpers.data import dataset_info
from helpers.data.formats import Shape
from helpers.data.tables import Rejects
from helpers.errors import TunebookError

RECORDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
DOCUMENTS = (".md", ".markdown", ".html", ".htm", ".pdf", ".docx")
COMPRESSED = (".gz", ".zst")
HUB = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<subset>[\w.-]*))?(?::(?P<split>[\w.\[\]%:-]+))?"
)


@dataclass(frozen=True)
class Source:
    """One set of records: a local file, or a hub set. `shape` is given when a dataset_info.json describes it."""

    name: str
    file: Path | None = None
    hub: str = ""
    revision: str = ""
    subset: str = ""
    split: str = "train"
    folder: str = ""
    shape: Shape | None = None
    limit: int = 0

    @property
    def suffix(self) -> str:
        """The kind of a file, without a compression ending: ".jsonl" for "a.jsonl.gz"."""
        name = self.file.name.lower()
        for ending in COMPRESSED:
            name = name.removesuffix(ending)
        return Path(name).suffix

    @property
    def is_document(self) -> bool:
        return self.file is not None and self.suffix in DOCUMENTS


def find(spec: str, info: str = "") -> list[Source]:
    """The sources that a spec names, in a fixed order. `info`: path of a dataset_info.json, "" for the one beside the file.

    Raises TunebookError for a part that is no file, no folder, no known name and no hub id, and for kinds that can't be read.
    """
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise TunebookError(
            "No dataset is named; give files, folders, globs, dataset_info names or hub ids, separated by commas."
        )
    named = _named_sets(info)
    found: list[Source] = []
    for part in parts:
        found += _find_part(part, named)
    names: set[str] = set()
    unique = []
    for source in found:
        name, number = source.name, 2
        while name in names:
            name, number = f"{source.name}-{number}", number + 1
        names.add(name)
        unique.append(replace(source, name=name))
    return unique


def names(found: list[Source]) -> dict[Path, str]:
    """What each file is called in reports and rejects: its name, with the folders that tell it from others of that name."""
    called: dict[str, set[Path]] = {}
    for source in found:
        if source.file is not None:
            called.setdefault(source.file.name, set()).add(source.file.absolute())
    shared = {name: Path(os.path.commonpath(files)) if len(files) > 1 else None for name, files in called.items()}
    return {
        source.file: str(source.file.absolute().relative_to(folder))
        if (folder := shared[source.file.name])
        else source.file.name
        for source in found
        if source.file is not None
    }


def _named_sets(info: str) -> dict[str, dataset_info.Entry]:
    if info:
        path = _existing(info)
        if path is None:
            raise TunebookError(f"dataset_info {info!r} is not there; name a dataset_info.json, or leave it empty.")
        return dataset_info.read(path / dataset_info.FILE if path.is_dir() else path)
    default = machine.PROJECT / "datasets" / dataset_info.FILE
    return dataset_info.read(default) if default.is_file() else {}


def _existing(text: str) -> Path | None:
    """The path as given, or under the project when that is where it is."""
    return next((path for path in (Path(text).expanduser(), machine.PROJECT / text) if path.exists()), None)


def _find_part(part: str, named: dict[str, dataset_info.Entry]) -> list[Source]:
    if part in named:
        return _of_entry(named[part])
    path = _existing(part)
    if path is not None and path.is_dir():
        return [source for file in _files_in(path) for source in _of_file(file)]
    if path is not None:
        if not _readable(path):
            raise TunebookError(
                f"{path.name} is of a kind that is not read as data; {', '.join(RECORDS + DOCUMENTS)} are, also with .gz or .zst."
            )
        return _of_file(path)
    match = HUB.fullmatch(part)
    if any(sign in part for sign in "*?[") and not match:
        for root in (Path.cwd(), machine.PROJECT):
            pattern = Path(part).expanduser()
            files = sorted(
                (pattern.anchor and Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
                or root.glob(part)
            )
            if files := [file for file in files if file.is_file() and _readable(file)]:
                return [source for file in files for source in _of_file(file)]
        raise TunebookError(
            f"No readable file matches {part!r}; check the pattern and the folder it starts from ({Path.cwd()})."
        )
    if (
        match
        and Path(part).suffix not in RECORDS + DOCUMENTS + COMPRESSED
        and not part.startswith(("datasets/", "data/", "."))
    ):
        return [
            Source(
                match["id"],
                hub=match["id"],
                revision=match["revision"] or "",
                subset=match["subset"] or "",
                split=match["split"] or "train",
            )
        ]
    raise TunebookError(
        f"The dataset {part!r} is not there: no such file, folder or hub id, and no set of that name in dataset_info.json.{_near(part, named)}"
    )


def _near(part: str, named: dict[str, dataset_info.Entry]) -> str:
    folder = Path(part).parent if Path(part).parent.is_dir() else machine.PROJECT / Path(part).parent
    beside = [str(Path(part).parent / file.name) for file in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(part, [*named, *beside], n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(near)}?" if near else " Check the spelling and the folder."


def _readable(file: Path) -> bool:
    return Source("", file=file).suffix in RECORDS + DOCUMENTS


def _files_in(folder: Path) -> list[Path]:
    """The files below a folder that can be read, hidden ones left out."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    ]
    known = [file for file in files if _readable(file) and file.name != dataset_info.FILE]
    if not known:
        raise TunebookError(
            f"The folder {folder} has no file that can be read "
            f"({', '.join(RECORDS + DOCUMENTS)}, also with .gz or .zst); it has {len(files)} others."
        )
    return known


def _of_file(file: Path) -> list[Source]:
    entry = dataset_info.beside(file)
    if entry is not None:
        return _of_entry(entry)
    name = file.name
    for ending in (*COMPRESSED, *RECORDS, *DOCUMENTS):
        name = name.removesuffix(ending)
    return [Source(name or file.name, file=file)]


def _of_entry(entry: dataset_info.Entry) -> list[Source]:
    """The entry's file, each file of its folder, or its hub set."""
    if entry.problem:
        raise TunebookError(entry.problem)
    if entry.media:
        raise TunebookError(
            f"The set {entry.name!r} has pictures, videos or sounds ({', '.join(entry.media)}); only text can be prepared here."
        )
    if entry.file is not None:
        if not entry.file.exists():
            raise TunebookError(
                f"The set {entry.name!r} is described in dataset_info.json, but its file {entry.file} is not there; "
                "put it there or take the entry out."
            )
        files = _files_in(entry.file) if entry.file.is_dir() else [entry.file]
        if entry.num_samples and len(files) > 1:
            raise TunebookError(
                f"The set {entry.name!r} takes num_samples of a folder of {len(files)} files; name one file, or leave it out."
            )
        return [Source(entry.name, file=file, shape=entry.shape, limit=entry.num_samples) for file in files]
    if not entry.hub:
        raise TunebookError(f"The set {entry.name!r} has no hf_hub_url; only files and the Hugging Face hub are read.")
    return [
        Source(
            entry.name,
            hub=entry.hub,
            subset=entry.subset,
            split=entry.split,
            folder=entry.folder,
            shape=entry.shape,
            limit=entry.num_samples,
        )
    ]


def records(source: Source, rejects: Rejects) -> Iterator[tuple[int, Any]]:
    """(row number from 1, record) of a source. What cannot be read goes to `rejects` with its row number."""
    from helpers.data import readers

    rows = _hub(source) if source.hub else readers.read(source.file, source.suffix, rejects)
    for number, record in rows:
        if source.limit and number > source.limit:
            return
        yield number, record


def _hub(source: Source) -> Iterator[tuple[int, dict]]:
    """Rows of a hub set by Hugging Face's own library, memory-mapped. Sets that are a script are refused by it."""
    import datasets

    what = source.hub + (f"@{source.revision}" if source.revision else "")
    try:
        table = datasets.load_dataset(
            source.hub,
            source.subset or None,
            data_dir=source.folder or None,
            split=source.split,
            revision=source.revision or None,
        )
    except Exception as error:  # the library raises many kinds; each ends here with its own words
        reason = str(error).strip().splitlines()[0][:200].rstrip(".") if str(error).strip() else type(error).__name__
        raise TunebookError(
            f"The hub set {what} (subset {source.subset or 'default'}, split {source.split}) could not be loaded: {reason}. "
            "Check the name, the subset, the split and the network, or name a local file."
        ) from error
    yield from enumerate(table, 1)
