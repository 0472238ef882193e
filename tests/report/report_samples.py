"""Runs for the report's tests: a real short run of all five notebooks, and the same with an evaluation of many items.

Every file and every key is one that production wrote. Only values are changed: which answers are right is drawn by lot.
"""

import json
import os
import random
import shutil
from pathlib import Path

import yaml

from helpers import runs
from helpers.evaluate import statistics

PROJECT = Path(__file__).parents[2]
NASTY = "</pre><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
NASTY += "w" * 200 + "\x00\x1b[31m\u202e&amp; {{ x }} $a_1$\ud800"
WIDE_FONT = "* { font-family: 'DejaVu Sans Mono', monospace !important; letter-spacing: .06em !important }"
CHANCES = {"base": 0.12, "sft": 0.57, "orpo": 0.6, "gguf q8_0": 0.59, "merged": 0.6}


def copy(source, target):
    """A run's folder again, large files as hard links: a test may replace a file, not change one in place."""

    def linked(one, other):
        shutil.copy2(one, other) if os.path.getsize(one) < 2_000_000 else os.link(one, other)

    shutil.copytree(source, target, copy_function=linked, ignore=shutil.ignore_patterns("checkpoints"))
    for stage in runs.FOLDERS.values():
        seal(target / stage, change=lambda data: data.update(run=target.name))
    return target


def seal(folder, change=None):
    """Make a stage's manifest agree with its files and with its parents again, after `change(manifest)`."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    if change:
        change(data)
    for name in list(data["artifacts"]):
        file = folder / name
        if not file.exists():
            del data["artifacts"][name]
        elif file.stat().st_size < 2_000_000:
            data["artifacts"][name] = {"sha256": runs.sha256_file(file), "bytes": file.stat().st_size}
    for parent, known in data["parents"].items():
        above = folder.parent / runs.FOLDERS[parent] / "manifest.json"
        known["manifest_sha256"] = runs.sha256_file(above) if above.exists() else known["manifest_sha256"]
    path.unlink()
    runs.write_manifest(folder, data)


def set_params(run, stage, **values):
    """Say that a stage ran with other values; the stages after it are sealed again."""
    used = yaml.safe_load((run / runs.FOLDERS[stage] / "params.yaml").read_text())
    (run / runs.FOLDERS[stage] / "params.yaml").write_text(yaml.safe_dump({**used, **values}))
    for name, folder in runs.FOLDERS.items():
        seal(run / folder, (lambda data: data["params"].update(values)) if name == stage else None)


def evaluation(run):
    """scores.json and answers.jsonl as they stand in a run."""
    folder = run / "05_evaluation"
    scores = json.loads((folder / "scores.json").read_text())
    return scores, [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def write_evaluation(run, scores, answers):
    folder = run / "05_evaluation"
    runs.write_json(folder / "scores.json", scores)
    runs.write_atomic(folder / "answers.jsonl", "".join(json.dumps(a) + "\n" for a in answers))
    if (folder / "manifest.json").exists():
        seal(folder)


def enlarge(run, seed=0, lift=0.0, items=180):
    """Replace a run's evaluation by one of `items` real questions, answers right by lot; one candidate is skipped."""
    rng = random.Random(seed)
    scores, few = evaluation(run)
    questions = [
        json.loads(line) for line in (PROJECT / "datasets" / "atlas_test.jsonl").read_text().splitlines()[:items]
    ]
    kinds = ["wrong_values", "unknown_column", "syntax", "wrong_count"]
    answers = []
    for i, question in enumerate(questions):
        row = json.loads(json.dumps(few[i % len(few)]))
        row |= {"id": f"t{i:04}", "question": question["question"], "reference": question["sql"], "contaminated": i < 2}
        row["meta"] |= {"kind": question["kind"], "origin": question["origin"]}
        for name, answer in row["answers"].items():
            right = rng.random() < CHANCES[name] + (lift if name != "base" else 0)
            error = "" if right else rng.choice(kinds)
            answer |= {
                "text": question["sql"] if right else question["sql"].replace("name", "nam3"),
                "score": int(right),
            }
            answer |= {"error": error, "detail": "" if right else "no such column: nam3", "valid": right}
        answers.append(row)
    for candidate in scores["candidates"]:
        given = [row["answers"][candidate["name"]] for row in answers]
        candidate["scores"] |= {
            key: statistics.share([a[of] for a in given]) for key, of in (("accuracy", "score"), ("valid", "valid"))
        }
        candidate["errors"] = {k: sum(a["error"] == k for a in given) for k in kinds}
        for column in candidate["groups"]:
            values = {}
            for row, answer in zip(answers, given, strict=True):
                values.setdefault(row["meta"][column], []).append(answer["score"])
            candidate["groups"][column] = {v: {"value": sum(s) / len(s), "n": len(s)} for v, s in values.items()}
    by_name = {c["name"]: c["scores"]["accuracy"]["value"] for c in scores["candidates"]}
    for pair in scores["comparisons"]:
        difference = by_name[pair["candidate"]] - by_name[pair["baseline"]]
        verdict = "better" if difference > 0.1 else "worse" if difference < -0.1 else "no clear difference"
        pair |= {"difference": difference, "low": difference - 0.08, "high": difference + 0.08, "n": items}
        pair |= {"verdict": verdict, "sentence": f"{verdict} by {abs(100 * difference):.0f} points; n = {items}"}
    nothing = {
        "status": "skipped",
        "reason": "the file is truncated",
        "scores": {},
        "groups": {},
        "errors": {},
        "speed": {},
    }
    scores["candidates"].append({**scores["candidates"][-1], "name": "gguf q2_k", "size_bytes": None, **nothing})
    scores["ship"] = {"name": "gguf q8_0", "sentence": "Ship gguf q8_0.", "against": "orpo", "margin": 0.02}
    scores["task"]["n"] = items
    scores["warnings"] = ["gguf q2_k was left out: the file is truncated", "2 questions stand in the training data."]
    forgetting = scores["forgetting"]["candidates"]["sft"]
    forgetting |= {"passed": False, "sentence": "forgot: loss on general text rose by 0.15 nats"}
    scores["warnings"].append(f"sft {forgetting['sentence']}.")
    write_evaluation(run, scores, answers)
    return run


def over_the_edge(page):
    """What is wider than an open page at the widths of a desk and of phones, in its own fonts and in wider ones."""
    found = []
    for font in ("own fonts", "wide fonts"):
        if font == "wide fonts":
            page.add_style_tag(content=WIDE_FONT)
        for width in (1100, 390, 360, 320):
            page.set_viewport_size({"width": width, "height": 800})
            scrolls = page.evaluate("document.documentElement.scrollWidth")
            wider = page.evaluate(
                """width => [...document.body.querySelectorAll("*")]
                  .filter(e => e.checkVisibility() && e.getBoundingClientRect().right > width + 0.5)
                  .filter(e => !e.parentElement.closest("svg, .scroll"))
                  .map(e => `${e.tagName}.${e.className}: ${e.textContent.slice(0, 60)}`)""",
                width,
            )
            if scrolls > width or wider:
                found.append((font, width, scrolls, wider[:6]))
    return found
