"""Mixing sources: weights, caps, a replay share of general data, evenly interleaved; and what came of it.

Rows are chosen by a hash of their content, so the same rows are taken again when a source grows elsewhere, and come in
the order of their sources. Nothing is held in memory but one 64-bit hash a row.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.data.shingles import mix as spread
from helpers.data.tables import StepReport, Table
from helpers.data.turns import BATCH_ROWS, Row, batches
from helpers.display import Html, percent, shown
from helpers.errors import TunebookError

Count = Callable[[list[Row]], list[int]]  # rows → the length of each in tokens


@dataclass(frozen=True)
class Source:
    """weight: its share relative to the others'; None: as many rows as it has. cap: most rows (0: no cap). replay:
    general data against forgetting, whose share is set by `replay_share` and not by weight."""

    table: Table
    weight: float | None = None
    cap: int = 0
    replay: bool = False


def numbers(parameter: str, text: str, names: list[str]) -> dict[str, float]:
    """ "name=2,other=1" as numbers by source. Raises TunebookError for an unknown source or an unusable number."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (piece.strip() for piece in part.rpartition("="))
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        whole = parameter != "caps" or (found[name] >= 1 and found[name].is_integer())
        if name not in names or not 0 <= found[name] < math.inf or not whole:
            kind = "whole number from 1" if parameter == "caps" else "number"
            wanted = f"source={kind} pairs separated by commas, with the sources {', '.join(names)}"
            raise TunebookError(f"{parameter} has {part!r}; it takes {wanted}.")
    return found


def take(table: Table, params: Any, report: StepReport) -> Table:
    """The first `max_rows` rows, with `shuffle` as many drawn by the seed, in their order; the others are counted."""
    order, most = list(range(len(table))), params.max_rows
    if params.shuffle:
        random.Random(params.seed).shuffle(order)
    taken, places, fault = set(order[:most]), iter(range(len(table))), ("over max_rows", f"max_rows is {most}")
    return Table.collect(report.sift(table, lambda rows: [None if next(places) in taken else fault for _ in rows]))


def mix(
    sources: Mapping[str, Source], report: StepReport, replay_share: float, lengths: Count, seed: int = 17
) -> Iterator[list[Row]]:
    """Rows of all sources in one stream, every part of which holds about the same mixture.

    Weights and replay_share (0 to 1, of the whole) are shares of rows; no row is taken twice, so the source that is
    shortest for its weight decides how much of the others is taken. Raises TunebookError when a share cannot be met.
    """
    taken = _plan(sources, replay_share)
    streams = {name: _chosen(s.table, taken[name], seed) for name, s in sources.items() if taken[name]}
    tokens = dict.fromkeys(sources, 0)
    for batch in batches(_interleaved(streams, taken), BATCH_ROWS):
        rows = [row["row"] for row in batch]
        for entry, length in zip(batch, lengths(rows), strict=True):
            tokens[entry["source"]] += length
        report.kept += len(rows)
        yield rows
    all_rows, all_tokens = max(1, sum(taken.values())), max(1, sum(tokens.values()))
    mixture: dict[str, dict[str, Any]] = {}
    report.figures["mixture"] = mixture
    for name, source in sources.items():
        report.seen += len(source.table)
        mixture[name] = {"available": len(source.table), "weight": source.weight, "replay": source.replay}
        mixture[name] |= {"rows": taken[name], "rows_share": round(taken[name] / all_rows, 4)}
        mixture[name] |= {"tokens": tokens[name], "tokens_share": round(tokens[name] / all_tokens, 4)}
        if left := len(source.table) - taken[name]:
            report.dropped[f"not needed for the mixture: {name}"] += left


def table(mixture: Mapping[str, Mapping[str, Any]]) -> Html:
    """What `mix` made of every source."""
    lines = []
    for name, one in mixture.items():
        rows, tokens = percent(one["rows_share"]), percent(one["tokens_share"])
        lines.append((name, f"{one['available']:,}", f"{one['rows']:,}", rows, f"{one['tokens']:,}", tokens))
    return shown(lines, ("source", "available", "rows taken", "of rows", "tokens", "of tokens"))


def _plan(sources: Mapping[str, Source], replay_share: float) -> dict[str, int]:
    """How many rows are taken of every source."""
    sizes = {name: min(len(s.table), s.cap or len(s.table)) for name, s in sources.items()}
    own = {name: s for name, s in sources.items() if not s.replay}
    have = sum(size for name, size in sizes.items() if name not in own)
    unweighted = [name for name, source in own.items() if source.weight is None]
    if unweighted and len(unweighted) < len(own):
        raise TunebookError(f"weights gives {', '.join(unweighted)} no weight; give every source one, or none.")
    if replay_share and not have:
        raise TunebookError(f"replay_share is {replay_share:g}, but there is no replay data; name a replay_dataset.")
    if not any(sizes[name] for name in own):
        raise TunebookError("There is no row to mix: every source is empty after cleaning. Look at rejected.jsonl.")
    planned: dict[str, float] = {name: sizes[name] for name in own}
    if not unweighted:
        total = min((sizes[name] / s.weight for name, s in own.items() if s.weight), default=0.0)
        if total == 0:
            empty = ", ".join(name for name, s in own.items() if s.weight and not sizes[name]) or "every weight is 0"
            raise TunebookError(f"There is nothing to mix: {empty} has no row left; set its weight to 0.")
        planned = {name: (s.weight or 0.0) * total for name, s in own.items()}
    wanted = sum(planned.values()) * replay_share / (1 - replay_share)
    shrink = min(1.0, have / wanted) if wanted else 1.0  # rather less of the rest than another share than asked for
    planned = {name: amount * shrink for name, amount in planned.items()}
    planned |= {name: size * wanted * shrink / max(1, have) for name, size in sizes.items() if name not in own}
    return {name: min(sizes[name], round(planned[name])) for name in sources}


def _chosen(table: Table, rows: int, seed: int) -> Iterator[Row]:
    """`rows` rows of a table in its order, chosen by the hash of their content and place."""
    if rows >= len(table):
        yield from table.rows()
        return
    ids = np.fromiter((int(row["id"], 16) for row in table.rows()), np.uint64, len(table))
    ranks = spread(ids ^ spread(np.full(1, seed, np.uint64)))
    keep: np.ndarray = np.zeros(len(table), bool)
    keep[np.argsort(ranks, kind="stable")[:rows]] = True  # equal rows have equal ranks: their place decides
    for row, wanted in zip(table.rows(), keep.tolist(), strict=True):
        if wanted:
            yield row


def _interleaved(streams: dict[str, Iterator[Row]], taken: dict[str, int]) -> Iterator[dict[str, Any]]:
    """{"source", "row"}, row after row from the source that lags furthest behind its share."""

    def placed(order: int, name: str) -> Iterator[tuple[float, int, dict[str, Any]]]:
        for at, row in enumerate(streams[name]):
            yield (at + 0.5) / taken[name], order, {"source": name, "row": row}

    merged = heapq.merge(*(placed(order, name) for order, name in enumerate(streams)))
    return (entry for _, _, entry in merged)
