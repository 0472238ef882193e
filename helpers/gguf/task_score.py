"""How well each exported file does the job itself: test questions answered by the file and judged as notebook 05 judges them."""

from __future__ import annotations

from typing import Any


def add(export: Any) -> None:
    """Set `task_score` (execution accuracy, 0 to 1) and `task_count` of every result, where the run has test questions and a database."""
    count = export.stage.params.task_questions
    data = export.stage.parents["data"].path
    if not count or not (data / "test.parquet").is_file() or not (data / "database.sqlite").is_file():
        return
    from helpers.tasks import questions as items
    from helpers.tasks.text_to_sql import sqlite
    from helpers.tasks.text_to_sql.scoring import Judge

    questions = items.read(data / "test.parquet", count, export.stage.params.seed)
    judge = Judge([sqlite.open_readonly(data / "database.sqlite")])
    try:
        for result in export.results:
            path = export.f16 if result.type == "f16" else export.file(result.type)
            answers = answer(path, [q.prompt for q in questions])
            scores = [judge.score(a, q.reference)["score"] for a, q in zip(answers, questions, strict=True)]
            known = [s for s in scores if s is not None]
            result.task_score = round(sum(known) / len(known), 4) if known else None
            result.task_count = len(known)
    finally:
        judge.close()


def answer(path: Any, prompts: list[list[dict]], max_tokens: int = 128) -> list[str]:
    """Greedy answers of a GGUF file to conversations, in a process without torch, where threads don't get in each other's way."""
    import json
    import subprocess
    import sys

    from helpers import machine
    from helpers.errors import TunebookError

    job = json.dumps({"path": str(path), "prompts": prompts, "max_tokens": max_tokens})
    done = subprocess.run(
        [sys.executable, "-m", "helpers.gguf.task_score"],
        input=job,
        capture_output=True,
        text=True,
        errors="replace",
        cwd=machine.PROJECT,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise TunebookError(f"{path} could not answer the test questions: {said[-1][:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def _child() -> None:
    import json
    import sys

    from helpers.evaluate.gguf_model import GgufModel
    from helpers.tasks.answers import Decoding

    job = json.loads(sys.stdin.read())
    model = GgufModel(job["path"])
    try:
        made = model.generate([model.encode(p) for p in job["prompts"]], Decoding(max_new_tokens=job["max_tokens"]))
    finally:
        model.close()
    print(json.dumps([a.text for a in made]))


if __name__ == "__main__":
    _child()
