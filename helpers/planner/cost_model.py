"""Bytes and seconds of a training step, worked out from a model's shapes and a GPU's figures.

Counted from what the fused training path keeps for the backward pass (`helpers.model.fused_lora`), not fitted to a
curve; the few constants that had to be measured say where. Lines that set them are in ci/results: h200_calibration,
h200_2026-11-22 and h200_2026-11-25; those of h100_2026-11-25 and gpu_2026-11-26 set none but the launch times.
GiB are 2³⁰ bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from helpers import machine
from helpers.errors import TunebookError
from helpers.model.layer_kinds import Shape
from helpers.model.loading import fast_bf16
from helpers.params import TrainingParams

GIB = 2**30
NF4_BITS = {True: 4.1275, False: 4.5}  # a parameter with double quantisation (measured) and without
FP8_SINCE = (8, 9)  # compute capability of GPUs with FP8 products
CONTEXT_GIB = 0.75  # CUDA context and library workspaces outside the allocator; 0.5 to 0.8 seen
FRAGMENTATION = 0.04  # reserved over allocated at the peak with expandable segments
# Bytes per trained element of the optimizer's state; that of sgd is empty and that of paged optimizers in host memory.
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2.03, "lion": 4, "adafactor": 0.1, "sgd": 0}
OPTIMIZER_BYTES |= {"paged_adamw": 0, "paged_adamw_32bit": 0, "paged_adamw_8bit": 0}
EVERY = ("", "all-linear")  # target_modules that mean every linear layer, and the experts
# Forward passes a loss takes besides its own: of the reference, once a run, and of the trained model, KTO's of others.
REFERENCE, BESIDE = {"dpo": 1, "kto": 2}, {"kto": 1}
TILE = 8192  # tokens of the MLP at a time once it is cut: long enough to fill the GPU
WORKSPACE_GIB = 0.1  # cuBLAS workspaces and small buffers inside the allocator (measured, 135M to 8B)
MATRIX_SHARE = 0.70  # of the GPU's matrix rate that products inside a sustained step reach (measured, H200)
FP8_RATE = 1.6  # of the rate of 16-bit products
ATTENTION_SHARE = 0.42  # the same for FlashAttention forward and backward together (measured, H200)
UNPACK_BYTES = 11.5  # traffic that unpacking a 4-bit weight costs as much as: 41 ms a row at 8B (measured, H200)
UNPACK_CPU_BYTES = 110.0  # the same on a CPU: 6 ns a weight and pass (135M, two cores: 212 tokens/s for 451)
# Processor time to launch one layer forward and back: the median of four machines, 4.3 to 7.7 and 6.1 to 12.2 ms,
# before adapted layers shared their products (152 operations a layer for 182).
LAUNCH_S = {"none": 6e-3, "nf4": 9e-3, "fp8": 8e-3}
GRAPH_S = {"none": 4e-4, "nf4": 6e-4, "fp8": 6e-4}  # the same of a CUDA graph: short kernels, one after another
CAPTURE_S, GRAPH_PADDING = 4.0, 0.2  # to make the graphs of a job; of a row
LAUNCH_SPREAD = 0.5  # half-width of an estimate that hangs on it
LAUNCH_AGAIN = 0.8  # of that again for a checkpointed layer (measured, H200)
UNSLOTH_TIME = 0.95  # of our layers' seconds at equal checkpointing; its copies to host memory hide behind them (H200)
UNSLOTH_GIB = 0.35  # its buffers (measured, H200)
HOST_GIB = 3.0  # of host memory that a process with CUDA's libraries and the system around it take
ONEDNN_GIB = 0.8  # kernels and scratch that oneDNN keeps for 16-bit products on a CPU (measured, 135M in bf16)
SHARDED_TIME = 1.15  # of a job whose weights are gathered for each layer; two H100 took 1.11 times, four 1.2 (8B, LoRA)
PROCESS_GIB = 0.75  # resident memory of a notebook's process with the libraries loaded (measured)


@dataclass(frozen=True)
class Card:
    """A GPU, or the CPU in its place. total_gib: memory that a job can have. tflops: 16-bit matrix products on random
    data. gb_s: copy bandwidth, bytes read plus written. host_gb_s: to and from host memory. spread: half-width of a
    time estimate, as a share of it. host_gib: host memory for offloaded layer inputs; 0: not known, not limited."""

    name: str
    capability: tuple[int, int] | None
    total_gib: float
    tflops: float
    gb_s: float
    host_gb_s: float
    spread: float
    host_gib: float = 0.0


# H200 and H100: measured (790 TFLOP/s on an 8192³ bf16 product, 4.3 and 3.0 TB/s copied). Others: data sheet × what the
# H200 reaches of its own (0.80 of matrix rate, 0.90 of bandwidth), a third of the matrix rate again off T4 and L4,
# whose 70 W hold their clocks down. Host memory: of Colab's machines (12.7, 53 and 83.5 GB).
CARDS = {
    card.name: card
    for card in (
        Card("T4", (7, 5), 14.6, 28, 280, 10, 0.40, 11.8),
        Card("L4", (8, 9), 22.0, 60, 270, 20, 0.35, 49.4),
        Card("A100-40", (8, 0), 39.4, 250, 1400, 20, 0.25, 77.8),
        Card("A100-80", (8, 0), 79.2, 250, 1800, 20, 0.25, 77.8),
        Card("H100", (9, 0), 79.1, 790, 3000, 45, 0.15),
        Card("H200", (9, 0), 139.8, 790, 4300, 45, 0.15),
    )
}
CPU = Card("CPU", None, 0.0, 0.08, 20, 20, 0.50)


def card_named(name: str) -> Card:
    """The GPU of that name. Raises TunebookError with the known names."""
    if card := CARDS.get(name.strip().upper()):
        return card
    raise TunebookError(f"There are no figures for the GPU {name!r}; plan_for takes one of {', '.join(CARDS)}.")


def card_here() -> Card:
    """The first visible GPU, or the CPU, with the memory that this process can have now: without what other programs
    hold or a container does not allow."""
    import psutil

    host = machine.free_memory_gib() + psutil.Process().memory_info().rss / 2**30
    found, free = machine.gpu(), machine.free_gpu_gib()
    if found is None or free is None:
        return replace(CPU, total_gib=host)
    total = min(found.total_gib, free + CONTEXT_GIB)  # asking has made the context, which every estimate counts again
    words = found.name.replace("-", " ").split()
    near = [c for c in CARDS.values() if abs(c.total_gib - found.total_gib) < 0.2 * c.total_gib]
    known = [card for card in near if card.name.split("-")[0] in words]
    # A GPU without figures: rated by its compute capability, with wide bars.
    like = "T4" if found.capability < (8, 0) else "A100-40" if found.capability < (9, 0) else "H100"
    card = known[0] if known else replace(CARDS[like], capability=found.capability, spread=0.5)
    return replace(card, name=found.name, total_gib=total, host_gib=host)


@dataclass(frozen=True)
class Setting:
    """One way to run a step. row_tokens: tokens of a micro-batch, padding too; recompute: layers with activation
    checkpointing, whose forward runs twice; offload: their inputs wait in host memory."""

    row_tokens: int
    params: TrainingParams
    recompute: int = 0
    offload: bool = False
    tile_mlp: int = 0
    backend: str = "hf"
    padded: bool = False
    flash: bool = True
    shards: int = 1
    accumulates: bool = False  # gradients of earlier rows are there while a row's activations are
    number_bytes: int = 2  # of a weight that is not quantised and of an activation: 4 in fp32
    graphs: bool = False  # rows are CUDA graphs, a few tokens longer
    process_gib: float = 0.0  # what the process itself holds in the same memory: on a CPU Python and its libraries

    @property
    def quantize(self) -> str:
        eight = self.params.quantize == "fp8" and self.params.method == "lora"
        return "nf4" if self.params.method == "qlora" else "fp8" if eight else "none"

    @property
    def sharded(self) -> bool:
        """FSDP2: each process holds its share of weights, gradients and optimizer state."""
        return self.shards > 1 and (self.quantize == "none" or self.params.shard_weights or self.params.cpu_offload)

    @property
    def fused(self) -> bool:
        return not self.params.dora

    @property
    def trained_share(self) -> float:
        """Tokens that the head has to look at."""
        return 0.6 if getattr(self.params, "train_on", "all") == "completion" else 1.0


def base_setting(params: TrainingParams, card: Card, world: int, backend: str, flash: bool, padded: bool) -> Setting:
    """The setting that every option varies in row tokens and activation checkpointing."""
    cpu = card.capability is None
    wide = params.precision == "fp32" or (cpu and params.precision != "bf16" and not fast_bf16())
    held = PROCESS_GIB + ONEDNN_GIB * (not wide) if cpu else 0.0
    number = 4 if wide else 2
    return Setting(0, params, 0, False, 0, backend, padded, flash, world, number_bytes=number, process_gib=held)


def trained_parameters(shape: Shape, s: Setting) -> int:
    """How many numbers the optimizer changes."""
    p = s.params
    if p.method == "full":
        return shape.parameters
    if p.method == "freeze":
        return round((shape.linear_parameters + shape.other) * getattr(p, "freeze_layers", 0) / shape.layers)
    names = [name.strip() for name in p.target_modules.split(",")]
    every = p.target_modules in EVERY
    chosen = shape.adapted if every else [one for one in shape.linears if one[0].rsplit(".", 1)[-1] in names]
    of_experts = sum(count * (rows + columns) for count, rows, columns in shape.experts) * every
    return whole_parameters(shape, s) + p.rank * (of_experts + sum(i + o for _, i, o in chosen))


def adapts_experts(shape: Shape, s: Setting) -> bool:
    """Whether experts have adapters: PEFT then sums each stack with its change and keeps it for the backward pass."""
    return bool(shape.experts) and s.params.method in ("lora", "qlora") and s.params.target_modules in EVERY


def whole_parameters(shape: Shape, s: Setting) -> int:
    """Of modules_to_save: embeddings and head, once where they are one matrix."""
    names = s.params.modules_to_save
    head = shape.head if "lm_head" in names else 0
    return head + (shape.embedding if "embed" in names or ("lm_head" in names and not shape.head) else 0)


def whole_state_bytes(shape: Shape, s: Setting) -> float:
    """Weights, gradients and optimizer state, of all processes together where they are sharded."""
    trained, optimizer = trained_parameters(shape, s), OPTIMIZER_BYTES[s.params.optimizer]
    base: float = (shape.embedding + shape.head + shape.other) * s.number_bytes
    base += shape.linear_parameters * (NF4_BITS[s.params.double_quant] / 8 if s.quantize == "nf4" else s.number_bytes)
    if s.quantize == "fp8":  # a byte a weight, and a scale a row
        base -= sum((s.number_bytes - 1) * i * o - 4 * o for _, i, o in shape.adapted if not (i % 16 or o % 16))
    if shape.stored and s.quantize == "nf4":
        base = shape.stored + (shape.embedding + shape.head + shape.other) * (s.number_bytes - 2)
    if s.params.method in ("full", "freeze"):
        masters = 2 if s.number_bytes == 2 else 0  # fp32 over 16-bit weights
        # One GPU also keeps autocast's 16-bit copies for the backward pass.
        return base + trained * (masters * (1 + (not s.sharded)) + 4 + optimizer)
    # Adapters are fp32. A first row's gradients come as its activations go, so they add nothing to the peak.
    state = trained * (4 + 4 * s.accumulates + optimizer)
    if getattr(s.params, "loss", "") in REFERENCE and s.params.start_from != "base":
        state += 4 * trained  # the adapter as it began
    return base + state


def gathered_bytes(shape: Shape, s: Setting) -> float:
    """What a process of a sharded job holds besides its share as the backward pass begins: three layers (at work, next,
    its copy), the head, gradients of trained ones. 59.7 GiB planned, 59.5 measured (8B LoRA, two H100)."""
    layer, head = (shape.linear_parameters + shape.other) / shape.layers, shape.head or shape.embedding
    trained = {"full": max(10 * layer, 8 * head), "freeze": 10 * layer}.get(s.params.method, 0)
    layer *= NF4_BITS[s.params.double_quant] / 8 / s.number_bytes if s.quantize == "nf4" else 1
    return (2 * (3 * layer + head) + trained) * s.number_bytes / 2


def state_bytes(shape: Shape, s: Setting) -> float:
    """Weights, gradients and optimizer state on one GPU."""
    whole = whole_state_bytes(shape, s)
    if not s.sharded:
        return whole
    return gathered_bytes(shape, s) + (0 if s.params.cpu_offload else whole / s.shards)


def layer_bytes_per_token(shape: Shape, s: Setting) -> tuple[float, float]:
    """Bytes that one layer keeps per token for its backward pass: (outside, inside) the MLP.

    Two norm inputs and outputs, queries, keys, values, attention's output and its fp32 row sums; gate, up and product.
    """
    key = shape.key if s.flash else shape.query  # without FlashAttention keys are repeated for every head
    outside = 2 * (4 * shape.hidden + 2 * shape.query + 2 * key) + 4 * shape.heads
    inside = 2 * 3 * shape.intermediate
    if not s.fused:  # PEFT's own LoRA under autocast keeps its inputs a second time, for the DoRA branch
        outside += 2 * 2 * (shape.hidden + shape.query)
        inside += 2 * (shape.hidden + shape.intermediate)
    elif s.params.dropout:  # its masks, a byte a number
        outside += 3 * shape.hidden + shape.query
        inside += 2 * shape.hidden + shape.intermediate
    states = shape.recurrent / shape.layers * shape.kept_bytes * 2 / s.number_bytes  # mostly fp32 in either precision
    return outside + states, inside


def head_bytes(shape: Shape, s: Setting) -> float:
    """The output head's share at its peak: one slice of logits, and the gradient of the hidden states."""
    tokens = s.row_tokens * s.trained_share
    sliced = min(tokens, 16384)
    power = 1 << (max(1, int(sliced * shape.hidden / shape.vocab)) - 1).bit_length()
    return 2 * min(power, sliced) * shape.vocab + tokens * shape.hidden * (2 * 3)


