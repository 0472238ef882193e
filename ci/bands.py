"""Ten-step loss trajectories that a machine has to repeat: the GPU job of CI holds today's training to recorded bands.

    python ci/bands.py record     the trajectories of this machine into ci/results/bands.json
    python ci/bands.py check      status 1 where one leaves its band, or cannot be trained any more

Takes the default data as notebook 01 prepares it. Each arm is ten steps of four rows from the base. A band is relative
to the recorded loss of its step and widens with the steps, as rounding does; an arm that this machine cannot run (no
GPU, no Unsloth) is said to be left out. `ci/run.sh` checks them in CI on a machine with a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ.setdefault("TUNEBOOK_HEADLESS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from helpers import display, machine, params, runs
from helpers.errors import TunebookError

FILE = PROJECT / "ci" / "results" / "bands.json"
STEPS = 10
FIRST, LAST = 0.005, 0.05  # half-width of the first and of the last step's band, as a share of its loss
ARMS = {
    f"{backend} {stage} {name}": (stage, {"backend": backend, **changed})
    for backend in ("hf", "unsloth")
    for stage in ("sft", "orpo")
    for name, changed in (("NF4", {"method": "qlora"}), ("16-bit", {"method": "lora"}))
}
ARMS |= {
    f"hf {stage} FP8": (stage, {"backend": "hf", "method": "lora", "quantize": "fp8"}) for stage in ("sft", "orpo")
}


def losses(run: str, arm: str, steps: int = STEPS) -> list[float]:
    """The loss of each step of an arm, trained in a folder that is thrown away. Raises TunebookError where the arm
    cannot run here."""
    from helpers.train import methods, training

    stage, changed = ARMS[arm]
    data = runs.load(run, "data", verify=False)
    values = {"run": run, "max_steps": steps, "batch_size": 4, "learning_rate": 1e-4, "eval_rows": 1}
    values |= {"best_checkpoint": False, "eval_steps": steps, "save_steps": steps, "export_check": False, "again": True}
    values |= {"start_from": "base", "learning_rate": 1e-5} if stage == "orpo" else {"score_rows": 0}
    resolved = params.resolve(stage, {**values, **changed})
    methods.import_first(resolved)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TUNEBOOK_RUNS": folder}):
        runs.folder(run, "data").parent.mkdir()
        runs.folder(run, "data").symlink_to(data.path.resolve())
        job = training.open(resolved)
        job.train()
        return [round(line["loss"], 5) for line in job.lines() if "loss" in line]


def outside(found: list[float], recorded: list[float]) -> list[str]:
    """Which steps leave the band, and by how much; a number that is not one leaves every band."""
    said = []
    for step, (loss, ought) in enumerate(zip(found, recorded, strict=True), 1):
        width = FIRST + (LAST - FIRST) * (step - 1) / max(len(recorded) - 1, 1)
        if not abs(loss - ought) <= width * abs(ought):
            said.append(f"step {step}: {loss} where {ought} ± {display.percent(width)} was recorded")
    return said


def kind() -> str:
    """This machine's name in the file: "cpu", or its GPU's as the planner knows it ("h100")."""
    gpu = machine.gpu()
    if gpu is None:
        return "cpu"
    words = gpu.name.upper().replace("-", " ").split()
    return next((name for name in ("T4", "L4", "A100", "H100", "H200") if name in words), words[-1]).lower()


def in_child(run: str, arm: str) -> list[float] | str:
    """`losses` of an arm in a process of its own, since Unsloth patches what the others use; or why there are none."""
    child = subprocess.run(
        [sys.executable, str(Path(__file__)), "one", "--run", run, "--arms", arm],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = [line for line in child.stdout.splitlines() if line.strip()] or ["nothing was said"]
    found = next((line for line in said if line.startswith("LOSSES ")), "")
    return json.loads(found[7:]) if found else said[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "check", "one"))
    parser.add_argument(
        "--on", default="", help="the machine's name in the file: cpu, h100, t4 … (default: this one's)"
    )
    parser.add_argument("--run", default="bands", help="run whose data stage is taken; it is made where it is missing")
    parser.add_argument("--arms", default="", help="some of them, separated by commas; none: all")
    parser.add_argument("--file", type=Path, default=FILE)
    given = parser.parse_args()
    if given.what == "one":
        try:
            print("LOSSES " + json.dumps(losses(given.run, given.arms)))
        except TunebookError as error:
            print(error)
        return 0
    kept = json.loads(given.file.read_text()) if given.file.is_file() else {}
    on, bad, none = given.on or kind(), 0, 0
    if given.what == "check" and on not in kept:
        said = f"No losses are held: none are recorded for {on} (recorded: {', '.join(kept) or 'none'}). On a machine "
        print(f"{said}whose losses are trusted, `python ci/bands.py record` writes ci/results/bands.json; commit it.")
        return 0
    if not (runs.folder(given.run, "data") / "manifest.json").is_file():
        pipeline = [sys.executable, str(PROJECT / "ci" / "pipeline.py"), "--recipe", "cpu", "--run", given.run]
        subprocess.run([*pipeline, "--to", "01"], check=True)
    bands = kept.setdefault(on, {"arms": {}})
    for arm in given.arms.split(",") if given.arms else ARMS:
        found = in_child(given.run, arm)
        if isinstance(found, str):
            none += arm in bands["arms"]
            print(f"left out: {arm}: {found}", flush=True)
        elif given.what == "record":
            bands["arms"][arm] = found
            bands |= machine.versions()
            given.file.write_text(json.dumps(kept, indent=1) + "\n")
            print(f"recorded: {arm}: {found}", flush=True)
        elif arm not in bands["arms"]:
            print(f"no band: {arm}: {found}", flush=True)
        else:
            wrong = outside(found, bands["arms"][arm])
            bad += bool(wrong)
            print(f"{'OUTSIDE' if wrong else 'inside'}: {arm}: {'; '.join(wrong) or found}", flush=True)
    return 1 if bad or none else 0


if __name__ == "__main__":
    sys.exit(main())
