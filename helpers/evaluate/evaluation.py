"""Notebook 05, a call a cell: who is judged and on what, asking them everything, and what that comes to.

job = evaluation.open(params)
job.who()                            the candidates and the questions
job.measure()                        each candidate is loaded once and asked everything; scores.json, answers.jsonl
job.scores()  job.comparisons()  …   what they came to, in tables and figures
job.report(report.build)             the page and the model card
job.finish()                         the manifest
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from helpers import cache, display, machine, plots, runs, steps
from helpers.data import decontamination, vocabulary
from helpers.data.chat_template import inspect
from helpers.data.rendering import Chat
from helpers.display import Html
from helpers.errors import TunebookError
from helpers.evaluate import candidates, forgetting, harness, preferences, statistics
from helpers.evaluate import scores as results
from helpers.evaluate.candidates import TROUBLE, Session
from helpers.evaluate.scores import ERROR_KINDS, Findings, Measured
from helpers.gguf import libraries
from helpers.model import loading
from helpers.model.stop_tokens import end_of_turn
from helpers.params import EvalParams
from helpers.runs import Manifest, Stage
from helpers.tasks import extraction, made_up_database, questions, text_metrics, text_to_sql
from helpers.tasks.questions import Answer, Decoding

UNSCORED = dict.fromkeys(("sql", "score", "valid", "structural", "result"))
SHOWN_CHARS, SHOWN_ITEMS = 400, 4  # of an answer, and of the best and the worst items


def open(params: EvalParams) -> Evaluation:
    """The evaluation of the run `params.run`. Raises TunebookError for what would stop it after hours of asking."""
    return Evaluation(runs.stage("eval", params))


def sql_judges(items: list[questions.Item], database: Path | None, seed: int) -> dict[str, text_to_sql.Judge]:
    """What scores each item's queries; none where its own schema cannot be read: the item stays undefined."""
    if database:
        return dict.fromkeys([i.id for i in items], text_to_sql.Judge([text_to_sql.open_readonly(database)]))
    judges = {}
    for item in items:
        with contextlib.suppress(TunebookError):
            judges[item.id] = text_to_sql.Judge(made_up_database.databases(item.schema, item.reference, seed))
    return judges