def activation_bytes(shape: Shape, s: Setting) -> float:
    """Highest sum of kept and passing activations in a step of `s.row_tokens` tokens."""
    outside, inside = layer_bytes_per_token(shape, s)
    tokens = s.row_tokens
    if s.tile_mlp and tokens > s.tile_mlp:
        layer = tokens * outside + s.tile_mlp * inside
        passing = tokens * 2 * 3.5 * shape.hidden + s.tile_mlp * 2 * shape.intermediate
    else:
        layer = tokens * (outside + inside)
        passing = tokens * 2 * (2 * shape.hidden + shape.intermediate)
    if adapts_experts(shape, s):  # the sums, and the gradient of one
        layer += 2 * shape.stack
        passing += 2 * shape.stack
    passing += 2 * tokens * shape.scan_bytes * 2 / s.number_bytes
    kept = 0.0 if s.offload else tokens * 2 * shape.hidden
    if s.offload and s.backend == "hf":  # one layer's input on its way out, one on its way back
        passing += 2 * tokens * 2 * shape.hidden
    whole = shape.layers - s.recompute
    body = max(whole, 1) * layer + s.recompute * kept + passing
    largest = max(i * o for _, i, o in shape.linears)
    unpacked = {"nf4": 2 * largest, "fp8": largest + tokens * shape.intermediate}.get(s.quantize, 0)
    return max(body + unpacked, whole * layer + s.recompute * kept + head_bytes(shape, s))  # or at the head


