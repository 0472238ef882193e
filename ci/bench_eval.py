"""Figures of evaluation, one JSON line each: `python ci/bench_eval.py [--questions 150] [--gguf FILE] [--skip-pipeline]`.

generation     questions/s of transformers.pipeline at its best batch size, of ours on the same weights, of llama.cpp on a GGUF
bootstrap      seconds for 10,000 resamples of 1,000 paired items
structure      sqlglot canonical forms a second
report         seconds to build the page of a finished run (--run NAME)
"""

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

from helpers.evaluate.generate import Decoding, HfModel  # noqa: E402

TOKENS = 48


def say(figure: str, value: float, unit: str, **setting: object) -> None:
    print(json.dumps({"figure": figure, "value": round(value, 3), "unit": unit, "cores": len(os.sched_getaffinity(0)), **setting}), flush=True)


def conversations(count: int) -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in (PROJECT / "datasets" / "atlas_test.jsonl").read_text().splitlines()]
    return [[{"role": "system", "content": r["system"]}, {"role": "user", "content": r["question"]}] for r in rows[:count]]


def pipeline(model, tokenizer, asked: list, sizes: tuple[int, ...]) -> float:
    """Best questions/s over batch sizes, tried on a third of the questions, then measured on all."""
    from transformers import pipeline
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    tokenizer.padding_side = "left"
    options = {"max_new_tokens": TOKENS, "do_sample": False, "return_full_text": False}

    def rate(some: list, size: int) -> float:
        started = time.perf_counter()
        answer(some, batch_size=size, **options)
        return len(some) / (time.perf_counter() - started)

    trial = asked[::3]
    rates = {size: rate(trial, size) for size in sizes}
    best = max(rates, key=rates.get)
    value = max(rate(asked, best), rates[best])
    say("transformers.pipeline", value, "questions/s", batch_size=best, questions=len(asked), tokens=TOKENS, dtype=str(model.dtype),
        tried={k: round(v, 3) for k, v in rates.items()})
    return value


def generation(count: int, gguf: str, skip: bool) -> None:
    from helpers.model import loading
    source = loading.resolve_model(loading.DEFAULT_MODEL)
    model, tokenizer = loading.load_model(source), loading.load_tokenizer(source)
    asked = conversations(count)
    ours = HfModel(model, tokenizer)
    prompts = [ours.encode(c) for c in asked]
    ours.generate(prompts[:2], Decoding(4))
    started = time.perf_counter()
    ours.generate(prompts, Decoding(TOKENS))
    rate = len(asked) / (time.perf_counter() - started)
    base = None if skip else pipeline(model, tokenizer, asked, (8, 16, 32, 64))
    say("ours, HF weights", rate, "questions/s", questions=count, tokens=TOKENS, dtype=str(model.dtype), path=ours.path_note,
        times_pipeline=round(rate / base, 2) if base else None)
    del model, ours
    with tempfile.TemporaryDirectory() as folder:
        path = Path(gguf) if gguf else exported(source.path, Path(folder))
        from helpers.evaluate.gguf_process import GgufProcess
        runtime = GgufProcess(path, "<|im_end|>")
        prompts = [runtime.encode(c) for c in asked]
        started = time.perf_counter()
        runtime.generate(prompts, Decoding(TOKENS))
        rate = len(asked) / (time.perf_counter() - started)
        runtime.close()
        say("ours, GGUF", rate, "questions/s", questions=count, tokens=TOKENS, file=path.name, times_pipeline=round(rate / base, 2) if base else None)


def exported(model: Path, folder: Path) -> Path:
    """A Q8_0 file of the model, made for the measurement."""
    from helpers.gguf import convert, quantize
    convert.convert(model, folder / "model-f16.gguf")
    quantize.quantize(folder / "model-f16.gguf", folder / "model-q8_0.gguf", "q8_0")
    return folder / "model-q8_0.gguf"


def statistics() -> None:
    import numpy as np

    from helpers.evaluate import compare, structure
    rng = np.random.default_rng(0)
    a, b = rng.random(1000), rng.random(1000)
    started = time.perf_counter()
    compare.pair("a", "b", a.tolist(), b.tolist())
    say("paired bootstrap", time.perf_counter() - started, "s", resamples=compare.RESAMPLES, items=1000)
    queries = [json.loads(line)["sql"] for line in (PROJECT / "datasets" / "atlas_train.jsonl").read_text().splitlines()]
    structure.canonical("SELECT 1")
    started = time.perf_counter()
    for query in queries:
        structure.canonical(query)
    say("structural match", len(queries) / (time.perf_counter() - started), "queries/s", queries=len(queries))


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
