"""Notebook 01 in order: read, clean, split, render, write. One `Job` holds what the steps hand on to each other.

    job = Job(stage)
    job.read();  job.generate();  job.clean();  job.mix();  job.split()
    job.template();  job.vocabulary();  job.encode();  job.pairs();  job.report();  job.finish()

Each step shows what it did when it ends a cell. Rows move in batches and lie on disk when there are many, so that memory
stays flat from a hundred rows to a million.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from helpers.data.tables import Rejects, StepReport, Table
from helpers.data.turns import Row, make_row
from helpers.display import Html, table
from helpers.errors import TunebookError

COMPANIONS = ("test_dataset", "preference_dataset", "database")


class Job:
    """One data preparation: its parameters, its folder, what was lost, and the tables between the steps."""

    def __init__(self, stage: Any):
        self.stage, self.params, self.path = stage, stage.params, Path(stage.path)
        self.rejects = Rejects(self.path / "rejected.jsonl", self.params.reject_limit)
        self.steps: list[StepReport] = []
        self.figures: dict[str, Any] = {}
        self.made_pairs: Table | None = None
        self._tokenizer: Any = None
        self._template: Any = None
        self.chosen = self._companions()

    def _companions(self) -> dict[str, str]:
        """The sets beside the training data. The embedded ones belong to the embedded data and are left out with any other."""
        from helpers.params import find

        own = find("data", "dataset").default in [part.strip() for part in self.params.dataset.split(",")]
        chosen = {name: getattr(self.params, name) for name in COMPANIONS}
        foreign = [
            name for name in COMPANIONS if not own and chosen[name] and chosen[name] == find("data", name).default
        ]
        if foreign:
            print(f"{', '.join(foreign)} belong to the embedded data, not to {self.params.dataset}: left out.")
        return {name: "" if name in foreign else value for name, value in chosen.items()}

    # ------------------------------------------------------------ read

    def read(self) -> Any:
        """Read every named set; rows that cannot be used are in rejected.jsonl, counted."""
        self.database()
        self.training = self._reading(self.params.dataset, self.params.format, self.params.columns)
        self.tests = self._reading(self.chosen["test_dataset"]) if self.chosen["test_dataset"] else None
        self.preferences = (
            self._reading(self.chosen["preference_dataset"]) if self.chosen["preference_dataset"] else None
        )
        self._check_preferences()
        self.replay = self._reading(self.params.replay_dataset) if self.params.replay_dataset else None
        everything = [reading for reading in (self.training, self.tests, self.preferences, self.replay) if reading]
        self.sources = [report for reading in everything for report in reading.reports]
        return type(self.training)(self.training.table, self.sources)

    def _reading(self, spec: str, format: str = "auto", columns: str = "") -> Any:
        from helpers.data.sources import read

        p = self.params
        documents = {
            "tokenizer": lambda: self.tokenizer,
            "tokens": p.chunk_tokens,
            "overlap": p.chunk_overlap,
            "least_chars": p.min_document_chars,
        }
        return read(
            spec,
            self.rejects,
            format=format,
            info=p.dataset_info,
            columns=columns,
            unanswerable=p.unanswerable,
            documents=documents,
        )

    def _check_preferences(self) -> None:
        if self.preferences and (
            other := next((row for row in self.preferences.table.rows() if row["kind"] != "preference"), None)
        ):
            raise TunebookError(
                f"preference_dataset has a row of another kind ({other['file']}, row {other['row']}: {other['kind']}); "
                "every row needs a prompt, a chosen and a rejected answer."
            )

    # ------------------------------------------------------------ clean

    def clean(self) -> Html:
        """Run the cleaning steps that the parameters ask for on all rows that will be trained on: training, pairs, KTO, replay."""
        from helpers.data.cleaning import run

        evaluation = self.tests.table if self.tests else None
        self.rows = run(self._for_training(self.training.table), self.params, self, evaluation)
        self.rejects.check_rows_left(self.rows, self.params.dataset)

        def cleaned(found: Iterable[list[Row]], label: str) -> Table:
            table = Table.collect(found)
            return run(table, self.params, self, evaluation, label) if len(table) else table

        self.pair_rows = cleaned(self._found("preference"), "pairs: ")
        self.kto_rows = cleaned(self._found("kto"), "kto: ")
        replay = self.replay.table if self.replay else []
        self.replay_rows = cleaned(
            ([row for row in batch if row["kind"] in ("sft", "text")] for batch in replay), "replay: "
        )
        return self.show_steps()

    def generate(self) -> Html:
        """Rows from a model behind an endpoint and preference pairs from run queries, where the parameters ask for them."""
        from helpers.data import blend

        return blend.generate(self)

    def mix(self) -> Html:
        """The mixture of the sources: weights, caps and replay; without them, every row, sources interleaved."""
        from helpers.data import blend

        return blend.mix_sources(self)

    def vocabulary(self) -> Html:
        """Tokens per character of the data, beside a second tokenizer, and words that would be worth a token."""
        from helpers.data import blend

        return blend.vocabulary(self)

    def _for_training(self, rows: Table) -> Table:
        """Rows that answers are learnt from: a pair gives its chosen answer, a KTO row its good one."""
        if all(kind in ("sft", "text") for report in self.training.reports for kind in report.kinds):
            return rows
        report = self._step("rows for training")

        def usable() -> Iterator[list[Row]]:
            for batch in rows:
                kept = []
                report.seen += len(batch)
                for row in batch:
                    if row["kind"] == "kto" and not row["label"]:
                        report.figures["bad answers, kept for kto.parquet only"] = (
                            report.figures.get("bad answers, kept for kto.parquet only", 0) + 1
                        )
                    elif row["kind"] in ("preference", "kto"):
                        kept.append(
                            make_row(
                                "sft",
                                row["messages"] + row.get("chosen", []),
                                source=row["source"],
                                file=row["file"],
                                row=row["row"],
                                tools=row.get("tools"),
                                meta=row["meta"],
                            )
                        )
                    else:
                        kept.append(row)
                report.kept += len(kept)
                yield kept

        return Table.collect(usable())

    def _found(self, kind: str) -> Iterator[list[Row]]:
        found_in = [reading.table for reading in (self.training, self.preferences) if reading]
        for rows in [*found_in, *([self.made_pairs] if self.made_pairs is not None else [])]:
            for batch in rows:
                if found := [row for row in batch if row["kind"] == kind]:
                    yield found

    def _step(self, name: str) -> StepReport:
        self.steps.append(StepReport(name, rejects=self.rejects))
        return self.steps[-1]

    def show_steps(self) -> Html:
        def example(step: StepReport) -> str:
            found = next(iter(step.examples.values()), None)
            return (
                "" if found is None else str(found.get("text") or f"{found.get('before')} → {found.get('after')}")[:140]
            )

        lines = [
            (
                s.step,
                f"{s.seen:,}",
                f"{s.kept:,}",
                f"{s.changed:,}" if s.changed else "",
                ", ".join(f"{reason}: {n:,}" for reason, n in s.dropped.items()),
                example(s),
            )
            for s in self.steps
        ]
        return Html(
            table(lines, ("step", "rows in", "rows out", "changed", "removed", "example")),
            "\n".join(f"{l[0]}: {l[1]} → {l[2]} {l[4]}" for l in lines),
        )

    # ------------------------------------------------------------ split

    def split(self) -> Html:
        """Train, eval and test rows by content hash; near-duplicates and groups stay on one side."""
        from helpers.data.dedup import near_duplicate_groups
        from helpers.data.split import pairs_of, split

        p = self.params
        together: Iterable[tuple[str, str]] = ()
        if not p.near_duplicates:  # they were kept, so they must not be parted
            together = pairs_of(self.rows, near_duplicate_groups(self.rows))
        self.splits = split(self.rows, p.eval_share, 0.0 if self.tests else p.test_share, p.group_by, together)
        if self.tests:
            self.splits["test"] = self.tests.table
        self.rejects.check_rows_left(self.splits["train"], f"the training split of {p.dataset}")
        if not self.tests and len(self.splits["test"]):
            self.pair_rows, self.kto_rows = map(self._without_test_questions, (self.pair_rows, self.kto_rows))
        grouped = p.group_by if any(p.group_by in row["meta"] for row in self.pair_rows.rows()) else ""
        self.pair_splits = split(self.pair_rows, p.preference_eval_share, 0.0, grouped)
        self.figures["splits"] = {name: len(part) for name, part in self.splits.items()}
        self.figures["preference_splits"] = {name: len(self.pair_splits[name]) for name in ("train", "eval")}
        sizes = [(name, f"{len(part):,}") for name, part in self.splits.items()]
        sizes += [(f"preference {name}", f"{count:,}") for name, count in self.figures["preference_splits"].items()]
        return Html(table(sizes, ("split", "rows")), ", ".join(f"{name} {count}" for name, count in sizes))

    def _without_test_questions(self, rows: Table) -> Table:
        """Pairs and KTO rows whose question landed in the test split must not be trained on either."""
        from helpers.data.shingles import text_hash

        if not len(rows):
            return rows
        report = self._step(f"{'kto' if rows is self.kto_rows else 'pairs'}: question in the test split")

        def named(messages: list[dict]) -> int:
            return text_hash(json.dumps(messages, sort_keys=True))

        asked = {named(row["messages"][:-1]) for row in self.splits["test"].rows()}

        def others() -> Iterator[list[Row]]:
            for batch in rows:
                kept = []
                report.seen += len(batch)
                for row in batch:
                    question = row["messages"] if row["kind"] == "preference" else row["messages"][:-1]
                    if named(question) in asked:
                        report.drop(row, "its question is in the test split")
                    else:
                        kept.append(row)
                report.kept += len(kept)
                yield kept

        return Table.collect(others())

    # ------------------------------------------------------------ render

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from helpers.model.loading import load_tokenizer, resolve_model

            self.source = resolve_model(self.params.model)
            self._tokenizer = load_tokenizer(self.source)
            if self.params.add_tokens:
                from helpers.data.vocabulary import add_tokens

                add_tokens(None, self._tokenizer, self.params.add_tokens)
        return self._tokenizer

    def template(self) -> Any:
        """What the model's chat template does: its end of turn, what it adds, what it cannot show."""
        from helpers.data.chat_template import inspect

        if self._template is None:
            self._template = inspect(self.tokenizer)
        return self._template

    def encode(self) -> Html:
        """Render and tokenise every split, mask what is not trained, fit it to max_length, and write the parquet files."""
        from helpers.data import encode as encoding

        self.encoded = encoding.encode_splits(self)
        return encoding.summary(self.encoded)

    def lengths(self) -> Any:
        """The histogram of lengths, with max_length and the proposal, saved as lengths.png."""
        from helpers import plots
        from helpers.display import save_figure

        found = self.encoded["lengths"]
        figure = plots.lengths(
            self.encoded["histogram"], self.encoded["max_length"], found["over"], found["proposed_max_length"]
        )
        save_figure(self.stage, figure, "lengths.png")
        return figure

    def preview(self, rows: int = 6) -> Any:
        """Real rows as the model will see them, trained tokens in colour; the whole page is saved as preview.html."""
        from helpers.report import data_preview

        return data_preview.write(self, rows)

    def pairs(self) -> Html:
        """Write preference.parquet and preference_eval.parquet, each answer with exactly one end of turn."""
        from helpers.data import encode as encoding

        return encoding.encode_pairs(self)

    # ------------------------------------------------------------ finish

    def report(self) -> Any:
        """Write report.html and the data card README.md."""
        from helpers.report import data_card, data_report

        self._copy_database()
        self.rejects.close()
        data_card.write(self)
        return data_report.write(self)

    def database(self) -> Path | None:
        """The SQLite file that goes with the data; None when there is none. Raises TunebookError for a missing or foreign file."""
        from helpers import machine

        name = self.chosen["database"]
        if not name:
            return None
        found = next((p for p in (Path(name), machine.PROJECT / name) if p.is_file()), None)
        if found is None:
            raise TunebookError(f"The database {name} is not there; name a SQLite file, or leave the parameter empty.")
        with found.open("rb") as file:
            if file.read(16) != b"SQLite format 3\x00":
                raise TunebookError(
                    f"{name} is no SQLite database; name a file that sqlite3 opens, or leave the parameter empty."
                )
        return found

    def _copy_database(self) -> None:
        if (found := self.database()) is not None:
            partial = self.path / ".database.sqlite.partial"
            shutil.copyfile(found, partial)
            partial.replace(self.path / "database.sqlite")

    def metrics(self) -> dict[str, Any]:
        """What the manifest and the report say about the job, as plain JSON."""
        tokens = sum(part.get("tokens", 0) for part in self.encoded["splits"].values())
        trained = sum(part.get("trained_tokens", 0) for part in self.encoded["splits"].values())
        return {
            "rows": self.figures["splits"],
            "preference_rows": self.figures["preference_splits"],
            "written": self.encoded["written"],
            "tokens": tokens,
            "trained_tokens": trained,
            "trained_share": trained / max(1, tokens),
            "lengths": self.encoded["lengths"],
            "rejected": self.rejects.as_dict(),
            "steps": [{k: v for k, v in step.as_dict().items() if k != "examples"} for step in self.steps],
            "notes": dict(Counter(self.encoded["notes"])),
            "cache": self.encoded["cache"],
            **{k: v for k, v in self.figures.items() if "splits" not in k},
        }

    def finish(self) -> Any:
        """Write the manifest: from here on the later notebooks accept this folder."""
        from helpers.model.loading import template_hash, tokenizer_hash

        self.rejects.close()
        metrics = json.loads(json.dumps(self.metrics(), default=float))
        return self.stage.finish(
            metrics,
            template_hash=template_hash(self.tokenizer),
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            model=self.source.as_dict(),
            extra={"data_hash": self.encoded["data_hash"]},
        )