def peak_gib(shape: Shape, s: Setting) -> float:
    """Highest allocated memory of a training step, GiB."""
    workspace = (WORKSPACE_GIB if s.backend == "hf" else UNSLOTH_GIB) + s.process_gib
    state, kept = state_bytes(shape, s), activation_bytes(shape, s) * s.number_bytes / 2
    # Shares of gradients come as activations go. As the last ones come, the embedding's is there in 16 and in 32 bits
    # (its weights too, and the head: 34.9 GiB planned and measured, 8B, rows of 856 tokens, four H100).
    later = s.sharded and s.params.method in ("full", "freeze") and not (s.accumulates or s.params.cpu_offload)
    coming = 4 * trained_parameters(shape, s) / s.shards * later
    last = (8 * shape.embedding + 2 * shape.head) * (s.params.method == "full") * s.number_bytes / 2
    return max(state + kept - coming, state - gathered_bytes(shape, s) + last) / GIB + workspace


def offloaded_gib(shape: Shape, s: Setting) -> float:
    """Host memory of a process that the inputs of offloaded layers, and with cpu_offload its share, wait in, GiB."""
    share = whole_state_bytes(shape, s) / s.shards if s.sharded and s.params.cpu_offload else 0.0
    return (s.offload * s.recompute * s.row_tokens * shape.hidden * 2 + share) / GIB


