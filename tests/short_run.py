"""A run of a few steps and a few rows through all five notebooks, and the command that starts it."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

PROJECT = Path(__file__).resolve().parent.parent
STAGES = {
    "data": {},
    "sft": {"max_steps": 4, "batch_size": 2, "save_steps": 2, "eval_steps": 2, "eval_rows": 4},
    "orpo": {"max_steps": 2, "batch_size": 2, "eval_steps": 2, "eval_rows": 4},
    "gguf": {"quantizations": "q8_0", "fidelity_tokens": 100, "fidelity_answers": 2, "task_questions": 4},
    "eval": {"limit": 6, "max_new_tokens": 32},
}
GENERAL = {
    "general_text": slice(2),
    "general_tasks": slice(6),
    "general_chat": slice(0, None, 50),
}  # two of each kind in the last


def parameters(folder: Path) -> Path:
    """The recipe, in `folder`, with a few rows of the general sets beside it."""
    stages = {stage: dict(values) for stage, values in STAGES.items()}
    for name, part in GENERAL.items():
        rows = (PROJECT / "datasets" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(rows[part]), encoding="utf-8")
        stages["eval"][name] = str(folder / f"{name}.jsonl")
    (folder / "short").mkdir()
    for stage, values in stages.items():
        (folder / "short" / f"{stage}.yaml").write_text(yaml.safe_dump(values) if values else "")
    return folder / "short"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "ci/pipeline.py", *arguments]


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "TUNEBOOK_RUNS": str(root), "HF_HUB_OFFLINE": "1"}


def pipeline(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The command run to its end, its runs under `root`."""
    return subprocess.run(
        command(*arguments),
        cwd=PROJECT,
        env=environment(root),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def shared(base: Path) -> tuple[subprocess.CompletedProcess, Path]:
    """The short run "whole" under `base`, made by whatever process asks first: (finished command, folder of runs)."""
    base.mkdir(exist_ok=True)
    with open(base / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = base / "done.json"
        if not kept.exists():
            done = pipeline(base / "runs", "--run", "whole", "--recipe", str(parameters(base)))
            kept.write_text(json.dumps([done.args, done.returncode, done.stdout, done.stderr]))
    return subprocess.CompletedProcess(*json.loads(kept.read_text())), base / "runs"
