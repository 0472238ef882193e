"""Will it fit, how long will it take, and which setting is the fastest that fits: before anything is loaded.

The plan keeps what was asked for (method, effective batch, the longest row) and chooses what nobody should have to:
tokens of a micro-batch, accumulation, activation checkpointing and CPU offload, and the backend. One probing step on
the real GPU corrects it (`Plan.correct`), and the error is kept.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from helpers.errors import TunebookError
from helpers.model import packed_attention
from helpers.model.loading import fast_bf16, load_config
from helpers.params import TrainingParams
from helpers.planner import cost_model, row_plan
from helpers.planner.cost_model import Setting, Shape
from helpers.planner.estimates import Option, Plan

ROWS = (512, 1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 98304, 131072, 196608, 262144)
TILE = 8192  # tokens of the MLP at a time once it is cut: long enough to fill the GPU
UNSLOTH_ROW = 16384  # its rows are padded: longer ones only pad more
UNSLOTH_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere", "phi3")


def choose_backend(asked: str, card: cost_model.Card, model_type: str, params: Mapping[str, Any]) -> tuple[str, str]:
    """("hf" or "unsloth", why). auto: hf wherever its kernels run, Unsloth on older GPUs when it is installed."""
    method, loss = params.get("method", "qlora"), params.get("loss", "sft")
    cannot = ""
    if card.capability is None:
        cannot = "Unsloth needs a GPU"
    elif method not in ("qlora", "lora"):
        cannot = f"method {method} is not offered through Unsloth here"
    elif loss not in ("sft", "orpo"):
        cannot = f"loss {loss} is not offered through Unsloth here"
    elif model_type not in UNSLOTH_MODELS:
        cannot = f"Unsloth has no kernels for {model_type}"
    elif params.get("dora") or params.get("init", "default") != "default":
        cannot = "DoRA, PiSSA and LoftQ are not offered through Unsloth here"
    elif params.get("precision") == "fp32":
        cannot = "Unsloth computes in 16 bits and precision is fp32"
    elif importlib.util.find_spec("unsloth") is None:
        cannot = "Unsloth is not installed"
    if asked == "unsloth" and cannot:
        raise TunebookError(f"backend is unsloth, but {cannot}; set backend to auto or hf.")
    if asked in ("hf", "unsloth"):
        return asked, f"Backend {asked}, as asked."
    if card.capability is not None and card.capability >= (8, 0):
        return "hf", "Backend hf: packed rows through variable-length FlashAttention are the fastest on this GPU."
    if cannot:
        return "hf", f"Backend hf: {cannot}."
    why = "this GPU has no variable-length FlashAttention, and Unsloth's kernels run on it"
    return "unsloth", f"Backend unsloth: {why}."


def plan(
    params: TrainingParams,
    lengths: Sequence[int],
    source: Any,
    world_size: int = 1,
    card: cost_model.Card | None = None,
    padded_lengths: Sequence[int] | None = None,
) -> Plan:
    """The fastest setting that fits the GPU, for these parameters and these training examples.

    lengths: tokens of each example (orpo: both answers with their prompts). padded_lengths: the same where rows are
    padded, default `lengths`. source: a ModelSource, a model folder, or a transformers config. card: default `plan_for`
    or the GPU here. Raises TunebookError when nothing fits, with the change that would.
    """
    if not len(lengths):
        raise TunebookError("There are no training examples to plan for; check the data stage's counts.")
    config = load_config(source)
    card = card or (cost_model.card_named(params.plan_for) if params.plan_for else cost_model.card_here())
    kernel = packed_attention.choose(card.capability, config, "float32" if params.precision == "fp32" else "auto")
    backend, why = choose_backend(params.backend, card, config.get_text_config().model_type, params.as_dict())
    packed = kernel.packed and params.packing and backend == "hf"
    base = _base(params, card, world_size, backend, flash=kernel.name == packed_attention.FLASH, padded=not packed)
    shape = cost_model.shape_of(config)
    search = _Search(params, shape, card, world_size, tuple(lengths), tuple(padded_lengths or lengths), base)
    options = [search.weigh(setting) for setting in search.settings()]
    fitting = [o for o in options if o.fits]
    if not fitting:
        raise TunebookError(search.refusal(options))
    fastest = max(o.tokens_per_s for o in fitting)
    best = min((o for o in fitting if o.tokens_per_s >= 0.995 * fastest), key=lambda o: o.peak_gib)
    reasons = [why, f"Attention {kernel.name}: {kernel.reason}."]
    if best.setting.recompute:
        lightest = min(options, key=lambda o: (o.setting.recompute, o.setting.row_tokens))
        need = f"without it the job would need {lightest.need_gib:.1f} GiB of {card.total_gib:.1f}"
        reasons.append(
            f"Activation checkpointing: {best.recompute_text}; {'longer rows fit' if lightest.fits else need}."
        )
    per_epoch = math.ceil(len(lengths) / params.batch_size)
    steps = params.max_steps or math.ceil(per_epoch * params.epochs)
    return Plan(
        card=card,
        shape=shape,
        option=search.laid_out(best),
        batch_size=params.batch_size,
        world_size=world_size,
        steps=steps,
        tokens=round(sum(lengths) * steps / per_epoch),
        attention=kernel.name,
        packed=packed,
        backend=backend,
        reasons=tuple(reasons),
        alternatives=search.alternatives(options, best),
    )


def _base(
    params: TrainingParams, card: cost_model.Card, world: int, backend: str, flash: bool, padded: bool
) -> Setting:
    """The setting that every option varies in row tokens and activation checkpointing."""
    cpu, qlora = card.capability is None, params.method == "qlora"
    wide = params.precision == "fp32" or (cpu and params.precision != "bf16" and not fast_bf16())
    answers_only = params.stage == "sft" and getattr(params, "train_on", "all") == "completion"
    return Setting(
        row_tokens=0,
        quantize="nf4" if qlora else "none",
        method=params.method,
        rank=params.rank,
        targets=params.target_modules,
        optimizer=params.optimizer,
        stage=params.stage,
        backend=backend,
        flash=flash,
        padded=padded,
        fused=not (params.dropout or params.dora),
        trained_layers=getattr(params, "freeze_layers", 0),
        shards=1 if qlora else world,
        trained_share=0.6 if answers_only else 1.0,
        number_bytes=4 if wide else 2,
        process_gib=cost_model.PROCESS_GIB + cost_model.ONEDNN_GIB * (not wide) if cpu else 0.0,
    )


def grades_of(layers: int) -> list[tuple[int, bool, int]]:
    """(layers checkpointed, inputs offloaded to host memory, tokens of the MLP at a time), cheapest in time first."""
    return [*((layers * part // 4, False, 0) for part in range(5)), (layers, True, 0), (layers, True, TILE)]


def offload_fits(shape: Shape, s: Setting, card: cost_model.Card, world: int = 1) -> bool:
    """Whether host memory has room for the offloaded layer inputs of every process on the machine."""
    need = world * (cost_model.offloaded_gib(shape, s) + cost_model.HOST_GIB)
    return not s.offload or not card.host_gib or need <= card.host_gib


@dataclass(frozen=True)
class _Search:
    """The options for one job. tokens, padded: of each training example, for pairs of both answers with their prompts,
    without and with the shorter one padded to the longer."""

    params: TrainingParams
    shape: Shape
    card: cost_model.Card
    world: int
    tokens: tuple[int, ...]
    padded: tuple[int, ...]
    base: Setting

    def lengths(self, s: Setting) -> tuple[int, ...]:
        return self.padded if s.padded else self.tokens

    @property
    def epochs(self) -> int:
        """Passes over the examples that the run at least begins."""
        per_epoch = math.ceil(len(self.tokens) / self.params.batch_size)
        return math.ceil(self.params.max_steps / per_epoch if self.params.max_steps else self.params.epochs)

    def heaviest(self, s: Setting) -> int:
        """Tokens of the optimizer step that has the most."""
        return _heaviest_step(self.lengths(s), self.params.batch_size, self.params.seed, self.epochs)

    def settings(self) -> Iterator[Setting]:
        """Every row size and grade of activation checkpointing worth weighing."""
        longest = max(self.lengths(self.base))
        useful = max(longest, math.ceil(self.heaviest(self.base) / self.world))
        sizes = sorted({longest, useful, *(r for r in ROWS if longest < r < useful)})
        if self.params.row_tokens:
            if self.params.row_tokens < longest:
                raise TunebookError(
                    f"row_tokens is {self.params.row_tokens} and the longest training row has {longest} tokens; raise "
                    "row_tokens or lower max_length in notebook 01."
                )
            sizes = [self.params.row_tokens]
        elif not self.params.packing:
            sizes = sizes[:1]
        elif self.base.backend == "unsloth":
            sizes = [r for r in sizes if r <= max(longest, UNSLOTH_ROW)]
        count = self.shape.layers
        grades = {
            "none": [(0, False, 0)],
            "half": [(count // 2, False, 0)],
            "all": [(count, False, 0)],
            "offload": [(count, True, 0), (count, True, TILE)],
            "auto": grades_of(count),
        }[self.params.recompute]
        if self.base.backend == "unsloth":
            grades = [(count, True, 0)]
        for size in sizes:
            for layers, offload, tile in grades:
                if not tile or tile < size:
                    yield replace(self.base, row_tokens=size, recompute=layers, offload=offload, tile_mlp=tile)

    def layout(self, s: Setting) -> row_plan.Layout:
        size, seed = self.params.batch_size, self.params.seed
        return row_plan.plan_rows(self.lengths(s), size, s.row_tokens, self.world, seed, self.epochs, s.padded)

    def need(self, peak_gib: float) -> float:
        return peak_gib * 1.1 if self.card.capability is None else cost_model.need_gib(peak_gib)

    def weigh(self, s: Setting) -> Option:
        """What a setting would need and take."""
        lengths = self.lengths(s)
        step_tokens = sum(self.tokens) / len(lengths) * min(self.params.batch_size, len(lengths))
        if s.padded:
            layout = self.layout(s)
            rows, mean_row = layout.accumulation, layout.mean_row_tokens
        else:
            rows = max(1, math.ceil(self.heaviest(s) / s.row_tokens / self.world))
            mean_row = step_tokens / self.world / rows
        s = replace(s, accumulates=rows > 1 or s.accumulates)
        square = sum(n * n for n in lengths) / sum(lengths)
        row = replace(s, row_tokens=max(1, round(mean_row)))
        work, launch = cost_model.row_work(self.shape, row, self.card, square)
        seconds = rows * cost_model.row_seconds(self.shape, row, self.card, square)
        # The optimizer reads and writes its state.
        seconds += cost_model.trained_parameters(self.shape, s) * 30 / (self.card.gb_s * 1e9)
        if self.world > 1:
            seconds *= 1.02
        peak = cost_model.peak_gib(self.shape, s)
        need = self.need(peak)
        fits = need <= self.card.total_gib and offload_fits(self.shape, s, self.card, self.world)
        spread = cost_model.LAUNCH_SPREAD if launch > 0.8 * work else self.card.spread
        offloaded = cost_model.offloaded_gib(self.shape, s)
        return Option(s, rows, peak, need, step_tokens / seconds, fits, spread, offloaded)

    def laid_out(self, option: Option) -> Option:
        """The option with the accumulation that its rows really need, and the peak of the longest row there will be."""
        layout = self.layout(option.setting)
        longest = replace(option.setting, row_tokens=layout.max_row_tokens, accumulates=layout.accumulation > 1)
        peak = cost_model.peak_gib(self.shape, longest)
        return replace(option, accumulation=layout.accumulation, peak_gib=peak, need_gib=self.need(peak))

    def alternatives(self, options: list[Option], best: Option) -> tuple[Option, ...]:
        """What a person would ask about: the fastest per grade of activation checkpointing, the base in the other
        precision, and Unsloth."""
        chosen: dict[Any, Option] = {}
        for option in options:
            key = (option.setting.recompute, option.setting.offload, option.setting.tile_mlp)
            held = chosen.setdefault(key, option)
            if (option.fits, option.tokens_per_s) > (held.fits, held.tokens_per_s):
                chosen[key] = option
        s = best.setting
        if s.method in ("qlora", "lora"):
            other = ("lora", "none") if s.quantize == "nf4" else ("qlora", "nf4")
            shards = s.shards if other[0] == "lora" else 1
            chosen["base"] = self.weigh(replace(s, method=other[0], quantize=other[1], shards=shards))
            if s.backend == "hf" and self.card.capability is not None:
                row = max(max(self.padded), min(s.row_tokens, UNSLOTH_ROW))
                unsloth = replace(s, backend="unsloth", row_tokens=row, padded=True, offload=True, tile_mlp=0)
                chosen["unsloth"] = self.weigh(replace(unsloth, recompute=self.shape.layers))
        return tuple(sorted(chosen.values(), key=lambda o: (not o.fits, -o.tokens_per_s)))

    def refusal(self, options: list[Option]) -> str:
        """What does not fit and the smallest change that would: 4 bits, 8-bit optimizer, shorter rows, larger GPU."""
        lengths, card = self.lengths(self.base), self.card
        smallest = min(options, key=lambda o: o.need_gib)
        what = (
            f"{self.shape.name or 'The model'} ({self.shape.parameters / 1e9:.2f} billion, method {self.base.method}, "
            f"longest row {max(lengths)} tokens) needs {smallest.need_gib:.1f} GiB and {card.name} has "
            f"{card.total_gib:.1f}"
        )
        if smallest.need_gib <= card.total_gib:
            host = smallest.offloaded_gib + cost_model.HOST_GIB
            what += (
                f", which is enough, but also {host:.1f} GiB of host memory a process for offloaded layer inputs, and "
                f"there are {card.host_gib:.1f}"
            )

        def fits(lengths: Sequence[int] = lengths, **change: Any) -> bool:
            params = replace(self.params, recompute="auto", row_tokens=0, **change)
            base = self.base
            base = _base(params, card, self.world, base.backend, base.flash, base.padded)
            search = replace(self, params=params, base=base, tokens=tuple(lengths), padded=tuple(lengths))
            return any(search.weigh(setting).fits for setting in search.settings())

        if fits():
            return f"{what}; set recompute to auto and row_tokens to 0, which fits."
        if self.base.method != "qlora" and fits(method="qlora"):
            return f"{what}; set method to qlora, which fits."
        if self.base.optimizer in ("adamw", "lion") and fits(optimizer="adamw_8bit"):
            return f"{what}; set optimizer to adamw_8bit, which fits."
        low, high = 0, max(lengths)
        while high - low > 16:
            middle = (low + high) // 2
            low, high = (middle, high) if fits([min(n, middle) for n in lengths]) else (low, middle)
        if low >= 64:
            return f"{what}; rows of at most {low // 16 * 16} tokens fit: lower max_length in notebook 01."
        setting = smallest.setting
        larger = [known for known in cost_model.CARDS.values() if known.total_gib >= smallest.need_gib]
        larger = [known for known in larger if offload_fits(self.shape, setting, known, self.world)]
        if not larger:
            return f"{what}; use a smaller model or several GPUs."
        names = ", ".join(known.name for known in sorted(larger, key=lambda known: known.total_gib))
        return f"{what}; use a GPU with more memory ({names})."


@lru_cache(maxsize=2)
def _heaviest_step(lengths: tuple[int, ...], batch_size: int, seed: int, epochs: int) -> int:
    """The same for all of the settings that are weighed: found once, in a quarter of a second for 100,000 rows."""
    return sum(lengths[i] for i in row_plan.heaviest(lengths, batch_size, seed, epochs, 1)[0])