def new_share(params: TrainingParams) -> float:
    """Share of a run's rows whose references are asked, the first time; 1 if it may end early, or asks for none."""
    asks = getattr(params, "loss", "") in REFERENCE and not (params.max_steps or params.max_minutes)
    return 1 / max(1.0, params.epochs) if asks else 1.0


def row_seconds(shape: Shape, s: Setting, card: Card, mean_square: float) -> tuple[float, bool]:
    """(seconds for a micro-batch of `s.row_tokens` tokens forward and back, as a mean; whether launches decide them).

    mean_square: Σ length² / Σ length over the documents, the attention span a token meets on average (twice over).
    """
    tokens = s.row_tokens
    full = s.params.method == "full"
    loss = getattr(s.params, "loss", "")
    passes = BESIDE.get(loss, 0) + REFERENCE.get(loss, 0) * new_share(s.params)
    again = s.recompute / shape.layers
    summed = adapts_experts(shape, s)  # then the gradient of the sums is computed too
    matrix = 2 * shape.linear_parameters * ((3 if full else 2) + again + passes)
    matrix += 2 * shape.expert_parameters * shape.routed * ((3 if full or summed else 2) + again + passes)
    head = 2 * shape.hidden * shape.vocab * s.trained_share * (2 + full + (s.params.stage != "sft") + passes)
    attention = 2 * mean_square * shape.query * shape.layers * (1 + 2.5 + again + passes)
    rate = card.tflops * 1e12
    matrix /= FP8_RATE if s.quantize == "fp8" else 1
    compute = tokens * ((matrix + head) / MATRIX_SHARE + attention / ATTENTION_SHARE) / rate
    outside, inside = layer_bytes_per_token(shape, s)
    traffic = tokens * shape.layers * (outside + inside) * (3.2 + 1.2 * again + passes) * (1 if s.fused else 1.6)
    if s.quantize == "nf4":
        unpack = UNPACK_BYTES if card.capability else UNPACK_CPU_BYTES
        traffic += shape.linear_parameters * unpack * (2 + again + passes)
    if s.quantize == "fp8":  # numbers become codes, and weights are turned once
        numbers = sum(i * (1 + again + passes) + o for _, i, o in shape.linears)
        traffic += 3 * tokens * numbers + 2 * shape.linear_parameters
    traffic += summed * shape.expert_parameters * s.number_bytes * (8 + 2 * again + 2 * passes)
    traffic += tokens * shape.recurrent * shape.scan_bytes * (6 + 2 * again + 2 * passes)
    moving = traffic / (card.gb_s * 1e9 * 0.9)
    seconds = compute + moving
    if s.offload and s.backend == "hf":
        seconds += 2 * tokens * shape.layers * 2 * shape.hidden / (card.host_gb_s * 1e9)
    if s.tile_mlp and tokens > s.tile_mlp:  # the MLP's forward once more, and its slices copied together
        seconds += tokens * 2 * 3 * shape.hidden * shape.intermediate * shape.layers * 1.4 / rate / MATRIX_SHARE
    if card.capability is None:
        return seconds, False
    launch = shape.layers * (GRAPH_S if s.graphs else LAUNCH_S)[s.quantize] * (1 + passes / 3)
    if s.backend == "unsloth":
        seconds *= UNSLOTH_TIME  # and its recomputed layers are launched in what ours take once
    else:
        launch *= 1 + again * LAUNCH_AGAIN
    # The longer of the two; where they are close neither hides the other.
    return (seconds**4 + launch**4) ** 0.25, launch > 0.8 * seconds


