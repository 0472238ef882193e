"""What a recipe would come to, before any GPU second: rows cut or masked, ends of turn, overlap, fit and time by GPU.

    tunebook check notebooks/recipes/mine [-p sft.rank 32] [--rows 2000] [--gpus 4]

The rows go through the data stage's own steps, in a folder that is removed again: nothing is written under runs/.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from helpers import display, params, runs
from helpers.data import prepare
from helpers.data.tables import open_parquet
from helpers.errors import TunebookError
from helpers.planner import cost_model, proposals
from helpers.planner import plan as planner
from helpers.train import config, examples

STEPS = ("read", "generate", "clean", "mix", "split", "template", "encode", "pairs")


def check(recipe: dict[str, Any], limit: int = 0, gpus: int = 1) -> display.Html:
    """Two tables: the rows, and the training on each known GPU, `gpus` of them. limit: only the first rows, 0 for all.

    Raises TunebookError where a stage's own would: rows that cannot be read, a template that cannot be rendered.
    """
    data: Any = dataclasses.replace(recipe["data"], again=True)
    found = []
    if data.synthetic != "none":
        told = f"{data.synthetic} are not asked for; the documents' pieces are looked at as plain text in their place"
        found, data.synthetic, data.format, data.train_on = [("synthetic", told)], "none", "auto", "everything"
    if limit and not 0 < data.max_rows <= limit:
        found, data.max_rows = [*found, ("sample", f"the first {limit:,} rows of dataset only")], limit
    with _elsewhere():
        job = prepare.open(data)
        for step in STEPS:
            getattr(job, step)()
        job.figures["vocabulary"] = {}
        manifest = job.finish()
        found += _rows(job, manifest, data)
        trainings = [chosen for stage, chosen in recipe.items() if stage in ("sft", "orpo")]
        methods: dict[str, str] = {}
        fits = [line for chosen in trainings for line in _fits(chosen, manifest, job.source, gpus, found, methods)]
    header = ("stage", "GPU", "fits", "peak", "tokens/s", "takes", "method, or why not")
    return display.shown(found, ("rows", "")) + display.said(" ") + display.shown(fits, header)


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """Runs go into a folder that is removed at the end."""
    before = os.environ.get("TUNEBOOK_RUNS")
    with tempfile.TemporaryDirectory(prefix="tunebook-check-") as folder, contextlib.redirect_stdout(None):
        os.environ["TUNEBOOK_RUNS"] = folder
        try:
            yield
        finally:
            os.environ.pop("TUNEBOOK_RUNS") if before is None else os.environ.update(TUNEBOOK_RUNS=before)


def _rows(job: prepare.Job, manifest: runs.Manifest, data: Any) -> list[tuple[str, str]]:
    """What became of the rows, as the data stage counted it."""
    counts, lengths = job.encoded["written"], job.encoded["lengths"]
    written = ", ".join(f"{name} {rows:,}" for name, rows in counts.items())
    removed = ", ".join(f"{reason} {rows:,}" for reason, rows in job.rejects.removed.most_common()) or "none"
    invalid = ", ".join(f"{reason} {rows:,}" for reason, rows in job.rejects.invalid.most_common()) or "none"
    over = f"{lengths['over']:,} ({display.percent(lengths['over_share'])}): dropped {lengths['dropped']:,}, "
    over += (
        f"truncated {lengths['truncated']:,}, split {lengths['split_rows']:,}, masked empty {lengths['all_masked']:,}"
    )
    held = sum(one.dropped["holds an evaluation question"] for one in job.steps if "decontamination" in one.step)
    asked = f"{held:,} rows hold a test question and are dropped" if job.chosen["test_dataset"] else ""
    overlap = asked or "no test set is named: one is split off, and equal rows stay on one side"
    if job.chosen["test_dataset"] and not data.decontaminate:
        overlap = "not looked for (decontaminate is 0)"
    lines = [("written", written), ("cannot be read", invalid), ("removed", removed), ("over max_length", over)]
    return [*lines, ("end of turn", _ends(job, manifest)), ("overlap with the test set", overlap)]


def _ends(job: prepare.Job, manifest: runs.Manifest) -> str:
    """In how many training rows the last trained tokens end a turn (a template may write a line end behind it)."""
    ends, rows_, trained = set(getattr(job.template(), "end_ids", ())), 0, 0
    if not ends:
        return "plain text has none"
    with open_parquet(manifest.path / "train.parquet") as table:
        for batch in table.iter_batches(columns=["input_ids", "completion_mask"]):
            for row in batch.to_pylist():
                shown = [token for token, on in zip(row["input_ids"], row["completion_mask"], strict=True) if on]
                rows_, trained = rows_ + 1, trained + bool(ends & set(shown[-3:]))
    names = " or ".join(job.tokenizer.convert_ids_to_tokens(sorted(ends)))
    cut = f"; {rows_ - trained:,} lost it to max_length, and teach no end" if trained < rows_ else ""
    return f"{names} is trained in {trained:,} of {rows_:,} rows{cut}"


def _fits(
    chosen: Any, manifest: runs.Manifest, source: Any, gpus: int, found: list, methods: dict[str, str]
) -> Iterator[tuple[str, ...]]:
    """A line for each known GPU: whether the training fits, or the planner's refusal. found: gets its rows' line;
    methods: what `auto` came to for SFT, by GPU, which goes for what is trained on top of it."""
    try:
        train, _, counts = examples.read(manifest, chosen)
        less = {name.replace("_", " "): n for name, n in counts["train"].items() if n and "ids" not in name}
        found.append((f"{chosen.stage} trains on", f"{len(train):,} ({display.plain(less)})"))
    except TunebookError as error:
        yield chosen.stage, "any", "no", "", "", "", str(error)
        return
    lengths, padded = examples.lengths_of(train), examples.lengths_of(train, padded=True)
    for card in cost_model.CARDS.values():
        try:
            config.check(chosen, card.capability)
            before = methods.get(card.name) if chosen.start_from == "sft" and chosen.method == "auto" else None
            params = dataclasses.replace(chosen, plan_for=card.name, method=before or chosen.method)
            plan = planner.plan(params, lengths, source, gpus, None, padded)
            methods |= {card.name: plan.method} if chosen.stage == "sft" else {}
            speed, takes = f"{plan.tokens_per_s:,.0f}", display.duration(plan.seconds[0])
            rate = (f"{chosen.stage} learning rate", proposals.used(params, plan.shape.parameters)[1])
            found += [rate] if rate not in found else []
            yield chosen.stage, card.name, "yes", f"{plan.peak_gib:.1f} GiB", speed, takes, plan.method
        except TunebookError as error:
            yield chosen.stage, card.name, "no", "", "", "", str(error)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tunebook check", description="Look at a recipe before anything is trained.")
    parser.add_argument("recipe", help="folder of a recipe, or its name in notebooks/recipes/")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("STAGE.NAME", "VALUE"), help="one parameter"
    )
    parser.add_argument("--rows", type=int, default=0, help="look at the first N rows of dataset only")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of each kind to plan for (default 1)")
    given = parser.parse_args(arguments)
    recipe: Any = params.recipe(given.recipe)
    for dotted, value in given.p:
        stage, _, name = dotted.partition(".")
        if stage not in recipe:
            raise TunebookError(f"-p {dotted} names no stage of the recipe; it has {', '.join(recipe)}.")
        setattr(recipe[stage], name, value)
    if "data" not in recipe:
        raise TunebookError(f"The recipe {given.recipe} has no data.yaml, so there are no rows to look at.")
    display.say(check(recipe, max(0, given.rows), max(1, given.gpus)))
    return 0
