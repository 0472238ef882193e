"""From what was measured to scores.json and answers.jsonl: intervals, comparisons, verdicts, sentences.

The report, the model card and the notebook read these two files and nothing else, so a number has one source. Their
shape is in scores.schema.json; `write` and `read` check it.
"""

from __future__ import annotations

import functools
import json
import statistics as numbers
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import cache, display
from helpers.errors import TunebookError
from helpers.evaluate import forgetting, harness, preferences, statistics
from helpers.evaluate.candidates import Candidate
from helpers.params import EvalParams
from helpers.tasks import questions, text_metrics, text_to_sql

SCHEMA_VERSION = 2
SCORES, ANSWERS = "scores.json", "answers.jsonl"
SMALL = 100  # items; below this even a large difference may hide
ERROR_KINDS = {
    **text_to_sql.ERROR_KINDS,
    "wrong": "differs from the reference",
    "no_answer": "the candidate failed to answer",
}


@dataclass
class Measured:
    """What one candidate answered. entries: an answer of answers.jsonl for each item.

    by_seed: the share right of each seed; loss, chat, preference: of forgetting and preferences; tasks: of the harness.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    speed: dict[str, Any] = field(default_factory=dict)
    by_seed: dict[str, float | None] = field(default_factory=dict)
    loss: dict[str, Any] | None = None
    chat: dict[str, Any] | None = None
    preference: dict[str, Any] | None = None
    tasks: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> list[float | None]:
        return [entry["score"] for entry in self.entries]


@dataclass
class Findings:
    """Everything that an evaluation measured. rows: answers.jsonl without answers; measured, skipped: by candidate."""

    params: EvalParams
    kind: str
    task: dict[str, Any]
    items: list[questions.Item]
    candidates: list[Candidate]
    rows: list[dict[str, Any]] = field(default_factory=list)
    contamination: dict[str, Any] | None = None
    trained: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    judge: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    def answers(self) -> list[dict[str, Any]]:
        """answers.jsonl."""
        entries = self._of("entries")
        return [{**row, "answers": {n: e[i] for n, e in entries.items()}} for i, row in enumerate(self.rows)]

    def _of(self, what: str) -> dict[str, Any]:
        """One part of what was measured, of the candidates that have it."""
        return {name: value for name, m in self.measured.items() if (value := getattr(m, what))}

    def scores(self) -> dict[str, Any]:
        """scores.json."""
        baseline, clusters = next(iter(self.measured)), questions.clusters(self.items)

        def share(values: Any) -> dict[str, Any]:
            return statistics.share(values, clusters=clusters, seed=self.params.seed)

        def apart(values: list[float | None], key: str, wanted: bool) -> dict[str, Any]:
            return share([v if row[key] is wanted else None for v, row in zip(values, self.rows, strict=True)])

        pairs = preferences.win_rates(self._of("preference"), baseline)
        followed: dict[str, Any] = {}
        harnessed: dict[str, Any] = {}
        records = []
        for candidate in self.candidates:
            name = candidate.name
            said = ("name", "role", "kind", "source", "made_by", "size_bytes")
            record = {key: getattr(candidate, key) for key in said}
            record |= {"status": "skipped", "reason": "", "scores": {}, "groups": {}, "errors": {}, "speed": {}}
            records.append(record)
            if name in self.skipped:
                record["reason"] = self.skipped[name]
                continue
            m = self.measured[name]
            passed = text_metrics.instructions(m.entries, self.items, self.kind)
            followed[name] = {check: statistics.share(values) for check, values in passed.items()}
            found = {"accuracy": share(m.values), "stopped": statistics.share([e["stopped"] for e in m.entries])}
            if self.kind == "text_to_sql":
                found["accuracy_nonempty"] = apart(m.values, "nonempty", True)
                found["valid"] = statistics.share([e["valid"] for e in m.entries])
            elif self.kind == "references":
                found |= {k: share([e["metrics"][k] for e in m.entries]) for k in text_metrics.METRICS}
            if self.contamination and self.contamination["contaminated"]:
                found["accuracy_clean"] = apart(m.values, "contaminated", False)
            found |= {f"instructions/{check}": score for check, score in followed[name].items()}
            for task, result in m.tasks.items():
                shown = harnessed.setdefault(task, {"n": result["n"], "metrics": {}})
                shown["metrics"][name] = result["metrics"]
                for metric, v in result["metrics"].items():
                    found[f"harness/{task}/{metric}"] = _plain(v["value"], result["n"], "share", v["stderr"])
            preferred = pairs.get(name, {})
            found |= {f"preference/{k}": preferred[k] for k in ("accuracy", "log_odds", "win_rate") if preferred.get(k)}
            if m.loss:
                found["general_loss"] = _plain(m.loss["loss"], m.loss["n"], "nats")
            if m.chat:
                known = {k: m.chat[k] for k in forgetting.SHARES if m.chat[k] is not None}
                found |= {k: _plain(value, m.chat["n"], "share") for k, value in known.items()}
            errors = Counter(e["error"] for e in m.entries if e["error"])
            record |= {"status": "scored", "scores": found, "speed": m.speed, "errors": dict(errors.most_common())}
            record["groups"] = questions.groups(self.items, m.values)
        contamination = self.contamination and {
            **self.contamination,
            "candidates": {
                n: {side: apart(m.values, "contaminated", side != "clean") for side in ("clean", "contaminated")}
                for n, m in self.measured.items()
            },
        }
        scores = {
            "schema_version": SCHEMA_VERSION,
            "run": self.params.run,
            "task": self.task,
            "candidates": records,
            "comparisons": self._comparisons(baseline, clusters),
            "forgetting": self._forgetting(baseline),
            "harness": harnessed or None,
            "preference": pairs or None,
            "instructions": followed,
            "judge": self.judge,
            "contamination": contamination,
            "seeds": self._seeds(),
        }
        scores |= {"headline": _headline(scores), "ship": self._ship(scores, clusters)}
        return {**scores, "warnings": self._warnings(scores)}

    def _comparisons(self, baseline: str, clusters: list[str] | None) -> list[dict[str, Any]]:
        """Every candidate against the baseline, and against what it was exported from or trained on top of."""
        values = {n: m.values for n, m in self.measured.items()}
        pairs = [(baseline, name) for name in values]
        pairs += [(c.made_from, c.name) for c in self.candidates] + [("sft", "orpo")]
        known = [(a, b) for a, b in dict.fromkeys(pairs) if a != b and {a, b} <= values.keys()]
        seed = self.params.seed
        return statistics.settle([statistics.pair(a, b, values[a], values[b], clusters, seed) for a, b in known])

    def _forgetting(self, baseline: str) -> dict[str, Any] | None:
        losses, chats, p = self._of("loss"), self._of("chat"), self.params
        asked = {n: t[harness.GENERAL_TASK] for n, t in self._of("tasks").items() if harness.GENERAL_TASK in t}
        tasks = {n: {forgetting.TASK: task["metrics"]["acc"]["value"]} for n, task in asked.items()}
        if baseline not in {**losses, **chats, **tasks}:
            return None
        return forgetting.judge(baseline, losses, chats, tasks, p.loss_increase, p.task_drop, **self.trained)

    def _seeds(self) -> dict[str, Any] | None:
        if len(self.task["seeds"]) < 2:
            return None
        found: dict[str, dict[str, Any]] = {}
        for name, m in self.measured.items():
            known = [v for v in m.by_seed.values() if v is not None]
            found[name] = {seed: {"accuracy": v} for seed, v in m.by_seed.items()}
            found[name]["mean"] = numbers.fmean(known) if known else None
            found[name]["sd"] = numbers.stdev(known) if known[1:] else None
        return found

    def _ship(self, scores: dict[str, Any], clusters: list[str] | None) -> dict[str, str] | None:
        """The smallest export that is not worse than the best candidate beyond chance, if it beats the base."""
        ready = [c for c in scores["candidates"] if _value(c) >= 0]
        exported, trained = ([c for c in ready if c["role"] in r] for r in (("gguf", "merged"), ("sft", "orpo")))
        files = exported or trained
        if not files:
            return None
        best, base = max(ready, key=_value), ready[0]["name"]
        beats = {c["candidate"] for c in scores["comparisons"] if c["verdict"] == "better" and c["baseline"] == base}
        for file in sorted(files, key=lambda c: c["size_bytes"] or 0):
            ours, top = self.measured[file["name"]].values, self.measured[best["name"]].values
            pair = statistics.pair(best["name"], file["name"], top, ours, clusters, self.params.seed)
            if file["name"] in beats and (file is best or pair is None or pair["high"] >= 0):
                close = "" if file is best else f", within chance of the best ({best['name']}, {_percent(best)})"
                size = f"{display.size(file['size_bytes'])}, " if file["size_bytes"] else ""
                said = f"{size}{_percent(file)} {self.task['label']}{close}"
                return {"name": file["name"], "sentence": f"Ship {file['name']} ({file['source']}): {said}."}
        return {"name": "", "sentence": f"Nothing to ship yet: no export is better than {base} beyond chance."}

    def _warnings(self, scores: dict[str, Any]) -> list[str]:
        said = [f"{name} was left out: {reason}" for name, reason in self.skipped.items()] + self.warnings
        n = len(self.items)
        if self.kind != "none":
            columns = zip(*(m.values for m in self.measured.values()), strict=True)
            if broken := sum(all(v is None for v in values) for values in columns):
                said.append(f"{broken} of {n} items have a reference that cannot be scored; they count nowhere.")
            if n < SMALL:
                worst = max((c["detectable"] for c in scores["comparisons"]), default=None)
                hide = f": differences under {100 * worst:.0f} points can hide." if worst else "."
                said.append(f"Only {n} questions{hide}")
        if (scores["contamination"] or {}).get("contaminated"):
            held = scores["contamination"]["contaminated"]
            said.append(f"{held} of {n} questions stand in the training data; accuracy_clean leaves them out.")
        forgot = (scores["forgetting"] or {}).get("candidates", {})
        return said + [f"{name} {f['sentence']}." for name, f in forgot.items() if not f["passed"]]


def metrics(scores: dict[str, Any]) -> dict[str, Any]:
    """metrics.json: the table of candidates and the comparisons."""
    table = {}
    for c in scores["candidates"]:
        if c["status"] == "scored":
            table[c["name"]] = {key: c["scores"]["accuracy"][key] for key in ("low", "high", "n")}
            table[c["name"]] |= {"accuracy": c["scores"]["accuracy"]["value"], "size_bytes": c["size_bytes"]}
            table[c["name"]]["valid"] = c["scores"].get("valid", {}).get("value")
    skipped = {c["name"]: c["reason"] for c in scores["candidates"] if c["status"] == "skipped"}
    kept = {key: scores[key] for key in ("comparisons", "headline", "ship")}
    return {"candidates": table, "skipped": skipped, **kept}


def _plain(value: float, n: int, unit: str, stderr: float | None = None) -> dict[str, Any]:
    """A score with the normal interval of its standard error, or with none."""
    low, high = (value - 1.96 * stderr, value + 1.96 * stderr) if stderr else (None, None)
    return {"value": value, "low": low, "high": high, "n": n, "method": "none", "unit": unit}


def _value(candidate: dict[str, Any]) -> float:
    """A candidate's accuracy; -1 where it has none."""
    value = candidate["scores"].get("accuracy", {}).get("value")
    return -1.0 if value is None else value


