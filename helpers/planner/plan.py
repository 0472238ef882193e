"""Will it fit, how long will it take, and which setting is the fastest that fits: before anything is loaded.

The plan keeps what was asked for (method, effective batch, the longest row) and chooses what nobody should have to:
tokens of a micro-batch, accumulation, activation checkpointing and CPU offload, and the backend. One probing step on
the real GPU corrects it (`Plan.correct`), and the error is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from helpers import display
from helpers.errors import TunebookError
from helpers.model import packed_attention
from helpers.model.layer_kinds import Shape, shape_of
from helpers.model.loading import load_config, quantizer
from helpers.params import TrainingParams
from helpers.planner import cost_model, proposals, row_plan
from helpers.planner.cost_model import Card, DoesNotFit, Option, Setting, base_setting

ROWS = (512, 1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 98304, 131072, 196608, 262144)
UNSLOTH_ROW = 16384  # its rows are padded: longer ones only pad more
MEMORY_SPREAD = 0.07  # half-width of an estimate of the peak, as a share of it
ROOM = 0.85  # of the memory that `method auto` plans a 16-bit base with
FP8_MEASURED, FASTER = (9, 0), 1.1  # GPUs where `method auto` takes FP8, and from how much more speed on
PROBED_SPREAD = (0.03, 0.08)  # of memory and of time, once a probing step has measured them
HEAD = ["", "backend", "base", "row tokens", "accumulation", "activation checkpointing", "peak GiB", "tokens/s", "time"]


@dataclass(frozen=True, repr=False)
class Plan(display.Shown):
    """The chosen setting, its costs with error bars, the reasons, and what else was weighed."""

    card: Card
    shape: Shape
    option: Option
    batches: row_plan.Batches
    world_size: int
    steps: int
    tokens: int
    attention: str
    packed: bool
    backend: str
    reasons: tuple[str, ...]
    alternatives: tuple[Option, ...]
    learning_rate: float
    memory_scale: float = 1.0
    time_scale: float = 1.0
    measured: bool = False
    errors: dict[str, Any] = field(default_factory=dict)

    @property
    def shares(self) -> bool:
        """Whether what the examples of a row all begin with is held once."""
        return self.packed and self.attention == packed_attention.SDPA

    @property
    def setting(self) -> Setting:
        return self.option.setting

    @property
    def method(self) -> str:
        return self.setting.params.method

    @property
    def batch_size(self) -> int:
        return self.batches.size

    @property
    def accumulation(self) -> int:
        return self.option.accumulation

    @property
    def peak_gib(self) -> float:
        return self.option.peak_gib * self.memory_scale

    @property
    def tokens_per_s(self) -> float:
        return self.option.tokens_per_s / self.time_scale

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Training time: expected, shortest, longest."""
        expected = self.tokens / self.tokens_per_s
        spread = PROBED_SPREAD[1] if self.measured else self.option.spread
        return expected, expected * (1 - spread), expected * (1 + spread)

    def correct(self, peak_gib: float | None = None, tokens_per_s: float | None = None) -> Plan:
        """The plan after a probing step that allocated `peak_gib` at most and ran at `tokens_per_s`.

        Or after the whole run. Keeps the relative errors of the first estimate ((predicted − measured) / measured) in
        `.errors`.
        """
        errors, memory_scale, time_scale = dict(self.errors), self.memory_scale, self.time_scale
        if peak_gib:
            memory_scale = peak_gib / self.option.peak_gib
            errors["peak_gib"] = round(1 / memory_scale - 1, 4)
        if tokens_per_s:
            time_scale = self.option.tokens_per_s / tokens_per_s
            errors["tokens_per_s"] = round(time_scale - 1, 4)
        return replace(self, errors=errors, memory_scale=memory_scale, time_scale=time_scale, measured=True)

    def shortened(self, steps: int) -> Plan:
        """The plan for fewer (or more) optimizer steps of the same kind."""
        return replace(self, steps=steps, tokens=round(self.tokens * steps / self.steps))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        of_plan = ("method", "backend", "attention", "accumulation", "world_size", "batch_size", "steps", "errors")
        of_setting = ("row_tokens", "recompute", "offload", "tile_mlp", "quantize", "graphs")
        found = {name: getattr(self, name) for name in of_plan} | {"card": self.card.name, "probed": self.measured}
        found |= {name: getattr(self.setting, name) for name in of_setting} | {"reason": " ".join(self.reasons)}
        costs = {"peak_gib": round(self.peak_gib, 3), "tokens_per_s": round(self.tokens_per_s, 1)}
        return found | costs | {"seconds": [round(s, 1) for s in self.seconds], "learning_rate": self.learning_rate}

    def _row(self, option: Option) -> tuple[str, ...]:
        speed = option.tokens_per_s / self.time_scale
        state = "chosen" if option is self.option else "fits" if option.fits else "does not fit"
        base = {"nf4": "4-bit", "fp8": "8-bit"}.get(option.setting.quantize, "16-bit")
        rows = (f"{option.setting.row_tokens:,}", f"{option.accumulation}", option.recompute_text)
        costs = (f"{option.peak_gib * self.memory_scale:.1f}", f"{speed:,.0f}", display.duration(self.tokens / speed))
        return (state, option.setting.backend, base, *rows, *costs)

    def line(self, minutes: float = 0) -> str:
        """Before anything is loaded: what fits and about how long it takes. minutes: where max_minutes ends it."""
        ends = f", ended by max_minutes after {display.duration(60 * minutes)}" * (self.seconds[0] > 60 * minutes > 0)
        return (
            f"{self.method} fits on {self.card.name}: {self.peak_gib:.1f} of {self.card.total_gib:.1f} GiB, "
            f"{self.steps:,} steps in about {display.duration(self.seconds[0])}{ends}; predicted."
        )

    def headline(self) -> str:
        expected, shortest, longest = map(display.duration, self.seconds)
        spread = PROBED_SPREAD[0] if self.measured else MEMORY_SPREAD
        return (
            f"{self.card.name}: {self.tokens:,} tokens in {self.steps:,} steps of {self.batches}, {expected} "
            f"({shortest} to {longest}), {self.tokens_per_s:,.0f} tokens/s, peak {self.peak_gib:.1f} GiB "
            f"({self.peak_gib * (1 - spread):.1f} to {self.peak_gib * (1 + spread):.1f}) of {self.card.total_gib:.1f}, "
            f"{'measured by a probing step' if self.measured else 'predicted'}."
        )

    def _shown(self) -> display.Html:
        others = [option for option in self.alternatives if option.setting != self.setting]
        table = display.shown([self._row(option) for option in (self.option, *others)], HEAD)
        return display.said(self.headline(), *self.reasons) + table


