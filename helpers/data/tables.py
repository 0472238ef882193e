"""The table that holds many rows, and the accounts of what a step did with them and of what was lost."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.data.turns import BATCH_ROWS, EXAMPLE_CHARS, Row, batches, shown
from helpers.display import clean, percent
from helpers.errors import TunebookError

SPILL_ROWS = 20_000  # a table of more rows lives on disk; 20,000 rows of 1 kB are about 60 MB as Python objects
# Why a row was lost → the parameters that decide it, named in the message that stops a job.
SETTINGS = {
    "answer too short": "min_chars or min_tokens",
    "too long": "max_chars",
    "language": "languages",
    "repetitive": "drop_repetitive",
    "gibberish": "drop_gibberish",
    "personal data": "personal_data",
    "toxic": "toxicity_threshold",
    "exact duplicate": "exact_duplicates",
    "near duplicate": "near_duplicates",
    "holds an evaluation question": "decontaminate",
    "its question is in the test split": "test_share",
    "document too short": "min_document_chars",
    "over max_length": "max_length or over_long",
    "all tokens masked": "max_length or train_on",
    "two readings": "format or columns as said",
    **dict.fromkeys(("unknown shape", "wrong columns", "no label", "wrong type"), "format or columns"),
}
_compact = json.JSONEncoder(separators=(",", ":")).encode


def setting_of(reason: str) -> str:
    """The parameters that decide a reason; "" where none does."""
    return SETTINGS.get(reason) or SETTINGS.get(reason.split()[0], "")


def _place(file: str, row: int) -> int:
    return hash((file, row))


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile that holds the pages it is reading: by default it keeps all it has read until closed."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)


def rows_of(path: Path) -> int:
    """The rows that a parquet file says it has; 0 where it cannot be read, and for any other file."""
    with contextlib.suppress(OSError, ValueError), open_parquet(path) as file:  # pyarrow's errors are among them
        return file.metadata.num_rows
    return 0


def arrow_batches(file: Path) -> Iterator[Any]:
    """The Arrow batches of a parquet file, an Arrow stream (as `save_to_disk` writes) or an Arrow file."""
    import pyarrow as pa

    if file.suffix.lower() == ".parquet":
        with open_parquet(file) as table:
            yield from table.iter_batches(batch_size=BATCH_ROWS)
        return
    with pa.OSFile(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            found = (reader.get_batch(at) for at in range(reader.num_record_batches))
        else:
            source.seek(0)
            found = iter(pa.ipc.open_stream(source))
        for batch in found:
            batch.validate(full=True)  # its offsets come from strangers
            yield from (batch.slice(start, BATCH_ROWS) for start in range(0, batch.num_rows, BATCH_ROWS))


def records_of(batch: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow batch as JSON has them: NaN is null, and a nested object has no key that holds nothing; the
    number of a class is its name, where the datasets library wrote names (ClassLabel)."""
    classes = _classes((batch.schema.metadata or {}).get(b"huggingface", b""))
    records = [{name: _as_json(value) for name, value in record.items()} for record in batch.to_pylist()]
    for column, names in classes.items():
        for record in records:
            at = record.get(column)
            record[column] = names[at] if isinstance(at, int) and 0 <= at < len(names) else None
    return records


@functools.lru_cache(8)
def _classes(metadata: bytes) -> dict[str, list[str]]:
    """Column → names of its classes, from a schema's metadata of the datasets library."""
    try:
        features = json.loads(metadata or b"{}").get("info", {}).get("features", {})
        return {name: [*map(str, one["names"])] for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError):
        return {}


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return value if value == value else None


class Table:
    """Rows that can be read many times, in order: in memory while few, in a temporary file when many.

    `Table.collect(batches)` drains an iterator of batches; iterating gives batches again; `len` counts rows.
    Memory stays flat however many rows there are; the file goes away with the table.
    """

    def __init__(self, spill_rows: int = SPILL_ROWS) -> None:
        self._spill_rows, self._count = spill_rows, 0
        self._held: list[Row] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._writer: Any = None

    @classmethod
    def collect(cls, source: Iterable[list[Row]], spill_rows: int = SPILL_ROWS) -> Table:
        table = cls(spill_rows)
        for batch in source:
            table.append(batch)
        return table.close()

    def append(self, batch: list[Row]) -> None:
        self._count += len(batch)
        self._held.extend(batch)
        if len(self._held) > self._spill_rows:
            self._spill()

    def _spill(self) -> None:
        import pyarrow as pa

        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tunebook-rows-")
            self._writer = pa.CompressedOutputStream(f"{self._folder.name}/rows.jsonl.zst", "zstd")
        for row in self._held:
            self._writer.write(_compact(row).encode() + b"\n")
        self._held = []

    def close(self) -> Table:
        """The table, which can now be read."""
        if self._folder is not None and not self._writer.closed:
            self._spill()
            self._writer.close()
        return self

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[Row]]:
        return batches(self.rows())

    def of_kind(self, *kinds: str) -> Iterator[list[Row]]:
        """Batches of the rows of some kinds."""
        for batch in self:
            if found := [row for row in batch if row["kind"] in kinds]:
                yield found

    def rows(self) -> Iterator[Row]:
        """One row after another."""
        if self._folder is None:
            yield from self._held
            return
        import pyarrow as pa

        with pa.CompressedInputStream(f"{self._folder.name}/rows.jsonl.zst", "zstd") as packed:
            yield from map(json.loads, io.BufferedReader(packed, 2**20))