def _percent(candidate: dict[str, Any]) -> str:
    return display.percent(_value(candidate), 0)


def _headline(scores: dict[str, Any]) -> str:
    scored = [c for c in scores["candidates"] if _value(c) >= 0]
    if scores["task"]["kind"] == "none":
        return "The test items have no references, so nothing was scored; read the answers side by side."
    if not scored:
        return "Nothing was scored."
    best = max([c for c in scored if c["role"] != "base"] or scored, key=_value)
    text = f"{best['name']} scores {_percent(best)} {scores['task']['label']}"
    against = next((c for c in scores["comparisons"] if c["candidate"] == best["name"]), None)
    if against:
        return f"{text}; against {against['baseline']}: {against['sentence']}."
    return f"{text} on {scores['task']['n']} questions."


# ---------------------------------------------------------------- the two files


def write(folder: Path, scores: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    check(scores, answers)
    cache.write_json(folder / SCORES, scores)
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in answers)
    cache.write_atomic(folder / ANSWERS, lines.encode("utf-8", "backslashreplace"))


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """scores.json and answers.jsonl of an evaluation folder, checked against the schema."""
    try:
        scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        answers = [json.loads(line) for line in (folder / ANSWERS).read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise TunebookError(f"{folder} holds no readable evaluation ({error}); run 05_evaluation again.") from error
    check(scores, answers)
    return scores, answers


@functools.cache
def _validator(part: str) -> Any:
    import jsonschema

    schema = json.loads(Path(__file__).with_name("scores.schema.json").read_text())
    return jsonschema.Draft202012Validator({**schema["$defs"][part], "$defs": schema["$defs"]} if part else schema)


def check(scores: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Raise TunebookError naming the first place where the two files leave their schema."""
    lines = ((f"{ANSWERS} line {number}", line, "answers") for number, line in enumerate(answers, 1))
    for name, value, part in ((SCORES, scores, ""), *lines):
        for error in _validator(part).iter_errors(value):
            place = "/".join(map(str, error.absolute_path))
            raise TunebookError(f"{name} {place}: {error.message[:200]}; run 05_evaluation again.")
    unknown = {a["error"] for row in answers for a in row["answers"].values()} - {"", *ERROR_KINDS}
    if unknown:
        raise TunebookError(f"{ANSWERS} has the unknown error kind {unknown.pop()!r}; known: {', '.join(ERROR_KINDS)}.")