def update_seconds(shape: Shape, s: Setting, card: Card, rows: int) -> float:
    """Seconds of an optimizer step besides its rows: it reads and writes its state. With cpu_offload it does so in host
    memory, and with each row weights come over twice and gradients go back."""
    bytes_moved = trained_parameters(shape, s) * 30 / (s.shards if s.sharded else 1)
    if not (s.sharded and s.params.cpu_offload):
        return bytes_moved / (card.gb_s * 1e9)
    over = rows * (2 * 4 * shape.parameters + 4 * trained_parameters(shape, s)) / s.shards
    return bytes_moved / (CPU.gb_s * 1e9) + over / (card.host_gb_s * 1e9)


def grades_of(layers: int) -> list[tuple[int, bool, int]]:
    """(layers checkpointed, inputs offloaded to host memory, tokens of the MLP at a time), cheapest in time first."""
    return [*((layers * part // 4, False, 0) for part in range(5)), (layers, True, 0), (layers, True, TILE)]


def offload_fits(shape: Shape, s: Setting, card: Card, world: int = 1) -> bool:
    """Whether host memory has room for what every process on the machine offloads; of several machines, on this one."""
    offloaded, here = offloaded_gib(shape, s), min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    return not offloaded or not card.host_gib or here * (offloaded + HOST_GIB) <= card.host_gib


@dataclass(frozen=True)
class Option:
    """One setting with what it would need and take."""

    setting: Setting
    accumulation: int
    peak_gib: float
    need_gib: float
    tokens_per_s: float
    fits: bool
    spread: float  # half-width of the time estimate, as a share of it
    offloaded_gib: float = 0.0  # host memory that layer inputs take

    @property
    def recompute_text(self) -> str:
        s = self.setting
        if not s.recompute:
            return "none"
        where = f", inputs in host memory ({self.offloaded_gib:.1f} GiB)" if s.offload else ""
        return f"{s.recompute} layers{where}" + (f", MLP by {s.tile_mlp}" if s.tile_mlp else "")


class DoesNotFit(TunebookError):
    """Nothing that these parameters allow fits the GPU. need_gib: what the smallest setting would take."""

    def __init__(self, message: str, need_gib: float) -> None:
        super().__init__(message)
        self.need_gib = need_gib