@dataclass
class StepReport:
    """What one step did: rows in, rows out, why rows went, and one example for each reason.

    `changed` counts rows that stay but were altered (repaired, masked). `figures` holds what else the step measured,
    `made` what a later step can use again.
    """

    step: str
    seen: int = 0
    kept: int = 0
    changed: int = 0
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, dict] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    rejects: Rejects | None = None
    made: Any = None

    def drop(self, row: Row, reason: str, detail: str = "") -> None:
        """Count a removed row, keep the first as example, and write it to rejected.jsonl when there is a writer."""
        self.dropped[reason] += 1
        if reason not in self.examples:
            self.examples[reason] = {"file": row["file"], "row": row["row"], "detail": detail, "text": shown(row)}
        if self.rejects is not None:
            self.rejects.add(row["file"], row["row"], reason, detail, step=self.step, invalid=False)

    def sift(
        self, rows: Iterable[list[Row]], judge: Callable[[list[Row]], Iterable[tuple[str, str] | None]]
    ) -> Iterator[list[Row]]:
        """Pass on, batch by batch, the rows that `judge` has nothing against; others go with (reason, detail)."""
        for batch in rows:
            self.seen += len(batch)
            kept = []
            for row, fault in zip(batch, judge(batch), strict=True):
                if fault is None:
                    kept.append(row)
                else:
                    self.drop(row, *fault)
            self.kept += len(kept)
            if kept:
                yield kept

    def alter(self, before: str, after: str, what: str) -> None:
        """Count a row that was altered and keep the first of each kind as example: 60 characters around the change."""
        self.changed += 1
        at = next((i for i, (old, new) in enumerate(zip(before, after, strict=False)) if old != new), 0)
        part = slice(max(0, at - 20), max(0, at - 20) + 60)
        self.examples.setdefault(what, {"before": before[part], "after": after[part]})

    def line(self) -> tuple[str, ...]:
        """The step as a line of a table: rows in, rows out, changed, why rows went, an example."""
        example = next(iter(self.examples.values()), {})
        text = str(example.get("text") or f"{example.get('before')} → {example.get('after')}" if example else "")
        removed = ", ".join(f"{reason}: {count:,}" for reason, count in self.dropped.items())
        counts = (f"{self.seen:,}", f"{self.kept:,}", f"{self.changed:,}" if self.changed else "")
        return self.step, *counts, removed, text[:140]

    def as_dict(self) -> dict:
        names = ("step", "seen", "kept", "changed", "dropped", "examples", "figures")
        return {name: getattr(self, name) for name in names} | {"dropped": dict(self.dropped.most_common())}


