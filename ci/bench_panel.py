"""How fast the panel's estimate follows a change: each control of 02's and 03's panels is moved through its values.

python ci/bench_panel.py [RUN] [--values N]    RUN: one with its data (default: default); N: values of a control

Prints a JSON line a panel: seconds until the estimate is shown, on the clock and of this process's CPU time, and the
slowest controls. Exits with 1 where a change took more than 0.25 s of CPU time.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import params
from helpers.panel import Panel, Row

MOST_S = 0.25


def positions(row: Row, most: int) -> list[object]:
    """Values that a person can move a control to, the end ones among them, at most `most`."""
    p = row.param
    every = list(p.marks) or list(p.choices) or ([True, False] if isinstance(p.default, bool) else [])
    step = max(1, -(-len(every) // most))
    return [*every[::step], *every[-1:]]


def move(panel: Panel, row: Row, value: object) -> tuple[float, float]:
    """(seconds on the clock, of CPU time) until the panel shows what a value comes to."""
    control = row.field if row.slider is None else row.slider
    value = type(row.param.default)(value)  # type: ignore[call-arg]
    wall, cpu = time.perf_counter(), time.process_time()
    control.value = value
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(stage: str, run: str, most: int) -> dict[str, object]:
    values = params.resolve(stage, {"run": run})
    began = time.perf_counter()
    panel = Panel(stage, values)
    built = time.perf_counter() - began
    panel.refresh()
    opened = time.perf_counter() - began
    assert panel.outlook and "No estimate" not in panel.outlook.table.value, panel.outlook and panel.outlook.table.value
    took: dict[str, list[tuple[float, float]]] = {}
    for name, row in panel.rows.items():
        before = getattr(values, name)
        moves = [value for value in positions(row, most) if value != before]
        if moves:
            took[name] = [move(panel, row, value) for value in moves]
            move(panel, row, before)
    walls, cpus = (sorted(one[kind] for moved in took.values() for one in moved) for kind in (0, 1))

    def three(sample: list[float]) -> dict[str, float]:
        found = {"min": sample[0], "median": statistics.median(sample), "max": sample[-1]}
        return {name: round(value, 3) for name, value in found.items()}

    slowest = sorted(took, key=lambda name: -max(cpu for _, cpu in took[name]))[:5]
    return {
        "panel": stage,
        "built_s": round(built, 3),
        "first_estimate_s": round(opened - built, 3),
        "controls": len(took),
        "changes": len(cpus),
        "wall_s": three(walls),
        "cpu_s": three(cpus),
        "slowest_cpu_s": {name: round(max(cpu for _, cpu in took[name]), 3) for name in slowest},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="How fast the panel's estimate follows a change.")
    parser.add_argument("run", nargs="?", default="default", help="a run with its data (and, for 03, its SFT adapter)")
    parser.add_argument("--values", type=int, default=40, help="values of one control at most")
    given = parser.parse_args()
    slow = False
    for stage in ("sft", "orpo"):
        found = measure(stage, given.run, given.values)
        slow |= found["cpu_s"]["max"] > MOST_S  # type: ignore[index]
        print(json.dumps({"run": given.run, **found, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}))
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
