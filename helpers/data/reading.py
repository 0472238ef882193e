"""Named sources to a table of rows: every record read, its shape found, converted or rejected, and all of it counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from helpers.data import formats, sources
from helpers.data.formats import DEFAULTS, RowError, Shape
from helpers.data.sources import Source
from helpers.data.tables import Rejects, Row, Table, batches, make_row
from helpers.errors import TunebookError

UNFORESEEN = "row that cannot be read"  # no known row ends here; the tests say so
CHECK_EVERY = 20_000  # rows after which a job that is mostly rejections stops early


@dataclass
class SourceReport:
    """What was read from one source. shapes: mapping, as text → rows; unused: columns that play no part → rows that have them."""

    name: str
    where: str
    rows: int = 0
    rejected: int = 0
    shapes: Counter = field(default_factory=Counter)
    unused: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)

    def as_dict(self) -> dict:
        return {
            "name": self.name,
            "where": self.where,
            "rows": self.rows,
            "rejected": self.rejected,
            "kinds": dict(self.kinds),
            "shapes": dict(self.shapes.most_common(8)),
            "unused_columns": dict(self.unused.most_common(12)),
        }


@dataclass
class Reading:
    """The rows of a spec, and a report for each of its sources."""

    table: Table
    reports: list[SourceReport]

    def _repr_html_(self) -> str:
        from helpers.display import table

        lines = [
            (
                r.name,
                r.where,
                f"{r.rows:,}",
                f"{r.rejected:,}",
                "; ".join(f"{shape} ({count:,})" for shape, count in r.shapes.most_common(4)),
                ", ".join(name for name, _ in r.unused.most_common(8)),
            )
            for r in self.reports
        ]
        return table(lines, ("source", "where", "rows", "rejected", "read as (rows)", "columns kept aside"))

    def __repr__(self) -> str:
        return "\n".join(
            f"{r.name}: {r.rows:,} rows, {r.rejected:,} rejected, {dict(r.shapes.most_common(4))}" for r in self.reports
        )


def read(
    spec: str,
    rejects: Rejects,
    *,
    format: str = "auto",
    info: str = "",
    columns: str = "",
    unanswerable: str = formats.UNANSWERABLE,
    documents: dict[str, Any] | None = None,
    limits: dict[str, int] | None = None,
) -> Reading:
    """Every row of the sources that `spec` names (see `helpers.data.sources`).

    format: one of `formats.FORMATS`; a dataset_info.json beside a file comes first when it is "auto". columns: the user's own
    mapping, "prompt=question,response=sql". documents: options of `helpers.data.documents.chunks` for HTML, PDF, DOCX, Markdown.
    limits: source name → most rows to take. Raises TunebookError when nothing can be read, or too much is wrong.
    """
    named = named_shape(format, columns, unanswerable)
    reports: list[SourceReport] = []
    found = sources.find(spec, info)
    rejects.names |= sources.names(found)

    def every() -> Iterator[Row]:
        for source in found:
            report = SourceReport(source.name, source.hub or rejects.names[source.file])
            reports.append(report)
            yield from _rows(
                source,
                named if format != "auto" or columns else source.shape,
                rejects,
                report,
                unanswerable,
                documents or {},
            )

    table = Table.collect(batches(every()))
    rejects.check_rows_left(table, spec)
    rejects.check()
    return Reading(table, reports)


def named_shape(format: str, columns: str = "", unanswerable: str = formats.UNANSWERABLE) -> Shape | None:
    """The shape that the user's parameters name; None for "auto" without columns."""
    chosen: dict[str, str] = {}
    known = (
        "prompt",
        "query",
        "response",
        "history",
        "system",
        "messages",
        "tools",
        "chosen",
        "rejected",
        "label",
        "context",
    )
    for part in filter(None, (part.strip() for part in columns.split(","))):
        name, sign, column = (piece.strip() for piece in part.partition("="))
        if name not in known or not sign or not column:
            raise TunebookError(
                f"columns has {part!r}; it takes part=column pairs separated by commas, with the parts {', '.join(known)}."
            )
        chosen[name] = column
    if format == "auto":
        if not chosen:
            return None
        format = (
            "preference"
            if "chosen" in chosen
            else "kto"
            if "label" in chosen
            else "messages"
            if "messages" in chosen
            else "context_qa"
            if "context" in chosen
            else "alpaca"
            if "response" in chosen
            else "text"
        )
    return replace(DEFAULTS[format], unanswerable=unanswerable, **chosen)


def _rows(
    source: Source,
    shape: Shape | None,
    rejects: Rejects,
    report: SourceReport,
    unanswerable: str,
    documents: dict[str, Any],
) -> Iterator[Row]:
    where = report.where
    before = sum(rejects.invalid.values())
    if source.is_document:
        from helpers.data.documents import chunks

        found = chunks(source.file, rejects, **documents)
    else:
        found = sources.records(source, rejects)
    adapted: dict[Any, Shape | None] = {}
    for number, record in found:
        rejects.saw(1)
        try:
            fitting = _shape_of(record, shape, adapted, unanswerable)
            used = set(fitting.columns().values())
            aside = {
                str(name): _plain(value)
                for name, value in record.items()
                if name not in used and value is not None and value != ""
            }
            parts = formats.convert(record, fitting)
        except (
            RowError,
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            RecursionError,
        ) as wrong:  # only RowError is expected
            error = wrong if isinstance(wrong, RowError) else RowError(UNFORESEEN, f"{type(wrong).__name__}: {wrong}")
            rejects.add(where, number, error.reason, error.detail, step="format")
            if rejects.total_seen % CHECK_EVERY == 0:
                rejects.check()
            continue
        report.shapes[_described(fitting)] += 1
        report.unused.update(aside.keys())
        for part in parts:
            report.rows += 1
            report.kinds[part["kind"]] += 1
            messages = part.pop("messages")
            yield make_row(part.pop("kind"), messages, source=source.name, file=where, row=number, meta=aside, **part)
    report.rejected = sum(rejects.invalid.values()) - before


def _shape_of(record: dict[str, Any], named: Shape | None, known: dict[Any, Shape | None], unanswerable: str) -> Shape:
    """The shape of one record. Records with the same filled columns of the same types share one look."""
    signature = tuple((name, type(value)) for name, value in record.items() if value is not None)
    if signature not in known or any(issubclass(kind, (list, tuple)) for _, kind in signature):
        if named is not None:
            known[signature] = named if named.exact else formats.adapt(named, record)
        else:
            found = formats.detect(record)
            known[signature] = replace(found, unanswerable=unanswerable) if found else None
    if known[signature] is None:
        raise RowError(
            "unknown shape",
            f"the columns {formats.seen(record)} fit none of {', '.join(formats.FORMATS[1:])}; name the format or the columns",
        )
    return known[signature]


def _described(shape: Shape) -> str:
    return shape.format + ": " + ", ".join(f"{part}={column}" for part, column in shape.columns().items())


def _plain(value: Any) -> Any:
    """A side column as plain JSON, cut where it is long: it travels along, but nobody trains on it."""
    if isinstance(value, str):
        return value[:2000].encode("utf-8", "replace").decode()
    if isinstance(value, (bool, int)) or (isinstance(value, float) and value == value and abs(value) != float("inf")):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value[:50]]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in list(value.items())[:50]}
    return str(value)[:200].encode("utf-8", "replace").decode()
