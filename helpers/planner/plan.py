"""Will it fit, how long will it take, and which setting is the fastest that fits: before anything is loaded.

The plan keeps what was asked for (method, effective batch, the longest row) and chooses what nobody should have to:
tokens of a micro-batch, accumulation, how many layers are recomputed, where their inputs wait, and the backend.
One probing step on the real card corrects it (`Plan.correct`), and the error is kept.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from helpers.errors import TunebookError
from helpers.model import packed_attention
from helpers.model.loading import fast_bf16
from helpers.planner import cost_model, gpus, row_plan
from helpers.planner.cost_model import Setting, Shape
from helpers.planner.estimates import Option, Plan

ROWS = (512, 1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 98304, 131072, 196608, 262144)
TILE = 8192  # tokens of the MLP at a time once it is cut: long enough to fill the card
UNSLOTH_ROW = 16384  # its rows are padded: longer ones only pad more
UNSLOTH_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere", "phi3")


def choose_backend(
    asked: str, card: gpus.Card, model_type: str, params: dict, needs_offload: bool = False
) -> tuple[str, str]:
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
    elif params.get("precision") == "fp32":
        cannot = "Unsloth computes in 16 bits and precision is fp32"
    elif importlib.util.find_spec("unsloth") is None:
        cannot = "Unsloth is not installed"
    if asked == "unsloth":
        if cannot:
            raise TunebookError(f"backend is unsloth, but {cannot}; set backend to auto or hf.")
        return "unsloth", "Backend unsloth, as asked."
    if asked == "hf":
        return "hf", "Backend hf, as asked."
    if card.capability is not None and card.capability < (8, 0) and not cannot:
        return (
            "unsloth",
            "Backend unsloth: this card has no variable-length FlashAttention, and Unsloth's kernels run on it.",
        )
    if card.capability is not None and card.capability >= (8, 0):
        return "hf", "Backend hf: packed rows through variable-length FlashAttention are the fastest on this card."
    return "hf", f"Backend hf: {cannot}."


@dataclass(frozen=True)
class Examples:
    """Training examples as the planner sees them. tokens, padded: tokens of each, for pairs of both answers with their
    prompts, without and with the shorter one padded to the longer."""

    tokens: Sequence[int]
    padded: Sequence[int]

    def of(self, s: Setting) -> Sequence[int]:
        return self.padded if s.padded else self.tokens


def plan(
    params,
    lengths: Sequence[int],
    source,
    stage: str = "sft",
    world_size: int | None = None,
    card: gpus.Card | None = None,
    padded_lengths: Sequence[int] | None = None,
) -> Plan:
    """The fastest setting that fits the card, for these parameters and these training examples.

    params: a stage's Params or a mapping; lengths: tokens of each example (orpo: both answers with their prompts).
    padded_lengths: the same where rows are padded (`train.rows.lengths_of`), default `lengths`.
    source: a ModelSource, a model folder, or a transformers config. card: default `plan_for` or the one here.
    Raises TunebookError when nothing fits, with the change that would.
    """
    values = dict(params.as_dict() if hasattr(params, "as_dict") else params)
    config = load_config(source)
    shape = cost_model.shape_of(config)
    if card is None:
        card = gpus.named(values["plan_for"]) if values.get("plan_for") else gpus.here()
    world = world_size or 1
    if not len(lengths):
        raise TunebookError("There are no training examples to plan for; check the data stage's counts.")
    precision = {"fp32": "float32"}.get(values.get("precision", "auto"), "auto")
    kernel = packed_attention.choose(card.capability, config, precision)
    backend, why = choose_backend(values.get("backend", "auto"), card, config.get_text_config().model_type, values)
    packed = kernel.packed and bool(values.get("packing", True)) and backend == "hf"
    reasons = [why, f"Attention {kernel.name}: {kernel.reason}."]
    examples = Examples(tuple(lengths), tuple(padded_lengths or lengths))
    base = replace(
        _base_setting(values, shape, stage, backend, kernel.name == packed_attention.FLASH, world), padded=not packed
    )
    if values.get("precision") == "fp32" or (
        card.capability is None and values.get("precision") != "bf16" and not fast_bf16()
    ):
        base = replace(base, number_bytes=4)
    if card.capability is None:
        base = replace(
            base, process_gib=cost_model.PROCESS_GIB + (cost_model.ONEDNN_GIB if base.number_bytes == 2 else 0)
        )
    options = [
        _weigh(shape, s, card, examples, values, world)
        for s in _settings(base, shape, examples.of(base), values, world)
    ]
    fitting = [o for o in options if o.fits]
    if not fitting:
        raise TunebookError(_refusal(shape, base, card, examples, values, world, options))
    fastest = max(o.tokens_per_s for o in fitting)
    best = min((o for o in fitting if o.tokens_per_s >= 0.995 * fastest), key=lambda o: o.peak_gib)
    if best.setting.recompute:
        least = min(options, key=lambda o: (o.setting.recompute, o.setting.row_tokens))
        reasons.append(
            f"Recomputation of {best.recompute_text}: without any it would need {least.need_gib:.1f} GiB of {card.total_gib:.1f}."
            if not least.fits
            else f"Recomputation of {best.recompute_text}, so that longer rows fit."
        )
    table = _table(options, best, shape, card, examples, values, world)
    best = _laid_out(best, shape, card, examples.of(base), values, world)
    epochs = float(values.get("epochs", 1.0) or 1.0)
    per_epoch = math.ceil(len(lengths) / int(values["batch_size"]))
    steps = int(values.get("max_steps") or 0) or math.ceil(per_epoch * epochs)
    tokens = round(sum(lengths) * steps / per_epoch)
    return Plan(
        card,
        shape,
        best,
        int(values["batch_size"]),
        world,
        steps,
        tokens,
        kernel.name,
        packed,
        backend,
        tuple(reasons),
        table,
    )


def load_config(source):
    """A transformers config from a ModelSource, a folder, or itself."""
    if hasattr(source, "get_text_config"):
        return source
    from transformers import AutoConfig

    path = getattr(source, "path", source)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TunebookError(
            f"The model folder {path} has no configuration that transformers reads ({str(error).splitlines()[0][:160]})."
        ) from error


def _base_setting(values: dict, shape: Shape, stage: str, backend: str, flash: bool, world: int) -> Setting:
    method = values.get("method", "qlora")
    return Setting(
        row_tokens=0,
        quantize="nf4" if method == "qlora" else "none",
        method=method,
        rank=int(values.get("rank", 16)),
        targets=values.get("target_modules", "all-linear"),
        optimizer=values.get("optimizer", "adamw"),
        backend=backend,
        stage=stage,
        flash=flash,
        fused=not (values.get("dropout") or values.get("dora")),
        trained_layers=int(values.get("freeze_layers", 2)),
        shards=world if method != "qlora" else 1,
        trained_share=1.0 if values.get("train_on", "all") == "all" or stage != "sft" else 0.6,
    )


def grades_of(layers: int) -> list[tuple[int, bool, int]]:
    """(layers recomputed, inputs in main memory, tokens of the MLP at a time), the lightest on time first."""
    return [*((layers * part // 4, False, 0) for part in range(5)), (layers, True, 0), (layers, True, TILE)]


def _settings(base: Setting, shape: Shape, lengths: Sequence[int], values: dict, world: int):
    """Every row size and grade of recomputation worth weighing."""
    longest = max(lengths)
    useful = max(longest, math.ceil(_heaviest(lengths, values) / world))
    asked = int(values.get("row_tokens") or 0)
    if asked:
        if asked < longest:
            raise TunebookError(
                f"row_tokens is {asked} and the longest training row has {longest} tokens; raise row_tokens or lower max_length in notebook 01."
            )
        sizes = [asked]
    else:
        sizes = sorted({longest, useful, *(r for r in ROWS if longest < r < useful)})
        if base.backend == "unsloth":
            sizes = [r for r in sizes if r <= max(longest, UNSLOTH_ROW)]
        sizes = sizes if values.get("packing", True) else sizes[:1]
    count = shape.layers
    grades = {
        "none": [(0, False, 0)],
        "half": [(count // 2, False, 0)],
        "all": [(count, False, 0)],
        "offload": [(count, True, 0), (count, True, TILE)],
        "auto": grades_of(count),
    }[values.get("recompute", "auto")]
    if base.backend == "unsloth":
        grades = [(count, True, 0)]
    for size in sizes:
        for layers, offload, tile in grades:
            if not tile or tile < size:
                yield replace(base, row_tokens=size, recompute=layers, offload=offload, tile_mlp=tile)


def _weigh(shape: Shape, s: Setting, card: gpus.Card, examples: Examples, values: dict, world: int) -> Option:
    lengths = examples.of(s)
    batch = min(int(values["batch_size"]), len(lengths))
    step_tokens = sum(examples.tokens) / len(lengths) * batch
    if s.padded:
        layout = _layout(lengths, s.row_tokens, values, world, padded=True)
        rows, mean_row = layout.accumulation, layout.mean_row_tokens
    else:
        rows = max(1, math.ceil(_heaviest(lengths, values) / s.row_tokens / world))
        mean_row = step_tokens / world / rows
    s = replace(s, accumulates=rows > 1 or s.accumulates)
    square = sum(n * n for n in lengths) / sum(lengths)
    row = replace(s, row_tokens=mean_row)
    work, launch = cost_model.row_work(shape, row, card, square)
    seconds = rows * cost_model.row_seconds(shape, row, card, square)
    seconds += (
        cost_model.trained_parameters(shape, s) * 30 / (card.gb_s * 1e9)
    )  # the optimizer reads and writes its state
    if world > 1:
        seconds += 0.02 * seconds
    peak = cost_model.peak_gib(shape, s)
    need = cost_model.need_gib(peak) if card.capability is not None else peak * 1.1
    spread = cost_model.LAUNCH_SPREAD if launch > 0.8 * work else card.spread
    fits = need <= card.total_gib and waits_in_main_memory(shape, s, card, world)
    return Option(s, rows, peak, need, step_tokens / seconds, fits, spread, cost_model.offloaded_gib(shape, s))


def waits_in_main_memory(shape: Shape, s: Setting, card: gpus.Card, world: int = 1) -> bool:
    """Whether the machine has room for the layer inputs that wait there, of every process on it."""
    return (
        not s.offload
        or not card.host_gib
        or world * (cost_model.offloaded_gib(shape, s) + cost_model.HOST_GIB) <= card.host_gib
    )


def _layout(lengths: Sequence[int], row_tokens: int, values: dict, world: int, padded: bool):
    epochs = _epochs(values, len(lengths))
    return row_plan.plan_rows(
        lengths, int(values["batch_size"]), row_tokens, world, int(values.get("seed", 0)), epochs, padded
    )


def _heaviest(lengths: Sequence[int], values: dict) -> int:
    """Tokens of the optimizer step that has the most."""
    return _heaviest_step(
        tuple(lengths), int(values["batch_size"]), int(values.get("seed", 0)), _epochs(values, len(lengths))
    )


@lru_cache(maxsize=2)
def _heaviest_step(lengths: tuple[int, ...], batch_size: int, seed: int, epochs: int) -> int:
    """The same for all of the settings that are weighed: found once, in a quarter of a second for 100,000 rows."""
    return sum(lengths[i] for i in row_plan.heaviest(lengths, batch_size, seed, epochs, 1)[0])


def _epochs(values: dict, rows: int) -> int:
    """Passes over the rows that the run at least begins."""
    if steps := int(values.get("max_steps") or 0):
        return math.ceil(steps / math.ceil(rows / int(values["batch_size"])))
    return math.ceil(float(values.get("epochs") or 1))


def _laid_out(
    option: Option, shape: Shape, card: gpus.Card, lengths: Sequence[int], values: dict, world: int
) -> Option:
    """The option with the accumulation that its rows really need, and the peak of the longest row there will be."""
    s = option.setting
    layout = _layout(lengths, s.row_tokens, values, world, s.padded)
    peak = cost_model.peak_gib(shape, replace(s, row_tokens=layout.max_row_tokens, accumulates=layout.accumulation > 1))
    return replace(
        option,
        accumulation=layout.accumulation,
        peak_gib=peak,
        need_gib=cost_model.need_gib(peak) if card.capability is not None else peak * 1.1,
    )


def _table(
    options: list[Option], best: Option, shape: Shape, card: gpus.Card, examples, values, world
) -> tuple[Option, ...]:
    """The options a person would ask about: per grade of recomputation the fastest, and the other precision of the base."""
    chosen: dict = {}
    for option in options:
        key = (option.setting.recompute, option.setting.offload, option.setting.tile_mlp)
        held = chosen.get(key)
        if held is None or (option.fits, option.tokens_per_s) > (held.fits, held.tokens_per_s):
            chosen[key] = option
    s = best.setting
    if s.method in ("qlora", "lora"):
        other = (
            replace(s, quantize="none", method="lora")
            if s.quantize == "nf4"
            else replace(s, quantize="nf4", method="qlora", shards=1)
        )
        chosen["base"] = _weigh(shape, other, card, examples, values, world)
    if s.backend == "hf" and card.capability is not None and s.method in ("qlora", "lora"):
        row = max(max(examples.padded), min(s.row_tokens, UNSLOTH_ROW))
        other = replace(
            s, backend="unsloth", row_tokens=row, padded=True, recompute=shape.layers, offload=True, tile_mlp=0
        )
        chosen["unsloth"] = _weigh(shape, other, card, examples, values, world)
    return tuple(sorted(chosen.values(), key=lambda o: (not o.fits, -o.tokens_per_s)))


def _refusal(shape, base, card, examples, values, world, options) -> str:
    """What does not fit and the smallest change that would: 4 bits, an 8-bit optimizer, a shorter row, a larger card."""
    lengths = examples.of(base)
    least = min(options, key=lambda o: o.need_gib)
    what = (
        f"{shape.name or 'The model'} ({shape.parameters / 1e9:.2f} billion, method {base.method}, longest row {max(lengths)} tokens) needs "
        f"{least.need_gib:.1f} GiB and {card.name} has {card.total_gib:.1f}"
    )
    if least.need_gib <= card.total_gib:
        host = least.offloaded_gib + cost_model.HOST_GIB
        what += f", which is enough, but also {host:.1f} GiB of main memory a process, where layer inputs wait, and there are {card.host_gib:.1f}"

    def fits(values, lengths=lengths):
        trial = _base_setting(values, shape, base.stage, base.backend, base.flash, world)
        trial = replace(trial, padded=base.padded, number_bytes=base.number_bytes, process_gib=base.process_gib)
        return any(
            _weigh(shape, s, card, Examples(lengths, lengths), values, world).fits
            for s in _settings(trial, shape, lengths, values, world)
        )

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
    enough = (
        c
        for c in gpus.CARDS.values()
        if c.total_gib >= least.need_gib and waits_in_main_memory(shape, least.setting, c, world)
    )
    larger = [c.name for c in sorted(enough, key=lambda c: c.total_gib)]
    return f"{what}; " + (
        f"use a card with more memory ({', '.join(larger)})." if larger else "use a smaller model or several GPUs."
    )


def longest_context(config, card: gpus.Card, method: str = "qlora", rank: int = 16, optimizer: str = "adamw") -> int:
    """Tokens of the longest single row that trains on the card with everything recomputed, offloaded and tiled."""
    shape = config if isinstance(config, Shape) else cost_model.shape_of(config)
    base = Setting(
        row_tokens=0,
        recompute=shape.layers,
        offload=True,
        tile_mlp=TILE,
        method=method,
        rank=rank,
        optimizer=optimizer,
        quantize="nf4" if method == "qlora" else "none",
    )
    low, high = 0, 1 << 24
    while high - low > 64:
        middle = (low + high) // 2
        s = replace(base, row_tokens=middle)
        fits = cost_model.need_gib(cost_model.peak_gib(shape, s)) <= card.total_gib and waits_in_main_memory(
            shape, s, card
        )
        low, high = (middle, high) if fits else (low, middle)
    return low
