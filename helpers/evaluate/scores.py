"""From what was measured to scores.json and answers.jsonl: intervals, comparisons, verdicts, sentences.

The report, the model card and the notebook read these two files and nothing else, so a number has one source. Their
shape is in scores.schema.json; `write` and `read` check it.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from helpers import cache, plots
from helpers.data import decontamination
from helpers.errors import TunebookError
from helpers.evaluate import forgetting, preferences, statistics
from helpers.evaluate.candidates import AS_LONG, Candidate
from helpers.params import EvalParams
from helpers.tasks import questions, text_metrics, text_to_sql

SCHEMA_VERSION = 4
SCORES, ANSWERS = "scores.json", "answers.jsonl"
SMALL = 100  # items; below this even a large difference may hide
ERROR_KINDS = {
    **text_to_sql.ERROR_KINDS,
    "wrong": "differs from the reference",
    "no_answer": "the candidate failed to answer",
}


@dataclass
class Measured:
    """What one candidate answered. entries: an answer of answers.jsonl for each item; by_seed: each seed's scores, the
    first those of the entries; loss, passed: of forgetting; preference: of preferences; tasks: of the harness."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    by_seed: dict[str, list[float | None]] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] | None = None
    passed: dict[str, list[bool | None]] = field(default_factory=dict)
    preference: dict[str, Any] | None = None
    tasks: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> list[float | None]:
        return [entry["score"] for entry in self.entries]


