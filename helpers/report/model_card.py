"""The model card: it names what was trained and what was exported, every number from manifests and scores.json."""

from __future__ import annotations

from pathlib import Path

from helpers import runs
from helpers.evaluate import statistics
from helpers.model.loading import DEFAULT_MODEL
from helpers.report import page, shell
from helpers.report.facts import Facts, accuracy

METHODS = {"qlora": "QLoRA", "lora": "LoRA", "full": "full", "freeze": "last-layer"}


def render(facts: Facts, kind: str = "gguf", repository: str = "", licence: str = "", data_licence: str = "") -> str:
    """The card of one repository. kind: "adapter", "merged" or "gguf"; repository: its id on the hub, or "".

    licence: of the base model and so of this one; "" takes what `base_licence` finds. data_licence: of the data.
    """
    held = [c for c in facts.scored if c["role"] == kind] if kind != "adapter" else []
    held = held or [c for c in facts.scored if c["role"] == facts.exported and kind != "gguf"]
    judged = statistics.protagonist({**facts.scores, "candidates": held})  # None: it was not judged
    artifacts = facts.stages["gguf"].data["artifacts"] if "gguf" in facts.stages else {}
    files = sorted((Path(f).name for f in artifacts if f.endswith(".gguf")), key=lambda f: ("q8" in f, f))
    ship = facts.scores.get("ship")
    return shell.card(
        "model_card.md.j2",
        run=facts,
        kind=kind,
        value=accuracy(judged).get("value"),
        repository=repository,
        licence=licence or base_licence(facts),
        data_licence=data_licence,
        steps=[_step(facts, stage) for stage in facts.lineage],
        others=[_step(facts, s) for s in ("sft", "orpo") if s in facts.stages and s not in facts.lineage],
        template=_template(facts),
        headline=statistics.headline(facts.scores, judged) if judged else "",
        gguf_files=files,
        first=next((f for f in files if ship and f"gguf {f[6:-5]}" == ship["name"]), (files or ["model.gguf"])[-1]),
        command=page.command(facts) if facts.stages else "",
        folders=runs.FOLDERS,
    )


def base_licence(facts: Facts) -> str:
    """The base model's licence as its own card names it; the shipped default model's is known; else ""."""
    import yaml
    from huggingface_hub import metadata_load

    readme = Path(str(facts.model.get("path", ""))) / "README.md"
    try:
        named = (metadata_load(readme) or {}).get("license") if readme.is_file() else None
    except (ValueError, yaml.YAMLError):
        named = None
    if isinstance(named, str):
        return named
    return "apache-2.0" if facts.model.get("name") == DEFAULT_MODEL else ""


def _template(facts: Facts) -> str:
    """What renders the model's prompts, in words; "" where it completes plain text."""
    data = facts.stages.get("data")
    if data and not (data.path / "tokenizer" / "chat_template.jinja").is_file():
        return ""
    chosen = (data.data.get("chat_template") or {}) if data else {}
    return f"the chat template {chosen['name']}" if chosen.get("name") else "the base model's own chat template"


def _step(facts: Facts, stage: str) -> str:
    settings = facts.used(stage)
    if stage == "orpo":
        return f"{str(settings.get('loss', '')).upper()} preference tuning"
    eight = " on an FP8 base" * (settings.get("quantize") == "fp8")
    return f"{METHODS.get(settings['method'], '')}{eight} supervised fine-tuning".strip()
