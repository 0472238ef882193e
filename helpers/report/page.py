"""The report of one run: scores and answers first, then how they came about, in one self-contained HTML file."""

from __future__ import annotations

import json
import shlex
from typing import Any

from helpers import display, params, plots, runs
from helpers.evaluate.scores import ERROR_KINDS
from helpers.evaluate.statistics import wilson
from helpers.report import facts as reading
from helpers.report import shell
from helpers.report.facts import TITLES, Facts, accuracy

#: metrics of the table of scores beside the headline; others have sections of their own
LABELS = {
    "accuracy": "accuracy",
    "accuracy_nonempty": "gold not empty",
    "accuracy_clean": "clean items",
    "accuracy_contaminated": "contaminated items",
    "valid": "query runs",
    "exact": "exact match",
    "f1": "token F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "stopped": "stops itself",
}
ANCHORS = {
    "scores": "Scores",
    "forgetting": "Forgetting",
    "fidelity": "Fidelity",
    "tasks": "Other",
    "answers": "Answers",
    "training": "Training",
    "data": "Data",
    "made": "How it was made",
}
GROUPS = ("gained", "lost", "both wrong", "both right", "other")
ANSWER_BYTES = 900_000  # of answers in the page; the page as a whole stays under 1.5 MB
PRINTED = 8  # items on paper: the best and the worst


def render(facts: Facts) -> str:
    """The run's page."""
    made = {
        **_scores(facts),
        **_files(facts),
        "answers": _answers(facts),
        "training": [_training(facts, stage) for stage in ("sft", "orpo") if stage in facts.stages],
        "data": _data(facts),
        "parameters": _parameters(facts),
        "command": command(facts),
        "params_yaml": params_yaml(facts),
    }
    title = f"{facts.run}: report"
    return shell.page("run.html.j2", title, run=facts, titles=TITLES, labels=LABELS, anchors=ANCHORS, **made)


# ---------------------------------------------------------------- what was measured


def _scores(facts: Facts) -> dict[str, Any]:
    """What the tables of run_scores.html.j2 need beside scores.json itself."""
    scored = facts.scored
    known = [v for c in facts.candidates if display.finite((v := accuracy(c)).get("value"))]
    shares = all(v.get("unit", "share") == "share" for v in known)
    differences = [c[k] for c in facts.scores.get("comparisons", []) for k in ("difference", "low", "high")]
    grouped = [c for c in scored if c["groups"]]
    groups = []
    for column in dict.fromkeys(column for c in grouped for column in c["groups"]):
        counts = {v: found["n"] for c in grouped for v, found in c["groups"].get(column, {}).items()}
        parts = [c["groups"].get(column, {}) for c in grouped]
        rows = [[v, n, *(display.percent(p.get(v, {}).get("value"), 0) for p in parts)] for v, n in counts.items()]
        groups += [(column, [c["name"] for c in grouped], rows)] if len(rows) > 1 else []
    failing = [c for c in scored if any(c["errors"].values())]
    kinds = [k for k in ERROR_KINDS if any(c["errors"].get(k) for c in failing)]
    forgotten = (facts.scores.get("forgetting") or {}).get("candidates") or {}
    return {
        "metrics": {m: v for m, v in LABELS.items() if m != "accuracy" and any(m in c["scores"] for c in scored)},
        "ceiling": 1.0 if shares else 1.05 * max(v.get("high") or v["value"] for v in known),
        "reach": max([abs(d) for d in differences if display.finite(d)], default=0.0) or 0.1,
        "groups": groups,
        "errors": (
            [c["name"] for c in failing],
            [[ERROR_KINDS[k], *(c["errors"].get(k) or "" for c in failing)] for k in kinds],
        ),
        "general_tasks": list(dict.fromkeys(t for c in forgotten.values() for t in c.get("tasks") or {})),
    }


