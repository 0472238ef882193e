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
from helpers.data.turns import PLACE, Row, make_row

COVERED = 0.99  # share of the rows that the proposed length holds whole
CANDIDATES = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)


@dataclass
class LengthReport:
    """lengths: tokens of a row, before anything was cut → rows. lost_end: rows over the limit whose end of turn lies
    behind it. all_masked: truncated rows of which nothing that is trained was left."""

    max_length: int
    over_long: str
    lengths: Counter[int] = field(default_factory=Counter)
    over: int = 0
    lost_end: int = 0
    dropped: int = 0
    truncated: int = 0
    split_rows: int = 0
    split_into: int = 0
    all_masked: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The counts, shares and quantiles, and the proposed length."""
        found = dict(vars(self))
        lengths, rows = expanded(found.pop("lengths")), self.lengths.total()
        return {
            **found,
            "rows": rows,
            "over_share": self.over / max(1, rows),
            "lost_end_share": self.lost_end / max(1, self.over),
            "proposed_max_length": propose(lengths),
            **quantiles(lengths),
        }


def expanded(counts: Mapping[Any, int]) -> Any:
    """A histogram (length → rows) as a sorted int64 array of every row's length."""
    import numpy as np

    pairs = sorted((int(length), count) for length, count in counts.items())
    return np.repeat(np.array([length for length, _ in pairs], np.int64), [count for _, count in pairs])


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Shortest, median, p90, p99 and longest; {} for no rows."""
    import numpy as np

    shares = {"shortest": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
    return {name: round(float(np.quantile(lengths, share))) for name, share in shares.items()} if len(lengths) else {}


def propose(lengths: Sequence[int]) -> int:
    """The smallest usual length that holds 99 % of the rows whole; the longest row's, rounded up, when that is less."""
    import numpy as np

    if not len(lengths):
        return 0
    needed = int(np.quantile(lengths, COVERED, method="higher"))
    longest = (int(max(lengths)) + 15) // 16 * 16
    return min(next((size for size in CANDIDATES if size >= needed), (needed + 1023) // 1024 * 1024), longest)


class Fitter:
    """Makes encoded rows fit `max_length` tokens, by dropping, splitting or truncating those that do not."""

    def __init__(
        self, encoder: Encoder, max_length: int, over_long: str = "drop", rejects: Rejects | None = None
    ) -> None:
        self.encoder, self.rejects = encoder, rejects or Rejects()
        self.report = LengthReport(max_length, over_long)

    def fit(self, encoded: Iterable[list[Encoded]]) -> Iterator[list[Encoded]]:
        """The batches with every row fitting."""
        report, make_fit = self.report, {"drop": self._drop, "truncate": self._truncate, "split": self._split}
        for batch in encoded:
            fitting = []
            for one in batch:
                report.lengths[len(one.ids)] += 1
                if len(one.ids) <= report.max_length:
                    fitting.append(one)
                    continue
                report.over += 1
                report.lost_end += one.ends[-1] >= report.max_length
                fitting += make_fit[report.over_long](one)
            yield fitting

    def _drop(self, one: Encoded) -> list[Encoded]:
        self.report.dropped += 1
        return self._lost(one, "over max_length", f"{len(one.ids):,} tokens; max_length is {self.report.max_length:,}")

    def _truncate(self, one: Encoded) -> list[Encoded]:
        """The first `max_length` tokens; a row that loses every trained token is dropped instead."""
        size = self.report.max_length
        if not one.mask[:size].any():
            self.report.all_masked += 1
            detail = f"cut at {size:,} of {len(one.ids):,} tokens, nothing that is trained is left"
            return self._lost(one, "all tokens masked", detail)
        self.report.truncated += 1
        return [Encoded(one.row, one.ids[:size], one.mask[:size], one.prompt, [end for end in one.ends if end < size])]

    def _split(self, one: Encoded) -> list[Encoded]:
        """Text in windows of `max_length`; a conversation between turns. What can't be split is dropped."""
        size, parts = self.report.max_length, []
        if one.row["kind"] == "text":
            for at in range(0, len(one.ids), size):
                ends = [len(one.ids) - 1 - at] if at + size >= len(one.ids) else []
                parts.append(Encoded(one.row, one.ids[at : at + size], one.mask[at : at + size], 0, ends))
        else:
            parts = self._split_turns(one.row)
        if not parts:
            return self._drop(one)
        self.report.split_rows += 1
        self.report.split_into += len(parts)
        return parts

    def _split_turns(self, row: Row) -> list[Encoded]:
        """Runs of exchanges that each fit, as long as they can be, the system message repeated; [] when one is too
        long for itself."""
        messages = row["messages"]
        system = messages[:1] if messages[0]["role"] == "system" else []
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
        exchanges = [messages[a:b] for a, b in zip(starts, [*starts[1:], len(messages)], strict=True)]
        parts: list[Encoded] = []
        run: list[dict] = []
        best: Encoded | None = None
        for exchange in exchanges:
            longer = self._fitting(row, system + run + exchange)
            if longer is None:
                parts += [best] if best is not None else []
                run, longer = [], self._fitting(row, system + exchange)
                if longer is None:
                    return []
            run, best = run + exchange, longer
        return [*parts, best] if best is not None else []

    def _fitting(self, row: Row, messages: list[dict]) -> Encoded | None:
        """These messages of the row as tokens; None when they do not fit, or cannot be rendered."""
        kept = {name: row[name] for name in (*PLACE, "tools", "meta", "label") if name in row}
        encoder = Encoder(self.encoder.template, self.encoder.train_on)
        (batch,) = encoder.encode([[make_row(row["kind"], messages, **kept)]])
        return next((one for one in batch if len(one.ids) <= self.report.max_length), None)

    def _lost(self, one: Encoded, reason: str, detail: str) -> list[Encoded]:
        self.rejects.add(one.row["file"], one.row["row"], reason, detail, step="length", invalid=False)
        return []
