"""What launching kernels costs a small model, with CUDA graphs and without, and where the notebooks' time goes.

    python ci/bench_graphs.py train MODEL --data DIR [--only ARM,…] [--steps 40] [--limit 150]
    python ci/bench_graphs.py notebooks [--again]

MODEL: a folder as ci/gpu_session.py makes them (MODEL/16); DATA: LLaMA-Factory's demo sets. Each arm of `train` is a
child that prints a JSON line: tokens/s, losses, seconds a step by part, kernels a step and the share of the time that
the GPU works. `notebooks` runs the default job in three epochs and prints the cells' seconds and where the notebook's
process was, sampled every 20 ms. What fails is printed and the next part begins.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "ci")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

SAMPLER = """
import collections, json, os, sys, threading, time
counts, main, began = collections.Counter(), threading.main_thread().ident, time.time()
def sample():
    for n in range(10**9):  # written as it goes: a kernel is ended by a signal
        time.sleep(0.02)
        frame, ours, leaf = sys._current_frames().get(main), [], ""
        while frame:
            code = frame.f_code
            place = "/".join(code.co_filename.split("/")[-2:]) + ":" + code.co_name
            leaf = leaf or place
            if "/helpers/" in code.co_filename:
                ours.append(place)
            frame = frame.f_back
        if ours:
            counts[" < ".join(ours[:4]) + " @ " + leaf] += 1
        if n % 50 == 49 and counts:
            with open(f"{os.environ['SAMPLES']}/{began:.0f}-{os.getpid()}.json", "w") as file:
                json.dump(counts.most_common(400), file)
