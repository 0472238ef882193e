"""Notebook 05, a call a cell: who is judged and on what, asking them everything, and what that comes to.

job = evaluation.open(params)
job.who()                            the candidates and the questions
job.measure()                        each candidate is loaded once and asked everything; scores.json, answers.jsonl
job.scores()  job.comparisons()  …   what they came to, in tables and figures
job.report(report.build)             the page and the model card
job.finish()                         the manifest
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from helpers import cache, display, machine, plots, runs, steps
from helpers.data import decontamination
from helpers.display import Html
from helpers.errors import TunebookError
from helpers.evaluate import candidates, forgetting, harness, preferences, score_tables
from helpers.evaluate import scores as results
from helpers.evaluate.candidates import TROUBLE, Session, key_name
from helpers.evaluate.scores import Findings, Measured
from helpers.llm_client import Client, Endpoint
from helpers.model import loading
from helpers.model.stop_tokens import end_of_turn
from helpers.params import EvalParams
from helpers.runs import Manifest, Stage
from helpers.tasks import made_up_database, questions, text_metrics, text_to_sql
from helpers.tasks.questions import Answer, Decoding

UNSCORED: dict[str, Any] = dict.fromkeys(("sql", "score", "valid", "result")) | {"error": "", "detail": ""}
KINDS = {
    "text_to_sql": "text-to-SQL, scored by execution",
    "references": "answers against references",
    "none": "no references: not scored",
}


def open(params: EvalParams) -> Evaluation:
    """The evaluation of the run `params.run`. Raises TunebookError for what would stop it after hours of asking."""
    return Evaluation(runs.stage("eval", params))


class Evaluation(steps.Job):
    """findings: all that was measured; found: scores.json."""

    def __init__(self, stage: Stage):
        super().__init__(stage)
        self.params = cast(EvalParams, stage.params)
        self.found: dict[str, Any] = {}
        self._judges: dict[str, text_to_sql.Judge | None] = {}
        if stage.done is None:
            self._prepare()

    def _prepare(self) -> None:
        p, stage, data = self.params, self.stage, self.stage.parents["data"]
        self.seeds = _seeds(p)
        self.include = Path(p.harness_include) if p.harness_include else None
        self.more_tasks = [t.strip() for t in p.harness_tasks.split(",") if t.strip()]
        if self.more_tasks:
            harness.known(self.more_tasks, self.include)
        self.texts, self.talk = _lines(p.general_text, "text"), _lines(p.general_chat, "prompt")
        self.general = machine.PROJECT / p.general_tasks if p.general_tasks else None
        if self.general:
            forgetting.read_lines(self.general, "question")
        items = questions.read(data.artifact("test.parquet"), p.limit, p.seed)
        database = data.path / "database.sqlite"
        self.database = database if database.is_file() else None
        kind = questions.task_kind(items, self.database)
        judged = candidates.find(stage.parents, p.candidates, p.extra_candidates, p.model)
        pairs = data.path / "preference_eval.parquet"
        self.pairs = preferences.read(pairs, p.limit) if pairs.is_file() else []
        first = next((c.path for c in judged if c.kind == "hf" and not c.trouble and c.path), None)
        tokenizer = loading.load_tokenizer(first) if first else None
        self.template_hash = loading.template_hash(tokenizer) if tokenizer else None
        self.end_of_turn = tokenizer.decode([end_of_turn(tokenizer)]) if tokenizer else ""
        f = self.findings = Findings(p, kind, self._task(kind, len(items), data), items, judged)
        trained = stage.parents.get("orpo") or stage.parents.get("sft")
        f.trained = {"rank": trained and trained.params.get("rank"), "replay": data.params.get("replay_share")}
        f.contamination, held = _contamination(items, data, p.contamination_share)
        f.rows = [self._row(item, known) for item, known in zip(items, held, strict=True)]
        if kind == "text_to_sql":
            f.task["n_nonempty"] = sum(bool(row["nonempty"]) for row in f.rows)

    def _task(self, kind: str, count: int, data: Manifest) -> dict[str, Any]:
        p = self.params
        label = {
            "text_to_sql": "execution accuracy" if self.database else "execution agreement on synthetic databases",
            "references": text_metrics.METRICS[p.reference_metric],
            "none": "not scored",
        }[kind]
        task = {"kind": kind, "metric": "accuracy", "label": label, "n": count, "n_nonempty": None}
        task |= {"seeds": self.seeds, "resampling_seed": p.seed, "template_hash": self.template_hash}
        return task | {
            "decoding": {"max_new_tokens": p.max_new_tokens, "temperature": p.temperature},
            "data": f"{data.path.name}/test.parquet",
            "data_sha256": data.data["artifacts"]["test.parquet"]["sha256"],
            "database": f"{data.path.name}/{self.database.name}" if self.database else None,
        }

    def _row(self, item: questions.Item, contaminated: bool | None) -> dict[str, Any]:
        """An item's line in answers.jsonl, still without answers and without long columns of the data."""
        sql = self._sql_judge(item)
        row: dict[str, Any] = {key: getattr(item, key) for key in ("id", "question", "system", "reference", "cluster")}
        row["meta"] = {k: v for k, v in item.meta.items() if not isinstance(v, (list, dict)) and len(str(v)) <= 200}
        row["nonempty"] = sql.nonempty(item.reference) if sql else None
        row["gold"] = text_to_sql.shown(sql.gold(item.reference)[0]) if sql else None
        return {**row, "contaminated": contaminated}

    @steps.look
    def who(self) -> Html:
        """Who is judged, on what."""
        f = self.findings
        held = f.contamination["contaminated"] if f.contamination else "unknown"
        facts = [("task", KINDS[f.kind]), ("questions", len(f.items)), ("held by the training data", held)]
        rows = [(c.name, c.kind, c.source, display.size(c.size_bytes), c.trouble or "ready") for c in f.candidates]
        return display.shown(facts) + display.shown(rows, ("candidate", "kind", "from", "size", "state"))

    @steps.step
    def measure(self) -> Html:
        """Ask every candidate everything. One that cannot be loaded or run is left out with its reason."""
        f = self.findings
        f.measured, f.skipped, f.warnings = {}, {}, []
        for candidate in f.candidates:
            try:
                with Session(candidate, "answers", self.params.precision, self.end_of_turn) as session:
                    f.measured[candidate.name] = self._measure(session)
            except TROUBLE as error:
                f.skipped[candidate.name] = str(error).strip().split("\n")[0][:400] or type(error).__name__
                print(f"{candidate.name} is left out: {f.skipped[candidate.name]}")
        if not f.measured:
            raise TunebookError("No candidate could be judged. " + " ".join(f"{n}: {r}." for n, r in f.skipped.items()))
        if self.params.judge and len(f.measured) > 1:
            f.judge = self._judge()
        self.found = f.scores()
        results.write(self.stage.path, self.found, f.answers())
        for sql in filter(None, self._judges.values()):
            sql.close()
        self._judges.clear()
        return score_tables.speed(self.found)

    def _measure(self, session: Session) -> Measured:
        p, m, kind = self.params, Measured(), session.candidate.kind
        name, prompts = session.candidate.name, [i.prompt for i in self.findings.items]
        for seed in self.seeds:
            label = f"{name}, {self.findings.kind.replace('_', '-')}" + f", seed {seed}" * (len(self.seeds) > 1)
            answers, speed = session.answers(prompts, Decoding(p.max_new_tokens, p.temperature, seed), label)
            entries = [self._score(item, answer) for item, answer in zip(self.findings.items, answers, strict=True)]
            known = [e["score"] for e in entries if e["score"] is not None]
            m.by_seed[str(seed)] = sum(known) / len(known) if known else None
            if seed == self.seeds[0]:
                m.entries, m.speed = entries, speed
        if failed := [e["detail"] for e in m.entries if e["error"] == "no_answer"]:
            self.findings.warnings.append(
                f"{name} gave no answer to {len(failed)} of {len(prompts)} questions; they count as wrong. First "
                f"reason: {failed[0].rstrip('.')}."
            )
        if self.more_tasks and kind != "endpoint":
            m.tasks |= harness.run(session, self.more_tasks, self.include, p.harness_limit, p.seed)
        if kind == "hf" or (kind == "gguf" and p.forgetting_gguf):
            m.loss = forgetting.text_loss(session, self.texts) if self.texts else None
            m.chat = forgetting.chat(session, self.talk) if self.talk else None
            m.preference = preferences.score(session, self.pairs) if self.pairs else None
            if self.general:
                folder = cache.folder() / "tasks"
                task = harness.general_task(self.general, folder)
                m.tasks |= harness.run(session, [task], folder, p.harness_limit, p.seed)
        return m

    def _score(self, item: questions.Item, answer: Answer) -> dict[str, Any]:
        entry = UNSCORED | {"text": answer.text, "tokens": answer.tokens, "stopped": answer.stopped}
        if sql := self._sql_judge(item):
            entry |= sql.score(answer.text, item.reference, answer.stopped)
        elif self.findings.kind == "references":
            entry |= text_metrics.entry(answer.text, item.reference, self.params.reference_metric)
        return entry | ({"error": "no_answer", "detail": answer.failed, "valid": None} if answer.failed else {})

    def _sql_judge(self, item: questions.Item) -> text_to_sql.Judge | None:
        """What scores the item's queries; None where its own schema cannot be read: the item stays undefined."""
        if self.findings.kind != "text_to_sql":
            return None
        key = "" if self.database else item.id
        if key not in self._judges and self.database:
            self._judges[key] = text_to_sql.Judge([text_to_sql.open_readonly(self.database)])
        elif key not in self._judges:
            try:
                made = made_up_database.databases(item.schema, item.reference, self.params.seed)
                self._judges[key] = text_to_sql.Judge(made)
            except TunebookError:
                self._judges[key] = None
        return self._judges[key]

    def _judge(self) -> dict[str, Any] | None:
        """The judge's verdicts on every candidate against the first; a judge that cannot be asked is a warning."""
        p, (baseline, *others) = self.params, self.findings.measured.items()
        url, _, model = p.judge.partition("#")

        def pairs(measured: Measured) -> list[preferences.Pair]:
            both = zip(self.findings.items[: p.judge_limit], baseline[1].entries, measured.entries, strict=False)
            return [preferences.Pair(i.question, i.reference, a["text"], b["text"]) for i, a, b in both]

        asked = {name: pairs(measured) for name, measured in others}
        try:
            cost = preferences.check_budget([pair for some in asked.values() for pair in some], p.judge_budget)
            tokens = cost["input_tokens"] + cost["output_tokens"]
            print(f"The judge is asked {cost['calls']} times, about {tokens:,} tokens.")
            answers = cache.Answers("answers", cache.key("judge", url, model))
            with Client(Endpoint(url, model, key_name(), concurrency=8, retries=2, timeout_s=60), answers) as client:
                found = {name: preferences.compare_answers(client, some, p.seed) for name, some in asked.items()}
                verdicts = [{"baseline": baseline[0], "candidate": name, **one} for name, one in found.items()]
                return {"model": client.model, "estimate": cost, "pairs": verdicts}
        except (TunebookError, OSError) as error:
            self.findings.warnings.append(f"The judge was not used: {error}")
            print(self.findings.warnings[-1])
            return None

    # ------------------------------------------------------------ results

    @steps.step
    def scores(self) -> Html:
        """The candidates with their intervals, warnings first, the sentence about what to ship last."""
        return score_tables.scores(self._measured())

    @steps.step
    def comparisons(self) -> Html:
        """Paired comparisons in words, with their p-values."""
        return score_tables.comparisons(self._measured())

    @steps.step
    def figure(self) -> Any:
        """Each candidate's score with its interval, and its file's size beside it."""
        task, bars = self._measured()["task"], []
        for c in self.found["candidates"]:
            if (score := c["scores"].get("accuracy", {})).get("value") is not None:
                kind = {"base": "base", "gguf": "file"}.get(c["role"], "tuned")
                bars.append(plots.Bar(c["name"], score["value"], score["low"], score["high"], kind, c["size_bytes"]))
        label = f"{task['label']}, % of {task['n']} questions (95 % interval)"
        return self._saved(plots.scores(bars, label), "scores")

    @steps.step
    def kinds(self) -> Any:
        """Share right by kind of question."""
        groups = {c["name"]: c["groups"]["kind"] for c in self._measured()["candidates"] if "kind" in c["groups"]}
        if not groups:
            return display.said("The questions have no column kind.")
        counts = {kind: group["n"] for name in groups for kind, group in sorted(groups[name].items())}
        shares = {name: {kind: group["value"] for kind, group in found.items()} for name, found in groups.items()}
        return self._saved(plots.by_group(counts, shares), "kinds")

    @steps.step
    def errors(self) -> Html:
        """How often each candidate failed in which way."""
        return score_tables.errors(self._measured())

    @steps.step
    def forgetting(self) -> Html:
        """The verdicts on what was forgotten and, where one failed, the advice."""
        return score_tables.forgetting(self._measured())

    @steps.step
    def preferences(self) -> Html:
        """Held-out preference pairs: how often and by how much the chosen answer is likelier."""
        return score_tables.preferences(self._measured())

    @steps.step
    def sides(self) -> Html:
        """Best and worst answers of the last candidate beside the others'."""
        self._measured()
        return score_tables.sides(self.findings.answers(), list(self.findings.measured))

    @steps.step
    def report(self, build: Callable[[str, Stage], Path]) -> Html:
        """The report and the model card of the run as files of this stage too; build: `helpers.report.build`."""
        return display.said(f"The report and the model card are in {build(self.params.run, self.stage).parent}")

    @steps.step
    def finish(self) -> Manifest:
        """Write the manifest."""
        return self.stage.finish(results.metrics(self._measured()), template_hash=self.template_hash)

    def _measured(self) -> dict[str, Any]:
        if not self.found:
            raise TunebookError("Nothing was measured yet: run the cell with job.measure() first.")
        return self.found

    def _saved(self, figure: Any, name: str) -> Any:
        display.save(figure, self.stage.path, name)
        return figure


def _seeds(params: EvalParams) -> list[int]:
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


def _lines(path: str, column: str) -> list[Any]:
    """Texts of a JSON-lines file, or whole rows where they have more than a text; none where the parameter is empty."""
    rows = forgetting.read_lines(machine.PROJECT / path, column) if path else []
    return [row["text"] for row in rows] if column == "text" else rows


def _contamination(
    items: list[questions.Item], data: Manifest, share: float
) -> tuple[dict[str, Any] | None, list[bool | None]]:
    """The record of scores.json, still without its scores, and for every item whether the training data holds it."""
    if not (data.path / "train.parquet").is_file():
        return None, [None] * len(items)
    held = decontamination.held([i.prompt for i in items], data.path / "train.parquet", share)
    record = {"n": len(items), "contaminated": sum(held), "threshold": share, "ngram": decontamination.GRAM}
    ids = [i.id for i, found in zip(items, held, strict=True) if found]
    return {**record, "reference": "train.parquet", "ids": ids}, list(held)
