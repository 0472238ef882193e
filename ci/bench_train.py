"""Training speed on this machine, one JSON line a setting:

    python ci/bench_train.py [--run default] [--steps 6]
    python ci/bench_train.py --start 100000,1000000 [--model FOLDER]    seconds until the first step, by rows

Takes the rows of a finished data stage. tokens_per_s counts every token of the rows that were trained on, however often
it was computed: a prefix that eight rows share counts eight times, padding never.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ.setdefault("TUNEBOOK_HEADLESS", "1")

from helpers import machine, params, runs

# (stage, what is changed, name): the default, then the same without one of its parts.
ARMS = (
    ("sft", {}, "nf4, shared prefixes"),
    ("sft", {"method": "lora"}, "bf16, shared prefixes"),
    ("sft", {"share": False}, "nf4, packed"),
    ("sft", {"packing": False}, "nf4, padded"),
    ("orpo", {}, "nf4 ORPO, shared prefixes"),
    ("orpo", {"packing": False}, "nf4 ORPO, padded"),
)


def arm(run: str, stage_name: str, changed: dict, name: str, steps: int) -> dict:
    """Train `steps` steps in a folder that is thrown away; the first is warm-up."""
    from transformers import TrainerCallback

    from helpers.train import training

    class Clock(TrainerCallback):
        def __init__(self):
            self.times = []

        def on_step_end(self, args, state, control, **kwargs):
            self.times.append((time.monotonic(), time.process_time(), job.trainer.trained_tokens))

    share = changed.pop("share", True)
    data = runs.load(run, "data", verify=False)
    given = {
        "run": run,
        "max_steps": steps,
        "eval_rows": 1,
        "best_checkpoint": False,
        "eval_steps": 10**6,
        "save_steps": 10**6,
        "export_check": False,
    }
    chosen = params.resolve(
        stage_name, {**given, **({"start_from": "base"} if stage_name == "orpo" else {}), **changed}
    )
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TUNEBOOK_RUNS": folder}):
        runs.folder(run, "data").parent.mkdir()
        runs.folder(run, "data").symlink_to(data.path.resolve())
        job = training.open(chosen).build()
        job.trainer.row_collator.share &= share
        clock = Clock()
        job.trainer.add_callback(clock)
        job.train()
    (start, cpu, before), (end, cpu_end, after) = clock.times[0], clock.times[-1]
    gpu = machine.gpu()
    return {
        "bench": "training",
        "setting": name,
        "model": job.source.name,
        "tokens_per_s": round((after - before) / (end - start), 1),
        "s_per_step": round((end - start) / (steps - 1), 3),
        "cpu_s_per_step": round((cpu_end - cpu) / (steps - 1), 3),
        "batch_size": chosen.batch_size,
        "peak_gib": machine.peak_memory_gib(),
        "device": gpu.name if gpu else "none",
        "cores": os.cpu_count(),
    }


def made_rows(run: str, model: str, count: int) -> None:
    """A finished data stage of so many random rows of 20 to 400 tokens, written in a stream."""
    import numpy
    import pyarrow
    import pyarrow.parquet as parquet

    from helpers.model.loading import load_tokenizer, template_hash, tokenizer_hash

    tokenizer = load_tokenizer(model)
    stage = runs.stage("data", params.resolve("data", {"run": run, "model": model}))
    stage.begin()
    draw, sink = numpy.random.default_rng(0), None
    for first in range(0, count, 10_000):
        ends = numpy.concatenate([[0], draw.integers(20, 400, min(10_000, count - first)).cumsum()])
        ids = draw.integers(3, len(tokenizer) - 3, ends[-1])
        lists = [
            pyarrow.ListArray.from_arrays(pyarrow.array(ends, pyarrow.int32()), pyarrow.array(values))
            for values in (ids, (numpy.arange(ends[-1]) % 3 > 0).astype(numpy.int64))
        ]
        names = [f"r{n}" for n in range(first, first + len(ends) - 1)]
        table = pyarrow.table({"id": names, "input_ids": lists[0], "completion_mask": lists[1]})
        sink = sink or parquet.ParquetWriter(stage.path / "train.parquet", table.schema)
        sink.write_table(table)
    sink.close()
    hashes = {"template_hash": template_hash(tokenizer), "tokenizer_hash": tokenizer_hash(tokenizer)}
    known = {"name": model, "path": model, "revision": "", "origin": "folder"}
    stage.finish({"rows": count}, **hashes, model=known)


def start(model: str, count: int, changed: dict) -> dict:
    """Seconds from the opened stage to its first optimizer step, and the highest private memory until then (file pages
    that are mapped and can be dropped do not count), with `count` rows."""
    from transformers import TrainerCallback

    from helpers.train import training

    class First(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.setdefault("first_step_s", round(time.monotonic() - began, 2))

    def watch():
        while "first_step_s" not in seen:
            text = Path("/proc/self/status").read_text()
            held.append(int(text.split("RssAnon:")[1].split()[0]) / 2**20)
            time.sleep(0.02)

    seen, held = {}, [0.0]
    given = {"run": "rows", "max_steps": 1, "eval_rows": 0, "best_checkpoint": False, "export_check": False, **changed}
    began = time.monotonic()
    threading.Thread(target=watch, daemon=True).start()
    job = training.open(params.resolve("sft", given))
    seen["opened_s"] = round(time.monotonic() - began, 2)
    job.build().trainer.add_callback(First())
    seen["built_s"] = round(time.monotonic() - began, 2)
    job.train()
    reasons = [reason for reason in job.planned.reasons if "packed sequences" in reason]
    return {"bench": "start", "rows": count, **changed, **seen, "peak_gib": round(max(held), 3), "reasons": reasons}


def starts(counts: list[int], model: str) -> None:
    """Each count with rows and with packed sequences as the unit of a batch, each in a process of its own."""
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TUNEBOOK_RUNS": folder}
            for what in ("made", "rows", "packed"):
                command = [sys.executable, __file__, "--one", f"{count}/{what}", "--model", model]
                subprocess.run(command, env=environment, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="default", help="run whose data stage is taken")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps an arm, the first not timed")
    parser.add_argument("--arms", default="", help="numbers of the arms to run, separated by commas; none: all")
    parser.add_argument("--start", default="", help="numbers of rows: seconds and memory until the first step of each")
    parser.add_argument("--model", default="", help="folder of a model for --start; small, for its own time counts too")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.start:
        starts([int(count) for count in given.start.split(",")], given.model)
        return 0
    if given.one:
        count, what = given.one.split("/")
        if what == "made":
            made_rows("rows", given.model, int(count))
            return 0
        changed = {"batch_unit": what} | ({"method": "lora"} if what == "rows" else {"method": "lora", "batch_size": 4})
        print(json.dumps(start(given.model, int(count), changed)), flush=True)
        return 0
    wanted = [int(n) for n in given.arms.split(",") if n] or range(len(ARMS))
    for number in wanted:
        stage, changed, name = ARMS[number]
        print(json.dumps(arm(given.run, stage, dict(changed), name, given.steps)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
