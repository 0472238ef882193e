"""The figures of one whole run on this machine, a JSON line each. The README's come from here.

    python ci/bench.py [--run NAME] [--recipe NAME]    runs notebooks 01 to 05 anew, then prints
    python ci/bench.py --run NAME --read               prints the figures of a run that is there

Training tokens/s count every token that is not padding; evaluation questions/s count generation and execution
together, without model loading; peak memory is each notebook process's own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ci import pipeline
from helpers import machine, runs


def figures(run: str) -> list[dict[str, object]]:
    """Each figure with its unit, out of the run's manifests."""
    stages = {name: runs.load(run, name, verify=False) for name in runs.FOLDERS}
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "gpu": stages["sft"].data["gpu"],
        "model": stages["data"].data["model"]["name"],
    }
    lines: list[dict[str, object]] = []

    def add(figure: str, value: object, unit: str, **setting: object) -> None:
        lines.append({"figure": figure, "value": value, "unit": unit, **machine, **setting})

    for stage in ("sft", "orpo"):
        metrics, params = stages[stage].metrics, stages[stage].params
        add(f"{stage} training", metrics.get("tokens_per_s"), "tokens/s", rank=params["rank"])
    for candidate in json.loads((stages["eval"].path / "scores.json").read_text())["candidates"]:
        if candidate["status"] == "scored":
            speed, n = candidate["speed"], candidate["scores"]["accuracy"]["n"]
            add(
                "evaluation",
                speed["items_per_s"],
                "questions/s",
                candidate=candidate["name"],
                n=n,
                cached=speed["from_cache"],
            )
    for step, seconds in stages["gguf"].metrics["seconds"].items():
        add("export", seconds, "s", step=step)
    for stage, manifest in stages.items():
        add("peak memory", manifest.data["peak_memory_gib"], "GiB", stage=stage)
        add("wall time", manifest.data["wall_s"], "s", stage=stage)
    add("wall time", round(sum(m.data["wall_s"] for m in stages.values()), 1), "s", stage="all five notebooks")
    return lines


def main(argv: list[str]) -> int:
    read = "--read" in argv
    argv = [a for a in argv if a != "--read"]
    if "--run" not in argv:
        argv += ["--run", "bench"]
    run = argv[argv.index("--run") + 1]
    if not read:
        os.environ.setdefault("TUNEBOOK_ANSWER_CACHE", "off")
        with open(os.devnull, "w") if "--quiet" in argv else sys.stderr as log:
            sys.stdout, out = log, sys.stdout
            status = pipeline.main([*[a for a in argv if a != "--quiet"], "--fresh"])
            sys.stdout = out
        if status:
            return status
    for line in figures(run):
        print(json.dumps(line))
    gpu = machine.gpu()
    here = {"GPU": gpu.name if gpu else "none", "CPU cores": os.cpu_count()}
    print(json.dumps({"figure": "setting", **here, **machine.versions()["versions"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