class Evaluation(steps.Job):
    """findings: all that was measured; found: scores.json."""

    def __init__(self, stage: Stage):
        super().__init__(stage)
        self.params = cast(EvalParams, stage.params)
        self.found: dict[str, Any] = {}
        if stage.done is None:
            self._prepare()

    def _prepare(self) -> None:
        p, stage, data = self.params, self.stage, self.stage.parents["data"]
        self.seeds = _seeds(p)
        self.include = Path(p.harness_include) if p.harness_include else None
        self.more_tasks = [t.strip() for t in p.harness_tasks.split(",") if t.strip()]
        if self.more_tasks:
            harness.known(self.more_tasks, self.include)
        self.texts = [row["text"] for row in forgetting.read_lines(p.general_text, "text")]
        self.talk = forgetting.read_lines(p.general_chat, "prompt")
        forgetting.read_lines(p.general_tasks, "question")
        pairs, database = data.path / "preference_eval.parquet", data.path / "database.sqlite"
        self.pairs = preferences.read(pairs, p.limit) if pairs.is_file() else []
        self.database = database if database.is_file() else None
        items = questions.read(data.artifact("test.parquet"), p.limit, p.seed)
        judged = candidates.find(stage.parents, p.candidates, p.extra_candidates)
        first = next((c.path for c in judged if c.kind == "hf" and not c.trouble and c.path), None)
        own = vocabulary.of_run(data.path, first)
        tokenizer = loading.load_tokenizer(own) if own else None
        self.template_hash = loading.template_hash(tokenizer) if tokenizer else None
        self.thinking = extraction.thinking_marks(tokenizer) if tokenizer else ()
        self.end_of_turn, self.chat = "", None
        if tokenizer and tokenizer.chat_template:
            self.end_of_turn, self.chat = tokenizer.decode([end_of_turn(tokenizer)]), Chat(inspect(tokenizer))
        elif self.talk:
            self.talk = []
            display.say("general_chat is left out: without a chat template a model completes text and cannot be asked.")
        tuned = stage.parents.get("orpo") or stage.parents.get("sft")
        trained = {"rank": tuned and tuned.params.get("rank"), "replay": data.params.get("replay_share")}
        kind = questions.task_kind(items, self.database)
        self._judges = sql_judges(items, self.database, p.seed) if kind == "text_to_sql" else {}
        held: list[bool | None] = [None] * len(items)
        if (data.path / "train.parquet").is_file():
            prompts = [i.prompt or [{"role": "text", "content": i.reference}] for i in items]
            held = list(decontamination.held(prompts, data.path / "train.parquet", p.contamination_share))
        rows = [self._row(item, known) for item, known in zip(items, held, strict=True)]
        self.findings = Findings(p, self._task(kind, rows, data), items, judged, rows, trained)

    def _task(self, kind: str, rows: list[dict[str, Any]], data: Manifest) -> dict[str, Any]:
        p = self.params
        label = {
            "text_to_sql": "execution accuracy" if self.database else "execution agreement on synthetic databases",
            "references": (text_metrics.METRICS | text_metrics.NAMED)[p.reference_metric],
            "none": "no references: not scored",
            "text": "mean probability of a token of held-out text",
        }[kind]
        if kind == "references" and any(text_metrics.calls(row["reference"]) for row in rows):
            label = f"tool calls, else {label}"
        task = {"kind": kind, "label": label, "n": len(rows), "template_hash": self.template_hash}
        task["n_nonempty"] = sum(bool(row["nonempty"]) for row in rows) if kind == "text_to_sql" else None
        task["decoding"] = {"max_new_tokens": p.max_new_tokens, "temperature": p.temperature}
        file = "test.parquet" if kind != "text" or data.metrics["written"].get("test") else "eval.parquet"
        sha256 = data.data["artifacts"][file]["sha256"]
        return {**task, "data": f"{data.path.name}/{file}", "data_sha256": sha256}

    def _row(self, item: questions.Item, contaminated: bool | None) -> dict[str, Any]:
        """An item's line in answers.jsonl, still without answers and without long columns of the data."""
        sql = self._judges.get(item.id)
        row: dict[str, Any] = {key: getattr(item, key) for key in ("id", "question", "system", "reference", "cluster")}
        row["meta"] = {k: v for k, v in item.meta.items() if not isinstance(v, (list, dict)) and len(str(v)) <= 200}
        row["nonempty"] = sql.nonempty(item.reference) if sql else None
        row["gold"] = text_to_sql.shown(sql.gold(item.reference)[0]) if sql else None
        return {**row, "contaminated": contaminated}

    @steps.look
    def who(self) -> Html:
        """Who is judged, on what."""
        f = self.findings
        held = (f.contamination() or {"contaminated": "unknown"})["contaminated"]
        facts = [("scored by", f.task["label"]), ("questions", len(f.items)), ("held by the training data", held)]
        rows = [(c.name, c.kind, c.source, display.size(c.size_bytes), c.trouble or "ready") for c in f.candidates]
        return display.shown(facts) + display.shown(rows, ("candidate", "kind", "from", "size", "state"))

    @steps.step
    def measure(self) -> Html:
        """Ask every candidate everything. One that cannot be loaded or run is left out with its reason."""
        f = self.findings
        f.measured, f.skipped, f.warnings = {}, {}, []
        with contextlib.ExitStack() as stack:  # llama.cpp leaves a GPU alone, and models on a GPU most cores
            files = self._beside()
            lanes = libraries.lanes(len(files))
            beside, threads = ThreadPoolExecutor(lanes), max(libraries.threads() - 2, 1) // lanes
            stack.callback(beside.shutdown, wait=False, cancel_futures=True)  # an interrupt waits for nobody
            begun = {c.name: beside.submit(self._ask, c, threads) for c in files}
            for name, candidate in ((c.name, c) for c in f.candidates):
                try:
                    f.measured[name] = begun[name].result() if name in begun else self._ask(candidate)
                except TROUBLE as error:
                    f.skipped[name] = str(error).strip().split("\n")[0][:400] or type(error).__name__
                    display.say(f"{name} is left out: {f.skipped[name]}")
        if not f.measured:
            raise TunebookError("No candidate could be judged. " + " ".join(f"{n}: {r}." for n, r in f.skipped.items()))
        f.leave_out()
        if self.params.judge and len(f.measured) > 1 and f.task["kind"] != "text":
            f.judge = self._judge()
        self.found = f.scores()
        results.write(self.stage.path, self.found, f.answers())
        for sql in self._judges.values():
            sql.close()
        rows = [(name, *(display.number(value) for value in m.speed.values())) for name, m in f.measured.items()]
        return display.shown(rows, ("candidate", "seconds", "questions/s", "tokens", "answers from the cache"))

    def _beside(self) -> list[candidates.Candidate]:
        """GGUF files that are asked while models answer on a GPU: small ones, and none that the harness asks too."""
        harnessed = self.more_tasks or (self.params.general_tasks and self.params.forgetting_gguf)
        files = [c for c in self.findings.candidates if c.kind == "gguf" and not c.trouble]
        size = sum(c.size_bytes or 0 for c in files) / 2**30
        return files if machine.gpu() and not harnessed and 2 * size < machine.free_memory_gib() else []

    def _ask(self, candidate: candidates.Candidate, threads: int = 0) -> Measured:
        with Session(candidate, "answers", self.end_of_turn, self.chat, threads) as session:
            return self._measure(session)

    def _measure(self, session: Session) -> Measured:
        p, m, name, kind = self.params, Measured(), session.candidate.name, session.candidate.kind
        items, failed = self.findings.items, list[str]()
        if self.findings.task["kind"] == "text":
            m.entries = self._texts(session)
            m.by_seed = {str(self.seeds[0]): m.values}
        for seed in self.seeds if not m.entries else ():
            label = f"{name}, questions" + f", seed {seed}" * (len(self.seeds) > 1)
            how = Decoding(p.max_new_tokens, p.temperature, seed)
            answers, speed = session.answers([i.asked for i in items], how, label)
            entries = [self._score(item, answer) for item, answer in zip(items, answers, strict=True)]
            m.by_seed[str(seed)] = [entry["score"] for entry in entries]
            m.entries, m.speed = m.entries or entries, m.speed or speed  # the first seed's
            failed += [a.failed for a in answers if a.failed]
        if failed:
            asked = len(items) * len(self.seeds)
            self.findings.warnings.append(
                f"{name} gave no answer to {len(failed)} of {asked} questions; they count as wrong. First "
                f"reason: {failed[0].rstrip('.')}."
            )
        if self.more_tasks and kind != "endpoint":
            m.tasks |= harness.run(session, self.more_tasks, self.include, p.harness_limit, p.seed)
        if self._remembers(session.candidate):
            m.loss = forgetting.text_loss(session, self.texts) if self.texts else None
            m.passed = forgetting.chat(session, self.talk, self.thinking) if self.talk else {}
            m.preference = preferences.score(session, self.pairs) if self.pairs else None
            if p.general_tasks:
                folder = cache.folder() / "tasks"
                task = harness.general_task(machine.PROJECT / p.general_tasks, folder)
                found = harness.run(session, [task], folder, p.harness_limit, p.seed)
                m.tasks, m.passed = m.tasks | found, {**m.passed, forgetting.TASK: found[task]["right"]}
        return m

    def _remembers(self, candidate: candidates.Candidate) -> bool:
        """Whether forgetting and preferences are measured on it: on what was made from another candidate only where
        asked for, or where that one is not judged."""
        if candidate.made_from and candidate.kind == "hf" and not self.params.forgetting_gguf:
            return not any(c.name == candidate.made_from and not c.trouble for c in self.findings.candidates)
        return candidate.kind == "hf" or (candidate.kind == "gguf" and self.params.forgetting_gguf)

    def _texts(self, session: Session) -> list[dict[str, Any]]:
        """How a candidate predicts each held-out text; score: the geometric mean of its tokens' probabilities."""
        if session.candidate.kind == "endpoint":
            raise TunebookError("an endpoint gives no probabilities of held-out text")
        found = session.logprobs([([], item.reference) for item in self.findings.items], "held-out text")
        entries = []
        for nats, n in found:
            seen = {"score": math.exp(nats / n) if n else None, "nats": -nats, "tokens": n, "stopped": None}
            entries.append({**UNSCORED, **seen, "error": "", "text": "", "detail": f"{-nats:.1f} nats, {n} tokens"})
        return entries

    def _score(self, item: questions.Item, answer: Answer) -> dict[str, Any]:
        text = extraction.without_thinking(answer.text, self.thinking)
        entry: dict[str, Any] = {**UNSCORED, "error": "", "detail": ""}
        if text != answer.text.strip():
            entry["thought"] = answer.text
        entry |= {"text": text, "tokens": answer.tokens, "stopped": answer.stopped}
        if answer.refused:
            return {**entry, "error": "no_answer", "detail": answer.refused, "refused": True}
        if sql := self._judges.get(item.id):
            entry |= sql.score(text, item.reference, answer.stopped)
        elif self.findings.task["kind"] == "references":
            entry |= text_metrics.entry(text, item.reference, self.params.reference_metric)
        failed = {"error": "no_answer", "detail": answer.failed, "valid": None, "structural": None}
        return entry | (failed if answer.failed else {})

    def _judge(self) -> dict[str, Any] | None:
        """The judge's verdicts on every candidate against the first; a judge that cannot be asked is a warning."""
        p, ((first, ours), *others) = self.params, self.findings.measured.items()
        pairs = {}
        for name, theirs in others:
            both = zip(self.findings.items[: p.judge_limit], ours.entries, theirs.entries, strict=False)
            pairs[name] = [preferences.Pair(i.question, i.reference, a["text"], b["text"]) for i, a, b in both]
        try:
            cost = preferences.check_budget([pair for some in pairs.values() for pair in some], p.judge_budget)
            answers = cache.Answers("answers", cache.key("judge", p.judge))
            with candidates.client(p.judge, answers) as client:
                found = {name: preferences.compare_answers(client, some, p.seed) for name, some in pairs.items()}
                verdicts = [{"baseline": first, "candidate": name, **one} for name, one in found.items()]
                return {"model": client.model, "estimate": cost, "pairs": verdicts}
        except (TunebookError, OSError) as error:
            self.findings.warnings.append(f"The judge was not used: {error}")
            display.say(self.findings.warnings[-1])
            return None

    @steps.step
    def scores(self) -> Html:
        """The verdict and what limits it, then the candidates with their intervals."""
        found, rows = self._measured(), []
        for c in found["candidates"]:
            accuracy, *others = (c["scores"].get(k, {}) for k in ("accuracy", "valid", "structural", "stopped"))
            shares = [display.percent(one["value"]) if one else "" for one in others]
            interval = display.interval(accuracy.get("low"), accuracy.get("high"))
            value = c["reason"] or display.percent(accuracy["value"])
            if perplexity := c["scores"].get("perplexity"):
                value += f" (perplexity {display.number(perplexity['value'])})"
            rows.append((c["name"], value, interval, *shares, display.size(c["size_bytes"])))
        shares_of = ("valid SQL", "same structure", "stops by itself")
        head = ("candidate", found["task"]["label"], "95 % interval", *shares_of, "size")
        lines = statistics.sentences(found)
        said = display.said(*lines, *(f"⚠ {warning}" for warning in found["warnings"] if warning not in lines))
        table = display.shown(rows, head)
        if seeds := found["seeds"]:
            rows = [(n, s["mean"], s["sd"], *(one["value"] for one in s["scores"].values())) for n, s in seeds.items()]
            drawn = [(name, *map(display.percent, shares)) for name, *shares in rows]
            table += display.shown(
                drawn, ("candidate", "mean of the seeds", "standard deviation", *map(str, self.seeds))
            )
        return said + table

    @steps.step
    def comparisons(self) -> Html:
        """Paired comparisons in words, with their p-values."""
        rows = []
        for c in self._measured()["comparisons"]:
            who, counts = f"{c['candidate']} against {c['baseline']}", f"{c['wins']} / {c['losses']} / {c['ties']}"
            rows.append((who, c["sentence"], counts, f"{c['p_holm']:.2g}", c["test"]))
        head = ("comparison", "result", "won / lost / tied", "p (Holm)", "test")
        return display.shown(rows, head) if rows else display.said("One candidate alone: there is nothing to compare.")

    @steps.step
    def figure(self) -> Any:
        """Each candidate's score with its interval, and its file's size beside it."""
        return results.figure(self._measured())

    @steps.step
    def kinds(self) -> Any:
        """Share right by kind of question."""
        groups = {c["name"]: c["groups"]["kind"] for c in self._measured()["candidates"] if "kind" in c["groups"]}
        if not groups:
            return display.said("The questions have no column kind.")
        counts = {kind: group["n"] for name in groups for kind, group in sorted(groups[name].items())}
        shares = {name: {kind: group["value"] for kind, group in found.items()} for name, found in groups.items()}
        return plots.by_group(counts, shares)

    @steps.step
    def errors(self) -> Html:
        """How often each candidate failed in which way."""
        scored = [c for c in self._measured()["candidates"] if c["status"] == "scored"]
        kinds = [k for k in ERROR_KINDS if any(k in c["errors"] for c in scored)]
        rows = [(ERROR_KINDS[k], *(c["errors"].get(k, "") for c in scored)) for k in kinds]
        return display.shown(rows, ("wrong because", *(c["name"] for c in scored)))

    @steps.step
    def forgetting(self) -> Html:
        """The verdicts on what was forgotten and, where one failed, the advice."""
        record = self._measured()["forgetting"]
        if record is None:
            return display.said("Not measured: general_text, _chat and _tasks are empty, or there is no base.")
        rows, tasks = [], list(record["candidates"][record["baseline"]]["tasks"])
        for name, f in record["candidates"].items():
            state = "" if name == record["baseline"] else "kept" if f["passed"] else "FORGOT"
            losses = (
                "" if f["loss"] is None else f"{f['loss']:.3f}",
                "" if f["change"] is None else f"{f['change']:+.3f}",
            )
            shares = [display.percent(f["tasks"].get(task, {}).get("value"), 0) for task in tasks]
            rows.append((name, state, *losses, *shares, f["sentence"]))
        counted = [f"{task}, of {one['n']}" for task, one in record["candidates"][record["baseline"]]["tasks"].items()]
        head = ("candidate", "verdict", "general text, nats/token", "change", *counted, "in words")
        return display.shown(rows, head) + display.said(record["shows"], *(f"→ {a}" for a in record["advice"]))

    @steps.step
    def preferences(self) -> Html:
        """Held-out preference pairs: how often and by how much the chosen answer is likelier."""
        if not (found := self._measured()["preference"]):
            return display.said("This run has no preference pairs.")
        rows = []
        for name, p in found.items():
            odds, accuracy = p["log_odds"], p["accuracy"]
            margin = f"{odds['value']:+.2f} ({odds['low']:+.2f} to {odds['high']:+.2f})" if p["n"] else "–"
            interval = display.interval(accuracy["low"], accuracy["high"])
            rate = p["win_rate"]
            limits = display.interval(rate["low"], rate["high"]) if rate else ""
            wins = f"{display.percent(rate['value'])} ({limits})" if limits else "–"
            rows.append((name, display.percent(accuracy["value"]), interval, margin, wins, p["n"], p["sentence"]))
        measured = ("prefers the chosen", "95 % interval", "log-odds margin", "margin beats the base's")
        return display.shown(rows, ("candidate", *measured, "pairs", "against the base"))

    @steps.step
    def sides(self) -> Html:
        """Where the last candidate gained most over the first and where it lost most, beside the others' answers."""
        self._measured()
        names, rows = list(self.findings.measured), self.findings.answers()
        first, last = names[0], names[-1]
        rows.sort(key=lambda row: (row["answers"][first]["score"] or 0) - (row["answers"][last]["score"] or 0))
        lines: list[tuple[str, ...]] = []
        for row in rows[:SHOWN_ITEMS] + rows[SHOWN_ITEMS:][-SHOWN_ITEMS:]:
            lines += [("question", row["question"]), ("reference", row["reference"])]
            for name, answer in row["answers"].items():
                mark = "✓" if answer["score"] and not answer["error"] else "✗"
                lines.append((name, answer["text"][:SHOWN_CHARS], mark, answer["detail"]))
        return display.shown(lines)

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


def _seeds(params: EvalParams) -> list[int]:
    words = [word.strip() for word in params.seeds.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise TunebookError(f"seeds is {params.seeds!r}; it takes whole numbers from 0, separated by commas.")
    seeds = list(dict.fromkeys(map(int, words)))
    if len(seeds) > 1 and params.temperature == 0:
        raise TunebookError(
            f"{len(seeds)} seeds were given, but greedy answers have none; set temperature above 0 or name one seed."
        )
    return seeds