class Rejects:
    """Counts every lost row by its reason, and writes it to a JSON-lines file, which begins anew with each object.

    Rows that were wrong (`invalid`: unreadable, of no known shape, breaking the chat contract) count against the
    limit; rows that a cleaning step took out on request (duplicates, another language) do not.
    """

    def __init__(self, path: Path | None = None, limit: float = 0.05):
        self.path, self.limit = path, limit
        self.invalid: Counter = Counter()
        self.removed: Counter = Counter()
        self.first: dict[str, dict] = {}  # reason → the first row lost for it
        self.total_seen = 0  # input rows, the wrong ones among them; the limit is a share of this
        self.kept = array("q")  # the places of the rows that were written
        self._file: Any = None
        self._marks: dict[str, tuple] = {}

    @property
    def share(self) -> float:
        return self.invalid.total() / self.total_seen if self.total_seen else 0.0

    def begin(self, step: str) -> None:
        """What `step` counts from here on replaces what it counted in an earlier attempt, and what came after that."""
        self.close()
        size = self.path.stat().st_size if self.path is not None else 0
        now = size, self.total_seen, len(self.kept), self.invalid.copy(), self.removed.copy(), self.first.copy()
        size, self.total_seen, written, *counts = self._marks.setdefault(step, now)
        del self.kept[written:]
        self.invalid, self.removed, self.first = (one.copy() for one in counts)
        if self.path is not None:
            os.truncate(self.path, size)

    def add(
        self, file: str, row: int, reason: str, detail: str = "", *, step: str = "read", invalid: bool = True
    ) -> None:
        """Count a lost row. row: from 1 in its file, 0 for the file as a whole."""
        (self.invalid if invalid else self.removed)[reason] += 1
        said = clean(detail)[:EXAMPLE_CHARS].replace("\n", "␊")
        record = {"file": clean(file), "row": row, "reason": reason, "detail": said, "step": step}
        self.first.setdefault(reason, record)
        if self.path is not None:
            self._opened(self.path).write(json.dumps(record) + "\n")

    def _opened(self, path: Path) -> Any:
        if self._file is None or self._file.closed:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w" if self._file is None else "a", encoding="utf-8")
        return self._file

    def close(self) -> None:
        """Close the file; an empty one is left when nothing was lost: its absence always means an unfinished job."""
        if self.path is not None:
            self._opened(self.path).close()

    def check(self) -> None:
        """Stop the job when more than the allowed share of the input rows was wrong."""
        if self.share > self.limit:
            count, listed = self.invalid.total(), f" They are listed in {self.path.name}." if self.path else ""
            self.close()
            found, setting = self._most_often(self.invalid)
            raise TunebookError(
                f"{count:,} of {self.total_seen:,} rows ({percent(self.share)}) could not be used; the limit is "
                f"{percent(self.limit)}. {found}.{listed} {setting}Mend the rows, or raise `reject_limit`."
            )

    def check_rows_left(self, rows: Sized, what: str) -> None:
        """Stop when nothing is left to continue with."""
        if len(rows):
            return
        self.close()
        if self.invalid:
            found, setting = self._most_often(self.invalid)
            why = f"{self.invalid.total():,} of {self.total_seen:,} were rejected. {found}"
            raise TunebookError(f"No row of {clean(what)} can be used: {why}. {setting or 'Mend the file.'}".rstrip())
        if self.removed:
            found, setting = self._most_often(self.removed)
            raise TunebookError(f"No row of {clean(what)} is left. {found}. {setting}Or bring more data.")
        raise TunebookError(f"{clean(what)} holds no rows; name a file that has some.")

    def keep(self, rows: Iterable[Row]) -> None:
        """Note rows as written to a split."""
        self.kept.extend(_place(clean(row["file"]), row["row"]) for row in rows)

    def loss(self, sets: Mapping[str, tuple[int, set[str]]], limit: float) -> list[str]:
        """A line for each set of which input rows are in no split, with the reasons in order and their settings.

        sets: parameter that named a set → its rows, their files. limit: share of a set's rows from which the job stops.
        """
        import numpy as np

        self.close()
        owner = {clean(file): name for name, (_, files) in reversed([*sets.items()]) for file in files}
        lost: dict[int, tuple[str, str]] = {}  # place → parameter, reason
        with self.path.open(encoding="utf-8") if self.path else io.StringIO() as file:
            for record in map(json.loads, file):
                found = owner.get(record["file"], ""), sys.intern(record["reason"])
                lost.setdefault(_place(record["file"], record["row"]), found)
        gone = ~np.isin(np.fromiter(lost, np.int64, len(lost)), np.frombuffer(self.kept, np.int64))
        reasons = Counter(itertools.compress(lost.values(), gone.tolist()))
        lines = []
        for name, (rows, _) in sets.items():
            counts = Counter({reason: count for (owned, reason), count in reasons.items() if owned == name})
            rows -= counts.pop("over max_rows", 0)  # left out as asked, which `read` has said
            if not counts:
                continue
            why = (
                f"{reason} {n:,}" + f" ({setting_of(reason)})" * bool(setting_of(reason))
                for reason, n in counts.most_common()
            )
            share = counts.total() / max(1, rows)
            lines.append(
                f"{counts.total():,} of {rows:,} rows of {name} ({percent(share)}) are in no split: {', '.join(why)}."
            )
            if share > limit:
                advice = f"loss_limit is {percent(limit, 0)}: change what is named, mend the rows, or raise loss_limit."
                raise TunebookError(f"{lines[-1]} rejected.jsonl lists each. {advice}")
        return lines

    def _most_often(self, reasons: Counter) -> tuple[str, str]:
        """The reason that cost most rows with its first row, and "Change …. " where a setting decides it."""
        reason, count = reasons.most_common(1)[0]
        first = self.first[reason]
        setting = setting_of(reason)
        found = f"{count:,} of them: {reason} (first in {first['file']}, row {first['row']}: {first['detail']})"
        return found, f"Change {setting}. " if setting else ""

    def as_dict(self) -> dict:
        counts = {"invalid": dict(self.invalid.most_common()), "removed": dict(self.removed.most_common())}
        return counts | {"seen": self.total_seen, "share": self.share}
