"""Ten steps of every published recipe on one GPU (or several), with random weights of the real size and made-up rows.

    python ci/bench_recipes.py OUT --tokenizer DIR [--only NAME,…] [--steps 10] [--gpus 4] [--tiny]

Needs no network: models are made from the published configurations (the vocabulary as long as the tokenizer's where
that is longer), rows are of the shape and about the length of the published sets, and all else is as the recipe says;
what differs on the machine stands in each line. One JSON line a recipe goes into OUT/results.jsonl: tokens/s over the
steps after the third, losses, the peak and what the planner said before. A job that does not fit is a line with the
planner's own refusal. `--tiny` is a dry run on small models, for a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "ci")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import bench_gpu
from bench_probe import LLAMA, TINY

WARM = 3
ROWS = 3000
SIZES = {  # part of the recipe's model name → (class, sizes); the first that fits
    "mistral": ("Mistral", LLAMA | {"vocab_size": 32000, "sliding_window": 4096}),
    "llama-2": ("Llama", LLAMA | {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32}),
    "llama-3": ("Llama", LLAMA),
}
WORDS = (ROOT / "datasets" / "general_text.jsonl").read_text(encoding="utf-8").split()[:4000]  # of real lengths


def make(model: str, folder: Path, tokenizer: str, tiny: bool) -> Path:
    """The random base for a recipe's model, in bf16, made once; the one before it is removed for its room."""
    import torch
    import transformers

    name = next(part for part in SIZES if part in model.lower())
    made = folder / name
    if (made / "config.json").is_file():
        return made
    shutil.rmtree(folder, ignore_errors=True)
    kind, sizes = SIZES[name]
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    sizes = (TINY | {"sliding_window": 4096} if kind == "Mistral" else TINY) if tiny else sizes
    sizes = sizes | {"vocab_size": max(sizes["vocab_size"], len(loaded)), "max_position_embeddings": 8192}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=1, eos_token_id=2)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(made, max_shard_size="4GB")
    torch.set_default_dtype(torch.float32)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    loaded.save_pretrained(made)
    return made


def rows(recipe: dict, folder: Path, count: int) -> dict:
    """Made-up rows of the shape that the recipe reads; the data parameters that name them."""
    draw, data = random.Random(0), recipe["data"]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))

    def row(number: int) -> dict:
        asked = f"{number}: {text(10, 60)}?"
        if "orpo" in recipe:
            sides = {"chosen": text(60, 300), "rejected": text(60, 300)}
            turns = {side: [{"role": "assistant", "content": said}] for side, said in sides.items()}
            return {"prompt": asked, **turns}
        if data.format == "context_qa":
            return {"context": text(20, 80), "question": asked, "answer": text(10, 40)}
        if not data.chat_template:
            return {"text": text(200, 900)}
        if data.chat_template == "chatml":
            said = {"human": asked, "gpt": text(150, 500)}
            return {"conversations": [{"from": who, "value": what} for who, what in said.items()]}
        return {"instruction": asked, "input": "", "output": text(20, 250)}

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row(number)) + "\n" for number in range(count))
    return {"dataset": str(folder / "rows.jsonl"), "dataset_info": "", "caps": "", "max_rows": 0}


def bench(name: str, given: argparse.Namespace, out: Path) -> dict:
    """One recipe: its data stage on made-up rows, then its training as its user would start it."""
    from helpers import machine, params, runs
    from helpers.data import prepare

    recipe = params.recipe(name)
    stage = "orpo" if "orpo" in recipe else "sft"
    base = make(recipe["data"].model, Path(given.models), given.tokenizer, given.tiny)
    data = recipe["data"]
    changed = rows(recipe, out / "rows" / name, 60 if given.tiny else ROWS)
    changed |= {"eval_share": 0.0, "test_share": 0.0, "preference_eval_share": 0.0, "synthetic": "none"}
    changed |= {"replay_dataset": "", "replay_share": 0.0, "model": str(base), "run": name}
    for key, value in changed.items():
        setattr(data, key, value)
    job = prepare.open(data)
    for step in ("read", "generate", "clean", "mix", "split", "template", "vocabulary", "encode", "pairs", "finish"):
        getattr(job, step)()
    values = {"max_steps": given.steps, "save_steps": given.steps, "loggers": "", "export_check": False}
    values |= {"early_stopping": 0, "best_checkpoint": False, "eval_steps": 0, "warmup_steps": 1}
    if given.tiny:
        values |= {"optimizer": "adamw", "precision": "auto", "batch_size": 2}
    for key, value in {**values, "run": name}.items():
        setattr(recipe[stage], key, value)
    began, gpu = time.time(), machine.gpu()
    line = {"recipe": name, "stage": stage, "gpu": gpu.name if gpu else "none", "gpus": given.gpus}
    done, said = bench_gpu.finish(bench_gpu.start_job(stage, recipe[stage].changed(), given.gpus))
    if done:
        return {**line, "refused": " ".join(said.split())[-900:]}
    manifest = runs.load(name, stage, verify=False)
    log = [json.loads(text) for text in (manifest.path / "log.jsonl").read_text().splitlines()]
    log = [entry for entry in log if "loss" in entry]
    first, last, plan = log[min(WARM, len(log) - 1) - 1], log[-1], manifest.data["plan"]
    spent = max(last["seconds"] - first["seconds"], 1e-9)
    return {
        **line,
        "steps": len(log),
        "tokens_per_s": round((last["trained_tokens"] - first["trained_tokens"]) / spent),
        "losses": [round(entry["loss"], 4) for entry in log],
        "peak_gib": manifest.metrics["peak_gib"],
        "planned_gib": bench_gpu.plan_prediction(plan, manifest),
        "planner_errors": plan["errors"],
        **{key: plan[key] for key in ("row_tokens", "accumulation", "recompute", "attention", "backend", "batch_size")},
        "method": recipe[stage].method,
        "changed": {key: value for key, value in values.items() if value != getattr(params.recipe(name)[stage], key)},
        "model": {"weights": "random", "as": recipe["data"].model, "like": params.recipe(name)["data"].model},
        "wall_s": round(time.time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--tokenizer", required=True, help="folder of any tokenizer")
    parser.add_argument("--only", default="", help="recipes, separated by commas; default: every published one")
    parser.add_argument("--models", default="/tmp/bench-recipes", help="where the random weights go, 16 GB at a time")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    out = Path(given.out).resolve()
    os.environ["TUNEBOOK_RUNS"] = str(out / "runs")
    sources = sorted((ROOT / "notebooks" / "recipes").glob("*/data.yaml"), key=lambda file: file.parent.name)
    published = [file.parent.name for file in sources if "\n# Source: " in "\n" + file.read_text()]
    kept = [name for name in published if name != "llama-factory-merge"]  # trains what llama-factory-lora trains
    kept.sort(key=lambda name: next(part for part in SIZES if part in bench_model(name)))  # one base at a time
    for name in given.only.split(",") if given.only else kept:
        try:
            line = bench(name, given, out)
        except Exception as error:
            line = {"recipe": name, "failed": f"{type(error).__name__}: {error}"[:900]}
        print(json.dumps(line), flush=True)
        with open(out / "results.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        shutil.rmtree(out / "runs" / name, ignore_errors=True)


def bench_model(name: str) -> str:
    from helpers import params

    return params.recipe(name)["data"].model.lower()


if __name__ == "__main__":
    main()