@dataclass
class Findings:
    """Everything that an evaluation measured. rows: answers.jsonl without answers; measured, skipped: by candidate;
    trained: rank and replay of this run's training."""

    params: EvalParams
    task: dict[str, Any]
    items: list[questions.Item]
    candidates: list[Candidate]
    rows: list[dict[str, Any]]
    trained: dict[str, Any]
    measured: dict[str, Measured] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    judge: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    def leave_out(self) -> None:
        """Questions that could not be asked of some candidate are left out for all, and counted."""
        out: dict[int, str] = {}
        for name, m in self.measured.items():
            for i, entry in enumerate(m.entries):
                if entry.pop("refused", False):
                    out.setdefault(i, f"{name}: {entry['detail'].rstrip('.')}")
        if not out:
            return
        if len(out) == len(self.items):
            raise TunebookError(f"No question can be asked of every candidate ({next(iter(out.values()))}).")
        kept = [i for i in range(len(self.items)) if i not in out]
        self.items, self.rows = [self.items[i] for i in kept], [self.rows[i] for i in kept]
        for m in self.measured.values():
            m.entries = [m.entries[i] for i in kept]
            m.by_seed = {seed: [values[i] for i in kept] for seed, values in m.by_seed.items()}
        self.task["n"] = len(kept)
        if self.task["n_nonempty"] is not None:
            self.task["n_nonempty"] = sum(bool(row["nonempty"]) for row in self.rows)
        self.warnings.append(
            f"{len(out)} of {len(out) + len(kept)} questions cannot be asked of every candidate and are left out for "
            f"all (first: {next(iter(out.values()))})."
        )

    def answers(self) -> list[dict[str, Any]]:
        """answers.jsonl."""
        given = zip(*(m.entries for m in self.measured.values()), strict=True)
        both = zip(self.rows, given, strict=True)
        return [{**row, "answers": dict(zip(self.measured, entries, strict=True))} for row, entries in both]

    def contamination(self) -> dict[str, Any] | None:
        """Which items the training data holds; None where it is not there."""
        if self.rows[0]["contaminated"] is None:
            return None
        ids = [row["id"] for row in self.rows if row["contaminated"]]
        how = {"threshold": self.params.contamination_share, "ngram": decontamination.GRAM}
        return {"n": len(self.rows), "contaminated": len(ids), "ids": ids, "reference": "train.parquet", **how}

    def scores(self) -> dict[str, Any]:
        """scores.json."""
        p, baseline = self.params, next(iter(self.measured))
        harnessed: dict[str, Any] = {}
        for name, m in self.measured.items():
            for task, found in m.tasks.items():
                harnessed.setdefault(task, {"n": found["n"], "metrics": {}})["metrics"][name] = found["metrics"]
        losses, passed = self._of("loss"), self._of("passed")
        lost = None
        if baseline in {**losses, **passed}:
            threshold = {"loss_increase": p.loss_increase, "task_drop": p.task_drop}
            lost = forgetting.judge(baseline, losses, passed, threshold, self.trained)
        scores = {
            "schema_version": SCHEMA_VERSION,
            "run": p.run,
            "task": self.task,
            "candidates": [self._record(candidate) for candidate in self.candidates],
            "comparisons": self._comparisons(baseline),
            "forgetting": lost,
            "harness": harnessed or None,
            "preference": self._preferences(baseline) or None,
            "instructions": {name: self._instructions(m) for name, m in self.measured.items()},
            "judge": self.judge,
            "contamination": self.contamination(),
            "seeds": self._seeds(),
        }
        scores |= statistics.verdict(scores, self._pair, p.margin)
        return {**scores, "warnings": self._warnings(scores)}

    def _of(self, what: str) -> dict[str, Any]:
        """One part of what was measured, of the candidates that have it."""
        return {name: value for name, m in self.measured.items() if (value := getattr(m, what))}

    def _record(self, candidate: Candidate) -> dict[str, Any]:
        """A candidate of scores.json."""
        record = {key: getattr(candidate, key) for key in ("name", "role", "kind", "source", "size_bytes", "made_from")}
        record |= {"status": "skipped", "reason": self.skipped.get(candidate.name, "")}
        record |= {"scores": {}, "groups": {}, "errors": {}, "speed": {}}
        if candidate.name in self.skipped:
            return record
        m, clusters = self.measured[candidate.name], questions.clusters(self.items)

        def share(values: Any, key: str = "", wanted: bool = True) -> dict[str, Any]:
            """Of all items or of those whose row says so."""
            kept = [v if not key or row[key] is wanted else None for v, row in zip(values, self.rows, strict=True)]
            return statistics.share(kept, clusters=clusters, seed=self.params.seed)

        found = {"accuracy": share(m.values), "stopped": statistics.share([e["stopped"] for e in m.entries])}
        if self.task["kind"] == "text_to_sql":
            found["accuracy_nonempty"] = share(m.values, "nonempty")
            found |= {k: statistics.share([e[k] for e in m.entries]) for k in ("valid", "structural")}
        elif self.task["kind"] == "text":
            found["perplexity"] = statistics.perplexity([(e["nats"], e["tokens"]) for e in m.entries])
        elif self.task["kind"] == "references":
            found |= {k: share([e["metrics"][k] for e in m.entries]) for k in text_metrics.METRICS}
        if any(row["contaminated"] for row in self.rows):
            found["accuracy_clean"] = share(m.values, "contaminated", False)
            found["accuracy_contaminated"] = share(m.values, "contaminated")
        errors = dict(Counter(e["error"] for e in m.entries if e["error"]).most_common())
        groups = questions.groups(self.items, m.values)
        return record | {"status": "scored", "scores": found, "groups": groups, "errors": errors, "speed": m.speed}

    def _instructions(self, m: Measured) -> dict[str, Any]:
        if self.task["kind"] == "text":
            return {}
        passed = text_metrics.instructions(m.entries, self.items, self.task["kind"])
        return {check: statistics.share(values) for check, values in passed.items()}

    def _pair(self, a: str, b: str) -> dict[str, Any] | None:
        values, clusters = (self.measured[a].values, self.measured[b].values), questions.clusters(self.items)
        return statistics.pair(a, b, *values, clusters, self.params.seed)

    def _comparisons(self, baseline: str) -> list[dict[str, Any]]:
        """Every candidate against the baseline, and against what it was exported from or trained on top of."""
        pairs = [(baseline, name) for name in self.measured]
        pairs += [(c.made_from, c.name) for c in self.candidates] + [("sft", "orpo"), (AS_LONG, "orpo")]
        known = [(a, b) for a, b in dict.fromkeys(pairs) if a != b and {a, b} <= self.measured.keys()]
        return statistics.settle([self._pair(a, b) for a, b in known])

    def _preferences(self, baseline: str) -> dict[str, Any]:
        """What was measured on preference pairs and, of all but the baseline, how they compare with it: win_rate, the
        share of pairs with the larger margin, ties half; sentence, the paired test of right and wrong in words."""
        found, right = self._of("preference"), preferences.right
        base = found.get(baseline, {}).get("margins")
        scored, compared = {}, []
        for name, one in found.items():
            scored[name] = {key: one[key] for key in ("accuracy", "log_odds", "n")} | {"win_rate": None, "sentence": ""}
            if base is not None and name != baseline:
                scored[name]["win_rate"] = statistics.share(right(one["margins"] - base))
                compared.append(statistics.pair(baseline, name, right(base), right(one["margins"])))
        for pair in statistics.settle(compared):
            scored[pair["candidate"]]["sentence"] = pair["sentence"]
        return scored

    def _seeds(self) -> dict[str, Any] | None:
        """Each seed's score, their mean and standard deviation, where answers were drawn with several seeds."""
        clusters, seed, found = questions.clusters(self.items), self.params.seed, {}
        for name, m in self.measured.items():
            shares = {key: statistics.share(values, clusters=clusters, seed=seed) for key, values in m.by_seed.items()}
            known = [one["value"] for one in shares.values() if one["n"]]
            if len(known) > 1:
                found[name] = {"scores": shares, "mean": fmean(known), "sd": stdev(known)}
        return found or None

    def _warnings(self, scores: dict[str, Any]) -> list[str]:
        said = [f"{name} was left out: {reason}" for name, reason in self.skipped.items()] + self.warnings
        n = len(self.items)
        if self.task["kind"] != "none":
            columns = zip(*(m.values for m in self.measured.values()), strict=True)
            if broken := sum(all(v is None for v in values) for values in columns):
                said.append(f"{broken} of {n} items have a reference that cannot be scored; they count nowhere.")
            if n < SMALL:
                worst = max((c["detectable"] for c in scores["comparisons"]), default=None)
                hide = f": differences under {100 * worst:.0f} points can hide." if worst else "."
                said.append(f"Only {n} questions{hide}")
        if held := (scores["contamination"] or {}).get("contaminated"):
            said.append(f"{held} of {n} questions stand in the training data; accuracy_clean leaves them out.")
        lost = scores["lost"]
        return said + ([lost["sentence"]] if lost and not lost["passed"] else [])