def plan(
    params: TrainingParams,
    lengths: Sequence[int],
    source: Any,
    world_size: int = 1,
    card: Card | None = None,
    padded_lengths: Sequence[int] | None = None,
    sequence: int = 0,
    shape: Shape | None = None,
    advise: bool = True,
) -> Plan:
    """The fastest setting that fits the GPU, for these parameters and these training examples.

    lengths: tokens of each example (orpo: both answers with their prompts). padded_lengths: the same where rows are
    padded, default `lengths`. source: a ModelSource, a model folder, or a transformers config. card: default `plan_for`
    or the GPU here. sequence: tokens of a packed sequence, for batch_unit; default the longest example. shape: the
    model's, where it is known. Raises DoesNotFit when nothing fits, with the change that would where `advise` asks.
    """
    if not len(lengths):
        raise TunebookError("There are no training examples to plan for; check the data stage's counts.")
    config, chosen = load_config(source), ""
    if (packed := quantizer(config)) and params.method in ("lora", "auto"):  # the base is loaded as it is
        chosen = f"Method auto: qlora, the base holds only {packed} weights." if params.method == "auto" else ""
        params = replace(params, method="qlora")
    card = card or (cost_model.card_named(params.plan_for) if params.plan_for else cost_model.card_here())
    kernel = packed_attention.choose(card.capability, config, "float32" if params.precision == "fp32" else "auto")
    backend, why = proposals.choose_backend(params.backend, card, config.get_text_config().model_type, params.as_dict())
    in_one = kernel.packed and params.packing and backend == "hf"
    base = base_setting(params, card, world_size, backend, kernel.name == packed_attention.FLASH, not in_one)
    shape = shape or shape_of(source)
    in_rows = lengths if in_one else padded_lengths or lengths
    batches = row_plan.batches_of(params, world_size, sequence or max(in_rows), params.group_by_length and not in_one)
    search = Search(params, shape, card, world_size, tuple(in_rows), sum(lengths), base, batches)
    search, chosen = search.by_room() if params.method == "auto" else (search, chosen)
    options = list(search.options())
    if (best := search.best(options)) is None and (shared := search.shared()):
        why, search = f"{why} The 4-bit base is sharded: no GPU has room for all of the job's.", shared
        best = search.best(options := list(search.options()))
    params = search.params
    if best is None:
        raise DoesNotFit(refusal(search, options) if advise else "", min(o.need_gib for o in options))
    steps = params.max_steps or math.ceil(search.steps.per_epoch * params.epochs)
    tokens = round(sum(lengths) * steps / search.steps.per_epoch)
    graphs = search.weigh(replace(best.setting, graphs=True), search.layout(best.setting.row_tokens))
    best, said = proposals.graphed(params.cuda_graphs, shape, card, best, graphs, tokens)
    attention = f"Attention {kernel.name}: {kernel.reason}."
    reasons = [*filter(None, [chosen, why, *shape.said(best.setting.quantize == "nf4"), attention, said])]
    if best.setting.recompute:
        lightest = min(options, key=lambda o: (o.setting.recompute, o.setting.row_tokens))
        need = f"without it the job would need {lightest.need_gib:.1f} GiB of {card.total_gib:.1f}"
        why = "longer rows fit" if lightest.fits else need
        reasons.append(f"Activation checkpointing: {best.recompute_text}; {why}.")
    if params.group_by_length and in_one:
        reasons.append("group_by_length changes nothing: packed rows hold no padding that it could save.")
    if fill := search.steps.fill:
        lost = f"packed sequences are {display.percent(fill)} full; {display.percent(1 - fill)} of their room is lost"
        reasons.append(f"The {lost} (up to {row_plan.WINDOW:,} examples are fitted together).")
    rate, told = proposals.used(params, shape.parameters)
    reasons.append(told)
    if params.method in ("qlora", "lora"):
        reasons.append(proposals.capacity(cost_model.trained_parameters(shape, best.setting), sum(lengths)))
    rest = tuple(reasons), search.alternatives(options, best), rate
    return Plan(card, shape, best, batches, world_size, steps, tokens, kernel.name, in_one, backend, *rest)


