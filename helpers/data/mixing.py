"""Mixing sources: weights, caps, a replay share of general data, evenly interleaved; and what came of it in rows and tokens.

Rows are chosen by a hash of their content, so the same rows are taken again when a source grows elsewhere, and come in
the order of their sources. Nothing is held in memory but one 64-bit hash a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from helpers.data.shingles import mix as spread
from helpers.data.tables import StepReport, Table
from helpers.data.turns import BATCH_ROWS, Row, batches
from helpers.errors import TunebookError

Count = Callable[[list[Row]], list[int]]
PROBE_ROWS = 2_000


@dataclass(frozen=True)
class Source:
    """weight: its share relative to the others'; None: as many rows as it has. cap: most rows (0: no cap). replay: general
    data against forgetting, whose share is set by `replay_share` and not by weight."""

    table: Table
    weight: float | None = None
    cap: int = 0
    replay: bool = False


def mix(
    sources: Mapping[str, Source],
    report: StepReport,
    replay_share: float = 0.0,
    unit: str = "rows",
    count_tokens: Count | None = None,
    rows_total: int = 0,
    seed: int = 17,
) -> Iterator[list[Row]]:
    """Rows of all sources in one stream, every part of which holds about the same mixture.

    Weights and replay_share (0 to 1, of the whole) are shares of rows, or of tokens with unit="tokens"; no row is taken
    twice, so the source that is shortest for its weight decides how much of the others is taken. rows_total: at most so many.
    count_tokens: lengths of a batch of rows in tokens, for the achieved mixture in the report. Raises TunebookError
    when a share cannot be met.
    """
    _check(sources, replay_share, unit, count_tokens)
    sizes = {name: min(len(s.table), s.cap or len(s.table)) for name, s in sources.items()}
    per_row = {name: _tokens_per_row(s.table, count_tokens) if unit == "tokens" else 1.0 for name, s in sources.items()}
    amounts = {name: size * per_row[name] for name, size in sizes.items()}
    planned = _plan(sources, amounts, replay_share)
    taken = {name: min(sizes[name], round(planned[name] / per_row[name])) for name in sources}
    if rows_total and (total := sum(taken.values())) > rows_total:
        taken = {name: math.floor(rows_total * rows / total) for name, rows in taken.items()}
    streams = {name: _chosen(s.table, taken[name], seed) for name, s in sources.items() if taken[name]}
    done = {name: {"rows": 0, "tokens": 0} for name in sources}
    for batch in batches(_interleaved(streams, taken, done), BATCH_ROWS):
        report.kept += len(batch)
        if count_tokens is not None:
            for row, length in zip(batch, count_tokens([row for _, row in batch]), strict=True):
                done[row[0]]["tokens"] += int(length)
        yield [row for _, row in batch]
    report.seen += sum(len(s.table) for s in sources.values())
    report.figures["mixture"] = _achieved(sources, done, count_tokens is not None)
    for name, source in sources.items():
        if left := len(source.table) - done[name]["rows"]:
            report.dropped[f"not needed for the mixture: {name}"] += left


def _check(sources: Mapping[str, Source], replay_share: float, unit: str, count_tokens: Count | None) -> None:
    if unit not in ("rows", "tokens") or (unit == "tokens" and count_tokens is None):
        raise TunebookError(
            f"The unit of the mixture is {unit!r}; it takes 'rows', or 'tokens' together with count_tokens."
        )
    if not 0 <= replay_share < 1:
        raise TunebookError(f"replay_share is {replay_share!r}; it takes a number from 0 up to, but not including, 1.")
    for name, source in sources.items():
        if source.weight is not None and not (source.weight >= 0 and math.isfinite(source.weight)):
            raise TunebookError(f"The weight of {name!r} is {source.weight!r}; it takes a number of 0 or more.")
    if len({s.weight is None for s in sources.values() if not s.replay}) > 1:
        missing = ", ".join(name for name, s in sources.items() if s.weight is None and not s.replay)
        raise TunebookError(f"Some sources have a weight and {missing} has none; give every source one, or none.")
    if replay_share and not any(s.replay and len(s.table) for s in sources.values()):
        raise TunebookError(
            f"replay_share is {replay_share:g}, but there is no replay data; name a source of general text, or set it to 0."
        )
    if not any(len(s.table) for s in sources.values() if not s.replay):
        raise TunebookError("There is no row to mix: every source is empty after cleaning. Look at rejected.jsonl.")


def _plan(sources: Mapping[str, Source], amounts: dict[str, float], replay_share: float) -> dict[str, float]:
    """How much of every source, in the unit of the mixture."""
    own = {name: s for name, s in sources.items() if not s.replay}
    replay = [name for name in sources if name not in own]
    planned = dict.fromkeys(sources, 0.0)
    if all(s.weight is None for s in own.values()):
        planned |= {name: amounts[name] for name in own}
    else:
        total = min((amounts[name] / s.weight for name, s in own.items() if s.weight), default=0.0)
        if total == 0:
            empty = ", ".join(name for name, s in own.items() if s.weight and not amounts[name]) or "every weight is 0"
            raise TunebookError(
                f"The mixture cannot be made: {empty} has no row left; set its weight to 0 or mend the source."
            )
        planned |= {name: s.weight * total for name, s in own.items()}
    if replay_share:
        wanted = sum(planned.values()) * replay_share / (1 - replay_share)
        have = sum(amounts[name] for name in replay)
        planned |= {name: amounts[name] * min(1.0, wanted / have) for name in replay}
        if wanted > have:  # rather less of the rest than another share than the one asked for
            shrink = have / wanted
            planned |= {name: planned[name] * shrink for name in own}
    return planned


def _chosen(table: Table, rows: int, seed: int) -> Iterator[Row]:
    """`rows` rows of a table in its order, chosen by the hash of their content and place."""
    if rows >= len(table):
        yield from table.rows()
        return
    ids = np.fromiter((int(row["id"], 16) for row in table.rows()), np.uint64, len(table))
    ranks = spread(ids ^ spread(np.full(1, seed, np.uint64)))
    # Equal rows have equal ranks: their place decides between them.
    keep = np.zeros(len(table), bool)
    keep[np.argsort(ranks, kind="stable")[:rows]] = True
    for row, wanted in zip(table.rows(), keep.tolist(), strict=True):
        if wanted:
            yield row


def _interleaved(
    streams: dict[str, Iterator[Row]], taken: dict[str, int], done: dict[str, dict]
) -> Iterator[tuple[str, Row]]:
    """Row after row from the source that lags furthest behind its share."""
    import heapq

    queue = [(0.5 / taken[name], order, name) for order, name in enumerate(streams)]
    heapq.heapify(queue)
    while queue:
        at, order, name = heapq.heappop(queue)
        row = next(streams[name], None)
        if row is None:
            continue
        done[name]["rows"] += 1
        heapq.heappush(queue, (at + 1 / taken[name], order, name))
        yield name, row


def _tokens_per_row(table: Table, count_tokens: Count) -> float:
    total = rows = 0
    for batch in table:
        total += sum(count_tokens(batch))
        rows += len(batch)
        if rows >= PROBE_ROWS:
            break
    return max(total / rows, 1e-9) if rows else 1.0


def _achieved(sources: Mapping[str, Source], done: dict[str, dict], with_tokens: bool) -> dict[str, dict]:
    rows = sum(d["rows"] for d in done.values())
    tokens = sum(d["tokens"] for d in done.values())
    result = {}
    for name, source in sources.items():
        entry = {
            "rows": done[name]["rows"],
            "rows_share": round(done[name]["rows"] / max(rows, 1), 4),
            "available": len(source.table),
        }
        if with_tokens:
            entry |= {"tokens": done[name]["tokens"], "tokens_share": round(done[name]["tokens"] / max(tokens, 1), 4)}
        result[name] = entry | {"weight": source.weight, "replay": source.replay}
    return result