def figure(scores: dict[str, Any]) -> Any:
    """Each candidate's score with its interval and its file's size, the one to ship marked."""
    task, bars, ship = scores["task"], [], (scores["ship"] or {}).get("name")
    for c in scores["candidates"]:
        if statistics.value(c) >= 0:
            kind = "ship" if c["name"] == ship else {"base": "base", "gguf": "file"}.get(c["role"], "tuned")
            one = c["scores"]["accuracy"]
            bars.append(plots.Bar(c["name"], one["value"], one["low"], one["high"], kind, c["size_bytes"]))
    return plots.scores(bars, f"{task['label']}, % of {task['n']} questions (95 % interval)")


def metrics(scores: dict[str, Any]) -> dict[str, Any]:
    """metrics.json: the verdict, the table of candidates and the comparisons."""
    table = {}
    for c in (c for c in scores["candidates"] if c["status"] == "scored"):
        accuracy, valid = c["scores"]["accuracy"], c["scores"].get("valid", {}).get("value")
        table[c["name"]] = {**accuracy, "accuracy": accuracy["value"], "valid": valid, "size_bytes": c["size_bytes"]}
    skipped = {c["name"]: c["reason"] for c in scores["candidates"] if c["status"] == "skipped"}
    kept = {key: scores[key] for key in ("comparisons", "headline", "ship", "lost")}
    return {"candidates": table, "skipped": skipped, "label": scores["task"]["label"], **kept}


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


def check(scores: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Raise TunebookError naming the first place where the two files leave their schema."""
    import jsonschema

    schema = json.loads(Path(__file__).with_name("scores.schema.json").read_text())
    whole, line = (jsonschema.Draft202012Validator(part) for part in (schema, schema["$defs"]["answers"]))
    wrong = [(SCORES, error) for error in whole.iter_errors(scores)]
    wrong += [(f"{ANSWERS} line {n}", error) for n, row in enumerate(answers, 1) for error in line.iter_errors(row)]
    for name, error in wrong[:1]:
        place = "/".join(map(str, error.absolute_path))
        raise TunebookError(f"{name} {place}: {error.message[:200]}; run 05_evaluation again.")
