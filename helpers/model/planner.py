"""Will it fit, how long will it take, and which setting is the fastest that fits: before anything is loaded.

The plan keeps what was asked for (method, effective batch, the longest row) and chooses what nobody should have to:
tokens of a micro-batch, accumulation, how many layers are recomputed, where their inputs wait, and the backend.
One probing step on the real card corrects it (`Plan.correct`), and the error is kept.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from helpers.errors import TunebookError
from helpers.model import attention, cards, memory
from helpers.model.memory import Setting, Shape

ROWS = (512, 1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 98304, 131072, 196608, 262144)
TILE = 8192  # tokens of the MLP at a time once it is cut: long enough to fill the card
UNSLOTH_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere", "phi3")
MEMORY_SPREAD = 0.07


@dataclass(frozen=True)
class Option:
    """One setting with what it would need and take."""

    setting: Setting
    accumulation: int
    peak_gib: float
    need_gib: float
    tokens_per_s: float
    fits: bool

    @property
    def recompute_text(self) -> str:
        s = self.setting
        if not s.recompute:
            return "none"
        return f"{s.recompute} layers" + (", inputs in main memory" if s.offload else "") + (f", MLP by {s.tile_mlp}" if s.tile_mlp else "")


@dataclass(frozen=True, repr=False)
class Plan:
    """The chosen setting, its costs with error bars, the reasons, and what else was weighed."""

    card: cards.Card
    shape: Shape
    option: Option
    batch_size: int
    world_size: int
    steps: int
    tokens: int
    attention: str
    packed: bool
    backend: str
    reasons: tuple[str, ...]
    alternatives: tuple[Option, ...]
    memory_scale: float = 1.0
    time_scale: float = 1.0
    measured: bool = False
    errors: dict = field(default_factory=dict)

    row_tokens = property(lambda self: self.option.setting.row_tokens)
    accumulation = property(lambda self: self.option.accumulation)
    recompute = property(lambda self: self.option.setting.recompute)
    offload = property(lambda self: self.option.setting.offload)
    tile_mlp = property(lambda self: self.option.setting.tile_mlp)
    quantize = property(lambda self: self.option.setting.quantize)
    capability = property(lambda self: self.card.capability)
    peak_gib = property(lambda self: self.option.peak_gib * self.memory_scale)
    tokens_per_s = property(lambda self: self.option.tokens_per_s / self.time_scale)
    reason = property(lambda self: " ".join(self.reasons))

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Training time: expected, shortest, longest."""
        middle = self.tokens / max(self.tokens_per_s, 1e-9)
        spread = 0.08 if self.measured else self.card.spread
        return middle, middle * (1 - spread), middle * (1 + spread)

    @property
    def peak_range_gib(self) -> tuple[float, float]:
        spread = 0.03 if self.measured else MEMORY_SPREAD
        return self.peak_gib * (1 - spread), self.peak_gib * (1 + spread)

    def correct(self, peak_gib: float | None = None, tokens_per_s: float | None = None) -> Plan:
        """The plan after a probing step that allocated `peak_gib` at most and ran at `tokens_per_s`.

        Keeps the relative errors of the estimate ((predicted − measured) / measured) in `.errors`.
        """
        errors, changes = dict(self.errors), {"measured": True}
        if peak_gib:
            errors["peak_gib"] = round(self.peak_gib / peak_gib - 1, 4)
            changes["memory_scale"] = self.memory_scale * peak_gib / self.peak_gib
        if tokens_per_s:
            errors["tokens_per_s"] = round(self.tokens_per_s / tokens_per_s - 1, 4)
            changes["time_scale"] = self.time_scale * self.tokens_per_s / tokens_per_s
        return replace(self, errors=errors, **changes)

    def as_dict(self) -> dict:
        """Plain values for the manifest."""
        return {"card": self.card.name, "backend": self.backend, "attention": self.attention, "row_tokens": self.row_tokens,
                "accumulation": self.accumulation, "world_size": self.world_size, "batch_size": self.batch_size,
                "steps": self.steps, "recompute": self.recompute, "offload": self.offload, "tile_mlp": self.tile_mlp,
                "quantize": self.quantize, "peak_gib": round(self.peak_gib, 3), "tokens_per_s": round(self.tokens_per_s, 1),
                "seconds": [round(s, 1) for s in self.seconds], "probed": self.measured, "errors": self.errors, "reason": self.reason}

    def rows(self) -> list[tuple]:
        """The table: the chosen setting first, then the alternatives."""
        out = []
        for option in (self.option, *(o for o in self.alternatives if o.setting != self.option.setting)):
            s = option.setting
            speed = option.tokens_per_s / self.time_scale
            verdict = "chosen" if option is self.option else "fits" if option.fits else "does not fit"
            out.append((verdict, s.backend, "4-bit" if s.quantize == "nf4" else "16-bit", f"{s.row_tokens:,}",
                        f"{option.accumulation}", option.recompute_text, f"{option.peak_gib * self.memory_scale:.1f}",
                        f"{speed:,.0f}", duration(self.tokens / speed)))
        return out

    HEADER = ("", "backend", "base", "row tokens", "accumulation", "recomputed", "peak GiB", "tokens/s", "time")

    def headline(self) -> str:
        middle, low, high = self.seconds
        lowest, highest = self.peak_range_gib
        measured = "measured by a probing step" if self.measured else "predicted"
        return (f"{self.card.name}: {self.tokens:,} tokens in {self.steps:,} steps of {self.batch_size} rows, {duration(middle)} "
                f"({duration(low)} to {duration(high)}), {self.tokens_per_s:,.0f} tokens/s, peak {self.peak_gib:.1f} GiB "
                f"({lowest:.1f} to {highest:.1f}) of {self.card.total_gib:.1f}, {measured}.")

    def __str__(self) -> str:
        rows = [self.HEADER, *self.rows()]
        widths = [max(len(str(r[i])) for r in rows) for i in range(len(self.HEADER))]
        lines = ["  ".join(str(c).ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        return "\n".join([self.headline(), *self.reasons, "", *lines])

    __repr__ = __str__  # a notebook's plain text: the dataclass's own would print every layer

    def _repr_html_(self) -> str:
        from html import escape

        from helpers.notebook import table
        return f"<p><b>{escape(self.headline())}</b></p><p>{escape(self.reason)}</p>" + table(self.rows(), self.HEADER)


def duration(seconds: float) -> str:
    """Seconds for people: "42 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def choose_backend(asked: str, card: cards.Card, model_type: str, params: dict, needs_offload: bool = False) -> tuple[str, str]:
    """("hf" or "unsloth", why). auto: hf wherever its kernels run, Unsloth on older GPUs when it is installed."""
    method, stage = params.get("method", "qlora"), params.get("loss", "sft")
    cannot = ""
    if card.capability is None:
        cannot = "Unsloth needs a GPU"
    elif method not in ("qlora", "lora"):
        cannot = f"method {method} is not offered through Unsloth here"
    elif stage not in ("sft", "orpo"):
        cannot = f"loss {stage} is not offered through Unsloth here"
    elif model_type not in UNSLOTH_MODELS:
        cannot = f"Unsloth has no kernels for {model_type}"
    elif params.get("dora") or params.get("init", "default") != "default":
        cannot = "DoRA, PiSSA and LoftQ are not offered through Unsloth here"
    elif importlib.util.find_spec("unsloth") is None:
        cannot = "Unsloth is not installed"
    if asked == "unsloth":
        if cannot:
            raise TunebookError(f"backend is unsloth, but {cannot}; set backend to auto or hf.")
        return "unsloth", "Backend unsloth, as asked."
    if asked == "hf":
        return "hf", "Backend hf, as asked."
    if card.capability is not None and card.capability < (8, 0) and not cannot:
        return "unsloth", "Backend unsloth: this card has no variable-length FlashAttention, and Unsloth's kernels run on it."
    if card.capability is not None and card.capability >= (8, 0):
        return "hf", "Backend hf: packed rows through variable-length FlashAttention are the fastest on this card."
    return "hf", f"Backend hf: {cannot}."


def plan(params, lengths: Sequence[int], source, stage: str = "sft", world_size: int | None = None, card: cards.Card | None = None) -> Plan:
    """The fastest setting that fits the card, for these parameters and these training examples.

    params: a stage's Params or a mapping; lengths: tokens of each example (orpo: both answers with their prompts).
    source: a ModelSource, a model folder, or a transformers config. card: default `plan_for` or the one here.
    Raises TunebookError when nothing fits, with the change that would.
    """
    values = dict(params.as_dict() if hasattr(params, "as_dict") else params)
    config = load_config(source)
    shape = memory.shape_of(config)
    if card is None:
        card = cards.named(values["plan_for"]) if values.get("plan_for") else cards.here()
    world = world_size or 1
    if not len(lengths):
        raise TunebookError("There are no training examples to plan for; check the data stage's counts.")
    precision = {"fp32": "float32"}.get(values.get("precision", "auto"), "auto")
    kernel = attention.choose(card.capability, config, precision)
    backend, why = choose_backend(values.get("backend", "auto"), card, config.get_text_config().model_type, values)
    packed = kernel.packed and bool(values.get("packing", True)) and backend == "hf"
    reasons = [why, f"Attention {kernel.name}: {kernel.reason}."]
    base = _base_setting(values, shape, stage, backend, kernel.name == attention.FLASH, world)
    options = [_weigh(shape, s, card, lengths, values, world) for s in _settings(base, shape, lengths, values, world)]
    fitting = [o for o in options if o.fits]
    if not fitting:
        raise TunebookError(_refusal(shape, base, card, lengths, values, world, options))
    fastest = max(o.tokens_per_s for o in fitting)
    best = min((o for o in fitting if o.tokens_per_s >= 0.995 * fastest), key=lambda o: o.peak_gib)
    if best.setting.recompute:
        least = min(options, key=lambda o: (o.setting.recompute, o.setting.row_tokens))
        reasons.append(f"Recomputation of {best.recompute_text}: without any it would need {least.need_gib:.1f} GiB of {card.total_gib:.1f}."
                       if not least.fits else f"Recomputation of {best.recompute_text}, so that longer rows fit.")
    table = _table(options, best, shape, card, lengths, values, world)
    best = _laid_out(best, shape, card, lengths, values, world)
    epochs = float(values.get("epochs", 1.0) or 1.0)
    per_epoch = math.ceil(len(lengths) / int(values["batch_size"]))
    steps = int(values.get("max_steps") or 0) or math.ceil(per_epoch * epochs)
    tokens = round(sum(lengths) * steps / per_epoch)
    return Plan(card, shape, best, int(values["batch_size"]), world, steps, tokens, kernel.name, packed, backend, tuple(reasons),
                table)


def load_config(source):
    """A transformers config from a ModelSource, a folder, or itself."""
    if hasattr(source, "get_text_config"):
        return source
    from transformers import AutoConfig
    path = getattr(source, "path", source)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TunebookError(f"The model folder {path} has no configuration that transformers reads ({str(error).splitlines()[0][:160]}).") from error


def _base_setting(values: dict, shape: Shape, stage: str, backend: str, flash: bool, world: int) -> Setting:
    method = values.get("method", "qlora")
    return Setting(row_tokens=0, quantize="nf4" if method == "qlora" else "none", method=method, rank=int(values.get("rank", 16)),
                   targets=values.get("target_modules", "all-linear"), optimizer=values.get("optimizer", "adamw"), backend=backend,
                   stage=stage, flash=flash, fused=not (values.get("dropout") or values.get("dora")),
                   trained_layers=int(values.get("freeze_layers", 2)), shards=world if method != "qlora" else 1,
                   trained_share=1.0 if values.get("train_on", "all") == "all" or stage != "sft" else 0.6)


def _settings(base: Setting, shape: Shape, lengths: Sequence[int], values: dict, world: int):
    """Every row size and grade of recomputation worth weighing."""
    longest = max(lengths)
    useful = max(longest, math.ceil(_heaviest(lengths, values) / world))
    asked = int(values.get("row_tokens") or 0)
    if asked:
        if asked < longest:
            raise TunebookError(f"row_tokens is {asked} and the longest training row has {longest} tokens; raise row_tokens or lower max_length in notebook 01.")
        sizes = [asked]
    else:
        sizes = sorted({longest, useful, *(r for r in ROWS if longest < r < useful)})
        sizes = sizes if values.get("packing", True) else sizes[:1]
    count = shape.layers
    grades = {"none": [(0, False, 0)], "half": [(count // 2, False, 0)], "all": [(count, False, 0)], "offload": [(count, True, 0), (count, True, TILE)],
              "auto": [(0, False, 0), (count // 4, False, 0), (count // 2, False, 0), (3 * count // 4, False, 0), (count, False, 0),
                       (count, True, 0), (count, True, TILE)]}[values.get("recompute", "auto")]
    if base.backend == "unsloth":
        grades = [(count, True, 0)]
    for size in sizes:
        for layers, offload, tile in grades:
            if not tile or tile < size:
                yield replace(base, row_tokens=size, recompute=layers, offload=offload, tile_mlp=tile)


def _weigh(shape: Shape, s: Setting, card: cards.Card, lengths: Sequence[int], values: dict, world: int) -> Option:
    batch = min(int(values["batch_size"]), len(lengths))
    step_tokens = sum(lengths) / len(lengths) * batch
    rows = max(1, math.ceil(_heaviest(lengths, values) / s.row_tokens / world))
    s = replace(s, accumulates=rows > 1 or s.accumulates)
    mean_row = step_tokens / world / rows
    square = sum(n * n for n in lengths) / sum(lengths)
    seconds = rows * memory.row_seconds(shape, replace(s, row_tokens=mean_row), card, square)
    seconds += memory.trained_parameters(shape, s) * 30 / (card.gb_s * 1e9)  # the optimizer reads and writes its state
    if world > 1:
        seconds += 0.02 * seconds
    peak = memory.peak_gib(shape, s)
    need = memory.need_gib(peak) if card.capability is not None else peak * 1.1
    return Option(s, rows, peak, need, step_tokens / seconds, need <= card.total_gib)


def _heaviest(lengths: Sequence[int], values: dict) -> int:
    """Tokens of the optimizer step that has the most."""
    from helpers.train import batching
    batch = batching.heaviest(lengths, int(values["batch_size"]), int(values.get("seed", 0)), math.ceil(float(values.get("epochs") or 1)), 1)[0]
    return sum(lengths[i] for i in batch)


def _laid_out(option: Option, shape: Shape, card: cards.Card, lengths: Sequence[int], values: dict, world: int) -> Option:
    """The option with the accumulation that best-fit rows really need, and the peak of the longest row there will be."""
    from helpers.train import batching
    s = option.setting
    layout = batching.plan_rows(lengths, int(values["batch_size"]), s.row_tokens, world, int(values.get("seed", 0)), math.ceil(float(values.get("epochs") or 1)))
    peak = memory.peak_gib(shape, replace(s, row_tokens=layout.max_row_tokens, accumulates=layout.accumulation > 1))
    return replace(option, accumulation=layout.accumulation, peak_gib=peak, need_gib=memory.need_gib(peak) if card.capability is not None else peak * 1.1)


def _table(options: list[Option], best: Option, shape: Shape, card: cards.Card, lengths, values, world) -> tuple[Option, ...]:
    """The options a person would ask about: per grade of recomputation the fastest, and the other precision of the base."""
    chosen: dict = {}
    for option in options:
        key = (option.setting.recompute, option.setting.offload, option.setting.tile_mlp)
        held = chosen.get(key)
        if held is None or (option.fits, option.tokens_per_s) > (held.fits, held.tokens_per_s):
            chosen[key] = option
    s = best.setting
    if s.method in ("qlora", "lora"):
        other = replace(s, quantize="none", method="lora") if s.quantize == "nf4" else replace(s, quantize="nf4", method="qlora", shards=1)
        chosen["base"] = _weigh(shape, other, card, lengths, values, world)
    if s.backend == "hf" and card.capability is not None and s.method in ("qlora", "lora"):
        chosen["unsloth"] = _weigh(shape, replace(s, backend="unsloth", recompute=shape.layers, offload=True, tile_mlp=0), card, lengths, values, world)
    return tuple(sorted(chosen.values(), key=lambda o: (not o.fits, -o.tokens_per_s)))


def _refusal(shape, base, card, lengths, values, world, options) -> str:
    """What does not fit and the smallest change that would: 4 bits, an 8-bit optimizer, a shorter row, a larger card."""
    least = min(options, key=lambda o: o.need_gib)
    what = (f"{shape.name or 'The model'} ({shape.parameters / 1e9:.2f} billion parameters, method {base.method}, longest row {max(lengths)} tokens) needs "
            f"{least.need_gib:.1f} GiB and {card.name} has {card.total_gib:.1f}")

    def fits(values, lengths=lengths):
        trial = _base_setting(values, shape, base.stage, base.backend, base.flash, world)
        return any(_weigh(shape, s, card, lengths, values, world).fits for s in _settings(trial, shape, lengths, values, world))

    free = {**values, "recompute": "auto", "row_tokens": 0}
    if fits(free):
        return f"{what}; set recompute to auto and row_tokens to 0, which fits."
    if base.method != "qlora" and fits({**free, "method": "qlora"}):
        return f"{what}; set method to qlora, which fits."
    if base.optimizer in ("adamw", "lion") and fits({**free, "optimizer": "adamw_8bit"}):
        return f"{what}; set optimizer to adamw_8bit, which fits."
    low, high = 0, max(lengths)
    while high - low > 16:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(free, [min(n, middle) for n in lengths]) else (low, middle)
    if low >= 64:
        return f"{what}; rows of at most {low // 16 * 16} tokens fit: lower max_length in notebook 01."
    larger = [c.name for c in sorted(cards.CARDS.values(), key=lambda c: c.total_gib) if c.total_gib >= least.need_gib]
    return f"{what}; " + (f"use a card with more memory ({', '.join(larger)})." if larger else "use a smaller model or several GPUs.")


def longest_context(config, card: cards.Card, method: str = "qlora", rank: int = 16, optimizer: str = "adamw") -> int:
    """Tokens of the longest single row that trains on the card with everything recomputed, offloaded and tiled."""
    shape = config if isinstance(config, Shape) else memory.shape_of(config)
    base = Setting(row_tokens=0, recompute=shape.layers, offload=True, tile_mlp=TILE, method=method, rank=rank, optimizer=optimizer,
                   quantize="nf4" if method == "qlora" else "none")
    low, high = 0, 1 << 24
    while high - low > 64:
        middle = (low + high) // 2
        fits = memory.need_gib(memory.peak_gib(shape, replace(base, row_tokens=middle))) <= card.total_gib
        low, high = (middle, high) if fits else (low, middle)
    return low


def plan_dict(plan: Plan) -> dict:
    """The plan and its alternatives as plain values."""
    return {**plan.as_dict(), "alternatives": [{**asdict(o.setting), "peak_gib": round(o.peak_gib, 2), "fits": o.fits,
                                               "tokens_per_s": round(o.tokens_per_s)} for o in plan.alternatives]}
