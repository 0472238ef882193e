"""The cleaning steps that the parameters ask for, one after another, each with its own account."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from helpers.data.tables import Row, Table


def run(rows: Iterable[list[Row]], p: Any, job: Any, evaluation: Table | None, label: str = "") -> Table:
    """Rows through every step that is switched on, in a fixed order: repair, judge, deduplicate, decontaminate.

    p: parameters of the data stage. job: gives `_step(name) -> StepReport` and the tokenizer. label: put before the steps' names.
    """
    from helpers.data import clean, decontamination, dedup

    def step(name: str) -> Any:
        return job._step(label + name)

    if p.repair_unicode:
        rows = clean.repair_unicode(rows, step("Unicode repair"))
    if p.languages:
        rows = clean.keep_languages(rows, step("language"), p.languages)
    if p.min_chars or p.max_chars or p.min_tokens:
        rows = clean.keep_lengths(
            rows, step("length"), p.min_chars, p.max_chars, p.min_tokens, 0, job.tokenizer if p.min_tokens else None
        )
    if p.drop_repetitive:
        rows = clean.drop_repetitive(rows, step("repetition"))
    if p.drop_gibberish:
        rows = clean.drop_gibberish(rows, step("gibberish"))
    if p.personal_data != "off":
        from helpers.data.privacy import mask_personal_data

        rows = mask_personal_data(rows, step("personal data"), action=p.personal_data)
    if p.toxicity != "none":
        from helpers.data.toxicity import drop_toxic

        rows = drop_toxic(
            rows, step("toxicity"), p.toxicity, p.toxicity_threshold, job.path / "work" / "toxicity.jsonl"
        )
    if p.exact_duplicates:
        rows = dedup.exact_duplicates(rows, step("exact duplicates"))
    if p.near_duplicates:
        rows = dedup.near_duplicates(rows, step("near-duplicates"), p.near_duplicates)
    if evaluation is not None and p.decontaminate:
        report = step("decontamination")
        rows = decontamination.decontaminate(rows, report, evaluation, p.decontaminate)
        if not label:
            carriers = next(iter(job.training.table), [])
            report.figures["injection_recall"] = decontamination.injection_recall(
                evaluation, carriers, p.decontaminate, 200, p.seed
            )
    return rows if isinstance(rows, Table) else Table.collect(rows)
