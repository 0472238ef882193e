"""The GPU benchmark: this project's own training jobs beside the rivals' recipes, every arm in one run.

    python ci/bench_gpu.py all OUT --tokenizer DIR --data DIR [--gpus 2]   every arm, into OUT/results.jsonl
    python ci/bench_gpu.py make MODEL --tokenizer DIR                        the random 8B Llama, 16-bit and NF4
    python ci/bench_gpu.py sft|orpo|context|planner ...                      one of our arms (all calls these)

A random-init Llama-3.1-8B, rank 16 on all linear layers, LLaMA-Factory's alpaca_en_demo.json and dpo_en_demo.json:
weights do not change speed. Our arms are whole jobs (`python -m helpers.train`) with logging and checkpoints; their
tokens/s are non-padding tokens over the wall time of the steps after the third, checkpoint included. `--tiny` makes a
dry run of everything that a CPU can do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "ci")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import bench_probe
import bench_rivals

WARM = 3
LOSSES = ("orpo", "dpo", "kto", "simpo")  # DPO's and KTO's reference counts in their time, not in their tokens
RIVALS = ("unsloth_sft_packed", "unsloth_orpo", "unsloth_sft", "unsloth_context", "trl_sft", "trl_orpo")


def make(model: Path, tokenizer: str, tiny: bool, only_16: bool = False) -> None:
    """Write MODEL/16 (bf16) and, on a GPU, MODEL/nf4 (what the rivals load)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

    if (model / "16" / "config.json").is_file():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        whole = LlamaForCausalLM(bench_probe.llama(bench_probe.TINY if tiny else bench_probe.LLAMA))
    torch.set_default_dtype(torch.float32)
    whole.save_pretrained(model / "16", max_shard_size="4GB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(model / "16")
    if device == "cuda" and not only_16:
        del whole
        torch.cuda.empty_cache()
        four = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        AutoModelForCausalLM.from_pretrained(
            model / "16", quantization_config=four, dtype=torch.bfloat16, device_map={"": 0}
        ).save_pretrained(model / "nf4")
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(model / "nf4")


def data_stage(run: str, model: str, data: str, most: int) -> None:
    """A finished data stage of the two demo sets, rendered by the model's own template."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from helpers import params, runs
    from helpers.model.loading import load_tokenizer, template_hash, tokenizer_hash

    if (runs.folder(run, "data") / "manifest.json").is_file():
        return
    tokenizer = load_tokenizer(model)

    def ids(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)

    rows = [
        {"id": f"a{n}", "input_ids": i, "completion_mask": [1] * len(i)}
        for n, c in enumerate(bench_rivals.chats(data)[:most])
        for i in [ids(c)[:2048]]
    ]
    pairs = []
    for n, p in enumerate(bench_rivals.pairs(data)[:most]):
        prompt = ids(p["prompt"], add_generation_prompt=True)
        pairs.append(
            {
                "id": f"p{n}",
                "prompt_ids": prompt,
                **{f"{side}_ids": ids(p["prompt"] + p[side])[len(prompt) :] for side in ("chosen", "rejected")},
            }
        )
    stage = runs.stage("data", params.resolve("data", {"run": run, "model": model}))
    stage.begin()
    parquet.write_table(pa.Table.from_pylist(rows), stage.path / "train.parquet")
    parquet.write_table(pa.Table.from_pylist(pairs), stage.path / "preference.parquet")
    stage.finish(
        {"rows": len(rows)},
        template_hash=template_hash(tokenizer),
        tokenizer_hash=tokenizer_hash(tokenizer),
        model={"name": model, "path": model, "revision": "", "origin": "folder"},
    )


def job(arm: str, stage: str, given: argparse.Namespace, processes: int = 1, killed_on: int = 0, **changes) -> None:
    """One whole training job in its own process(es); prints its speed, peak, losses and the planner's errors.

    killed_on: begin on that many GPUs, kill it after its first checkpoint, and resume with `processes`.
    """
    from helpers import params, runs

    run = f"bench-{arm}"
    values = {
        "run": run,
        "rank": 16,
        "alpha": 16,
        "schedule": "linear",
        "warmup_ratio": 0.1,
        "epochs": 100.0,
        "max_steps": given.steps,
        "save_steps": max(1, given.steps // 2),
        "batch_size": 333 if stage == "sft" else 8,
        "learning_rate": 2e-4,
        "best_checkpoint": False,
        "export_check": False,
        **changes,
    }
    values |= (
        {"train_on": "all"}
        if stage == "sft"
        else {"start_from": "base", "beta": 0.1, "max_length": 1024, "learning_rate": 8e-6}
    )
    if given.tiny:
        values |= {"batch_size": 4, "max_length": 4096} if stage == "orpo" else {"batch_size": 4}
    data_stage(run, str(Path(given.model) / "16"), given.data, 24 if given.tiny else given.rows)
    params.resolve(stage, values)
    began = time.time()
    if killed_on:
        kill_after_checkpoint(stage, values, killed_on)
    done, said = finish(start_job(stage, values, processes))
    if done:
        bench_rivals.emit(arm=arm, failed=" ".join(said.split())[-1500:])
        return
    lines = [json.loads(line) for line in (runs.folder(run, stage) / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    first, last = lines[min(WARM, len(lines) - 1) - 1], lines[-1]
    manifest = runs.load(run, stage, verify=False)  # 16 GB would be hashed once more
    plan = manifest.data["plan"]
    bench_rivals.emit(
        arm=arm,
        tokens_per_s=round(
            (last["trained_tokens"] - first["trained_tokens"]) / max(last["seconds"] - first["seconds"], 1e-9)
        ),
        tokens_per_s_median_step=sorted(line["tokens_per_s"] for line in lines[WARM:])[(len(lines) - WARM) // 2]
        if len(lines) > WARM
        else None,
        processes=processes,
        **({"killed_on": killed_on, "went_on": "Resuming from checkpoint" in said} if killed_on else {}),
        steps=len(lines),
        batch_size=values["batch_size"],
        row_tokens=plan["row_tokens"],
        accumulation=plan["accumulation"],
        recompute=plan["recompute"],
        # Another program's memory on the GPU shows here alone: the plan counts with what is free.
        checkpointing=(plan["reason"].partition("Activation checkpointing: ")[2].partition(". ")[0]),
        backend=plan["backend"],
        peak_gib=manifest.metrics["peak_gib"],
        predicted_gib=plan_prediction(plan, manifest),
        losses=[round(line["loss"], 4) for line in lines[:6]],
        last_loss=round(last["loss"], 4),
        nan=any(line["loss"] != line["loss"] for line in lines),
        planner_errors=plan["errors"],
        wall_s=round(time.time() - began, 1),
        step_s=(step_s := [round(b["seconds"] - a["seconds"], 2) for a, b in itertools.pairwise(lines)]),
        **parts(lines, step_s, int(values["save_steps"])),
        sharded=next((note for note in manifest.data["notes"] if note.startswith("sharded over")), ""),
        left_out=manifest.data["data_counts"]["train"].get("left out"),
        **(merges(run) if given.merges else {}),
    )


def merges(run: str) -> dict:
    """What merging the run's adapter costs, as notebook 04 measures it: each merge against the trained model."""
    import dataclasses

    from helpers import params
    from helpers.gguf import export

    began = time.time()
    kept = {"run": run, "outputs": "merged", "fidelity_tokens": 2000, "task_questions": 0, "again": True}
    exported = export.open(params.resolve("gguf", kept))
    exported.merge()
    found = [dataclasses.asdict(m) for m in exported.merges]
    return {"merges": found, "merges_s": round(time.time() - began, 1)}


def parts(lines: list[dict], step_s: list[float], save: int) -> dict:
    """Where the mean over a job differs from its median step: tokens/s without the steps that wait for a checkpoint of
    the step before, and what such a step takes more than its tokens would."""
    steps = [
        (b["step"], b["trained_tokens"] - a["trained_tokens"], s)
        for (a, b), s in zip(itertools.pairwise(lines), step_s, strict=True)
    ][WARM - 1 :]
    after = [step for step in steps if (step[0] - 1) % save == 0]
    plain = [step for step in steps if (step[0] - 1) % save]
    if not plain:
        return {}
    rate = sum(tokens for _, tokens, _ in plain) / max(sum(seconds for *_, seconds in plain), 1e-9)
    return {
        "tokens_per_s_no_checkpoint": round(rate),
        "checkpoint_s": [round(seconds - tokens / rate, 2) for _, tokens, seconds in after],
        "step_tokens_per_s": [round(tokens / max(seconds, 1e-9)) for _, tokens, seconds in steps],
    }


def start_job(stage: str, values: dict, processes: int) -> subprocess.Popen:
    """A job as its user would start it; its output goes to a file."""
    command = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if processes > 1
        else [sys.executable]
    )
    if limits := os.environ.get("BENCH_LIMITS"):  # of ci/limited.py
        command += [str(ROOT / "ci" / "limited.py"), *limits.split()]
    command += ["-m", "helpers.train", "--stage", stage, *(x for k, v in values.items() for x in ("-p", k, str(v)))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the child writes
    child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
    child.log = log
    return child


def finish(child: subprocess.Popen) -> tuple[int, str]:
    """Exit status and output of a job when it has ended."""
    status = child.wait()
    child.log.seek(0)
    return status, child.log.read().decode(errors="replace")


def kill_after_checkpoint(stage: str, values: dict, processes: int) -> None:
    """Start the job and kill every process of it once its first checkpoint is whole."""
    import psutil

    from helpers import runs

    child = start_job(stage, values, processes)
    sealed = runs.folder(values["run"], stage) / "checkpoints" / f"checkpoint-{values['save_steps']}" / "complete.json"
    while child.poll() is None and not sealed.exists():
        time.sleep(0.05)
    if child.poll() is None:
        starter = psutil.Process(child.pid)
        for process in [*starter.children(recursive=True), starter]:  # torchrun gives each process a session of its own
            process.kill()
    finish(child)


def plan_prediction(plan: dict, manifest) -> float:
    return round(manifest.metrics["peak_gib"] * (1 + plan["errors"].get("peak_gib", 0)), 2)


def run_all(given: argparse.Namespace) -> None:
    """Every arm, one GPU each where there are two, then the arms that need two; results collected as they come."""
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    results = out / "results.jsonl"

    def start(name: str, gpu: str, *command: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": gpu,
            "TUNEBOOK_RUNS": str(Path(given.model) / "runs"),
            "PYTHONUNBUFFERED": "1",
        }
        log = open(out / f"{name}.log", "w")  # noqa: SIM115  open as long as the child writes
        return subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
        )

    def collect(name: str) -> None:
        found = [
            line[7:]
            for line in (out / f"{name}.log").read_text(errors="replace").splitlines()
            if line.startswith("RESULT ")
        ]
        with open(results, "a") as file:
            file.writelines(line + "\n" for line in found)
        print(
            f"== {name} at {time.time() - began:.0f} s",
            *(found or [(out / f"{name}.log").read_text(errors="replace")[-600:]]),
            sep="\n",
            flush=True,
        )

    here = str(ROOT / "ci" / "bench_gpu.py")
    common = ["--model", given.model, "--data", given.data, *(["--tiny"] if given.tiny else [])]
    start(
        "make",
        "0",
        here,
        "make",
        "--tokenizer",
        given.tokenizer,
        *common,
        *(["--only", given.only] if given.only and "unsloth" not in given.only else []),
    ).wait()
    print(f"== model made at {time.time() - began:.0f} s", flush=True)
    queues = {
        "0": [
            ("ours_sft", here, "sft", "--steps", "16", *common),
            *((f"ours_{loss}", here, loss, "--steps", "24", *common) for loss in LOSSES),
            ("ours_context", here, "context", *common),
        ],
        "1": [],
    }
    rivals = [
        (
            arm,
            str(ROOT / "ci" / "bench_rivals.py"),
            arm,
            "--model",
            f"{given.model}/nf4",
            "--data",
            given.data,
            "--steps",
            steps,
        )
        for arm, steps in zip(RIVALS, ("12", "8", "9", "1", "6", "4"), strict=True)
    ]
    ours_unsloth = [
        ("ours_unsloth", here, "sft", "--steps", "4", "--backend", "unsloth", *common),
        ("ours_unsloth_orpo", here, "orpo", "--steps", "3", "--backend", "unsloth", *common),
    ]
    queues["1" if given.gpus > 1 else "0"] += [*rivals[:3], *ours_unsloth, rivals[3]]
    queues["0"] += [
        ("planner", here, "planner", *common),
        ("planner_unsloth", here, "planner_unsloth", *common),
        *rivals[4:],
    ]
    if given.tiny:
        queues = {"0": queues["0"][:2], "1": []}
    if given.only:
        queues = {gpu: [arm for arm in arms if arm[0] in given.only.split(",")] for gpu, arms in queues.items()}
    running: dict[str, tuple] = {}
    while any(queues.values()) or running:
        for gpu, queue in queues.items():
            if gpu in running and running[gpu][1].poll() is not None:
                collect(running.pop(gpu)[0])
            if gpu not in running and queue:
                name, *command = queue.pop(0)
                running[gpu] = (name, start(name, gpu, *command))
        time.sleep(0.3)
    pairs = [  # two_gpus stands beside ours_sft, the same job on one; the last two beside two_gpus_sharded, unbroken
        ("two_gpus", "--processes", "2", "--steps", "16"),
        ("two_gpus_sharded", "--processes", "2", "--steps", "6", "--method", "lora"),
        ("two_gpus_then_one", "--processes", "1", "--steps", "6", "--method", "lora", "--killed-on", "2"),
        ("one_gpu_then_two", "--processes", "2", "--steps", "6", "--method", "lora", "--killed-on", "1"),
    ]
    for name, *options in pairs if given.gpus > 1 else []:
        if not given.only or name in given.only.split(","):
            start(name, "0,1", here, "sft", *options, "--arm", name, *common).wait()
            collect(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("all", "make", "sft", *LOSSES, "context", "planner", "planner_unsloth"))
    parser.add_argument("out", nargs="?", default="bench-out")
    parser.add_argument("--model", default="/tmp/bench-model")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--data", default="")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=100_000, help="of the data at most: few make several epochs")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--killed-on", type=int, default=0)
    parser.add_argument("--method", default="qlora")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch-size", type=int, default=0)
    parser.add_argument("--arm", default="")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the stage")
    parser.add_argument("--merges", action="store_true", help="then measure what merging the adapter costs")
    parser.add_argument("--only", default="")
    parser.add_argument("--gib", default="15,24,40,80")
    parser.add_argument("--longest-whole", type=int, default=160_000)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.what == "all":
        run_all(given)
    elif given.what == "make":
        make(Path(given.model), given.tokenizer, given.tiny, bool(given.only))
    elif given.what == "context":
        bench_probe.context(given)
    elif given.what == "planner":
        bench_probe.planner()
    elif given.what == "planner_unsloth":
        bench_probe.planner_unsloth(given)
    else:
        extra = {"batch_size": given.batch_size} if given.batch_size else {}
        extra |= {"loss": given.what} if given.what in LOSSES else {}
        extra |= {"backend": given.backend, "method": given.method} | dict(pair.split("=", 1) for pair in given.set)
        name = given.arm or ("ours_" + given.what if given.backend == "auto" else f"ours_{given.backend}_{given.what}")
        job(
            name,
            "sft" if given.what == "sft" else "orpo",
            given,
            given.processes,
            given.killed_on,
            **extra,
        )


if __name__ == "__main__":
    main()
