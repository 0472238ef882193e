"""Notebook 01 in order: read, clean, split, render, write. Each step computes from what the steps before it left.

    job = prepare.open(params)
    job.read();  job.generate();  job.clean();  job.mix();  job.split()
    job.template();  job.vocabulary();  job.encode();  job.lengths();  job.pairs();  job.finish()

Each step returns what its cell shows and replaces its own output. Many rows lie on disk: memory stays flat.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

from helpers import machine, plots, runs
from helpers.cache import Answers
from helpers.data import cleaning, dedup, encode, mixing, sources, sql_pairs, synthetic, template_choice, vocabulary
from helpers.data.chat_template import Template, inspect, set_arguments
from helpers.data.chat_template import plain as plain_text
from helpers.data.rendering import refuse_control_tokens
from helpers.data.split import asks, group_value, split
from helpers.data.tables import Rejects, StepReport, Table
from helpers.data.turns import Row, answer_of, as_sft, text_of, with_system
from helpers.display import Html, plain, said, save, say, shown
from helpers.errors import TunebookError
from helpers.model import loading
from helpers.model.stop_tokens import special_pattern
from helpers.params import DataParams
from helpers.steps import Job as StageJob
from helpers.steps import look, step
from helpers.tasks import text_to_sql

BAD = "bad answers, kept for kto.parquet only"
COMPANIONS = ("test_dataset", "preference_dataset", "database")


def open(params: DataParams) -> Job:
    """The data stage of the run `params.run`; nothing is written before its first step."""
    return Job(runs.stage("data", params))


class Job(StageJob):
    """One data preparation. rejects and reports count what each step lost; figures holds what the pages show."""

    def __init__(self, stage: runs.Stage) -> None:
        super().__init__(stage)
        self.params, self.path = cast(DataParams, stage.params), Path(stage.path)
        self.rejects = Rejects(self.path / "rejected.jsonl", self.params.reject_limit)
        self.figures: dict[str, Any] = {}
        self.inputs: dict[str, tuple[int, set[str]]] = {}  # parameter that names a set → its rows, their files
        self.warnings: dict[str, str] = {}
        self.choice: dict[str, Any] = {}  # of a chat template by parameter
        self._reports: dict[str, list[StepReport]] = {}
        self.chosen = {name: getattr(self.params, name) for name in COMPANIONS}
        if (embedded := DataParams()).dataset not in [part.strip() for part in self.params.dataset.split(",")]:
            foreign = [name for name in COMPANIONS if self.chosen[name] == getattr(embedded, name) != ""]
            self.chosen |= dict.fromkeys(foreign, "")
            if names := ", ".join(foreign):
                say(f"{names} belong to the embedded data; your own dataset needs none of them.")
        if stage.done is None and self.params.chat_template:
            _ = self.tokenizer  # a template that cannot be used is refused before anything is read or written

    @functools.cached_property
    def source(self) -> loading.ModelSource:
        """The model's files."""
        return loading.resolve_model(self.params.model)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The run's tokenizer: the model's, with the tokens and the chat template that the parameters give it."""
        tokenizer = loading.load_tokenizer(self.source)
        vocabulary.add_tokens(None, tokenizer, self.params.add_tokens)
        self.choice = template_choice.choose(tokenizer, self.params.chat_template, self.params.template_tokens)
        set_arguments(tokenizer, self.params.template_arguments)
        return tokenizer

    @property
    def steps(self) -> list[StepReport]:
        """What every cleaning step did, in order."""
        return [report for reports in self._reports.values() for report in reports]

    def _begin(self, step: str) -> None:
        """What the step counted in an earlier attempt is counted anew."""
        self.rejects.begin(step)
        self._reports[step] = []

    def report_of(self, step: str, *name: str) -> StepReport:
        """A new account of what is done to rows within a step."""
        self._reports[step].append(StepReport("".join(name), rejects=self.rejects))
        return self._reports[step][-1]

    def _warn(self, about: str, text: str) -> None:
        """Say what a reader must know, here, in the report and in the manifest; "" takes back what was said."""
        self.warnings[about] = text
        if text:
            say(f"Note: {text}")

    def _notes(self, *about: str) -> list[tuple[str, str]]:
        return [("note", self.warnings[one]) for one in about if self.warnings[one]]

    # ------------------------------------------------------------ read and generate

    @step
    def read(self) -> Html:
        """Read every named set; rows that cannot be used are in rejected.jsonl, counted."""
        self._begin("read")
        self.database()
        p, named = self.params, self.chosen["test_dataset"]
        self.training = self._read(p.dataset, "dataset", p.format, p.columns)
        own = [] if named else self.training.held()
        self.tests = self._read(own or named, "test_dataset", p.format if own else "auto", p.columns, "test")
        self.preferences = self._read(self.chosen["preference_dataset"], "preference_dataset")
        self.replay = self._read(p.replay_dataset, "replay_dataset")
        if row := next((row for row in self.preferences.table.rows() if row["kind"] != "preference"), None):
            found = f"{row['file']}, row {row['row']} of preference_dataset is of the kind {row['kind']}"
            raise TunebookError(f"{found}; every row needs a prompt, a chosen and a rejected answer.")
        every = (self.training, self.tests, self.preferences, self.replay)
        self.sources, aside = ([one for r in every for one in getattr(r, kind)] for kind in ("sources", "aside"))
        taken, notes = self.training.table, []
        if 0 < p.max_rows < len(taken):
            taken = mixing.take(taken, p, self.report_of("read", "max_rows"))
            notes.append(f"max_rows: {len(taken):,} of {len(self.training.table):,} rows of dataset are taken.")
        if own:
            notes.append(f"No test_dataset is named: the {own[0].split} files of {p.dataset} are the test rows.")
        self.training_rows, self.made_pairs, self.training.table = taken, Table().close(), taken
        return said(*notes) + sources.Reading(taken, self.sources + [one for one in aside if one not in own]).shown()

    def _read(self, spec: Any, name: str, format: str = "auto", columns: str = "", split: str = "") -> sources.Reading:
        p = self.params
        self.inputs[name] = 0, set()
        if not spec:
            return sources.Reading(Table().close(), [])
        cut: dict[str, Any] = {"tokenizer": lambda: self.tokenizer, "least_chars": p.min_document_chars}
        cut |= {"tokens": p.chunk_tokens, "overlap": p.chunk_overlap}
        written = {"unanswerable": p.unanswerable, "joints": template_choice.joints(p.chat_template)}
        options: dict[str, Any] = {"format": format, "columns": columns, "info": p.dataset_info, "written": written}
        if p.control_tokens == "reject":
            options["check"] = functools.partial(refuse_control_tokens, pattern=special_pattern(self.tokenizer))
        before = self.rejects.total_seen
        found = sources.read(spec, self.rejects, documents=cut, split=split or "train", **options)
        self.inputs[name] = self.rejects.total_seen - before, {source.where for source in found.sources}
        return replace(found, table=self._with_system(found.table))

    def _with_system(self, rows: Table) -> Table:
        given = ([with_system(row, self.params.system) for row in batch] for batch in rows)
        return Table.collect(given) if self.params.system else rows

    @step
    def generate(self) -> Html:
        """Rows from a model behind an endpoint, and preference pairs from queries that were run, where asked for."""
        self._begin("generate")
        p, made = self.params, []
        if p.synthetic != "none":
            documents = Table.collect(self.training.table.of_kind("text"))
            report = self.report_of("generate", f"synthetic {p.synthetic}")
            found = synthetic.generate(p, documents, report, Answers(self.path / "work", "synthetic"))
            rows = self._with_system(found)
            self.rejects.check_rows_left(rows, f"the synthetic {p.synthetic}")
            if p.synthetic.startswith("questions"):
                self.training_rows = Table.collect(chain(self.training.table.of_kind("sft", "preference", "kto"), rows))
            else:
                self.made_pairs = rows
            made.append((f"synthetic {p.synthetic}", f"{len(rows):,}", f"{len(documents):,} pieces of text"))
        if p.sql_negatives:
            database = self.database()
            if database is None:
                raise TunebookError("sql_negatives needs a database to run the queries on; name a SQLite file.")
            report, questions = self.report_of("generate", "mistaken queries"), self.training.table.of_kind("sft")
            self.made_pairs = Table.collect(sql_pairs.reject_queries(questions, report, database, seed=p.seed))
            counts = (f"{report.kept:,}", f"{report.seen:,} questions")
            made.append(("pairs with a query that answers wrongly", *counts))
        if not made:
            return said("No synthetic data was asked for (synthetic, sql_negatives).")
        return shown(made, ("made", "rows", "of"))

    # ------------------------------------------------------------ clean, mix, split

    @step
    def clean(self) -> Html:
        """The cleaning steps that the parameters ask for, on all that is trained on: rows, pairs, KTO rows, replay."""
        self._begin("clean")
        tests = self.tests.table if len(self.tests.table) else None

        def cleaned(rows: Iterable[list[Row]], label: str = "") -> Table:
            table = rows if isinstance(rows, Table) else Table.collect(rows)
            account = functools.partial(self.report_of, "clean", label)
            return cleaning.run(table, self.params, account, tests, lambda: self.tokenizer)

        self.rows = cleaned(self._for_training())
        self.rejects.check_rows_left(self.rows, self.params.dataset)
        found = (self.training_rows, self.preferences.table, self.made_pairs)
        self.pair_rows = cleaned((batch for table in found for batch in table.of_kind("preference")), "pairs: ")
        self.kto_rows = cleaned(self.training_rows.of_kind("kto"), "kto: ")
        self.replay_rows = cleaned(self.replay.table.of_kind("sft", "text"), "replay: ")
        self.mixed = self.rows
        lines = [one.line() for one in self.steps]
        return shown(lines, ("step", "rows in", "rows out", "changed", "removed", "example"))

    def _for_training(self) -> Iterable[list[Row]]:
        """Rows that answers are learnt from: a pair gives its chosen answer, a KTO row its good one."""
        kinds = {kind for source in self.training.sources for kind in source.kinds}
        if kinds <= {"sft", "text"}:
            return self.training_rows
        report = self.report_of("clean", "rows for training")
        report.figures[BAD] = 0

        def usable() -> Iterator[list[Row]]:
            for batch in self.training_rows:
                kept = [row for row in batch if row["kind"] != "kto" or row["label"]]
                report.seen, report.kept = report.seen + len(batch), report.kept + len(kept)
                report.figures[BAD] += len(batch) - len(kept)
                yield [as_sft(row) if row["kind"] in ("preference", "kto") else row for row in kept]

        return usable()

    @step
    def mix(self) -> Html:
        """The mixture of the sources: weights, caps and replay; without them, every row, sources interleaved."""
        self._begin("mix")
        p = self.params
        names = list(dict.fromkeys(row["source"] for row in self.rows.rows()))
        weights, caps = mixing.numbers("weights", p.weights, names), mixing.numbers("caps", p.caps, names)
        if len(names) == 1 and not caps and not p.replay_dataset:
            return shown([(f"One source with {len(self.rows):,} rows; nothing to mix.",)])
        parts = {name: Table() for name in names}
        for batch, name in ((batch, name) for batch in self.rows for name in names):
            parts[name].append([row for row in batch if row["source"] == name])
        given = {n: mixing.Source(part.close(), weights.get(n), int(caps.get(n, 0))) for n, part in parts.items()}
        if p.replay_dataset:
            replay = ([{**row, "source": f"replay: {row['source']}"} for row in batch] for batch in self.replay_rows)
            given["replay"] = mixing.Source(Table.collect(replay), replay=True)

        def lengths(rows: list[Row]) -> list[int]:
            return [len(ids) for ids in vocabulary.token_ids(self.tokenizer, [text_of(row) for row in rows])]

        report = self.report_of("mix", "mixture")
        self.mixed = Table.collect(mixing.mix(given, report, p.replay_share, lengths, seed=p.seed))
        for reason, count in report.dropped.items():
            self.rejects.removed[reason] += count
            self.rejects.first[reason] = {"file": "", "row": 0, "detail": "left out by weights, caps or replay_share"}
        return mixing.table(report.figures["mixture"])

    @step
    def split(self) -> Html:
        """Train, eval and test rows by content hash; near-duplicates and groups stay on one side."""
        self._begin("split")
        index = next((report.made for report in self._reports["clean"] if report.made), None)
        p, together = self.params, dedup.near_pairs(self.mixed, index)
        given = self.tests.table if len(self.tests.table) else None
        self.splits = split(self.mixed, p.eval_share, 0.0 if given else p.test_share, p.group_by, together)
        if given is not None:
            self.splits["test"] = given
        self.rejects.check_rows_left(self.splits["train"], f"the training split of {p.dataset}")
        pairs, self.kto_split = self.pair_rows, self.kto_rows
        if given is None and len(self.splits["test"]):
            pairs, self.kto_split = self._not_asked(pairs, "pairs"), self._not_asked(self.kto_rows, "kto")
        grouped = p.group_by if any(group_value(row, p.group_by) for row in pairs.rows()) else ""
        self.pair_splits = split(pairs, p.preference_eval_share, 0.0, grouped)
        self.figures["splits"] = found = {name: len(part) for name, part in self.splits.items()}
        self.figures["preference_splits"] = {name: len(self.pair_splits[name]) for name in ("train", "eval")}
        sizes = [(name, f"{count:,}") for name, count in found.items()]
        sizes += [(f"preference {name}", f"{count:,}") for name, count in self.figures["preference_splits"].items()]
        self._held_out(found)
        none = f"none of {len(pairs):,} pairs is held out (preference_eval_share {p.preference_eval_share})"
        self._warn("pairs", none if len(pairs) and not len(self.pair_splits["eval"]) else "")
        return shown(sizes + self._notes("eval", "test", "pairs"), ("split", "rows"))

    def _held_out(self, rows: Mapping[str, int]) -> None:
        """Say which part was to be held out and holds nothing. rows: of each split."""
        p, texts = self.params, all(row["kind"] == "text" for row in self.mixed.rows())
        test_share = 0.0 if texts or self.chosen["test_dataset"] else p.test_share
        for name, share, lack in (("eval", p.eval_share, "held-out loss"), ("test", test_share, "question for 05")):
            why = f"{len(self.mixed):,} rows leave no room for {name}_share = {share:g}"
            if had := len(self.splits[name]):
                why = f"each of its {had:,} rows was lost on the way, see rejected.jsonl"
            self._warn(name, f"{name}.parquet is empty: {why}; there is no {lack}." * bool(share and not rows[name]))

    def _not_asked(self, rows: Table, label: str) -> Table:
        """Pairs and KTO rows whose question landed in the test split must not be trained on either."""
        if not len(rows):
            return rows

        held, fault = asks(self.splits["test"]), ("its question is in the test split", "")
        report = self.report_of("split", f"{label}: test questions")
        return Table.collect(report.sift(rows, lambda batch: (fault if held(row) else None for row in batch)))

    # ------------------------------------------------------------ render and write

    @look
    def template(self) -> Template:
        """What the chat template does: its end of turn, what it adds, what it cannot show; plain text needs none."""
        tokenizer, rows = self.tokenizer, chain(*(part.rows() for part in (*self.splits.values(), self.pair_rows)))
        if not tokenizer.chat_template and all(row["kind"] == "text" for row in rows):
            return plain_text(tokenizer)
        given = ("template_arguments", self.params.template_arguments or "none")
        return replace(inspect(tokenizer), chosen=(*template_choice.facts(self.choice), given))

    @step
    def vocabulary(self) -> Html:
        """Tokens per character of the data, unknown tokens, pieces per word; beside a second tokenizer's, if named."""
        p, found = self.params, {}
        for name in filter(None, (p.model, p.compare_tokenizer)):
            tokenizer = self.tokenizer if name == p.model else loading.load_tokenizer(loading.resolve_model(name))
            texts = (
                "\n".join((row["messages"][-2]["content"] if len(row["messages"]) > 1 else "", answer_of(row)))
                for row in self.mixed.rows()
            )
            found[name] = vocabulary.report(tokenizer, texts)
        self.figures["vocabulary"] = found
        rows = [(key.replace("_", " "), *(plain(one[key]) for one in found.values())) for key in found[p.model]]
        return shown(rows, ("", *found))

    @step
    def encode(self) -> Html:
        """Render and tokenise every split, mask what is not trained, fit it to max_length, write the parquet files."""
        self._begin("encode")
        given = (self.template(), self.params, self.path, self.rejects, self.source.path)
        self.encoded = encode.splits(self.splits, self.kto_split, *given)
        self.tokenizer.save_pretrained(self.path / "tokenizer")
        if self.choice.get("replaced"):
            rows = self.encoded["written"]["train"]
            self.encoded["notes"][f"chat_template {self.choice['name']} in place of the model's own"] = rows
        self._held_out(self.encoded["written"])
        return encode.summary(self.encoded)

    @step
    def lengths(self) -> Any:
        """The histogram of lengths, with max_length and the proposal, saved as lengths.png."""
        found = self.encoded["lengths"]
        limits = (found["max_length"], found["over"], found["proposed_max_length"])
        figure = plots.lengths(self.encoded["histogram"], *limits)
        save(figure, self.stage.path, "lengths")
        return figure

    @step
    def pairs(self) -> Html:
        """Write preference.parquet and preference_eval.parquet, each answer with exactly one end of turn."""
        self._begin("pairs")
        given = (self.template(), self.params, self.encoded["max_length"], self.path, self.rejects)
        written, over, notes = encode.pairs(self.pair_splits, *given)
        self.encoded["written"] |= written
        self.encoded["notes"] |= notes
        lines = [(f"{file}.parquet", f"{count:,}") for file, count in written.items()] or [("no preference pairs", "")]
        self._warn("loss", " ".join(self.rejects.loss(self.inputs, self.params.loss_limit)))
        return shown([*lines, ("over max_length", f"{over:,}"), *self._notes("loss")], ("file", "pairs"))

    # ------------------------------------------------------------ finish

    def database(self) -> Path | None:
        """The SQLite file that goes with the data; None when there is none. Raises TunebookError for any other file."""
        name = self.chosen["database"]
        if not name:
            return None
        found = next((p for p in (root / name for root in machine.places()) if p.is_file()), None)
        if found is None:
            raise TunebookError(f"The database {name} is not there; name a SQLite file, or leave the parameter empty.")
        text_to_sql.open_readonly(found).close()  # raises for any other file
        return found

    def metrics(self) -> dict[str, Any]:
        """What the manifest and the report say about the job, as plain JSON."""
        splits = self.encoded["splits"].values()
        tokens, trained = (sum(part.get(name, 0) for part in splits) for name in ("tokens", "trained_tokens"))
        reports = [{k: v for k, v in report.as_dict().items() if k != "examples"} for report in self.steps]
        found = {
            "rows": self.figures["splits"],
            "preference_rows": self.figures["preference_splits"],
            "written": self.encoded["written"],
            "tokens": tokens,
            "trained_tokens": trained,
            "trained_share": trained / max(1, tokens),
            "lengths": self.encoded["lengths"],
            "rejected": self.rejects.as_dict(),
            "steps": reports,
            "notes": self.encoded["notes"],
            "warnings": [text for text in self.warnings.values() if text],
            **{name: value for name, value in self.figures.items() if "splits" not in name},
        }
        return json.loads(json.dumps(found, default=float))

    @step
    def finish(self) -> runs.Manifest:
        """Write the manifest: from here on the later notebooks accept this folder."""
        self.rejects.close()
        if (found := self.database()) is not None:
            shutil.copyfile(found, self.path / "database.sqlite")
        return self.stage.finish(
            self.metrics(),
            template_hash=loading.template_hash(self.tokenizer),
            tokenizer_hash=loading.tokenizer_hash(self.tokenizer),
            model=self.source.as_dict(),
            data_hash=self.encoded["data_hash"],
            chat_template=self.choice | ({"arguments": a} if (a := self.params.template_arguments) else {}),
        )
