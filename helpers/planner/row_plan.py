"""Which examples share a row: best-fit packing that leaves the optimizer's batch exactly as asked.

One optimizer step sees exactly `batch_size` examples, in the seeded order of the epoch. They are spread over
`accumulation × world_size` rows of nearly equal token count, none longer than the budget unless one example is:

    an epoch    [ 7 2 9 4 | 1 8 3 6 | 5 0 ]            batches of 4 examples
    its rows    (7) (2 9 4)  (1 8) (3 6)  (5) (0)      accumulation × world_size = 2 rows a step

With the loss divided by the step's trained tokens, any packing, accumulation or number of GPUs gives the same gradient.
Where rows are padded instead of packed (`padded`), a row costs its longest example times their number, and examples of
similar length go together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from helpers.errors import TunebookError


@dataclass(frozen=True)
class Layout:
    """How an epoch is cut: rows that one process works through per optimizer step, and how full they are."""

    accumulation: int
    max_row_tokens: int
    mean_row_tokens: float


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: indices of `lengths` in as few rows of at most `budget` tokens as it finds.

    An example longer than the budget gets a row of its own. O(n · budget) at worst, through a table of free room.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(budget + 1)]
    for index in _longest_first(lengths):
        length = lengths[index]
        room = next((r for r in range(min(length, budget + 1), budget + 1) if by_room[r]), None)
        if room is None:
            rows.append([index])
            row, room = len(rows) - 1, max(budget, length)
        else:
            row = by_room[room].pop()
            rows[row].append(index)
        if room - length > 0:
            by_room[room - length].append(row)
    return rows


def padded_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in rows that, padded to their longest example, hold at most `budget` tokens."""
    rows: list[list[int]] = []
    for index in _longest_first(lengths):
        if rows and (len(rows[-1]) + 1) * lengths[rows[-1][0]] <= budget:
            rows[-1].append(index)
        else:
            rows.append([index])
    return rows


def cost(lengths: Sequence[int], padded: bool = False) -> int:
    """Tokens that the GPU works through for one row of examples with these lengths."""
    return max(lengths, default=0) * len(lengths) if padded else sum(lengths)


def spread(lengths: Sequence[int], rows: int, padded: bool = False) -> list[list[int]]:
    """Indices in exactly `rows` rows of nearly equal cost: longest first into the emptiest (padded: least budget)."""
    out: list[list[int]] = [[] for _ in range(rows)]
    if padded:
        low, high = 0, cost(lengths, padded)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(padded_fit(lengths, middle)) <= rows else (middle + 1, high)
        fitted = padded_fit(lengths, low)
        return [sorted(row) for row in fitted] + out[len(fitted) :]
    load = [0] * rows
    for index in _longest_first(lengths):
        row = min(range(rows), key=lambda r: (load[r], len(out[r]), r))
        out[row].append(index)
        load[row] += lengths[index]
    return [sorted(row) for row in out]


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
    """The epoch's examples in order, cut into optimizer steps: a function of its arguments, so resume repeats it."""
    order = list(range(count))
    if shuffle:
        random.Random(f"{seed}/{epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, count, batch_size)]


def heaviest(lengths: Sequence[int], batch_size: int, seed: int, epochs: int = 1, count: int = 24) -> list[list[int]]:
    """The optimizer steps with the most tokens in these epochs (of 50 at most): what a row budget has to hold."""
    batches = [b for e in range(max(1, min(epochs, 50))) for b in epoch_batches(len(lengths), batch_size, seed, e)]
    return sorted(batches, key=lambda b: -sum(lengths[i] for i in b))[:count]


def batch_rows(
    batch: list[int], lengths: Sequence[int], rows: int, budget: int | None = None, padded: bool = False
) -> list[list[int]]:
    """The batch in exactly `rows` rows: evenly, or best fit where even rows would break the budget."""
    local = [lengths[i] for i in batch]
    out = spread(local, rows, padded)
    if budget and not padded and max(sum(local[i] for i in row) for row in out) > budget:
        fitted = best_fit(local, budget)
        if len(fitted) <= rows:
            out = fitted + [[] for _ in range(rows - len(fitted))]
    return [[batch[i] for i in row] for row in out]


def plan_rows(
    lengths: Sequence[int],
    batch_size: int,
    budget: int,
    world_size: int = 1,
    seed: int = 0,
    epochs: int = 1,
    padded: bool = False,
) -> Layout:
    """The smallest accumulation whose rows stay within `budget` tokens in every step of every epoch.

    lengths: tokens of each example. Raises TunebookError when one example alone exceeds the budget.
    """
    if not len(lengths):
        raise TunebookError("There are no training examples to pack; check the data stage's counts.")
    if max(lengths) > budget:
        raise TunebookError(
            f"The longest example has {max(lengths)} tokens and a row holds {budget}; raise row_tokens or lower "
            "max_length."
        )
    batches = heaviest(lengths, batch_size, seed, epochs)
    fit = padded_fit if padded else best_fit
    accumulation = math.ceil(max(len(fit([lengths[i] for i in batch], budget)) for batch in batches) / world_size)
    rows = [row for b in batches for row in batch_rows(b, lengths, accumulation * world_size, budget, padded)]
    loads = [cost([lengths[i] for i in row], padded) for row in rows]
    return Layout(accumulation, max(loads), sum(loads) / len(loads))


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