threading.Thread(target=sample, daemon=True).start()
"""
ARMS = {  # name → (stage, parameters)
    "lora_off": ("sft", {"method": "lora", "cuda_graphs": "off"}),
    "lora_on": ("sft", {"method": "lora", "cuda_graphs": "on"}),
    "qlora_off": ("sft", {"method": "qlora", "cuda_graphs": "off"}),
    "qlora_on": ("sft", {"method": "qlora", "cuda_graphs": "on"}),
    "auto": ("sft", {"cuda_graphs": "auto"}),
    "accumulated_on": ("sft", {"method": "lora", "cuda_graphs": "on", "accumulation": 2}),
    "completion_on": ("sft", {"method": "lora", "cuda_graphs": "on", "train_on": "completion"}),
    "full_off": ("sft", {"method": "full", "cuda_graphs": "off", "learning_rate": 2e-5}),
    "full_on": ("sft", {"method": "full", "cuda_graphs": "on", "learning_rate": 2e-5}),
    "dora_on": ("sft", {"method": "lora", "cuda_graphs": "on", "dora": True}),
    "orpo_off": ("orpo", {"method": "lora", "cuda_graphs": "off"}),
    "orpo_on": ("orpo", {"method": "lora", "cuda_graphs": "on"}),
    "dpo_on": ("orpo", {"method": "lora", "cuda_graphs": "on", "loss": "dpo"}),
    "broken": ("sft", {"method": "lora", "cuda_graphs": "on"}),  # a pass that waits for the GPU: trained without graphs
}


def train(arm: str, given: argparse.Namespace) -> dict:
    """One job in this process, timed by part and, for three steps, profiled."""
    import bench_gpu
    import torch
    from transformers import TrainerCallback

    from helpers import params, runs
    from helpers.train import graphs, training

    stage, changes = ARMS[arm]
    run, cuda = f"graphs-{Path(given.model).name}-{arm}", torch.cuda.is_available()
    values = {"run": run, "rank": 16, "alpha": 16, "schedule": "linear", "epochs": 100.0, "max_steps": given.steps}
    values |= {"save_steps": 1000, "eval_steps": 1000, "batch_size": 8, "learning_rate": 2e-4, "again": True}
    values |= {"best_checkpoint": False, "export_check": False}
    values |= {"train_on": "all"} if stage == "sft" else {"start_from": "base", "beta": 0.1, "max_length": 1024}
    if given.set:
        values |= dict(pair.split("=", 1) for pair in given.set)
    bench_gpu.data_stage(run, str(Path(given.model) / "16"), given.data, 24 if given.tiny else 100_000)
    job = training.open(params.resolve(stage, values | changes)).build()
    trainer, parts, steps = job.trainer, collections.defaultdict(float), []
    found: dict = {"arm": arm, "model": Path(given.model).name, "method": job.planned.method}
    if arm == "broken":
        layer = job.model.get_base_model().get_decoder().layers[0]
        layer.register_forward_hook(lambda module, given, out: print(end="" if float(out.sum()) else " "))

    def timed(holder, name):
        own = getattr(holder, name)

        def call(*a, **k):
            began = time.perf_counter()
            try:
                return own(*a, **k)
            finally:
                parts[name] += time.perf_counter() - began

        setattr(holder, name, call)

    for name in ("get_batch_samples", "training_step", "_clip_grad_norm", "_maybe_log_save_evaluate"):
        timed(trainer, name)
    captures: list[float] = []
    own = graphs._Row.__init__

    def captured(self, *a):
        began = time.perf_counter()
        own(self, *a)
        captures.append(round(time.perf_counter() - began, 3))

    graphs._Row.__init__ = captured
    profiler = torch.profiler.profile(activities=list(torch.profiler.supported_activities())) if cuda else None

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if cuda and not profiler_on():
                torch.cuda.synchronize()
            steps.append(time.perf_counter())
            if state.global_step == given.steps // 2:
                timed(trainer.optimizer, "step")
                parts.clear()
            if profiler and state.global_step == given.steps - 4:
                found["host_ms"] = {k: round(1000 * v / (given.steps // 2 - 4), 2) for k, v in parts.items()}
                profiler.start()
            if profiler and state.global_step == given.steps - 1:
                profiler.stop()

    def profiler_on():
        return len(steps) >= given.steps - 4

    trainer.add_callback(Watch())
    job.train()
    lines = [line for line in job.lines() if "loss" in line]
    tokens = [b["trained_tokens"] - a["trained_tokens"] for a, b in itertools.pairwise(lines)]
    seconds = [b - a for a, b in itertools.pairwise(steps)]
    kept = slice(given.steps // 2, given.steps - 5)
    found |= {"losses": [round(line["loss"], 4) for line in lines[:6]], "last_loss": round(lines[-1]["loss"], 4)}
    found |= {"tokens_per_s": round(sum(tokens[kept]) / sum(seconds[kept]))}
    found |= {"step_ms": round(1000 * statistics.median(seconds[kept]), 2), "peak_gib": lines[-1]["memory_gib"]}
    found |= {"tokens_a_step": round(statistics.mean(tokens)), "graphs": job.planned.setting.graphs}
    found |= {"reasons": [r for r in job.planned.reasons if r.startswith("CUDA")], "errors": job.planned.errors}
    if trainer.graphs:
        g = trainer.graphs
        found |= {"forms": [list(vars(row.form).values()) for row in g.rows.values()], "captures_s": captures}
        found |= {"off": g.off, "missed": g.missed}
    if arm == "broken" and cuda:
        found["random_after"] = float(torch.randn(3, device="cuda").sum())
    if profiler:
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(e.time_range.elapsed_us() for e in kernels)
        span = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
        found |= {"kernels_a_step": round(len(kernels) / 3), "gpu_ms_a_step": round(busy / 3000, 2)}
        found |= {"gpu_busy": round(busy / span, 3)}
        longest = collections.Counter()
        for event in kernels:
            longest[event.name[:70]] += event.time_range.elapsed_us() / 3000
        found["longest_ms"] = [(name, round(ms, 2)) for name, ms in longest.most_common(12)]
    job._free()
    runs.set_aside(runs.folder(run, stage))
    return found


def decode(given: argparse.Namespace, dtype: str) -> dict:
    """Greedy answers of a random adapter's model, a step as one graph and kernel by kernel: seconds, and how many are
    the same."""
    import bench_rivals

    from helpers.evaluate.generate import HfModel
    from helpers.model import loading
    from helpers.tasks.questions import Decoding

    folder, found = Path(given.model) / "16", {"arm": f"decode_{dtype}", "model": Path(given.model).name}
    model = HfModel(loading.load_model(folder, dtype=dtype), loading.load_tokenizer(folder))
    prompts = [model.encode(chat[:1])[-200:] for chat in bench_rivals.chats(given.data)[: 4 if given.tiny else 96]]
    answers = {}
    for name, fixed in (("warm", False), ("kernels", False), ("graph", True), ("graph_again", True)):
        model.fixed = fixed
        began = time.perf_counter()
        answers[name] = model.generate(prompts, Decoding(64))
        found[f"{name}_s"] = round(time.perf_counter() - began, 3)
        found[f"{name}_fixed"] = model.fixed
    pairs = zip(answers["kernels"], answers["graph"], strict=True)
    return found | {"same": sum(a == b for a, b in pairs), "of": len(prompts)}


def notebooks(given: argparse.Namespace) -> None:
    """The default job in three epochs, with a sampler in every process."""
    import tempfile

    from helpers import runs

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(SAMPLER)
        command = ["ci/pipeline.py", "--recipe", "cpu", "--run", "session", "-p", "sft.max_minutes", "0", "--fresh"]
        environment = {**os.environ, "SAMPLES": folder, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
        for graphs in ("auto", "off"):
            began, words = time.time(), [w for s in ("sft", "orpo") for w in ("-p", f"{s}.cuda_graphs", graphs)]
            done = subprocess.run(
                [sys.executable, *command, *words], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            found = {"arm": "notebooks", "graphs": graphs, "seconds": round(time.time() - began, 1)}
            print("RESULT " + json.dumps(found | {"status": done.returncode}), flush=True)
            print(done.stdout[-2500:], done.stderr[-1500:], flush=True)
            if not done.returncode:
                break
        for file in sorted(runs.run_folder("session").glob("*/executed.ipynb")):
            cells = json.loads(file.read_text())["cells"]
            spent = [
                (c.get("metadata", {}).get("papermill", {}).get("duration") or 0, "".join(c["source"])) for c in cells
            ]
            shown = [(round(s, 1), source[:60]) for s, source in spent if s > 0.7]
            print(
                json.dumps({"notebook": file.parent.name, "cells_s": round(sum(s for s, _ in spent), 1), "long": shown})
            )
        for file in sorted(Path(folder).glob("*.json")):
            try:
                counts = json.loads(file.read_text())
            except ValueError:  # its process was ended in the middle of it
                continue
            total = sum(count for _, count in counts)
            if total > 100:
                print(json.dumps({"process": file.stem, "seconds": round(total * 0.02, 1)}))
                for place, count in counts[:24]:
                    print(f"    {count * 0.02:6.1f} s  {place}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "arm", "notebooks"))
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--data", default="")
    parser.add_argument("--only", default=",".join(["decode_bf16", "decode_fp32", *ARMS]))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--limit", type=float, default=150, help="seconds of an arm")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.what == "notebooks":
        notebooks(given)
        return
    if given.what == "arm":
        try:
            made = decode(given, given.only[7:]) if given.only.startswith("decode_") else train(given.only, given)
            print("RESULT " + json.dumps(made), flush=True)
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
        return
    for arm in given.only.split(","):
        command = [sys.executable, __file__, "arm", given.model, "--data", given.data, "--only", arm]
        command += ["--steps", str(given.steps), *(word for pair in given.set for word in ("--set", pair))]
        try:
            done = subprocess.run(
                command + ["--tiny"] * given.tiny, cwd=ROOT, capture_output=True, text=True, timeout=given.limit
            )
            said, status = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as error:
            said, status = f"{error.stdout or b''}{error.stderr or b''}", "timeout"
        result = next((line for line in said.splitlines() if line.startswith("RESULT ")), "")
        print(result or json.dumps({"arm": arm, "status": status, "said": said[-2500:]}), flush=True)
        for line in said.splitlines():
            if "CUDA graphs: none" in line and result and line != result:
                print("   said:", line[:300], flush=True)


if __name__ == "__main__":
    main()
