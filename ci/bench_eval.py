"""Figures of evaluation, one JSON line each: `python ci/bench_eval.py [--questions 150] [--gguf FILE]`.

generation     questions/s of transformers.pipeline at its best batch size, of ours on these weights and on a GGUF
bootstrap      seconds for 10,000 resamples of 1,000 paired items
report         seconds to build the page of a finished run (--run NAME)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from helpers.evaluate.generate import HfModel
from helpers.tasks.questions import Decoding

TOKENS = 48


def say(figure: str, value: float, unit: str, **setting: object) -> None:
    print(
        json.dumps(
            {"figure": figure, "value": round(value, 3), "unit": unit, "cores": len(os.sched_getaffinity(0)), **setting}
        ),
        flush=True,
    )


class Spent:
    """Wall and processor seconds of a block, children included; on a busy machine neither compares well."""

    def __init__(self, count: int):
        self.count = count

    def __enter__(self) -> Spent:
        self.wall_s, self.cpu_s = -time.perf_counter(), -sum(os.times()[:4])
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s += time.perf_counter()
        self.cpu_s += sum(os.times()[:4])
        self.rate = self.count / self.wall_s

    def times(self, base: Spent | None) -> dict[str, float | None]:
        """How many times as fast as `base`, by the clock and by processor time."""
        if base is None:
            return {}
        return {
            "times_pipeline": round(base.wall_s / self.wall_s, 2),
            "times_pipeline_cpu": round(base.cpu_s / self.cpu_s, 2),
        }


def conversations(count: int) -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in (PROJECT / "datasets" / "atlas_test.jsonl").read_text().splitlines()]
    return [
        [{"role": "system", "content": r["system"]}, {"role": "user", "content": r["question"]}] for r in rows[:count]
    ]


def pipeline(model, tokenizer, asked: list, sizes: tuple[int, ...]) -> Spent:
    """The best batch size, found on a sixth of the questions, measured on all."""
    from transformers import pipeline

    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    tokenizer.padding_side = "left"
    options = {"max_new_tokens": TOKENS, "do_sample": False, "return_full_text": False}

    def spent(some: list, size: int) -> Spent:
        with Spent(len(some)) as measured:
            answer(some, batch_size=size, **options)
        return measured

    trial = asked[::6]
    tried = {size: spent(trial, size) for size in sizes}
    best = min(tried, key=lambda size: tried[size].wall_s)
    value = spent(asked, best)
    say(
        "transformers.pipeline",
        value.rate,
        "questions/s",
        batch_size=best,
        questions=len(asked),
        tokens=TOKENS,
        dtype=str(model.dtype),
        cpu_s=round(value.cpu_s, 1),
        tried={k: round(v.rate, 3) for k, v in tried.items()},
    )
    return value


def generation(count: int, gguf: str, skip: bool) -> None:
    from helpers.model import loading

    source = loading.resolve_model(loading.DEFAULT_MODEL)
    model, tokenizer = loading.load_model(source), loading.load_tokenizer(source)
    asked = conversations(count)
    ours = HfModel(model, tokenizer)
    prompts = [ours.encode(c) for c in asked]
    ours.generate(prompts[:2], Decoding(4))
    with Spent(len(asked)) as mine:
        ours.generate(prompts, Decoding(TOKENS))
    base = None if skip else pipeline(model, tokenizer, asked, (8, 16, 32, 64))
    say(
        "ours, HF weights",
        mine.rate,
        "questions/s",
        questions=count,
        tokens=TOKENS,
        dtype=str(model.dtype),
        fast=ours.fast,
        cpu_s=round(mine.cpu_s, 1),
        **mine.times(base),
    )
    del model, ours
    with tempfile.TemporaryDirectory() as folder:
        path = Path(gguf) if gguf else exported(source.path, Path(folder))
        from helpers.gguf.runner import GgufModel

        with Spent(len(asked)) as mine:  # loading and rendering included
            runtime = GgufModel(path, "<|im_end|>")
            runtime.generate([runtime.encode(c) for c in asked], Decoding(TOKENS))
            runtime.close()
        say(
            "ours, GGUF",
            mine.rate,
            "questions/s",
            questions=count,
            tokens=TOKENS,
            file=path.name,
            cpu_s=round(mine.cpu_s, 1),
            **mine.times(base),
        )


def exported(model: Path, folder: Path) -> Path:
    """A Q8_0 file of the model, made for the measurement."""
    from helpers.gguf import convert

    convert.convert(model, folder / "model-f16.gguf")
    convert.quantize(folder / "model-f16.gguf", folder / "model-q8_0.gguf", "q8_0")
    return folder / "model-q8_0.gguf"


def statistics() -> None:
    import numpy as np

    from helpers.evaluate import statistics

    rng = np.random.default_rng(0)
    a, b = rng.random(1000), rng.random(1000)
    started = time.perf_counter()
    statistics.pair("a", "b", a.tolist(), b.tolist())
    say("paired bootstrap", time.perf_counter() - started, "s", resamples=statistics.RESAMPLES, items=1000)


def page(run: str) -> None:
    from helpers import report

    report.build(run)
    started = time.perf_counter()
    made = report.build(run)
    say("report", time.perf_counter() - started, "s", bytes=made.stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--gguf", default="", help="measure this file instead of a Q8_0 of the default model")
    parser.add_argument("--skip-pipeline", action="store_true")
    parser.add_argument("--run", default="", help="also build this run's report")
    given = parser.parse_args()
    statistics()
    if given.run:
        page(given.run)
    generation(given.questions, given.gguf, given.skip_pipeline)


if __name__ == "__main__":
    main()
