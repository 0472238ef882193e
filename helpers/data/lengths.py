"""How long rows are in tokens, which `max_length` fits them, and what becomes of those that are longer.

Nothing is cut without being counted: a report says how many rows were over, what was done, and how many of them would
have lost their end of turn if they had simply been cut (a model trained on such rows does not learn to stop).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from helpers.data.labels import Encoded, Encoder
from helpers.data.tables import Rejects
from helpers.data.turns import PLACE, Row, make_row

COVERED = 0.99  # share of the rows that the proposed length holds whole
QUANTILES = {"shortest": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
CANDIDATES = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)


def expanded(counts: Mapping[Any, int]) -> Any:
    """A histogram (length → rows) as a sorted int64 array of every row's length."""
    import numpy as np

    pairs = sorted((int(length), count) for length, count in counts.items())
    return np.repeat(np.array([length for length, _ in pairs], np.int64), [count for _, count in pairs])


def propose(lengths: Sequence[int]) -> int:
    """The smallest usual length that holds 99 % of the rows whole; the longest row's, rounded up, when that is less."""
    import numpy as np

    if not len(lengths):
        return 0
    needed = int(np.quantile(lengths, COVERED, method="higher"))
    longest = (int(max(lengths)) + 15) // 16 * 16
    return min(next((size for size in CANDIDATES if size >= needed), (needed + 1023) // 1024 * 1024), longest)


class Fitter:
    """Makes encoded rows fit `max_length` tokens, by dropping, splitting or truncating those that do not.

    lengths: tokens of a row, before anything was cut → rows. counts: over, of them lost_end whose end of turn lies
    behind max_length; dropped, truncated, split_rows into split_into; all_masked, dropped because a cut would leave
    nothing that is trained.
    """

    def __init__(
        self, encoder: Encoder, max_length: int, over_long: str = "drop", rejects: Rejects | None = None
    ) -> None:
        self.max_length, self.over_long, self.rejects = max_length, over_long, rejects or Rejects()
        self._parts = Encoder(encoder.template, encoder.train_on)
        self.lengths: Counter[int] = Counter()
        names = ("over", "lost_end", "dropped", "truncated", "split_rows", "split_into", "all_masked")
        self.counts = Counter(dict.fromkeys(names, 0))

    def report(self) -> dict[str, Any]:
        """The counts, shares and quantiles, and the proposed length."""
        import numpy as np

        lengths, rows = expanded(self.lengths), self.lengths.total()
        return {
            "max_length": self.max_length,
            "over_long": self.over_long,
            **self.counts,
            "rows": rows,
            "over_share": self.counts["over"] / max(1, rows),
            "lost_end_share": self.counts["lost_end"] / max(1, self.counts["over"]),
            "proposed_max_length": propose(lengths),
            **{name: round(float(np.quantile(lengths, share))) for name, share in QUANTILES.items() if rows},
        }

    def fit(self, encoded: Iterable[list[Encoded]]) -> Iterator[list[Encoded]]:
        """The batches with every row fitting."""
        for batch in encoded:
            self.lengths.update(len(one.ids) for one in batch)
            yield [part for one in batch for part in self._fitting(one)]

    def _fitting(self, one: Encoded) -> list[Encoded]:
        size, length = self.max_length, len(one.ids)
        if length <= size:
            return [one]
        self.counts.update(over=1, lost_end=int(one.ends[-1] >= size))
        gone, reason, detail = "dropped", "over max_length", f"{length:,} tokens; max_length is {size:,}"
        if self.over_long == "truncate":
            if one.mask[:size].any():
                self.counts["truncated"] += 1
                return [one.part(0, size)]
            gone, reason = "all_masked", "all tokens masked"
            detail = f"cut at {size:,} of {length:,} tokens, nothing that is trained is left"
        elif self.over_long == "split" and (parts := self._split(one)):
            self.counts.update(split_rows=1, split_into=len(parts))
            return parts
        self.counts[gone] += 1
        self.rejects.add(one.row["file"], one.row["row"], reason, detail, step="length", invalid=False)
        return []

    def _split(self, one: Encoded) -> list[Encoded]:
        """Text in windows of `max_length`; a conversation in runs of exchanges that each fit, as long as they can be,
        the system message repeated. [] when one exchange is too long for itself."""
        if one.row["kind"] == "text":
            return [one.part(at, at + self.max_length) for at in range(0, len(one.ids), self.max_length)]
        messages = one.row["messages"]
        system = messages[:1] if messages[0]["role"] == "system" else []
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
        parts: list[Encoded] = []
        run: list[dict] = []
        for begin, end in pairwise([*starts, len(messages)]):
            exchange = messages[begin:end]
            longer = self._encoded(one.row, system + run + exchange) if run else None
            if longer is not None:
                run, parts[-1] = run + exchange, longer
                continue
            alone = self._encoded(one.row, system + exchange)
            if alone is None:
                return []
            run = exchange
            parts.append(alone)
        return parts

    def _encoded(self, row: Row, messages: list[dict]) -> Encoded | None:
        """These messages of the row as tokens; None when they do not fit, or cannot be rendered."""
        kept = {name: row[name] for name in (*PLACE, "tools", "meta", "label") if name in row}
        (batch,) = self._parts.encode([[make_row(row["kind"], messages, **kept)]])
        return next((one for one in batch if len(one.ids) <= self.max_length), None)