@dataclass(frozen=True)
class Search:
    """The options for one job. lengths: tokens of each example in its row, padding too; tokens: of all, without."""

    params: TrainingParams
    shape: Shape
    card: Card
    world: int
    lengths: tuple[int, ...]
    tokens: int
    base: Setting
    batches: row_plan.Batches
    room: float = 1.0  # of the memory that an option may need

    def with_params(self, **change: Any) -> Search:
        return replace(self, params=(p := replace(self.params, **change)), base=replace(self.base, params=p))

    def shared(self) -> Search | None:
        """With a 4-bit base sharded over the GPUs, which would be whole in each; None where there is none such."""
        whole = self.params.method == "qlora" and not self.base.sharded
        return self.with_params(shard_weights=True) if whole and self.world > 1 and self.base.backend == "hf" else None

    def by_room(self) -> tuple[Search, str]:
        """(method auto as LoRA on FP8 where that was measured and is faster, else on 16 bits, where they fit with room,
        else on 4; why, and what the others would cost)."""
        if (p := self.params).init != "default":
            method = "lora" if p.init == "pissa" else "qlora"
            return self.with_params(method=method), f"Method auto: {method}, which init {p.init!r} needs."
        four, sixteen = self.with_params(method="qlora"), replace(self.with_params(method="lora"), room=ROOM)
        big, eight = sixteen._in_room(), sixteen.with_params(quantize="fp8")
        card, bits = f"{display.percent(ROOM, 0)} of {self.card.total_gib:.1f} GiB", 8 * self.base.number_bytes
        able, loss = self.takes_fp8, proposals.EIGHT_BITS
        measured = able and (self.card.capability or (0, 0)) >= FP8_MEASURED
        small = eight._in_room() if measured else None
        if small and small.tokens_per_s > (FASTER * big.tokens_per_s if big else 0):
            why, one = f"lora, on a base in FP8: it needs {small.need_gib:.1f} GiB, under {card}, {loss}", eight
            why += f" (16 bits, by quantize 'none': {sixteen._beside(small)}; QLoRA: {four._beside(small)})"
        elif big is None:
            least = min(o.need_gib for o in sixteen.options())
            why, one = f"qlora, on a 4-bit base: LoRA on {bits} bits needs {least:.1f} GiB, over {card}", four
        else:
            why, one = f"lora, on the {bits}-bit base: it needs {big.need_gib:.1f} GiB, under {card}", sixteen
            why += f" (QLoRA: {four._beside(big)})" + f"; quantize 'fp8': {eight._beside(big)}, {loss}" * able
        return one, f"Method auto: {why}. {proposals.four_bits(self.shape.parameters)}"

    @property
    def takes_fp8(self) -> bool:
        """Whether the GPU has products of a base in FP8 and nothing forbids them; experts stay in 16 bits."""
        p = self.params
        able = p.quantize == "auto" and p.precision in ("auto", "bf16") and self.base.backend == "hf"
        able &= not (p.dora or p.shard_weights or p.cpu_offload or self.shape.experts)
        return able and (self.card.capability or (0, 0)) >= cost_model.FP8_SINCE

    def _in_room(self) -> Option | None:
        return self.best(o for o in self.options() if self.params.recompute == "offload" or not o.setting.offload)

    def _beside(self, option: Option) -> str:
        o = self.weigh(replace(option.setting, params=self.params), self.layout(option.setting.row_tokens))
        return f"{o.need_gib:.1f} GiB, {option.tokens_per_s / o.tokens_per_s:.1f} times as long"

    def best(self, options: Iterable[Option]) -> Option | None:
        """Of the fastest options that fit the one with the lowest peak."""
        fitting = [o for o in options if o.fits]
        fastest = max((o.tokens_per_s for o in fitting), default=0.0)
        return min((o for o in fitting if o.tokens_per_s >= 0.995 * fastest), key=lambda o: o.peak_gib, default=None)

    @cached_property
    def steps(self) -> row_plan.Steps:
        p = self.params
        return row_plan.steps_of(self.lengths, self.batches, p.seed, p.max_steps, math.ceil(p.epochs))

    @cached_property
    def mean_square(self) -> float:
        return sum(n * n for n in self.lengths) / sum(self.lengths)

    def options(self) -> Iterator[Option]:
        """Every row size and grade of activation checkpointing worth weighing."""
        longest = max(self.lengths)
        # Whole steps in one row a process: longer ones are of no use.
        useful = self.layout(longest * max(map(len, self.steps.heaviest))).max_row_tokens
        sizes = sorted({longest, useful, *(r for r in ROWS if longest < r < useful)})
        if self.params.row_tokens:
            if self.params.row_tokens < longest:
                raise TunebookError(
                    f"row_tokens is {self.params.row_tokens} and the longest training row has {longest} tokens; raise "
                    "row_tokens or lower max_length in notebook 01."
                )
            sizes = [self.params.row_tokens]
        elif self.batches.accumulation:
            sizes = [useful]
        elif self.base.backend == "unsloth":
            sizes = [r for r in sizes if r <= max(longest, UNSLOTH_ROW)]
        count = self.shape.layers
        known = cost_model.grades_of(count)
        named = {"none": known[:1], "half": [(count // 2, False, 0)], "all": known[4:5], "offload": known[5:]}
        grades = [(count, True, 0)] if self.base.backend == "unsloth" else named.get(self.params.recompute, known)
        for size in sizes:
            layout = self.layout(size)
            for layers, offload, tile in grades:
                if not tile or tile < size:
                    setting = replace(self.base, row_tokens=size, recompute=layers, offload=offload, tile_mlp=tile)
                    yield self.weigh(setting, layout)

    def layout(self, row_tokens: int) -> row_plan.Layout:
        return self.steps.layout(row_tokens, self.world, self.base.padded)

    def weigh(self, s: Setting, layout: row_plan.Layout) -> Option:
        """What a setting would need and take, its rows laid out like this."""
        lengths, rows = self.lengths, layout.accumulation
        examples = self.batches.size if self.batches.unit == "rows" else len(lengths) / self.steps.per_epoch
        step_tokens = self.tokens / len(lengths) * min(examples, len(lengths))
        mean_row = layout.mean_row_tokens if s.padded else step_tokens / self.world / rows
        row = replace(s, row_tokens=max(1, round(mean_row)))
        seconds, launching = cost_model.row_seconds(self.shape, row, self.card, self.mean_square)
        seconds = rows * seconds + cost_model.update_seconds(self.shape, s, self.card, rows)
        seconds *= cost_model.SHARDED_TIME if s.sharded else 1.02 if self.world > 1 else 1
        padded = round(layout.max_row_tokens * (1 + cost_model.GRAPH_PADDING * s.graphs))
        longest = replace(s, row_tokens=padded, accumulates=rows > 1)
        peak, offloaded = cost_model.peak_gib(self.shape, longest), cost_model.offloaded_gib(self.shape, longest)
        slack, context = cost_model.FRAGMENTATION, cost_model.CONTEXT_GIB  # on top of what a GPU's job allocates
        slack += MEMORY_SPREAD * (s.sharded and self.params.method in ("full", "freeze"))  # long rows: not measured
        need = peak * 1.1 if self.card.capability is None else peak * (1 + slack) + context
        fits = cost_model.offload_fits(self.shape, longest, self.card, self.world)
        fits &= need <= self.room * self.card.total_gib
        spread = cost_model.LAUNCH_SPREAD if launching else self.card.spread
        return Option(s, rows, peak, need, step_tokens / seconds, fits, spread, offloaded)

    def alternatives(self, options: list[Option], best: Option) -> tuple[Option, ...]:
        """What a person would ask about: the fastest per grade of activation checkpointing, the other base."""
        chosen: dict[Any, Option] = {}
        for option in sorted(options, key=lambda o: (o.fits, o.tokens_per_s, -o.setting.row_tokens)):
            chosen[option.setting.recompute, option.setting.offload, option.setting.tile_mlp] = option
        s = best.setting
        if other := {"qlora": "lora", "lora": "qlora"}.get(self.params.method):
            setting = replace(s, params=replace(self.params, method=other, quantize="auto"))
            chosen["base"] = self.weigh(setting, self.layout(s.row_tokens))
        if s.quantize == "fp8":
            setting = replace(s, params=replace(self.params, quantize="none"))
            chosen["16 bits"] = self.weigh(setting, self.layout(s.row_tokens))
        return tuple(sorted(chosen.values(), key=lambda o: (not o.fits, -o.tokens_per_s)))


def refusal(search: Search, options: list[Option]) -> str:
    """What does not fit and what would: offload, 4 bits, 8-bit optimizer, shorter rows, more GPUs."""
    lengths, card, params, shape = search.lengths, search.card, search.params, search.shape
    smallest, size = min(options, key=lambda o: o.need_gib), f"{shape.parameters / 1e9:.2f} billion"
    what = f"{shape.name} ({size}, method {params.method}, longest row {max(lengths)} tokens) needs "
    what += f"{smallest.need_gib:.1f} GiB and {card.name} has {card.total_gib:.1f}"
    if smallest.need_gib <= card.total_gib:
        host = smallest.offloaded_gib + cost_model.HOST_GIB
        what += f", which is enough, but offloaded layer inputs also take {host:.1f} GiB of host memory a process, "
        what += f"and there are {card.host_gib:.1f}"

    def fits(lengths: Sequence[int] = lengths, world: int = search.world, /, **change: Any) -> bool:
        other = search.with_params(recompute="auto", row_tokens=0, **change)
        base = replace(other.base, shards=world)
        other = replace(other, lengths=tuple(lengths), tokens=sum(lengths), world=world, base=base)
        return any(option.fits for way in (other, other.shared()) if way for option in way.options())

    if fits():
        return f"{what}; set recompute to auto and row_tokens to 0, which fits."
    changes: list[tuple[str, Any]] = [("cpu_offload", True)] * (apart := search.base.sharded)
    changes += [("method", "qlora")] * (params.method != "qlora") + [("optimizer", "adamw_8bit")] * (not apart)
    more = next((n for n in (2, 4, 8, 16) if n > search.world and fits(lengths, n)), 0)
    share = f"{more} such GPUs, each with its share: tunebook train --gpus {more}" * bool(more)
    for name, value in changes:
        if fits(**{name: value}):
            return f"{what}; set {name} to {value}, which fits{f' (or {share})' * bool(more)}."
    low, high = 0, max(lengths)
    while high - low > 16:
        middle = (low + high) // 2
        low, high = (middle, high) if fits([min(n, middle) for n in lengths]) else (low, middle)
    if low >= 64:
        most, pairs = low // 16 * 16, params.stage == "orpo"
        where = "max_length to half of that, for a pair is two answers" if pairs else "max_length in notebook 01"
        return f"{what}; rows of at most {most} tokens fit: lower {where}{f' (or take {share})' * bool(more)}."
    larger = [card for card in cost_model.CARDS.values() if card.total_gib >= smallest.need_gib]
    names = [c.name for c in larger if cost_model.offload_fits(shape, smallest.setting, c, search.world)]
    remedy = f"GPU with more memory ({', '.join(names)})" if names else "smaller model or several GPUs"
    return f"{what}; use a {remedy}{f', or {share}' * bool(more)}."