def _files(facts: Facts) -> dict[str, Any]:
    """Task scores and figures of the exported files: the evaluation's own score where it judged the file."""
    judged = {
        c["name"].lower().removeprefix("gguf").strip(" :-"): accuracy(c) for c in facts.scored if c["kind"] == "gguf"
    }
    shown, points, questions = {}, [], 0
    for name, file in facts.files.items():
        value, count = file.get("task_score"), file.get("task_count") or 0
        score: tuple[float, float, float] | None = None
        if display.finite(value) and count:
            score = (value, *wilson(round(value * count), count))
        shown[name] = f"{display.percent(value)} of {count}" if score else "–"
        if display.finite((found := judged.get(name.lower(), {})).get("value")):
            shown[name], count = display.percent(found["value"]), found["n"]
            score = (found["value"], found["low"], found["high"])
        if display.finite(file["bytes"]) and display.finite(file.get("mean_kl")):
            kl = (file["mean_kl"], file.get("weights_kl"), file["allowed"])
            points.append(plots.FilePoint(name, int(file["bytes"]), *kl, score))
            questions = max(questions, count)
    panels = ["divergence", "score"] if any(p.score for p in points) else ["divergence"]
    return {
        "file_scores": shown,
        "file_figures": [plots.file_sizes(points, questions, [panel]) for panel in panels] if points else [],
        "exported": TITLES.get(facts.exported, "the base model, untrained").lower(),
    }


# ---------------------------------------------------------------- answers side by side


def _answers(facts: Facts) -> dict[str, Any]:
    """Every item with the candidates' answers, the most telling first. Gained: only the best candidate is right."""
    names = [c["name"] for c in facts.scored]
    if not facts.answers or not names:
        return {}
    base, best = names[0], (facts.best or facts.scored[0])["name"]
    ranked = sorted(
        ((_group(row, base, best), row) for row in facts.answers), key=lambda pair: _rank(pair[0], pair[1], best)
    )
    piles = [[pair for pair in ranked if pair[0] == group] for group in GROUPS]
    woven = [pile[i] for i in range(max(map(len, piles))) for pile in piles if i < len(pile)]
    draw, used = shell.macro("answer.html.j2", "item"), 0
    shown: list[shell.Markup] = []
    errors: dict[str, None] = {}
    for group, row in woven:
        wrong = [f"{n}: {row['answers'][n]['error']}" for n in names if (row["answers"].get(n) or {}).get("error")]
        alike: dict[str, tuple[list[str], dict[str, Any] | None]] = {}
        for name in names:
            answer = row["answers"].get(name)
            key = json.dumps([answer and [answer[k] for k in ("text", "score", "detail", "error")]])
            alike.setdefault(key, ([], answer))[0].append(name)
        item = draw(group, row, list(alike.values()), wrong, len(shown) < PRINTED)
        used += len(item.encode())
        if used > ANSWER_BYTES and shown:
            break
        shown.append(item)
        errors |= dict.fromkeys(wrong)
    kept = woven[: len(shown)]
    sub = "Best and worst first."
    if best != base:
        sub += f" “Gained”: {best} is right where {base} is not; “lost”: the other way round."
    if len(shown) < len(facts.answers):
        sub += f" The {len(shown)} most telling of {len(facts.answers)} are shown; all are in answers.jsonl."
    columns = {c: sorted({str(r["meta"][c]) for _, r in kept if (r["meta"] or {}).get(c)}) for c in ("kind", "origin")}
    filters = {c: values for c, values in columns.items() if len(values) > 1} | (
        {"errors": sorted(errors)} if errors else {}
    )
    counts = {g: sum(group == g for group, _ in kept) for g in GROUPS}
    return {"sub": sub, "shown": shown, "filters": filters, "groups": {g: n for g, n in counts.items() if n}}


def _group(row: dict[str, Any], base: str, best: str) -> str:
    def right(name: str) -> bool | None:
        score = (row["answers"].get(name) or {}).get("score")
        return score >= 0.5 if display.finite(score) else None

    found = {(False, True): "gained", (True, False): "lost", (False, False): "both wrong", (True, True): "both right"}
    return found.get((right(base), right(best)), "other")  # type: ignore[arg-type]


def _rank(group: str, row: dict[str, Any], best: str) -> tuple[Any, ...]:
    """Within a group, wrong answers that do not even run come first, then short questions."""
    runs_at_all = bool((row["answers"].get(best) or {}).get("valid"))
    return GROUPS.index(group), runs_at_all and group in ("lost", "both wrong"), len(row["question"]), row["id"]


# ---------------------------------------------------------------- how it came about


