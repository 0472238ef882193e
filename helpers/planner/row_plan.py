"""Which examples share a row: best-fit packing that leaves the optimizer's batch exactly as asked.

One optimizer step sees exactly the examples that `Batches` gives it, in the seeded order of the epoch. They are spread
over `accumulation × world_size` rows of nearly equal token count, none longer than the budget unless one example is:

    an epoch    [ 7 2 9 4 | 1 8 3 6 | 5 0 ]            batches of 4 examples
    its rows    (7) (2 9 4)  (1 8) (3 6)  (5) (0)      accumulation × world_size = 2 rows a step

With the loss divided by the step's trained tokens, any packing, accumulation or number of GPUs gives the same gradient.
Where rows are padded instead of packed (`padded`), a row costs its longest example times their number, and examples of
similar length go together.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.errors import TunebookError

WINDOW = 10_000  # examples fitted into sequences together: within 0.3 % as full as all, in a time that grows as they do


@dataclass(frozen=True)
class Layout:
    """How an epoch is cut: rows that one process works through per optimizer step, and how full they are."""

    accumulation: int
    max_row_tokens: int
    mean_row_tokens: float


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: indices of `lengths` in as few rows of at most `budget` tokens as it finds.

    An example longer than the budget gets a row of its own.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted
    for index in _longest_first(lengths):
        length = lengths[index]
        place = bisect.bisect(free, (length, -1))
        if place == len(free):
            rows.append([])
            free.append((max(budget, length), len(rows) - 1))
        room, row = free.pop(place)
        rows[row].append(index)
        if room > length:
            bisect.insort(free, (room - length, row))
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
    if rows == 1:
        return [list(range(len(lengths)))]
    out: list[list[int]] = [[] for _ in range(rows)]
    if padded:
        budgets = range(cost(lengths, padded))
        least = bisect.bisect(budgets, False, key=lambda budget: len(padded_fit(lengths, budget)) <= rows)
        fitted = padded_fit(lengths, least)
        return [sorted(row) for row in fitted] + out[len(fitted) :]
    emptiest = [(0, 0, row) for row in range(rows)]
    for index in _longest_first(lengths):
        load, count, row = emptiest[0]
        out[row].append(index)
        heapq.heapreplace(emptiest, (load + lengths[index], count + 1, row))
    return [sorted(row) for row in out]


@dataclass(frozen=True)
class Batches:
    """How an epoch is cut into optimizer steps, on all GPUs together.

    size: examples a step (unit "rows"), packed sequences of at most `sequence` tokens ("packed"), or tokens ("tokens").
    accumulation: micro-batches of a process; 0: as many as the row budget asks for. by_length: examples of similar
    length share a step.
    """

    size: int
    unit: str = "rows"
    sequence: int = 0
    accumulation: int = 0
    by_length: bool = False

    def epoch(self, lengths: Sequence[int], seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
        """The epoch's examples as steps: a function of its arguments, so resume repeats it. Every epoch has as many."""
        order, draw = list(range(len(lengths))), random.Random(f"{seed}/{epoch}")
        if shuffle:
            draw.shuffle(order)
        if self.by_length:
            window = 50 * self.size
            windows = (order[i : i + window] for i in range(0, len(order), window))
            order = [i for part in windows for i in sorted(part, key=lambda i: -lengths[i])]
        if self.unit == "rows":
            steps = [order[n : n + self.size] for n in range(0, len(order), self.size)]
        else:
            sequence, count = (self.sequence, self.size) if self.unit == "packed" else (self.size, 1)
            windows = (order[i : i + WINDOW] for i in range(0, len(order), WINDOW))
            parts = [[w[i] for i in row] for w in windows for row in best_fit([lengths[i] for i in w], sequence)]
            draw.shuffle(parts)
            steps = [[i for part in parts[n : n + count] for i in part] for n in range(0, len(parts), count)]
        if self.by_length and shuffle:
            draw.shuffle(steps)
        return steps

    def __str__(self) -> str:
        what = {"rows": "rows", "packed": f"packed rows of up to {self.sequence:,} tokens", "tokens": "tokens at most"}
        return f"{self.size:,} {what[self.unit]}"


def batches_of(params: Any, world: int, sequence: int = 0, by_length: bool = False) -> Batches:
    """What a stage's parameters ask for. sequence: tokens of a packed sequence (max_length of the data).

    Raises TunebookError where batch_size, micro_batch, accumulation and the number of GPUs contradict each other.
    """
    size, micro, times = params.batch_size, params.micro_batch, params.accumulation
    gpus = f"{world} GPU" + "s" * (world > 1)
    if micro and times:
        if "batch_size" in params.changed() and size != micro * times * world:
            raise TunebookError(
                f"batch_size is {size}, and micro_batch {micro} × accumulation {times} × {gpus} is "
                f"{micro * times * world}; make them agree, or leave one of them out."
            )
        size = micro * times * world
    elif size % ((micro or times or 1) * world) and (micro or times):
        name = "micro_batch" if micro else "accumulation"
        raise TunebookError(
            f"batch_size is {size}, which is no multiple of {name} {micro or times} × {gpus}; change one of them."
        )
    if micro:
        times = size // (micro * world)
    return Batches(size, params.batch_unit, sequence, times, by_length)


def heaviest(lengths: Sequence[int], epochs: Iterable[list[list[int]]], count: int = 24) -> list[list[int]]:
    """The optimizer steps with the most tokens in these epochs: what a row budget has to hold."""
    return heapq.nlargest(count, (b for steps in epochs for b in steps), key=lambda b: sum(lengths[i] for i in b))


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


def lay_out(
    lengths: Sequence[int],
    batches: list[list[int]],
    budget: int,
    world: int,
    padded: bool = False,
    accumulation: int = 0,
) -> Layout:
    """The smallest accumulation whose rows stay within `budget` tokens in each of these optimizer steps, or the given.

    lengths: tokens of each example, none over the budget. batches: the `heaviest` steps. world: processes.
    """
    fit = padded_fit if padded else best_fit
    if not accumulation:
        accumulation = math.ceil(max(len(fit([lengths[i] for i in batch], budget)) for batch in batches) / world)
    rows = [row for b in batches for row in batch_rows(b, lengths, accumulation * world, budget, padded)]
    loads = [cost([lengths[i] for i in row], padded) for row in rows]
    return Layout(accumulation, max(max(loads), max(lengths)), sum(loads) / len(loads))


class Steps:
    """The optimizer steps of a whole job, as far as they depend on neither GPU nor model: each answer is found once."""

    def __init__(self, lengths: tuple[int, ...], batches: Batches, seed: int, max_steps: int, epochs: int) -> None:
        first = batches.epoch(lengths, seed, 0)
        self.per_epoch = len(first)
        room = {"packed": batches.size * batches.sequence, "tokens": batches.size}.get(batches.unit, 0)
        self.fill = sum(lengths) / (room * self.per_epoch) if room else 0.0  # at least: the last step may have fewer
        whole = math.ceil(max_steps / self.per_epoch if max_steps else epochs)
        later = (batches.epoch(lengths, seed, epoch) for epoch in range(1, min(whole, 50)))
        self.heaviest = heaviest(lengths, itertools.chain([first], later))
        # (row tokens, processes, whether rows are padded) -> Layout
        laid_out = functools.partial(lay_out, lengths, self.heaviest, accumulation=batches.accumulation)
        self.layout: Callable[[int, int, bool], Layout] = functools.lru_cache(None)(laid_out)


steps_of = functools.lru_cache(32)(Steps)  # a slider that leaves the rows alone asks for the same


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
