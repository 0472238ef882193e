"""Training speed on this machine, one JSON line a setting:

    python ci/bench_train.py [--run default] [--steps 6]

Takes the rows of a finished data stage. tokens_per_s counts every token of the rows that were trained on, however often
it was computed: a prefix that eight rows share counts eight times, padding never.
"""

import argparse
import json
import os
import sys
import tempfile
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="default", help="run whose data stage is taken")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps an arm, the first not timed")
    parser.add_argument("--arms", default="", help="numbers of the arms to run, separated by commas; none: all")
    given = parser.parse_args()
    wanted = [int(n) for n in given.arms.split(",") if n] or range(len(ARMS))
    for number in wanted:
        stage, changed, name = ARMS[number]
        print(json.dumps(arm(given.run, stage, dict(changed), name, given.steps)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
