"""What merging a QLoRA adapter costs, seed by seed: training as notebook 02 does it, then notebook 04's measurement.

    python ci/bench_chain.py [--task NAME[=FOLDER]] [--seeds 17,18,19] [--steps 60 | --minutes 4]

Tasks are those of `ci/bench_learning.py`. A JSON line a seed: the trained model (adapter on its 4-bit base), the merge
onto those 4-bit weights unpacked and the merge onto the 16-bit weights, each with its KL and top-1 to the trained model
on held-out tokens and its share of right test questions (None for a task without a database); `chosen` is the merge
that `merge_onto auto` keeps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from ci.bench_learning import Row, ours, prepare
from ci.learning_tasks import sources
from helpers import cache, machine, params, worker
from helpers.errors import TunebookError, command


def child(spec: Row, event: Callable[[Any], None]) -> Row:
    """The worker's handler: one seed, trained, merged and measured. Raises TunebookError where memory is short."""
    from helpers.gguf import export

    _, onto, made = ours(spec)
    asked = {"fidelity_tokens": spec["fidelity_tokens"], "task_questions": spec["task_questions"]}
    job = export.open(params.resolve("gguf", {"run": spec["run"], "outputs": "merged", "again": True, **asked}))
    began = time.monotonic()
    job.merge()
    merges_s = round(time.monotonic() - began, 1)
    shutil.rmtree(job.stage.path)  # the merged weights, which nobody asked for
    if not job.merges:
        raise TunebookError(f"The merges of {spec['run']} were not measured: too little free memory for two models.")
    kept = {name: made[name] for name in ("steps", "train_s", "learning_rate", "method", "eval_loss")}
    short = {"task_score": "score", "task_count": "n"}
    merges = [{short.get(key, key): value for key, value in asdict(one).items()} for one in job.merges]
    chosen = next((one.onto for one in job.merges if one.chosen), None)
    return kept | {"trained_on": onto, "merges": merges, "chosen": chosen, "merges_s": merges_s}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="atlas", help="default: atlas")
    parser.add_argument("--fetch", action="store_true", help="download a public task's files that are not there")
    parser.add_argument("--seeds", default="17,18,19")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=0, help="optimizer steps; default: 60")
    length.add_argument("--minutes", type=float, default=0.0, help="minutes of training instead of steps")
    parser.add_argument("--task-questions", type=int, default=100, help="test questions each model answers; 0: none")
    parser.add_argument("--fidelity-tokens", type=int, default=2000, help="held-out tokens of KL and top-1")
    parser.add_argument("--model", default="", help="base model; default: notebook 01's")
    parser.add_argument(
        "--work", default="", help="folder of runs and adapters; default: bench_learning's in the cache"
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    os.environ["TUNEBOOK_RUNS"] = given.work or str(cache.folder() / "learning" / "runs")
    name = given.task.partition("=")[0]
    found = sources(given.task, Path(os.environ["TUNEBOOK_RUNS"]) / "files" / name, given.fetch)
    with contextlib.redirect_stdout(sys.stderr):
        prepare(name, found, given)
    gpu, steps = machine.gpu(), 0 if given.minutes else given.steps or 60
    here = {"device": gpu.name if gpu else "cpu", "model": given.model or "default"} | machine.versions()["versions"]
    failed = False
    for seed in map(int, given.seeds.split(",")):
        spec = {"task": name, "run": f"{name}-chain-{seed}", "seed": seed, "minutes": given.minutes, "epochs": 100}
        spec |= {"ours": {"method": "qlora", "max_steps": steps}, "task_questions": given.task_questions}
        spec |= {"fidelity_tokens": given.fidelity_tokens}
        line = {"bench": "chain", "task": name, "seed": seed}
        try:
            line |= worker.run("ci.bench_chain:child", spec, wall_s=None, name=f"seed {seed} of {name}") | here
        except TunebookError as error:  # the other seeds are measured nevertheless
            failed, line = True, line | {"error": str(error)}
        print(json.dumps(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
