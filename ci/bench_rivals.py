"""The other recipes of the GPU benchmark: TRL and Unsloth as their own guides use them. One arm a process.

    python ci/bench_rivals.py ARM --model DIR --data DIR [--steps N] [--turn FILE]

Arms: trl_sft (tutorial: padded, checkpointing), unsloth_sft (as its notebook ships), unsloth_sft_packed, trl_orpo,
unsloth_orpo, unsloth_context (memory of one long row at several lengths, and the longest in each of --gib).
Every arm prints JSON lines with non-padding tokens/s after warm-up and the peak of allocated memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
}.items():
    os.environ.setdefault(name, value)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def emit(**values) -> None:
    print("RESULT " + json.dumps(values), flush=True)


def wait_turn(turn: str | None) -> None:
    """Imports are done; go on when the file appears, so that only one arm at a time has the card."""
    while turn and not Path(turn).exists():
        time.sleep(0.1)


def chats(data: str) -> list[list[dict]]:
    """alpaca_en_demo.json as conversations."""
    rows = json.loads((Path(data) / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    return [
        [
            {"role": "user", "content": r["instruction"] + ("\n" + r["input"] if r.get("input") else "")},
            {"role": "assistant", "content": r["output"]},
        ]
        for r in rows
    ]


def pairs(data: str) -> list[dict]:
    """dpo_en_demo.json as prompt, chosen and rejected messages."""

    def message(m):
        return {"role": ROLES[m["from"]], "content": m["value"]}

    rows = json.loads((Path(data) / "dpo_en_demo.json").read_text(encoding="utf-8"))
    return [
        {
            "prompt": [message(m) for m in r["conversations"]],
            "chosen": [message(r["chosen"])],
            "rejected": [message(r["rejected"])],
        }
        for r in rows
    ]


def load(arm: str, path: str, length: int, alpha: int):
    """The model in NF4 (a mixture of experts in bf16) with a rank-16 adapter on the seven linear layers, the way each
    library's guide loads it. UNSLOTH_LOADER: Unsloth's class, FastModel for architectures that the other fails at."""
    import torch

    if arm.startswith("unsloth"):
        import unsloth

        kind = getattr(unsloth, os.environ.get("UNSLOTH_LOADER", "FastLanguageModel"))
        model, tokenizer = kind.from_pretrained(path, max_seq_length=length, load_in_4bit=not experts(path), dtype=None)
        model = kind.get_peft_model(
            model,
            r=16,
            lora_alpha=alpha,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing="unsloth",
            random_state=3407,
        )
        return model, tokenizer, None
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
    )
    return (
        model,
        AutoTokenizer.from_pretrained(path),
        LoraConfig(r=16, lora_alpha=alpha, lora_dropout=0, task_type="CAUSAL_LM", target_modules=TARGETS),
    )


def experts(path: str) -> bool:
    """Whether the model is a mixture: bitsandbytes packs no stacks of experts, Unsloth's guide trains them on bf16."""
    config = json.loads((Path(path) / "config.json").read_text())
    return any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


class Clock:
    """A trainer callback that notes when each optimizer step ended."""

    def __new__(cls):
        import torch
        from transformers import TrainerCallback

        class Stepped(TrainerCallback):
            def __init__(self):
                self.times = []

            def on_step_end(self, args, state, control, **kwargs):
                torch.cuda.synchronize()
                self.times.append(time.time())

        return Stepped()


def sft(arm: str, path: str, data: str, steps: int) -> None:
    import torch
    from trl import SFTConfig, SFTTrainer

    from datasets import Dataset

    packed, unsloth = arm.endswith("packed"), arm.startswith("unsloth")
    # Unsloth lays a batch's packed rows behind each other, and its loss cuts what is longer than max_seq_length.
    model, tokenizer, adapter = load(arm, path, 8192 if packed else 2048, 16)
    batch, accumulation = (4, 4) if packed else (2, 4)
    if experts(path):
        batch, accumulation = batch // 2, 2 * accumulation
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        warmup_steps=2,
        learning_rate=2e-4,
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        bf16=True,
        packing=packed,
        max_length=2048,
        report_to="none",
        dataset_text_field="text",
        save_strategy="no",
        gradient_checkpointing=not unsloth,
        gradient_checkpointing_kwargs=None if unsloth else {"use_reentrant": False},
    )
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in chats(data)]
    clock, seen = Clock(), []
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        args=args,
        callbacks=[clock],
        **({"peft_config": adapter} if adapter else {}),
    )
    collate = trainer.data_collator

    def counting(rows):
        out = collate(rows)
        mask = out.get("attention_mask")
        seen.append(int(mask.sum()) if mask is not None else int(out["input_ids"].numel()))
        return out

    trainer.data_collator = counting
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    warm = max(3, len(clock.times) - 4)  # new shapes compile for up to eight steps
    seconds = clock.times[-1] - clock.times[warm - 1]
    useful = sum(seen[warm * accumulation : len(clock.times) * accumulation])
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    emit(
        arm=arm,
        tokens_per_s=round(useful / seconds),
        steps=len(clock.times),
        peak_gib=gib(),
        losses=[losses[0], losses[-1]],
        batch=batch,
        accumulation=accumulation,
    )


