"""A file far larger than the memory that may be used. It takes many minutes, so that only ci/attack.py runs it."""

import json
import os
import random
import resource
import subprocess
import sys

import pytest

from tests.conftest import PROJECT

ROWS, CHARS, LIMIT_GIB = 200_000, 5_000, 2.0
PREPARE = """
import sys
from helpers import params
from helpers.data import prepare
job = prepare.open(params.resolve("data", {"run": "large", "dataset": sys.argv[1], "max_length": 4096}))
for step in ("read", "generate", "clean", "mix", "split", "template", "vocabulary", "encode", "lengths", "pairs"):
    getattr(job, step)()
print(job.finish().metrics)
"""


@pytest.mark.skipif("TUNEBOOK_ATTACK" not in os.environ, reason="many minutes; ci/attack.py runs it")
@pytest.mark.timeout(3600)
def test_a_gigabyte_of_rows_is_prepared_in_two(tmp_path):
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlu", k=5)) for _ in range(5_000)]  # at most 4 tokens each
    file = tmp_path / "large.jsonl"
    with open(file, "w") as out:
        for number in range(ROWS):
            said = " ".join(rng.choices(words, k=CHARS // 6))
            row = {"prompt": f"Row {number}: {said[:400]}", "response": said}
            out.write(json.dumps(row) + "\n")
    assert file.stat().st_size > 2**30
    env = {**os.environ, "TUNEBOOK_RUNS": str(tmp_path / "runs"), "TUNEBOOK_HEADLESS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(file)], cwd=PROJECT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20 < LIMIT_GIB
