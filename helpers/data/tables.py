"""The row that every data step passes on, the table that holds many of them, and the account of what was lost.

A row is a plain dict, so that it can be written as JSON and read in a notebook:

    {"id": "16 hex digits of the sha256 of its content", "source": "atlas_train", "file": "atlas_train.jsonl", "row": 12,
     "kind": "sft" | "preference" | "kto" | "text",
     "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}],
     "tools": None | "JSON text", "chosen": [...], "rejected": [...], "label": True, "meta": {"other": "columns"}}

`sft` rows end with an assistant turn. `preference` rows hold the prompt in `messages` and the answers in `chosen` and
`rejected`. `kto` rows are `sft` rows with a `label`. `text` rows hold one message with the role "text".
`file` and `row` say where a row came from (rows count from 1); they are not part of its content, nor is `source`.
Steps take and give batches (`list[Row]`), never the whole set.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError

Row = dict[str, Any]
KINDS = ("sft", "preference", "kto", "text")
BATCH_ROWS = 1000
SPILL_ROWS = 20_000  # a table of more rows lives on disk; 20,000 rows of 1 kB are about 60 MB as Python objects
EXAMPLE_CHARS = 400
# Made once: json.dumps makes an encoder at each call, a quarter of its time for a row.
_canonical = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode
_compact = json.JSONEncoder(separators=(",", ":")).encode


def content_id(row: Row) -> str:
    """Sixteen hex digits that depend on nothing but what the model would learn from: same content, same id, anywhere."""
    content = [row["kind"], row["messages"], row.get("tools"), row.get("chosen"), row.get("rejected"), row.get("label")]
    return hashlib.sha256(_canonical(content).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def make_row(
    kind: str,
    messages: list[dict],
    *,
    source: str = "",
    file: str = "",
    row: int = 0,
    tools: str | None = None,
    chosen: list[dict] | None = None,
    rejected: list[dict] | None = None,
    label: bool | None = None,
    meta: dict | None = None,
) -> Row:
    """A row with its id. `row` counts from 1 inside `file`."""
    made: Row = {
        "id": "",
        "source": source,
        "file": file,
        "row": row,
        "kind": kind,
        "messages": messages,
        "tools": tools,
    }
    if kind == "preference":
        made["chosen"], made["rejected"] = chosen or [], rejected or []
    if kind == "kto":
        made["label"] = bool(label)
    made["meta"] = meta or {}
    made["id"] = content_id(made)
    return made


def all_messages(row: Row) -> list[dict]:
    """Every message of a row, the chosen and rejected answers of a preference row last."""
    return row["messages"] + row.get("chosen", []) + row.get("rejected", [])


def map_contents(row: Row, change: Callable[[str], str]) -> Row:
    """A copy of `row` with `change` applied to the text of every message, and a new id when something changed."""
    changed = False

    def mapped(messages: list[dict]) -> list[dict]:
        nonlocal changed
        result = []
        for message in messages:
            before = message.get("content")
            if not isinstance(before, str) or (after := change(before)) == before:
                result.append(message)
            else:
                changed = True
                result.append({**message, "content": after})
        return result

    parts = {key: mapped(row[key]) for key in ("messages", "chosen", "rejected") if key in row}
    if not changed:
        return row
    made = {**row, **parts}
    made["id"] = content_id(made)
    return made


def text_of(row: Row) -> str:
    """The whole example as one text: system prompt, question, tools and answers, for comparing rows with each other."""
    parts = [message.get("content") or "" for message in all_messages(row)]
    parts += [
        json.dumps(message["tool_calls"], ensure_ascii=False, sort_keys=True)
        for message in row["messages"]
        if message.get("tool_calls")
    ]
    if row.get("tools"):
        parts.append(row["tools"])
    return "\n".join(parts)


def spoken(row: Row) -> list[str]:
    """The texts of a row that are its own: every message but the system prompt, which all rows of a set may share."""
    return [message.get("content") or "" for message in all_messages(row) if message["role"] != "system"]


def shown(row: Row, chars: int = EXAMPLE_CHARS) -> str:
    """The start of an example for people: without the system prompt, which every row of a set may share."""
    parts = [
        message.get("content") or json.dumps(message.get("tool_calls") or "")
        for message in all_messages(row)
        if message["role"] != "system"
    ]
    return "\n".join(parts)[:chars]


def answer_of(row: Row) -> str:
    """What the model would learn to say: the chosen answer, the last assistant turn, or the text itself."""
    messages = row.get("chosen") or row["messages"]
    return (messages[-1].get("content") or "") if messages else ""


def batches(rows: Iterable[Row], size: int = BATCH_ROWS) -> Iterator[list[Row]]:
    """Consecutive lists of up to `size` rows."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile that holds the pages it is reading: left to itself it keeps all that it has read until it is closed."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)


