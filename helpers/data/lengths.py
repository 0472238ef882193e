"""How long rows are in tokens, which `max_length` fits them, and what becomes of those that are longer.

Nothing is cut without being counted: a report says how many rows were over, what was done, and how many of them would
have lost their end of turn if they had simply been cut (a model trained on such rows does not learn to stop).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from helpers.data.labels import Encoded, Encoder
from helpers.data.tables import Rejects
from helpers.data.turns import Row, make_row

OVER_LONG = ("drop", "split", "truncate")
COVERED = 0.99
CANDIDATES = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)


@dataclass
class LengthReport:
    """lengths: tokens of a row, before anything was cut → rows. lost_end: rows over the limit whose end of turn lies behind it."""

    max_length: int
    over_long: str
    lengths: Counter = field(default_factory=Counter)
    over: int = 0
    lost_end: int = 0
    dropped: int = 0
    truncated: int = 0
    split_rows: int = 0
    split_into: int = 0
    all_masked: int = 0

    def as_dict(self) -> dict:
        counts = {
            name: getattr(self, name)
            for name in (
                "max_length",
                "over_long",
                "over",
                "lost_end",
                "dropped",
                "truncated",
                "split_rows",
                "split_into",
                "all_masked",
            )
        }
        rows, lengths = self.lengths.total(), expanded(self.lengths)
        return {
            **counts,
            "rows": rows,
            "over_share": self.over / rows if rows else 0.0,
            "lost_end_share": self.lost_end / self.over if self.over else 0.0,
            "proposed_max_length": propose(lengths),
            **quantiles(lengths),
        }


def expanded(counts: Mapping[int, int]) -> Any:
    """A histogram (length → rows) as a sorted int64 array of every row's length."""
    import numpy as np

    pairs = sorted((int(length), count) for length, count in counts.items())
    return np.repeat(np.array([length for length, _ in pairs], np.int64), [count for _, count in pairs])


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    import numpy as np

    if not len(lengths):
        return {}
    values = np.quantile(np.asarray(lengths), [0.0, 0.5, 0.9, 0.99, 1.0])
    return dict(zip(("shortest", "median", "p90", "p99", "longest"), (round(float(v)) for v in values), strict=True))


def propose(lengths: Sequence[int], covered: float = COVERED) -> int:
    """The smallest usual length that holds `covered` of the rows whole; the longest row's, rounded up, when that is smaller."""
    import numpy as np

    if not len(lengths):
        return 0
    needed = int(np.ceil(np.quantile(np.asarray(lengths), covered, method="higher")))
    longest = (int(max(lengths)) + 15) // 16 * 16
    return min(next((size for size in CANDIDATES if size >= needed), (needed + 1023) // 1024 * 1024), longest)


def choices(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """For each usual `max_length`: rows that would be over it, and the tokens lost with them, so that the proposal can be judged."""
    import numpy as np

    values = np.sort(np.asarray(lengths, dtype=np.int64))
    if not len(values):
        return []
    proposed = propose(lengths)
    rows = []
    for size in sorted({*CANDIDATES, proposed}):
        over = values[np.searchsorted(values, size, side="right") :]
        rows.append(
            {
                "max_length": size,
                "rows_over": len(over),
                "share_over": len(over) / len(values),
                "tokens_lost": int(over.sum()),
                "proposed": size == proposed,
            }
        )
        if not len(over):
            break
    return [row for row in rows if row["share_over"] < 0.9 or row["proposed"]]


class Fitter:
    """Makes encoded rows fit `max_length` tokens, by dropping, splitting or truncating those that do not."""

    def __init__(self, encoder: Encoder, max_length: int, over_long: str = "drop", rejects: Rejects | None = None):
        self.encoder, self.rejects = encoder, rejects or Rejects()
        self.report = LengthReport(max_length, over_long)

    def fit(self, encoded: Iterable[list[Encoded]]) -> Iterator[list[Encoded]]:
        report = self.report
        for batch in encoded:
            fitting = []
            for one in batch:
                report.lengths[len(one.ids)] += 1
                if len(one.ids) <= report.max_length:
                    fitting.append(one)
                    continue
                report.over += 1
                report.lost_end += one.ends[-1] >= report.max_length
                fitting += {"drop": self._drop, "truncate": self._truncate, "split": self._split}[report.over_long](one)
            yield fitting

    def _drop(self, one: Encoded) -> list[Encoded]:
        self.report.dropped += 1
        self._removed(one, "over max_length", f"{len(one.ids):,} tokens; max_length is {self.report.max_length:,}")
        return []

    def _truncate(self, one: Encoded) -> list[Encoded]:
        """The first `max_length` tokens; a row that loses every trained token is dropped instead."""
        size = self.report.max_length
        ids, mask = one.ids[:size], one.mask[:size]
        if not mask.any():
            self.report.all_masked += 1
            self._removed(
                one, "all tokens masked", f"cut at {size:,} of {len(one.ids):,} tokens, nothing that is trained is left"
            )
            return []
        self.report.truncated += 1
        return [Encoded(one.row, ids, mask, one.prompt, [end for end in one.ends if end < size])]

    def _split(self, one: Encoded) -> list[Encoded]:
        """Text in windows of `max_length`; a conversation between turns, its system message repeated. What can't be split is dropped."""
        size = self.report.max_length
        if one.row["kind"] == "text":
            parts = [
                Encoded(
                    one.row,
                    one.ids[at : at + size],
                    one.mask[at : at + size],
                    0,
                    [len(one.ids) - 1 - at] if at + size >= len(one.ids) else [],
                )
                for at in range(0, len(one.ids), size)
            ]
        else:
            parts = self._split_turns(one.row)
        if not parts:
            return self._drop(one)
        self.report.split_rows += 1
        self.report.split_into += len(parts)
        return parts

    def _split_turns(self, row: Row) -> list[Encoded]:
        """Runs of turns that each begin with a question, end with an answer and fit, as long as they can be; [] when one turn is too long."""
        messages = row["messages"]
        system = messages[:1] if messages[0]["role"] == "system" else []
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
        exchanges = [messages[a:b] for a, b in zip(starts, [*starts[1:], len(messages)], strict=True)]
        if len(exchanges) < 2:
            return []
        parts: list[Encoded] = []
        run: list[dict] = []
        best: Encoded | None = None
        for exchange in exchanges:
            longer = self._encoded(row, system + run + exchange)
            if longer is not None and len(longer.ids) <= self.report.max_length:
                run, best = run + exchange, longer
                continue
            alone = self._encoded(row, system + exchange)
            if best is None or alone is None or len(alone.ids) > self.report.max_length:
                return []
            parts.append(best)
            run, best = exchange, alone
        return [*parts, best] if best is not None else []

    def _encoded(self, row: Row, messages: list[dict]) -> Encoded | None:
        extra = {"label": row["label"]} if "label" in row else {}
        part = make_row(
            row["kind"],
            messages,
            source=row["source"],
            file=row["file"],
            row=row["row"],
            tools=row.get("tools"),
            meta=row["meta"],
            **extra,
        )
        encoder = Encoder(self.encoder.template, self.encoder.train_on)
        return next((one for batch in encoder.encode([[part]]) for one in batch), None)

    def _removed(self, one: Encoded, reason: str, detail: str) -> None:
        self.rejects.add(one.row["file"], one.row["row"], reason, detail, step="length", invalid=False)
