"""The report of one run: scores and answers first, then how they came about, in one self-contained HTML file."""

from __future__ import annotations

import itertools
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from helpers import display, plots, runs
from helpers.evaluate.scores import ERROR_KINDS, figure
from helpers.report import data_page, shell
from helpers.report.facts import TITLES, Facts, accuracy

#: metrics of the table of scores beside the headline; others have sections of their own
LABELS = {
    "accuracy_nonempty": "gold not empty",
    "accuracy_clean": "clean items",
    "accuracy_contaminated": "contaminated items",
    "valid": "query runs",
    "structural": "same structure",
    "exact": "exact match",
    "f1": "token F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "stopped": "stops itself",
}
GROUPS = ("gained", "lost", "both wrong", "both right", "other")
ANSWER_BYTES = 900_000  # of answers in the page; the page as a whole stays under 1.5 MB
PRINTED = 4  # items on paper: the most telling


def render(facts: Facts) -> str:
    """The run's page."""
    made = {
        **_scores(facts),
        "exported": TITLES.get(facts.exported, "the base model, untrained").lower(),
        "answers": _answers(facts),
        "example": _example(facts),
        "training": [_training(facts, stage) for stage in facts.logs],
        "examples": _examples(facts),
        "command": command(facts),
        "recipe": recipe(facts),
    }
    constants = {"titles": TITLES, "labels": LABELS, "error_kinds": ERROR_KINDS, "score_after": plots.score_after}
    return shell.page("run.html.j2", f"{facts.run}: report", run=facts, **constants, **made)


# ---------------------------------------------------------------- what was measured


def _scores(facts: Facts) -> dict[str, Any]:
    """What the tables of run_scores.html.j2 need beside scores.json itself."""
    scored = facts.scored
    known = [v for c in facts.candidates if display.finite((v := accuracy(c)).get("value"))]
    shares = all(v.get("unit", "share") == "share" for v in known)
    differences = [c[k] for c in facts.scores.get("comparisons", []) for k in ("difference", "low", "high")]
    groups: dict[str, dict[str, int]] = {}  # column → value → items
    for column, values in (pair for c in scored for pair in c["groups"].items()):
        groups.setdefault(column, {}).update({value: found["n"] for value, found in values.items()})
    forgotten = (facts.scores.get("forgetting") or {}).get("candidates") or {}
    return {
        "figure": figure(facts.scores) if known else None,
        "metrics": {metric: words for metric, words in LABELS.items() if any(metric in c["scores"] for c in scored)},
        "ceiling": 1.0 if shares else 1.05 * max(v.get("high") or v["value"] for v in known),
        "reach": max([abs(d) for d in differences if display.finite(d)], default=0.0) or 0.1,
        "groups": {column: values for column, values in groups.items() if len(values) > 1},
        "general_tasks": list(dict.fromkeys(t for c in forgotten.values() for t in c.get("tasks") or {})),
    }


# ---------------------------------------------------------------- answers side by side


