"""What the GPU benchmark measures inside one process: the longest row within a memory limit, and the planner's guesses.

`ci/bench_gpu.py context` and `planner` call it; models are random and never touch the disk.
"""

from __future__ import annotations

import argparse
import time

import bench_rivals

LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 49152,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(sizes: dict):
    from transformers import LlamaConfig

    return LlamaConfig(
        **sizes,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
    )


def random_model(sizes: dict, quantize: str, rank: int, method: str = "lora"):
    """A random Llama on the GPU with its adapter and the fused arithmetic, without touching the disk."""
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from helpers.model import fused_lora, packed_attention

    packed_attention.register()
    config = llama(sizes)
    config._attn_implementation = packed_attention.FLASH
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if quantize == "nf4":
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                parent, leaf = name.rsplit(".", 1)
                four = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                four.weight = bnb.nn.Params4bit(
                    module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=four
                ).to("cuda")
                setattr(model.get_submodule(parent), leaf, four)
        model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=16, task_type="CAUSAL_LM", target_modules=bench_rivals.TARGETS)
    )
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    fused_lora.apply(model)
    torch.cuda.empty_cache()
    return model.train(), config


def row_of(lengths: list[int]) -> dict:
    import torch

    from helpers.model.packed_attention import row_tensors

    batch = row_tensors([{"input_ids": torch.randint(3, 40_000, (n,)).tolist()} for n in lengths])
    return {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}