def orpo(arm: str, path: str, data: str, steps: int) -> None:
    import torch
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from datasets import Dataset

    unsloth = arm.startswith("unsloth")
    model, tokenizer, adapter = load(arm, path, 1024, 32)
    rows = pairs(data)

    def length(messages):
        return min(1024, len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]))

    mean = sum(length(r["prompt"] + r["chosen"]) + length(r["prompt"] + r["rejected"]) for r in rows) / len(rows)
    args = ORPOConfig(
        output_dir=tempfile.mkdtemp(),
        learning_rate=8e-6,
        beta=0.1,
        lr_scheduler_type="linear",
        max_length=1024,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        optim="paged_adamw_8bit",
        max_steps=steps,
        logging_steps=1,
        warmup_steps=2,
        report_to="none",
        bf16=True,
        save_strategy="no",
        gradient_checkpointing=not unsloth,
        gradient_checkpointing_kwargs=None if unsloth else {"use_reentrant": False},
    )
    clock = Clock()
    trainer = ORPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
        **({"peft_config": adapter} if adapter else {}),
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    warm = max(2, len(clock.times) - 4)
    seconds = (clock.times[-1] - clock.times[warm - 1]) / (len(clock.times) - warm)
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    emit(
        arm=arm,
        tokens_per_s=round(8 * mean / seconds),
        pair_tokens=round(mean),
        peak_gib=gib(),
        losses=[losses[0], losses[-1]],
        nan=any(x != x for x in losses),
    )


def context(path: str, limits: list[float]) -> None:
    """Unsloth on one row: peak at some lengths, then the longest that trains within each limit."""
    import torch

    model, _, _ = load("unsloth", path, 400_000, 16)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(tokens: int) -> float:
        ids = torch.randint(3, 40_000, (1, tokens), device="cuda")
        began = time.time()
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return time.time() - began

    body = model.get_base_model().model

    def two_layers(tokens: int) -> float:
        whole, body.layers = body.layers, body.layers[:2]
        try:
            return step(tokens)
        finally:
            body.layers = whole

    longest_rows("unsloth", step, limits, longest_whole=110_000, few_layers=two_layers)


def longest_rows(
    arm: str,
    step,
    limits: list[float],
    few_layers,
    longest_whole: int,
    lengths=(2048, 8192, 16384, 32768),
    tries: int = 3,
) -> None:
    """Peak memory of `step(tokens)` at some lengths, the straight line through them, and rows tried at what it says.

    A ballast tensor leaves exactly the limit free, because some libraries size their buffers by what is free. Rows over
    `longest_whole`, whose step would take minutes, run through `few_layers(tokens)`: every weight is in its place, and
    as layer inputs are offloaded to host memory, two layers need what all of them need.
    """
    import torch

    points = []
    for tokens in lengths:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = step(tokens)
        points.append((tokens, torch.cuda.max_memory_allocated() / 2**30))
        emit(
            arm=arm + "_context",
            tokens=tokens,
            peak_gib=round(points[-1][1], 3),
            reserved_gib=round(torch.cuda.max_memory_reserved() / 2**30, 3),
            seconds=round(seconds, 2),
        )
    (a, low), (b, high) = points[-2:]
    slope = (high - low) / (b - a)
    for limit in limits:
        promise = int(a + (limit * 0.97 - low) / slope)
        if promise > longest_whole:
            for _ in range(tries):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                try:
                    few_layers(promise)
                except RuntimeError as error:  # out of memory, or a kernel that cannot take so long a row
                    how, promise = f"failed: {' '.join(str(error).split())[:200]}", int(promise * 0.95)
                    continue
                peak = torch.cuda.max_memory_allocated() / 2**30
                how = f"all weights in memory and two of the layers run: {peak:.2f} GiB"
                if peak <= limit:
                    break
                promise = int(promise - (peak - limit + 0.05) / slope)
            emit(arm=arm + "_context", limit_gib=limit, longest=promise, how=how)
            continue
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        held = torch.cuda.memory_reserved()
        ballast = torch.empty(int(total * 0.985 - limit * 2**30 - 0.8 * 2**30), dtype=torch.uint8, device="cuda")
        torch.cuda.set_per_process_memory_fraction(min(1.0, (ballast.numel() + limit * 2**30) / total))
        best, tokens = 0, promise if promise < 100_000 else int(promise * 0.93)  # long rows leave larger gaps behind
        for _ in range(tries):
            try:
                step(tokens)
                best = tokens
                break  # one success is enough: another step takes up to minutes
            except torch.cuda.OutOfMemoryError:
                tokens = int(tokens * 0.92)
            torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        del ballast
        emit(
            arm=arm + "_context",
            limit_gib=limit,
            longest=best,
            promised=promise,
            how="trained under the limit",
            held_gib=round(held / 2**30, 2),
        )


def gib() -> float:
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--gib", default="15,24,40,80")
    parser.add_argument("--turn")
    given = parser.parse_args()
    wait_turn(given.turn)
    if given.arm.endswith("context"):
        context(given.model, [float(g) for g in given.gib.split(",")])
    elif "orpo" in given.arm:
        orpo(given.arm, given.model, given.data, given.steps)
    else:
        sft(given.arm, given.model, given.data, given.steps)


if __name__ == "__main__":
    sys.exit(main())
