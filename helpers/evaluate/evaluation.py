"""A run's evaluation from its folders to scores.json and answers.jsonl: what notebook 05 calls, a method a cell.

judged = Evaluation(stage)      what is there to judge, and on what
judged.measure()                each candidate is loaded once and asked everything
judged.summary()                scores, comparisons, forgetting in the shape of helpers/evaluate/scores.py
judged.write()                  the two files, and the metrics for the manifest
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import cache, machine, runs
from helpers.errors import TunebookError
from helpers.evaluate import (
    candidates,
    contamination,
    forgetting,
    harness,
    preferences,
    scores,
    session,
    summary,
)
from helpers.model import loading
from helpers.tasks import questions, text_metrics
from helpers.tasks.answers import Decoding
from helpers.tasks.text_to_sql import made_up_database, scoring
from helpers.tasks.text_to_sql import sqlite as readonly


class Evaluation:
    """stage: the open eval stage (its parents are the finished stages before it)."""

    def __init__(self, stage: Any):
        self.stage, self.params = stage, stage.params
        data = stage.parents["data"]
        self.database = data.path / "database.sqlite" if (data.path / "database.sqlite").is_file() else None
        self.items = questions.read(data.artifact("test.parquet"), self.params.limit, self.params.seed)
        self.kind = questions.task_kind(self.items, self.database)
        self.clusters = questions.clusters(self.items)
        self.seeds = _seeds(self.params)
        self.candidates = candidates.find(
            stage.parents, self.params.candidates, self.params.extra_candidates, self.params.model
        )
        self.cache = cache.folder() / "answers"
        self.warnings: list[str] = []
        self.skipped: dict[str, str] = {}
        self.answers: dict[str, list[dict[str, Any]]] = {}
        self.speed: dict[str, dict[str, Any]] = {}
        self.by_seed: dict[str, dict[str, float | None]] = {}
        self.losses: dict[str, dict[str, Any]] = {}
        self.chats: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, dict[str, Any]] = {}
        self.preferences: dict[str, dict[str, Any]] = {}
        self.judgements: dict[str, Any] | None = None
        self.contaminated, self.contamination = self._contamination(data)
        tokenizer = self._tokenizer()
        self.template_hash = loading.template_hash(tokenizer) if tokenizer is not None else None
        self.end_of_turn = tokenizer.decode([loading.end_of_turn(tokenizer)]) if tokenizer is not None else ""
        self._sql_judges: dict[str, scoring.Judge | None] = {}

    def _tokenizer(self) -> Any:
        first = next((c for c in self.candidates if c.kind == "hf" and not c.trouble), None)
        return loading.load_tokenizer(first.path) if first else None

    def _contamination(self, data: Any) -> tuple[list[bool | None], dict[str, Any] | None]:
        if not (data.path / "train.parquet").is_file():
            return [None] * len(self.items), None
        held, record = contamination.check(
            [i.question for i in self.items], data.path / "train.parquet", self.params.contamination_share
        )
        return held, {**record, "ids": [i.id for i, h in zip(self.items, held, strict=True) if h]}

    def _repr_html_(self) -> str:
        from helpers.display import table

        label = {
            "text_to_sql": "text-to-SQL, scored by execution",
            "references": "answers against references",
            "none": "no references: not scored",
        }
        rows = [
            ("task", label[self.kind]),
            ("questions", len(self.items)),
            ("held by the training data", self.contamination["contaminated"] if self.contamination else "unknown"),
        ]
        return table(rows) + table(
            [(c.name, c.kind, c.source, _mib(c.size_bytes), c.trouble or "ready") for c in self.candidates],
            ("candidate", "kind", "from", "MiB", "state"),
        )

    # ------------------------------------------------------------ asking

    def measure(self) -> dict[str, dict[str, Any]]:
        """Ask every candidate everything. One that cannot be loaded or fails is left out with its reason; the others go on."""
        texts = _column(self.params.general_text, "text")
        chat = (
            forgetting.read_lines(machine.PROJECT / self.params.general_chat, "prompt")
            if self.params.general_chat
            else []
        )
        pairs = self._pairs()
        for candidate in self.candidates:
            try:
                with session.Session(candidate, self.cache, self.params.precision, self.end_of_turn) as s:
                    self._ask(s)
                    self._knowledge(s, texts, chat)
                    if pairs and (candidate.kind == "hf" or (candidate.kind == "gguf" and self.params.forgetting_gguf)):
                        self.preferences[candidate.name] = preferences.score(s, pairs)
            except session.TROUBLE as error:
                reason = str(error).strip().split("\n")[0][:400] or type(error).__name__
                self.skipped[candidate.name] = reason
                for kept in (
                    self.answers,
                    self.speed,
                    self.losses,
                    self.chats,
                    self.tasks,
                    self.preferences,
                    self.by_seed,
                ):
                    kept.pop(candidate.name, None)
                print(f"{candidate.name} is left out: {reason}")
        if not self.answers:
            raise TunebookError(
                "No candidate could be judged. " + " ".join(f"{n}: {r}." for n, r in self.skipped.items())
            )
        return self.speed

    def _ask(self, s: session.Session) -> None:
        name, prompts = s.candidate.name, [i.prompt for i in self.items]
        for seed in self.seeds:
            label = f"{name}, {self.kind.replace('_', '-')}" + (f", seed {seed}" if len(self.seeds) > 1 else "")
            found, speed = s.answers(
                prompts, Decoding(self.params.max_new_tokens, self.params.temperature, seed), label
            )
            entries = [self._score(item, answer) for item, answer in zip(self.items, found, strict=True)]
            known = [e["score"] for e in entries if e["score"] is not None]
            self.by_seed.setdefault(name, {})[str(seed)] = sum(known) / len(known) if known else None
            if seed == self.seeds[0]:
                self.answers[name], self.speed[name] = entries, speed
        failed = sum(e["error"] == "no_answer" for e in self.answers[name])
        if failed:
            self.warnings.append(
                f"{name} gave no answer to {failed} of {len(prompts)} questions; they count as wrong. First reason: "
                + next(e["detail"] for e in self.answers[name] if e["error"] == "no_answer")
                + "."
            )

    def _score(self, item: questions.Item, answer: Any) -> dict[str, Any]:
        judge = self._judge(item) if self.kind == "text_to_sql" else None
        entry: dict[str, Any] = {
            "text": answer.text,
            "sql": None,
            "score": None,
            "valid": None,
            "error": "",
            "detail": "",
        }
        entry |= {"structural": None, "stopped": answer.stopped, "result": None}
        if judge is not None:
            entry |= judge.score(answer.text, item.reference, answer.stopped)
        elif self.kind == "references":
            entry |= text_metrics.entry(answer.text, item.reference, self.params.reference_metric)
        if answer.failed:
            entry.update(error="no_answer", detail=answer.failed, valid=None)
        return {**entry, "tokens": answer.tokens}

    def _judge(self, item: questions.Item) -> scoring.Judge | None:
        """What scores the item's queries; None where its own schema cannot be read, so that the item stays undefined."""
        key = "" if self.database else item.id
        if key not in self._sql_judges:
            if self.database:
                connections = [readonly.open_readonly(self.database)]
            else:
                try:
                    connections = made_up_database.databases(item.schema, item.reference, self.params.seed)
                except TunebookError:
                    connections = []
            self._sql_judges[key] = scoring.Judge(connections) if connections else None
        return self._sql_judges[key]

    def _knowledge(self, s: session.Session, texts: list[str], chat: list[dict[str, Any]]) -> None:
        name, kind = s.candidate.name, s.candidate.kind
        if kind == "endpoint" or (kind == "gguf" and not self.params.forgetting_gguf):
            chat, texts = [], []
        if texts:
            self.losses[name] = forgetting.text_loss(s, texts)
        if chat:
            self.chats[name] = forgetting.chat(s, chat)
        wanted = [t.strip() for t in self.params.harness_tasks.split(",") if t.strip()]
        include = Path(self.params.harness_include) if self.params.harness_include else None
        if wanted and kind != "endpoint":
            self.tasks.setdefault(name, {}).update(
                harness.run(s, wanted, include, self.params.harness_limit, self.params.seed)
            )
        if self.params.general_tasks and texts:
            folder = self.cache.parent / "tasks"
            task = harness.general_task(machine.PROJECT / self.params.general_tasks, folder)
            self.tasks.setdefault(name, {}).update(
                harness.run(s, [task], folder, self.params.harness_limit, self.params.seed)
            )

    def _pairs(self) -> list[dict[str, Any]]:
        path = self.stage.parents["data"].path / "preference_eval.parquet"
        return preferences.read(path, self.params.limit) if path.is_file() else []

    # ------------------------------------------------------------ results

    def judge(self) -> dict[str, Any] | None:
        """Ask the judge of `params.judge` about every candidate against the first; None when there is none. Failure is a warning."""
        if not self.params.judge or len(self.answers) < 2:
            return None
        from helpers.evaluate import answer_store
        from helpers.evaluate import judge as judging
        from helpers.evaluate.remote_model import Endpoint

        url, _, model = self.params.judge.partition("#")
        names = list(self.answers)
        jobs = {
            n: [
                {"question": i.question, "reference": i.reference, "baseline": a["text"], "candidate": b["text"]}
                for i, a, b in zip(self.items, self.answers[names[0]], self.answers[n], strict=True)
            ]
            for n in names[1:]
        }
        jobs = {n: pairs[: self.params.judge_limit] for n, pairs in jobs.items()}
        cost = judging.estimate([p for pairs in jobs.values() for p in pairs])
        print(
            f"The judge is asked {cost['calls']} times, about {cost['input_tokens'] + cost['output_tokens']:,} tokens."
        )
        try:
            if cost["input_tokens"] + cost["output_tokens"] > self.params.judge_budget:
                raise TunebookError(
                    f"That is over judge_budget = {self.params.judge_budget:,}; lower judge_limit or raise judge_budget."
                )
            endpoint = Endpoint(url, model, candidates.api_key())
            store = answer_store.Store(self.cache, answer_store.key("judge", url, endpoint.model))
            pairs = [
                {
                    "baseline": names[0],
                    "candidate": n,
                    **judging.compare_answers(endpoint, p, store, self.params.judge_budget, self.params.seed),
                }
                for n, p in jobs.items()
            ]
            self.judgements = {"model": endpoint.model, "estimate": cost, "pairs": pairs}
        except (TunebookError, OSError, RuntimeError) as error:
            self.warnings.append(f"The judge was not used: {error}")
            print(self.warnings[-1])
        return self.judgements

    def summary(self) -> dict[str, Any]:
        """scores.json as a dict; computed from what was measured, without asking again."""
        return summary.build(self)

    def rows(self) -> list[dict[str, Any]]:
        """answers.jsonl as dicts."""
        found = []
        for place, item in enumerate(self.items):
            judge = self._judge(item) if self.kind == "text_to_sql" else None
            gold = judge.gold(item.reference)[0] if judge is not None else None
            found.append(
                {
                    "id": item.id,
                    "question": item.question,
                    "system": item.system,
                    "reference": item.reference,
                    "meta": _plain(item.meta),
                    "cluster": item.cluster,
                    "nonempty": self.nonempty(item),
                    "contaminated": self.contaminated[place],
                    "gold": scoring.shown(gold) if gold is not None else None,
                    "answers": {
                        name: {k: v for k, v in entries[place].items() if k != "metrics"}
                        for name, entries in self.answers.items()
                    },
                }
            )
        return found

    def nonempty(self, item: questions.Item) -> bool | None:
        """Whether the reference's answer has rows; None where that is not known."""
        judge = self._judge(item) if self.kind == "text_to_sql" else None
        return judge.nonempty(item.reference) if judge is not None else None

    def write(self) -> dict[str, Any]:
        """Write scores.json and answers.jsonl into the stage's folder; returns the metrics for its manifest."""
        summed, rows = self.summary(), self.rows()
        scores.check(summed, rows)
        runs.write_json(self.stage.path / scores.SCORES, summed)
        lines = (json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in rows)
        runs.write_atomic(self.stage.path / scores.ANSWERS, "".join(lines).encode("utf-8", "backslashreplace"))
        for judge in filter(None, self._sql_judges.values()):
            judge.close()
        self._sql_judges.clear()
        return summary.metrics(summed)


def _seeds(params: Any) -> list[int]:
    try:
        seeds = list(dict.fromkeys(int(s) for s in params.seeds.split(",") if s.strip()))
    except ValueError:
        raise TunebookError(f"seeds is {params.seeds!r}; it takes whole numbers separated by commas.") from None
    if not seeds or min(seeds) < 0:
        raise TunebookError(f"seeds is {params.seeds!r}; it takes at least one whole number from 0.")
    if len(seeds) > 1 and params.temperature == 0:
        raise TunebookError(
            f"{len(seeds)} seeds were given, but greedy answers have none; set temperature above 0 or name one seed."
        )
    return seeds


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """Metadata without long columns, for answers.jsonl."""
    kept = (bool, int, float, type(None))
    return {k: v for k, v in meta.items() if isinstance(v, kept) or (isinstance(v, str) and len(v) <= 200)}


def _column(path: str, column: str) -> list[str]:
    return [r[column] for r in forgetting.read_lines(machine.PROJECT / path, column)] if path else []


def _mib(size: int | None) -> str:
    return f"{size / 2**20:.0f}" if size else ""
