"""Attack the product on this machine, loopback only, and count what it survives, kind by kind.

    python ci/attack.py [KIND ...] [--out ci/results/attack.json]

Every attack is a test of the suite, on real parts: this command runs them by kind and prints tried / survived. A test
that tries many inputs reports how many (`record_property("tried", n)`). It ends with status 1 when one was not
survived. The whole takes about a quarter of an hour on two cores, and two gigabytes of rows a quarter more. Not
played here: two kernels on one GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from helpers import display, machine
from helpers.cache import write_json

HOSTILE = "tests/test_hostile.py"
# Kind of attack -> pytest's arguments that select its tests.
KINDS: dict[str, list[str]] = {
    "deletion of what is not ours": ["tests/train/test_resume.py", "-k", "mirror or cut_off or cannot_be_read"],
    "broken models and adapters": ["tests/model", "tests/train/test_bases.py", "-k", "broken or refused or missing"],
    "caches": [HOSTILE, "tests/test_cache.py", "-k", "flipped or torn or checksum or cache"],
    "run names": [HOSTILE, "tests/test_runs.py", "-k", "run_name"],
    "killed exports": ["tests/gguf/test_export.py", "-k", "killed or stable_order or twice"],
    "killed training and evaluation": [
        *("tests/train/test_resume.py", "tests/test_pipeline_stopped.py", "tests/evaluate"),
        *("-k", "killed or stopped_and or full_disk"),
    ],
    "strangers' SQL": ["tests/tasks/test_sqlite.py"],
    "strangers' templates": ["tests/data/test_labels.py", "tests/data/test_template_choice.py", "-k", "template"],
    "strangers' documents": ["tests/data/test_documents.py", "tests/data/test_privacy.py"],
    "strangers' files": ["tests/data/test_reading_fuzz.py", "tests/data/test_reading_cases.py"],
    "foreign text shown": [HOSTILE, "tests/test_display.py", "tests/report/test_data_page.py", "-k", "not flipped"],
    "addresses and keys": [HOSTILE, "tests/test_llm_client.py", "-k", "secret or variable or key"],
    "the server": ["tests/gguf/test_gateway.py", "tests/test_serve.py"],
    "locks and clock": ["tests/test_runs.py", "-k", "lock or clock or processes"],
    "parameters and files": [
        *(HOSTILE, "tests/test_params.py", "tests/test_command_line.py", "tests/test_pipeline_stopped.py"),
        *("-k", "not killed and not flipped"),
    ],
    "trackers, hubs and drives that fail": [
        *(HOSTILE, "tests/train/test_resume.py", "tests/test_drive.py"),
        *("-k", "tracker or says_nothing or disappears or fills_up or cannot_be_written or damaged_on"),
    ],
    "long rows and memory": ["tests/data/test_memory.py"],
}


def attack(arguments: list[str]) -> tuple[int, int, list[str]]:
    """(tried, survived, names of the tests that failed)."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--junitxml={file.name}", *arguments]
        done = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, env={**os.environ, "TUNEBOOK_ATTACK": "1"}
        )
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = list(ElementTree.parse(file.name).iter("testcase"))
    tried = survived = 0
    failed = []
    for case in cases:
        if case.find("skipped") is not None:
            continue
        count = next((int(p.get("value", 1)) for p in case.iter("property") if p.get("name") == "tried"), 1)
        tried += count
        if case.find("failure") is None and case.find("error") is None:
            survived += count
        else:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return tried, survived, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of: {', '.join(KINDS)}; none: all")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    found = {}
    for kind in given.kinds or KINDS:
        began = time.monotonic()
        tried, survived, failed = attack(KINDS[kind])
        found[kind] = {"tried": tried, "survived": survived, "failed": failed}
        took = display.duration(time.monotonic() - began)
        print(f"{kind:<32} tried {tried:>4}  survived {survived:>4}  {took}  {' '.join(failed)}", flush=True)
    lost = sum(one["tried"] - one["survived"] for one in found.values())
    print(f"{sum(one['tried'] for one in found.values())} attacks, {lost} not survived")
    if given.out:
        write_json(given.out, {"kinds": found, "code_revision": machine.revision()})
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