class Table:
    """Rows that can be read many times, in order: in memory while few, in a temporary parquet file when many.

    `Table.collect(batches)` drains an iterator of batches; iterating gives batches again; `len` counts rows.
    Memory stays flat however many rows there are; the file goes away with the table.
    """

    def __init__(self, spill_rows: int = SPILL_ROWS):
        self.spill_rows = spill_rows
        self.rows_total = 0
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
        self.rows_total += len(batch)
        self._held.extend(batch)
        if self._writer is not None or len(self._held) > self.spill_rows:
            self._flush()

    def close(self) -> Table:
        if self._writer is not None:
            self._flush()
            self._writer.close()
            self._writer = None
        return self

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tunebook-rows-")
            schema = pa.schema([("id", pa.string()), ("source", pa.string()), ("row", pa.large_string())])
            self._writer = pq.ParquetWriter(self._path, schema, compression="zstd", compression_level=1)
        for batch in batches(self._held):
            texts = [_compact(row) for row in batch]
            columns = [pa.array([row[name] for row in batch], pa.string()) for name in ("id", "source")] + [
                pa.array(texts, pa.large_string())
            ]
            self._writer.write_table(pa.table(columns, schema=self._writer.schema))
        self._held = []

    @property
    def _path(self) -> Path:
        return Path(self._folder.name) / "rows.parquet"

    def __len__(self) -> int:
        return self.rows_total

    def __iter__(self) -> Iterator[list[Row]]:
        if self._writer is not None:
            raise RuntimeError("close() the table before reading it")
        if self._folder is None:
            yield from batches(self._held)
            return
        with open_parquet(self._path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=["row"]):
                yield [json.loads(text) for text in batch.column(0).to_pylist()]

    def ids_and_sources(self) -> Iterator[tuple[str, str]]:
        """(id, source) of every row, without reading the rest of it."""
        if self._folder is None:
            yield from ((row["id"], row["source"]) for row in self._held)
            return
        with open_parquet(self._path) as file:
            for batch in file.iter_batches(batch_size=10 * BATCH_ROWS, columns=["id", "source"]):
                yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)

    def rows(self) -> Iterator[Row]:
        """One row after another."""
        for batch in self:
            yield from batch


@dataclass
class StepReport:
    """What one step did: rows in, rows out, why rows went, and one example for each reason.

    `changed` counts rows that stay but were altered (repaired, masked). `figures` holds whatever else the step measured.
    """

    step: str
    seen: int = 0
    kept: int = 0
    changed: int = 0
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, dict] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    rejects: Rejects | None = None

    def drop(self, row: Row, reason: str, detail: str = "") -> None:
        """Count a removed row, keep the first as example, and write it to rejected.jsonl when there is a writer."""
        self.dropped[reason] += 1
        if reason not in self.examples:
            self.examples[reason] = {
                "file": row.get("file", ""),
                "row": row.get("row", 0),
                "detail": detail,
                "text": shown(row),
            }
        if self.rejects is not None:
            self.rejects.add(row.get("file", ""), row.get("row", 0), reason, detail, step=self.step, invalid=False)

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
        """Count a row that was altered and keep the first of each kind as example."""
        self.changed += 1
        self.examples.setdefault(what, {"before": before[:EXAMPLE_CHARS], "after": after[:EXAMPLE_CHARS]})

    def as_dict(self) -> dict:
        return {
            "step": self.step,
            "seen": self.seen,
            "kept": self.kept,
            "changed": self.changed,
            "dropped": dict(self.dropped.most_common()),
            "examples": self.examples,
            "figures": self.figures,
        }