def _answers(facts: Facts) -> dict[str, Any]:
    """Every item with the candidates' answers, the most telling first. Gained: only the best candidate is right."""
    names = [c["name"] for c in facts.scored]
    if not facts.answers or not names:
        return {}
    base, best = names[0], (facts.best or facts.scored[0])["name"]
    piles: dict[str, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    for row in sorted(facts.answers, key=lambda row: (len(row["question"]), row["id"])):
        piles[_group(row, base, best)].append(row)
    for group in ("lost", "both wrong"):  # first the answers that do not even run
        piles[group].sort(key=lambda row: bool((row["answers"].get(best) or {}).get("valid")))
    woven = []
    for turn in itertools.zip_longest(*piles.values()):
        woven += [(group, row) for group, row in zip(GROUPS, turn, strict=True) if row]
    draw, used = shell.macro("answer.html.j2", "item"), 0
    shown: list[shell.Markup] = []
    errors: set[str] = set()
    for group, row in woven:
        given = {name: row["answers"].get(name) or {} for name in names}
        wrong = [f"{name}: {answer['error']}" for name, answer in given.items() if answer.get("error")]
        alike: dict[str, list[str]] = {}  # candidates by what they answered
        for name, answer in given.items():
            alike.setdefault(json.dumps([answer.get(k) for k in ("text", "score", "detail", "error")]), []).append(name)
        sides = [(who, row["answers"].get(who[0])) for who in alike.values()]
        item = draw(group, row, sides, wrong, len(shown) < PRINTED)
        used += len(item.encode())
        if used > ANSWER_BYTES and shown:
            break
        shown.append(item)
        errors |= set(wrong)
    kept = woven[: len(shown)]
    sub = "The most telling first."
    if best != base:
        sub += f" “Gained”: {best} is right where {base} is not; “lost”: the other way round."
    if len(shown) < len(facts.answers):
        sub += f" The {len(shown)} most telling of {len(facts.answers)} are shown; all are in answers.jsonl."
    filters = {c: {str(r["meta"][c]) for _, r in kept if (r["meta"] or {}).get(c)} for c in ("kind", "origin")}
    filters = {column: values for column, values in filters.items() if len(values) > 1}
    counts = Counter(group for group, _ in kept)
    return {
        "sub": sub,
        "shown": shown,
        "filters": filters | ({"errors": errors} if errors else {}),
        "groups": {g: counts[g] for g in GROUPS if counts[g]},
    }


def _example(facts: Facts) -> dict[str, Any]:
    """A question with the answers of the baseline and of the best: one that was gained, and a short one."""
    names = [c["name"] for c in (facts.baseline, facts.best) if c]
    if len(names) < 2 or facts.scores["task"]["kind"] == "text":
        return {}
    known = [row for row in facts.answers if all(row["answers"].get(name, {}).get("text") for name in names)]

    def place(row: dict[str, Any]) -> tuple[int, int]:
        texts = [row["question"], *(row["answers"][name]["text"] for name in names)]
        return GROUPS.index(_group(row, *names)), sum(map(len, texts))

    row = min(known, key=place, default=None)
    return {"question": row["question"], "sides": [(n, row["answers"][n]) for n in names]} if row else {}


def _group(row: dict[str, Any], base: str, best: str) -> str:
    def right(name: str) -> bool | None:
        score = (row["answers"].get(name) or {}).get("score")
        return score >= 0.5 if display.finite(score) else None

    found = {(False, True): "gained", (True, False): "lost", (False, False): "both wrong", (True, True): "both right"}
    return found.get((right(base), right(best)), "other")  # type: ignore[arg-type]


# ---------------------------------------------------------------- how it came about


def _training(facts: Facts, stage: str) -> dict[str, Any]:
    """Curves, memory compared with the plan, the plan's choices and every figure of a training stage."""
    metrics, manifest = facts.metrics(stage), facts.stages[stage].data
    lines = [{**line, "memory_gb": shell.gigabytes(line.get("memory_gib"))} for line in facts.logs[stage]]
    logged = [n for n in plots.CURVES if any(len(plots.series(lines, key)[1]) > 1 for key in (n, f"eval_{n}"))]
    flat = {k: v for k, v in sorted(metrics.items()) if isinstance(v, (int, float, str)) and len(str(v)) < 200}
    return {
        "title": TITLES[stage],
        "figures": [plots.curves({"": lines}, [name]) for name in logged],
        "manifest": manifest,
        "used": metrics.get("peak_gib") or manifest.get("peak_memory_gib") or 0.0,
        "figures_in_words": [(k, display.plain(v)) for k, v in flat.items()],
    }


def _examples(facts: Facts, count: int = 3) -> list[list[tuple[str, bool]]]:
    """The first training rows as (text, trained) pieces, decoded from the ids that training saw; [] without them."""
    from tokenizers import Tokenizer

    places = [Path(str(facts.model.get("path", ""))), *(facts.stages[s].path / "adapter" for s in facts.logs)]
    vocabulary = next((p / "tokenizer.json" for p in places if (p / "tokenizer.json").is_file()), None)
    if vocabulary is None or "data" not in facts.stages:
        return []
    tokenizer, shown = Tokenizer.from_file(str(vocabulary)), []
    try:
        rows = data_page.first_rows(facts.stages["data"].path / "train.parquet", count)
    except (OSError, ValueError) as error:
        facts.warnings.append(f"train.parquet cannot be read ({error}).")
        rows = []
    for row in rows:
        marked = itertools.groupby(zip(row["input_ids"], row["completion_mask"], strict=True), key=lambda pair: pair[1])
        pieces = [([token for token, _ in pairs], bool(trained)) for trained, pairs in marked]
        shown.append([(tokenizer.decode(ids, skip_special_tokens=False), trained) for ids, trained in pieces])
    return shown


def command(facts: Facts) -> str:
    """Shell lines that repeat this run: the code's revision, then every stage with the parameters in recipe/."""
    commit, _, changes = str(facts.latest("code_revision") or "").partition("+")
    note = "   # the run had uncommitted changes on top" if changes else ""
    lines = [f"git checkout {shlex.quote(commit)}{note}"] if commit else []
    last = list(facts.stages)[-1:]
    until = f" --to {runs.FOLDERS[last[0]][:2]}" if last and last != ["eval"] else ""
    values = shlex.quote(f"runs/{facts.run}/recipe")
    return "\n".join([*lines, f"bash ci/run.sh --run {shlex.quote(facts.run)}-again --recipe {values}{until}"])


def recipe(facts: Facts) -> dict[str, str]:
    """The recipe that repeats this run: its files with every parameter of every stage."""
    import yaml

    found = {stage: {n: v for n, v in made.params.items() if n != "run"} for stage, made in facts.stages.items()}
    return {f"{stage}.yaml": yaml.safe_dump(v, sort_keys=False, allow_unicode=True) for stage, v in found.items()}