def stepper(model):
    """step(row) → seconds of one micro-batch with its optimizer step, in bf16."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(batch: dict) -> float:
        torch.cuda.synchronize()
        began = time.time()
        with torch.autocast("cuda", torch.bfloat16):
            model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return time.time() - began

    return step


def context(given: argparse.Namespace) -> None:
    """The longest row that trains within 15, 24, 40 and 80 GiB, every layer checkpointed, offloaded and tiled."""
    from helpers.model import checkpointing
    from helpers.planner.cost_model import TILE

    model, _ = random_model(LLAMA, "nf4", 16)
    checkpointing.set_recompute(model, "all", offload=True, tile_mlp=TILE)
    step = stepper(model)
    body = model.get_base_model().model

    def two_layers(tokens: int) -> float:
        """A step of the first two layers, every weight in its place: with offloading each needs the same memory."""
        body.config.num_hidden_layers = 2
        try:
            return step(row_of([tokens]))
        finally:
            body.config.num_hidden_layers = len(body.layers)

    bench_rivals.longest_rows(
        "ours",
        lambda tokens: step(row_of([tokens])),
        [float(g) for g in given.gib.split(",")],
        two_layers,
        longest_whole=given.longest_whole,
        lengths=(2048, 16384, 32768, 49152),
    )


SIZES = {
    "135m": (576, 1536, 30, 9, 3, 49152),
    "360m": (960, 2560, 32, 15, 5, 49152),
    "1.7b": (2048, 8192, 24, 32, 32, 49152),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
# size, base, rank, longest document, documents, layers checkpointed, offload: none of them set the planner's constants
SETTINGS = [
    ("135m", "none", 32, 1400, 20, 0, False),
    ("135m", "nf4", 16, 2000, 10, 15, False),
    ("360m", "none", 16, 700, 40, 0, False),
    ("360m", "nf4", 32, 1200, 18, 0, False),
    ("1.7b", "none", 32, 3000, 5, 12, False),
    ("1.7b", "nf4", 16, 1600, 12, 0, False),
    ("1.7b", "nf4", 16, 6500, 4, 24, True),
    ("3b", "nf4", 16, 1800, 12, 7, False),
    ("3b", "none", 32, 800, 20, 0, False),
    ("3b", "none", 32, 5200, 5, 28, True),
    ("8b", "nf4", 32, 700, 24, 8, False),
    ("8b", "none", 16, 3200, 4, 16, False),
    ("8b", "none", 16, 1200, 10, 32, False),
    ("8b", "nf4", 64, 5000, 5, 32, True),
]
UNSLOTH_SETTINGS = [
    (10, 600),
    (4, 2500),
    (1, 9000),
    (16, 900),
]  # documents and tokens of each in one padded micro-batch of the 8B


def planner_unsloth(given: argparse.Namespace) -> None:
    """Predicted against measured peak and time of the Unsloth backend on the 8B model in 4 bits."""
    from pathlib import Path
    from types import SimpleNamespace

    from helpers import params
    from helpers.train import methods

    values = params.resolve("sft", {"run": "x", "backend": "unsloth", "rank": 16, "alpha": 16, "train_on": "all"})
    methods.import_first(values)
    import torch

    from helpers.model.layer_kinds import Shape
    from helpers.planner import cost_model
    from helpers.train.rows import padded_tensors

    card = cost_model.card_here()
    shape = Shape(llama(LLAMA))
    model, _ = methods.load_unsloth(SimpleNamespace(path=Path(given.model) / "nf4"), values)
    model.train()
    step = stepper(model)
    for documents, tokens in UNSLOTH_SETTINGS:
        setting = cost_model.Setting(
            documents * tokens, values, recompute=shape.layers, offload=True, backend="unsloth"
        )
        rows = []
        for length in (tokens, *(tokens * share // 100 for share in (93, 97, 103))):
            drawn = [torch.randint(3, 40_000, (length,)).tolist() for _ in range(documents)]
            batch = padded_tensors([{"input_ids": ids, "labels": ids} for ids in drawn], 0)
            rows.append({k: v.cuda() for k, v in batch.items()})
        measure(step, rows, shape, setting, card, tokens, size="8b", base="nf4", backend="unsloth", documents=documents)


def measure(step, rows: list[dict], shape, setting, card, mean_square: float, **about) -> None:
    """Print predicted and measured peak and seconds of one micro-batch (the median of four after one warm-up).

    rows: the micro-batch, then others like it. probed_error: how far the time of its second pass, by tokens, is from
    what the others take; that is what a training job's probing step goes by.
    """
    import torch

    from helpers.planner import cost_model

    torch.cuda.empty_cache()
    batch, *others = rows
    step(batch)
    torch.cuda.reset_peak_memory_stats()
    passes = [step(batch) for _ in range(4)]
    seconds = sorted(passes)[1]
    peak = torch.cuda.max_memory_allocated() / 2**30
    for row in others:  # an allocator that has met no row of this length yet would be timed too
        step(row)
    more = sum(step(row) for row in others)
    tokens = [row["input_ids"].numel() for row in rows]
    probed = passes[0] / tokens[0] * sum(tokens[1:]) / more - 1
    guess = cost_model.peak_gib(shape, setting), cost_model.row_seconds(shape, setting, card, mean_square)[0]
    bench_rivals.emit(
        arm="planner",
        **about,
        rank=setting.params.rank,
        tokens=setting.row_tokens,
        recompute=setting.recompute,
        offload=setting.offload,
        peak_gib=round(peak, 3),
        predicted_gib=round(guess[0], 3),
        peak_error=round(guess[0] / peak - 1, 4),
        seconds=round(seconds, 4),
        predicted_s=round(guess[1], 4),
        time_error=round(guess[1] / seconds - 1, 4),
        probed_error=round(probed, 4),
    )


def planner() -> None:
    """Predicted against measured peak and time of `SETTINGS`."""
    import gc
    import random

    import torch

    from helpers import params
    from helpers.model import checkpointing
    from helpers.model.layer_kinds import Shape
    from helpers.planner import cost_model

    card, draw, loaded = cost_model.card_here(), random.Random(7), None
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    for size, base, rank, longest, count, layers, offload in SETTINGS:
        if (size, base, rank) != loaded:
            model = step = None
            gc.collect()
            torch.cuda.empty_cache()
            sizes = dict(zip(names, SIZES[size], strict=True))
            model, config = random_model({**sizes, "tie_word_embeddings": size in ("135m", "360m", "1.7b")}, base, rank)
            loaded, step = (size, base, rank), stepper(model)
        checkpointing.set_recompute(model, layers, offload)
        lengths, *others = ([draw.randint(longest // 3, longest) for _ in range(count)] for _ in range(4))
        rows = [row_of(lengths), *map(row_of, others)]
        setting = cost_model.Setting(
            sum(lengths),
            params.SftParams(method="qlora" if base == "nf4" else "lora", rank=rank, train_on="all"),
            recompute=layers,
            offload=offload,
        )
        measure(
            step,
            rows,
            Shape(config),
            setting,
            card,
            sum(n * n for n in lengths) / sum(lengths),
            size=size,
            base=base,
            backend="hf",
            documents=count,
        )
