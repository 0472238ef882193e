"""Figures of the data stage, one JSON line each; ratios are taken in one run on one machine.

    python ci/bench_data.py                         all but the million rows
    python ci/bench_data.py near pipeline           some of: near, injection, rendering, pipeline, memory
    python ci/bench_data.py memory --large 1000000  peak memory at 100,000 and at a million rows

The texts are made of 30,000 invented words in the frequencies of a natural language, so no data is needed. Every
figure is taken in a process of its own, for its peak memory to be its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

STEPS = (
    "read",
    "generate",
    "clean",
    "mix",
    "split",
    "template",
    "vocabulary",
    "encode",
    "lengths",
    "pairs",
    "preview",
    "write",
    "finish",
)
FIGURES = ("near", "injection", "rendering", "pipeline")


def say(figure: str, **values: Any) -> None:
    values["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        json.dumps({"figure": figure, **{k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}}),
        flush=True,
    )


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def begin_peak() -> None:
    """Forget the peak so far (Linux), so that each step shows its own."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Words:
    """Texts of so many words drawn by Zipf's law."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        letters = "etaoinshrdlcumwfgypbvk"
        self.words = ["".join(self.random.choices(letters, k=self.random.randint(2, 10))) for _ in range(30_000)]
        self.weights = [1 / (rank + 10) for rank in range(len(self.words))]
        self.pool: list[str] = []
        self.taken = 0

    def take(self, count: int) -> list[str]:
        if len(self.pool) - self.taken < count:
            self.pool, self.taken = self.random.choices(self.words, self.weights, k=200_000), 0
        self.taken += count
        return self.pool[self.taken - count : self.taken]

    def text(self, count: int) -> str:
        return " ".join(self.take(count))


# ---------------------------------------------------------------- near-duplicates


def near(rows: int) -> None:
    """Documents of 150 words, one in twenty planted again with changed words: Jaccard similarity 0.9 on average."""
    from helpers.data import dedup
    from helpers.data.turns import make_row

    words = Words(1)
    texts = [words.text(150) for _ in range(rows)]
    copies, similar = {}, []
    for original in range(0, rows, 20):
        changed = texts[original].split()
        for at in words.random.sample(range(150), words.random.choice((2, 3))):
            changed[at] = words.take(1)[0]
        one, other = sets(texts[original]), sets(" ".join(changed))
        similarity = len(one & other) / len(one | other)
        if similarity < 0.86:  # a changed word that overlaps another's shingles
            continue
        copies[len(texts)] = original
        similar.append(similarity)
        texts.append(" ".join(changed))
    table = [make_row("text", [{"role": "text", "content": text}]) for text in texts]
    best, least_cpu = float("inf"), float("inf")
    for _ in range(3):
        began, cpu = time.perf_counter(), time.process_time()
        keeper = dedup.NearIndex(table).keepers(0.8)
        best, least_cpu = min(best, time.perf_counter() - began), min(least_cpu, time.process_time() - cpu)
    found = sum(keeper[copy] == original for copy, original in copies.items())
    wrong = int((keeper >= 0).sum()) - found
    speed = {"documents_per_s": len(texts) / best, "documents_per_cpu_s": len(texts) / least_cpu}
    quality = {
        "mean_jaccard": sum(similar) / len(similar),
        "recall": found / len(copies),
        "false_per_1000": 1_000 * wrong / len(texts),
    }
    say(
        "near-duplicates", documents=len(texts), words=150, planted=len(copies), **speed, **quality, peak_gib=peak_gib()
    )


def sets(text: str) -> set[tuple[str, ...]]:
    """Word trigrams, made without the code that is measured."""
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


# ---------------------------------------------------------------- decontamination


def injection(rows: int) -> None:
    """Questions planted in training rows: wrapped anew, in other case and punctuation; and false alarms."""
    from helpers.data import decontamination
    from helpers.data.tables import StepReport
    from helpers.data.turns import batches, make_row

    words = Words(2)

    def chat(question: str, at: int) -> dict:
        answer = {"role": "assistant", "content": words.text(40)}
        return make_row("sft", [{"role": "user", "content": question}, answer], row=at)

    rows = min(rows, 20_000)
    carriers = [chat(words.text(80), i) for i in range(rows)]
    han = [chr(code) for code in range(0x4E00, 0x5600)]
    questions = {
        "words": [chat(words.text(words.random.randint(3, 40)) + "?", i) for i in range(1_000)],
        "Chinese": [
            chat("".join(words.random.choices(han, k=words.random.randint(4, 40))) + "？", i) for i in range(1_000)
        ],
    }
    for script, asked in questions.items():
        planted = [chat(disguised(row["messages"][0]["content"], words), 0) for row in asked]
        missed = sum(map(len, decontamination.decontaminate([planted], StepReport("planted"), [asked])))
        report = StepReport("decontamination")
        began = time.perf_counter()
        kept = sum(map(len, decontamination.decontaminate(batches(carriers), report, [asked])))
        wall = time.perf_counter() - began
        false = 1_000 * (rows - kept) / rows
        found = {"injection_recall": 1 - missed / len(planted), "false_per_1000": false, "documents_per_s": rows / wall}
        say("decontamination", script=script, questions=len(asked), **found)


def disguised(question: str, words: Words) -> str:
    """A question wrapped anew, in capitals, its punctuation changed; one that has 8-grams stands inside other text."""
    parts = question.split()
    text = "\n  ".join(" ".join(parts[at : at + 5]) for at in range(0, len(parts), 5)).upper().replace("?", " ?")
    long = len(parts) >= 8 or (len(parts) == 1 and len(question) > 8)  # one part: Chinese
    return f"{words.text(40)}\n{text}\n{words.text(40)}" if long else text


# ---------------------------------------------------------------- rendering


def rendering(rows: int) -> None:
    """Rendering, tokenising, masking and checking against a plain batched datasets.map, turn about, best of three."""
    from datasets import Dataset, disable_caching, disable_progress_bars
    from helpers.data import chat_template as templates
    from helpers.data.labels import Encoder
    from helpers.data.turns import batches, make_row
    from helpers.model.loading import DEFAULT_MODEL, load_tokenizer, resolve_model

    disable_caching()
    disable_progress_bars()
    words = Words(3)
    rows = min(rows, 20_000)
    chats = [
        [{"role": "user", "content": words.text(25)}, {"role": "assistant", "content": words.text(90)}]
        for _ in range(rows)
    ]
    tokenizer = load_tokenizer(resolve_model(DEFAULT_MODEL))
    data = Dataset.from_dict({"messages": chats})
    table = list(batches(make_row("sft", chat, row=i) for i, chat in enumerate(chats)))

    def plain(batch: dict) -> dict:
        return {
            "input_ids": tokenizer(
                tokenizer.apply_chat_template(batch["messages"], tokenize=False), add_special_tokens=False
            )["input_ids"]
        }

    wall, cpu = {"ours": [], "plain": []}, {"ours": [], "plain": []}
    encoder = Encoder(templates.inspect(tokenizer))
    jobs = {
        "plain": lambda: len(data.map(plain, batched=True, remove_columns=["messages"])),
        "ours": lambda: sum(len(batch) for batch in encoder.encode(table)),
    }
    for _ in range(3):
        for name, job in jobs.items():
            began, spent = time.perf_counter(), time.process_time()
            assert job() == rows
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - spent)
    best = {name: min(times) for name, times in wall.items()}
    ratios = {"time_ratio": best["ours"] / best["plain"], "cpu_ratio": min(cpu["ours"]) / min(cpu["plain"])}
    say(
        "render and tokenise",
        rows=rows,
        rows_per_s=rows / best["ours"],
        plain_rows_per_s=rows / best["plain"],
        **ratios,
    )


# ---------------------------------------------------------------- the whole stage


def alpaca(rows: int, seed: int = 4) -> Iterator[dict]:
    """Alpaca-shaped rows of 120 words; two in a hundred are exact duplicates, three near ones."""
    words = Words(seed)
    recent: list[dict] = []
    for _ in range(rows):
        draw = words.random.random()
        if recent and draw < 0.05:
            row = dict(words.random.choice(recent))
            if draw < 0.03:
                changed = row["output"].split()
                changed[words.random.randrange(len(changed))] = words.take(1)[0]
                row["output"] = " ".join(changed)
        else:
            row = {
                "instruction": words.text(words.random.randint(8, 25)) + "?",
                "input": words.text(20) if draw > 0.7 else "",
                "output": words.text(words.random.randint(60, 130)) + ".",
            }
            recent = [*recent[-200:], row]
        yield row


def pipeline(rows: int) -> None:
    """From a jsonl file to parquet with template, masks, duplicates, decontamination, statistics and report."""
    with tempfile.TemporaryDirectory(prefix="tunebook-bench-") as folder:
        source, tests = Path(folder) / "train.jsonl", Path(folder) / "test.jsonl"
        for path, count, seed in ((source, rows, 4), (tests, 1_000, 5)):
            with path.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in alpaca(count, seed))
        # A process of its own: making the rows must not count.
        env = {**os.environ, "TUNEBOOK_RUNS": folder}
        done = subprocess.run([sys.executable, __file__, "--stage", folder], capture_output=True, text=True, env=env)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        say("pipeline", rows=rows, **json.loads(done.stdout.splitlines()[-1]))


def stage(folder: str) -> None:
    """The steps of notebook 01 on the files in `folder`; the last line printed is their wall time and peak memory."""
    from helpers import params
    from helpers.data import prepare
    from helpers.model.loading import resolve_model
    from helpers.report import data_page

    source = resolve_model(params.DataParams().model)
    os.environ["TUNEBOOK_CACHE"] = f"{folder}/cache"  # nothing may come from an earlier run
    began = time.perf_counter()
    values = {"dataset": f"{folder}/train.jsonl", "test_dataset": f"{folder}/test.jsonl", "max_length": 1024}
    values |= {"preference_dataset": "", "database": ""}
    pages = {"preview": data_page.preview, "write": data_page.write}
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        job = prepare.open(params.resolve("data", values))
        job.source = source
        for name in STEPS:
            at = time.perf_counter()
            begin_peak()
            pages[name](job) if name in pages else getattr(job, name)()
            seconds[name], peaks[name] = round(time.perf_counter() - at, 2), round(peak_gib(), 3)
    written = job.encoded["written"]["train"]
    wall, cpu = time.perf_counter() - began, time.process_time()
    figures = {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1), "peak_gib": max(peaks.values()), "written": written}
    print(json.dumps(figures | {"seconds": seconds, "peak_gib_by_step": peaks}))


def memory(rows: int, large: int) -> None:
    """Peak memory of the whole stage at two sizes."""
    pipeline(rows)
    pipeline(large)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "figures", nargs="*", choices=[*FIGURES, "memory", []], help="which figures; all but memory when none is named"
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--stage", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        stage(given.stage)
    elif given.alone:
        name = given.figures[0]
        memory(given.rows, given.large) if name == "memory" else globals()[name](given.rows)
    else:
        for name in given.figures or FIGURES:
            subprocess.run(
                [sys.executable, __file__, name, "--alone", "--rows", str(given.rows), "--large", str(given.large)],
                check=True,
            )


if __name__ == "__main__":
    main()
