"""The model card: it names what was trained and what was exported, every number from manifests and scores.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import display, params, runs
from helpers.model.loading import DEFAULT_MODEL
from helpers.report import page, shell
from helpers.report.facts import Facts, accuracy

LIBRARY = {"adapter": "peft", "merged": "transformers", "gguf": "llama.cpp"}
RELATION = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
METHODS = {"qlora": "QLoRA", "lora": "LoRA", "full": "full", "freeze": "last-layer"}


def render(facts: Facts, kind: str = "gguf", repository: str = "", licence: str = "", data_licence: str = "") -> str:
    """The card of one repository. kind: "adapter", "merged" or "gguf"; repository: its id on the hub, or "".

    licence: of the base model and so of this one; "" takes what `base_licence` finds. data_licence: of the data.
    """
    licence = licence or base_licence(facts)
    base = str(facts.model.get("name") or "")
    judged = judged_as(facts, kind)
    artifacts = facts.stages["gguf"].data["artifacts"] if "gguf" in facts.stages else {}
    files = [Path(f).name for f in artifacts if f.endswith(".gguf")]
    counts = facts.metrics("data").get("rows") or {}
    return shell.card(
        "model_card.md.j2",
        run=facts,
        kind=kind,
        library=LIBRARY[kind],
        relation=RELATION[kind] if facts.hub_base else "",
        value=accuracy(judged).get("value"),
        repository=repository,
        base=base,
        licence=licence,
        data_licence=data_licence,
        steps=[_step(facts, stage) for stage in facts.lineage],
        others=[_step(facts, s) for s in ("sft", "orpo") if s in facts.stages and s not in facts.lineage],
        headline=_headline(facts, judged),
        gguf_files=files,
        first=next((f for f in files if "q8" in f), files[0] if files else "model.gguf"),
        rows_counted=", ".join(f"{counts[k]:,} {k}" for k in ("train", "eval", "test") if k in counts),
        changed=_changed(facts),
        command=page.command(facts) if facts.stages else "",
        template_hash=str(facts.first("template_hash") or "")[:16],
        folders=runs.FOLDERS,
    )


def base_licence(facts: Facts) -> str:
    """The base model's licence as its own card names it; the shipped default model's is known; else ""."""
    import yaml

    readme = Path(str(facts.model.get("path", ""))) / "README.md"
    if readme.is_file():
        parts = readme.read_text(encoding="utf-8", errors="replace").split("---")
        try:
            found = (yaml.safe_load(parts[1]) or {}).get("license") if len(parts) > 2 else None
        except (yaml.YAMLError, AttributeError):
            found = None
        if isinstance(found, str):
            return found
    return "apache-2.0" if facts.model.get("name") == DEFAULT_MODEL else ""


def judged_as(facts: Facts, kind: str) -> dict[str, Any] | None:
    """The evaluated candidate that this repository holds; None when it was not judged."""
    found = [c for c in facts.scored if c["role"] == kind] if kind != "adapter" else []
    found = found or [c for c in facts.scored if c["role"] == facts.exported and kind != "gguf"]
    ship = (facts.scores.get("ship") or {}).get("name")
    return max(found, key=lambda c: (c["name"] == ship, accuracy(c).get("value") or -1.0), default=None)


def _step(facts: Facts, stage: str) -> str:
    settings = facts.stages[stage].params
    if stage == "orpo":
        return f"{str(settings.get('loss', '')).upper()} preference tuning"
    return f"{METHODS.get(settings['method'], '')} supervised fine-tuning".strip()


def _headline(facts: Facts, judged: dict[str, Any] | None) -> str:
    """What these files came to against the base; the evaluation's own headline may speak of another candidate."""
    if judged and facts.baseline and (pair := facts.comparison(facts.baseline["name"], judged["name"])):
        return f"{judged['name']} against {facts.baseline['name']}: {pair['sentence']}."
    return ""


def _changed(facts: Facts) -> dict[str, str]:
    """Stage → its parameters that differ from the defaults, and the main ones."""
    found = {}
    for stage, manifest in facts.stages.items():
        known = {p.name: p.default for p in params.STAGES[stage]}
        values = [
            f"{n} {display.plain(shell.public(v))}"
            for n, v in manifest.params.items()
            if n != "run" and n in known and (v != known[n] or n in ("rank", "learning_rate"))
        ]
        if values:
            found[stage] = ", ".join(values)
    return found
