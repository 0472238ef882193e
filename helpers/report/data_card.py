"""README.md of a prepared data set: Hugging Face's dataset card, its front matter written from what was counted."""

from __future__ import annotations

from typing import Any


def write(job: Any) -> None:
    """Write the data card into the stage's folder; a hub upload of the folder shows it as the set's page."""
    from helpers.runs import write_atomic

    write_atomic(job.path / "README.md", card(job))


def card(job: Any) -> str:
    import yaml

    written = {name: count for name, count in job.encoded["written"].items() if count}
    rows = sum(written.values())
    sizes = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))
    configs = [
        {
            "config_name": "sft",
            "default": True,
            "data_files": [
                {"split": s, "path": f"{f}.parquet"}
                for f, s in (("train", "train"), ("eval", "validation"), ("test", "test"))
                if f in ("train", "eval") and written.get(f)
            ],
        }
    ]
    if written.get("test"):
        configs.append({"config_name": "test", "data_files": [{"split": "test", "path": "test.parquet"}]})
    if written.get("preference"):
        configs.append(
            {
                "config_name": "preference",
                "data_files": [
                    {"split": s, "path": f"{f}.parquet"}
                    for f, s in (("preference", "train"), ("preference_eval", "validation"))
                    if written.get(f)
                ],
            }
        )
    if written.get("kto"):
        configs.append({"config_name": "kto", "data_files": [{"split": "train", "path": "kto.parquet"}]})
    front = {
        "pretty_name": f"Training data of run {job.params.run}",
        "task_categories": ["text-generation"],
        "size_categories": [next((name for name, top in sizes if rows < top), "n>10M")],
        "tags": ["tunebook"],
        "configs": configs,
    }
    lost = job.rejects.as_dict()
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# Training data of run {job.params.run}",
        "",
        f"Rendered with the chat template of `{plain(job.params.model)}`; trained tokens: {job.params.train_on}; "
        f"longest row {job.encoded['max_length']} tokens.",
        "",
        "| file | rows |",
        "|---|---|",
        *(f"| {name}.parquet | {count} |" for name, count in written.items()),
        "",
        "## Sources",
        "",
        "| source | file or hub id | rows | rejected |",
        "|---|---|---|---|",
        *(f"| {plain(r.name)} | {plain(r.where)} | {r.rows} | {r.rejected} |" for r in job.sources),
        "",
        "## What was removed or rejected",
        "",
    ]
    lines += [
        f"- {plain(reason)}: {count}" for reason, count in [*lost["invalid"].items(), *lost["removed"].items()]
    ] or ["Nothing."]
    lines += [
        "",
        "`rejected.jsonl` names file, row and reason of each. `report.html` has the lengths, an example for every cleaning step and the mixture.",
        "",
        "## Columns",
        "",
        "`input_ids` and `completion_mask` (1 = trained) go into TRL's SFTTrainer as they are, with `completion_only_loss=True`; "
        "`prompt`, `chosen`, `rejected` are TRL's conversational form.",
        "",
        "The licence and the origin of the sources above hold for this set too; add them here before you share it.",
        "",
    ]
    return "\n".join(lines)


def plain(value: Any) -> str:
    """A value that cannot break out of a Markdown table cell or bring HTML along."""
    text = str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return " ".join(text.split())[:200]