def _training(facts: Facts, stage: str) -> dict[str, Any]:
    """Curves, memory compared with the plan, the plan's choices and every figure of a training stage."""
    log, metrics, manifest = facts.logs[stage], facts.metrics(stage), facts.stages[stage].data
    logged = [n for n in plots.CURVES if any(len(plots.series(log, key)[1]) > 1 for key in (n, f"eval_{n}"))]
    plan = manifest.get("plan") or {}
    used = metrics.get("peak_gib") or manifest.get("peak_memory_gib") or 0.0
    error = (plan.get("errors") or {}).get("peak_gib")  # (predicted - measured) / measured
    planned = used * (1 + error) if display.finite(error) else None
    named = {n: n.replace("_", " ") for n in ("backend", "attention", "quantize", "row_tokens", "accumulation")}
    named["recompute"] = "layers with activation checkpointing"
    chosen = ", ".join(f"{words} {display.plain(plan[name])}" for name, words in named.items() if name in plan)
    flat = {k: v for k, v in sorted(metrics.items()) if isinstance(v, (int, float, str)) and len(str(v)) < 200}
    return {
        "title": TITLES[stage],
        "figures": [plots.curves(log, [name]) for name in logged],
        "planned": planned,
        "used": used,
        "most": 1.1 * max(planned or 0.0, used),
        "notes": [n for n in (chosen, plan.get("reason"), *(manifest.get("notes") or [])) if n],
        "figures_in_words": [(k, display.plain(v)) for k, v in flat.items()],
    }


def _data(facts: Facts) -> dict[str, Any]:
    """Rows in and out, why rows went, lengths, and real rows with the trained tokens marked."""
    if "data" not in facts.stages:
        return {}
    metrics = facts.metrics("data")
    splits = metrics.get("rows", {}) | {f"preference {k}": v for k, v in metrics.get("preference_rows", {}).items()}
    order = ["train", "eval", "test", "preference train", "preference eval"]
    steps = []
    for s in metrics.get("steps", []):
        removed = ", ".join(f"{reason}: {n}" for reason, n in s["dropped"].items())
        steps.append(
            [s["step"], f"{s['seen']:,}", f"{s['kept']:,}", f"{s['changed']:,}" if s["changed"] else "", removed]
        )
    rejected = metrics.get("rejected", {}).get("invalid", {}) | metrics.get("rejected", {}).get("removed", {})
    found, limit = metrics.get("lengths", {}), facts.stages["data"].params.get("max_length")
    histogram = reading.row_lengths(facts)
    marks = (found.get("max_length") or limit or 0, found.get("over", 0), found.get("proposed_max_length"))
    return {
        "metrics": metrics,
        "splits": [(n, f"{splits[n]:,}") for n in sorted(splits, key=lambda n: order.index(n) if n in order else 9)],
        "steps": steps,
        "rejected": sorted(rejected.items(), key=lambda item: -item[1]),
        "figures": [plots.lengths(histogram, *marks)] if histogram else [],
        "examples": reading.examples(facts),
    }


def _parameters(facts: Facts) -> list[tuple[str, list[list[Any]], list[str]]]:
    """(stage's title, rows of its parameters table, a mark for each row whose value is not the default)."""
    found = []
    for stage, manifest in facts.stages.items():
        known = {p.name: p for p in params.STAGES[stage]}
        rows, changed = [], []
        for name, value in manifest.params.items():
            spec = known.get(name)
            rows.append([name, display.plain(value) if value != "" else "–", spec and spec.unit, spec and spec.help])
            changed.append("changed" if spec and value != spec.default and name != "run" else "")
        found.append((TITLES[stage], rows, changed))
    return found


def command(facts: Facts) -> str:
    """Shell lines that repeat this run: the code's revision, then every stage with the parameters of params.yaml."""
    revision = str((facts.last.data.get("code_revision") if facts.last else "") or "")
    commit, _, changes = revision.partition("+")
    note = "   # the run had uncommitted changes on top" if changes else ""
    lines = [f"git checkout {shlex.quote(commit)}{note}"] if commit else []
    last = list(facts.stages)[-1:]
    until = f" --to {runs.FOLDERS[last[0]][:2]}" if last and last != ["eval"] else ""
    values = shlex.quote(f"runs/{facts.run}/params.yaml")
    return "\n".join([*lines, f"bash ci/run.sh --run {shlex.quote(facts.run)}-again --params {values}{until}"])


def params_yaml(facts: Facts) -> str:
    """Every parameter of every stage, as ci/run.sh takes them with --params."""
    import yaml

    sections = {stage: {n: v for n, v in m.params.items() if n != "run"} for stage, m in facts.stages.items()}
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