class Rejects:
    """Writes every lost row to a JSON-lines file and counts the reasons.

    Rows that were wrong (`invalid=True`: unreadable, of no known shape, breaking the chat contract) count against
    the limit; rows that a cleaning step took out on request (duplicates, another language) do not.
    """

    def __init__(self, path: Path | None = None, limit: float = 0.05):
        self.path = path
        self.limit = limit
        self.invalid: Counter = Counter()
        self.removed: Counter = Counter()
        self.first: dict[str, dict] = {}
        self.total_seen = 0
        self.names: dict[Path, str] = {}  # what a file is called, where its name alone is not enough
        self._file: Any = None
        self._begun = False

    def add(
        self, file: str | Path, row: int, reason: str, detail: str = "", *, step: str = "read", invalid: bool = True
    ) -> None:
        if isinstance(file, Path):
            file = self.names.get(file, file.name)
        (self.invalid if invalid else self.removed)[reason] += 1
        record = {"file": file, "row": row, "reason": reason, "detail": str(detail)[:EXAMPLE_CHARS], "step": step}
        self.first.setdefault(reason, record)
        if self.path is not None:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a" if self._begun else "w", encoding="utf-8")
                self._begun = True
            self._file.write(json.dumps(record, ensure_ascii=True) + "\n")

    def saw(self, count: int) -> None:
        """Tell how many more input rows there were, the wrong ones among them; the limit is a share of this."""
        self.total_seen += count

    @property
    def share(self) -> float:
        return sum(self.invalid.values()) / self.total_seen if self.total_seen else 0.0

    def check(self) -> None:
        """Stop the job when more than the allowed share of the input rows was wrong."""
        if self.share <= self.limit:
            return
        self.flush()
        count = sum(self.invalid.values())
        reason, worst = self.invalid.most_common(1)[0]
        first = self.first[reason]
        where = f" They are listed in {self.path.name}." if self.path else ""
        raise TunebookError(
            f"{count:,} of {self.total_seen:,} rows ({self.share:.1%}) could not be used; the limit is {self.limit:.1%}. "
            f"{worst:,} of them: {reason} (first in {first['file']}, row {first['row']}: {first['detail']}).{where} "
            "Mend the rows, or raise `reject_limit` to go on without them."
        )

    def check_rows_left(self, rows: Any, what: str) -> None:
        """Stop when there is nothing to go on with. rows: anything with a length."""
        if len(rows):
            return
        self.flush()
        if self.invalid:
            reason, count = self.invalid.most_common(1)[0]
            first = self.first[reason]
            raise TunebookError(
                f"No row of {what} can be used: {count:,} of {self.total_seen:,} have {reason} (first in {first['file']}, row {first['row']}: "
                f"{first['detail']}). Mend the file, or name its format and columns."
            )
        if self.removed:
            reason, count = self.removed.most_common(1)[0]
            raise TunebookError(
                f"No row of {what} is left: {count:,} were removed for {reason!r}. Loosen that setting, or bring more data."
            )
        raise TunebookError(f"{what} holds no rows; name a file that has some.")

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file; an empty one is left when nothing was lost, so that its absence always means an unfinished job."""
        if self._file is not None:
            self._file.close()
            self._file = None
        elif self.path is not None and not self._begun:
            self._begun = True
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("", encoding="utf-8")

    def as_dict(self) -> dict:
        return {
            "invalid": dict(self.invalid.most_common()),
            "removed": dict(self.removed.most_common()),
            "seen": self.total_seen,
            "share": self.share,
        }
