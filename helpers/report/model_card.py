"""The model card: Markdown whose every number comes from the run's manifests and scores.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import runs
from helpers.report import results, svg
from helpers.report.facts import Facts
from helpers.report.markup import HIDDEN, percent, plain, points, size
from helpers.report.stages import command

LIBRARY = {"adapter": "peft", "merged": "transformers", "gguf": "llama.cpp"}


def render(facts: Facts, kind: str = "gguf", repository: str = "", licence: str = "", data_licence: str = "") -> str:
    """The card of one repository. kind: "adapter", "merged" or "gguf"; repository: its id on the hub, "" when not published.

    licence: of the base model and so of this one; "" takes what `base_licence` finds. data_licence: of the training data.
    """
    import yaml

    licence = licence or base_licence(facts)
    base = str(facts.model.get("name") or "")
    head: dict[str, Any] = {
        "license": licence or "other",
        "library_name": LIBRARY[kind],
        "pipeline_tag": "text-generation",
        "tags": ["tunebook", "lora"],
    }
    if base.count("/") == 1 and not base.startswith((".", "/")):
        head |= {
            "base_model": base,
            "base_model_relation": {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}[kind],
        }
    if evaluation := _model_index(facts, repository or facts.run):
        head["model-index"] = evaluation
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {_md(repository.split('/')[-1] or facts.run)}",
        _intro(facts, kind, base),
        _warnings(facts),
        _scores(facts),
        _lost(facts),
        _fidelity(facts),
        _use(facts, kind, repository, base),
        _data(facts, data_licence),
        _licence(base, licence),
        _made(facts),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def base_licence(facts: Facts) -> str:
    """The base model's licence as its own card's front matter names it; the shipped default model's is known; else ""."""
    from helpers.model.loading import DEFAULT_MODEL

    readme = Path(str(facts.model.get("path", ""))) / "README.md"
    if readme.is_file():
        import yaml

        parts = readme.read_text(encoding="utf-8", errors="replace").split("---")
        try:
            found = (yaml.safe_load(parts[1]) or {}).get("license") if len(parts) > 2 else None
        except (yaml.YAMLError, AttributeError):
            found = None
        if isinstance(found, str):
            return found
    return "apache-2.0" if facts.model.get("name") == DEFAULT_MODEL else ""


def _intro(facts: Facts, kind: str, base: str) -> str:
    tuned = "sft" in facts.stages or "orpo" in facts.stages
    what = {
        "adapter": "This is a LoRA adapter for",
        "merged": "This is a fine-tuned version of",
        "gguf": "These are GGUF files of a fine-tuned",
    }[kind]
    if not tuned:
        what = "These are GGUF files of" if kind == "gguf" else "This is"
    how = {"qlora": "QLoRA", "lora": "LoRA", "full": "full", "freeze": "last-layer"}
    said = []
    if "sft" in facts.stages:
        said.append(f"{how.get(facts.stages['sft'].params.get('method'), '')} supervised fine-tuning".strip())
    if "orpo" in facts.stages:
        said.append(f"{str(facts.stages['orpo'].params.get('loss', '')).upper()} preference tuning".strip())
    steps = " and then ".join(said)
    text = f"{what} {_md(base) or 'its base model'}" + (f", made by {steps}." if steps else ".")
    return text + (f"\n\n**{_md(facts.scores['headline'])}**" if facts.scores else "")


def _warnings(facts: Facts) -> str:
    return (
        "> **Known limits of these figures**\n" + "\n".join(f"> - {_md(w)}" for w in dict.fromkeys(facts.warnings))
        if facts.warnings
        else ""
    )


def _scores(facts: Facts) -> str:
    if not facts.scores:
        return "## Evaluation\n\nThis run was not evaluated."
    task = facts.scores["task"]
    label = task.get("label") or task.get("metric") or "accuracy"
    rows = []
    for c in facts.candidates():
        accuracy, valid = c["scores"].get("accuracy") or {}, c["scores"].get("valid") or {}
        if c["status"] == "skipped":
            rows.append([c["name"], f"skipped: {c['reason']}", "", "", ""])
        else:
            rows.append(
                [
                    c["name"],
                    results.score(accuracy),
                    results.between(accuracy.get("low"), accuracy.get("high"), accuracy.get("unit", "share")),
                    results.score(valid) if valid else "",
                    size(c["size_bytes"]),
                ]
            )
    text = f"## Evaluation\n\n{_md(label).capitalize()} on {task['n']} held-out items, same prompts and decoding for all.\n\n"
    text += _table(["", label, "95 % interval", "valid", "size"], rows)
    sentences = [
        f"- {_md(c['candidate'])} against {_md(c['baseline'])}: {_md(c['sentence'])} ({_md(c['test'])})"
        for c in facts.scores["comparisons"]
        if c["metric"] == "accuracy"
    ]
    if sentences:
        text += "\n\n" + "\n".join(sentences)
    dirty = facts.scores.get("contamination")
    if dirty:
        text += f"\n\n{dirty['contaminated']} of {dirty['n']} test items share {dirty['ngram']}-grams with the training data."
    return text


def _lost(facts: Facts) -> str:
    lost = (facts.scores or {}).get("forgetting")
    if not lost:
        return ""
    rows = [
        [
            n,
            plain(c.get("loss")),
            f"{c['change']:+.3f}" if n != lost["baseline"] and svg.finite(c.get("change")) else "",
            "" if n == lost["baseline"] else "within bounds" if c.get("passed") else "beyond the threshold",
        ]
        for n, c in results.in_order(facts, lost["candidates"])
    ]
    return "## What was lost\n\nCross-entropy on general text, nats per token.\n\n" + _table(
        ["", "loss", "change", "verdict"], rows
    )


def _fidelity(facts: Facts) -> str:
    rows = [
        [
            name,
            size(f.get("bytes")),
            plain(f.get("bits_per_weight")),
            plain(f.get("mean_kl")),
            plain(f.get("p99_kl")),
            percent(f.get("top1")),
        ]
        for name, f in results.exported(facts).items()
    ]
    head = ["file", "size", "bits per weight", "mean KL", "99th percentile KL", "same first choice"]
    intro = "## Fidelity of the GGUF files\n\nllama.cpp's runtime against the merged 16-bit model, on held-out text of this job.\n\n"
    return intro + _table(head, rows) if rows else ""


def _use(facts: Facts, kind: str, repository: str, base: str) -> str:
    name = repository or f"runs/{facts.run}"
    if kind == "adapter":
        code = (
            f'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("{name}")'
        )
        return f"## How to run\n\n```python\n{code}\n```\n\nPrompts are rendered with the tokenizer's own chat template, which is in this repository."
    if kind == "merged":
        return (
            f"## How to run\n\n```bash\nvllm serve {name} --host 127.0.0.1\n```\n\n```python\nfrom transformers import pipeline\n\n"
            f'chat = pipeline("text-generation", model="{name}")\n'
            'chat([{"role": "user", "content": "…"}], max_new_tokens=128, do_sample=False)\n```'
        )
    files = [
        Path(f).name
        for f in (facts.stages["gguf"].data["artifacts"] if "gguf" in facts.stages else {})
        if f.endswith(".gguf")
    ]
    first = next((f for f in files if "q8" in f), files[0] if files else "model.gguf")
    quant = first.removesuffix(".gguf").removeprefix("model-").upper()
    hub = f"```bash\nllama-server -hf {repository}:{quant} --jinja --host 127.0.0.1\n```\n\n" if repository else ""
    return (
        f"## How to run\n\n{hub}```bash\npython -m helpers.serve {first}        # llama.cpp's OpenAI-compatible server on this machine\n"
        "ollama create mymodel -f Modelfile    # template, stops and context are in the Modelfile\n```\n\n"
        f"Files: {', '.join(f'`{_md(f)}`' for f in files) or 'none'}."
    )


def _data(facts: Facts, licence: str) -> str:
    if "data" not in facts.stages:
        return ""
    metrics, params = facts.metrics("data"), facts.stages["data"].params
    counts = metrics.get("rows") or {}
    rows = ", ".join(f"{counts[k]:,} {k}" for k in ("train", "eval", "test") if isinstance(counts.get(k), int))
    text = f"## Training data\n\n{_md(_public(params.get('dataset')))}" + (f": {rows} rows" if rows else "") + "."
    if params.get("preference_dataset"):
        text += f" Preference pairs: {_md(_public(params['preference_dataset']))}."
    return text + (f" Licence of the data: {_md(licence)}." if licence else " Licence of the data: see its own card.")


def _licence(base: str, licence: str) -> str:
    return (
        f"## Licence\n\nThe base model's licence applies: {_md(licence)}."
        if licence
        else f"## Licence\n\nThe licence of the base model{f' {_md(base)}' if base else ''} applies; read it there."
    )


def _made(facts: Facts) -> str:
    if not facts.stages:
        return ""
    changed = []
    from helpers import params

    for stage, manifest in facts.stages.items():
        known = {p.name: p.default for p in params.STAGES[stage]}
        values = [
            f"{n} {plain(_public(v))}"
            for n, v in manifest.params.items()
            if n != "run" and n in known and (v != known[n] or n in ("rank", "learning_rate"))
        ]
        changed += [f"- {runs.FOLDERS[stage]}: {_md(', '.join(values))}"] if values else []
    versions = ", ".join(f"{k} {v}" for k, v in (facts.last.data.get("versions") or {}).items())
    template = next((m.data["template_hash"] for m in facts.stages.values() if m.data.get("template_hash")), "")
    return (
        "## How it was made\n\nWith Tunebook. Parameters that differ from the defaults, and the main ones:\n\n"
        + "\n".join(changed)
        + f"\n\n```bash\n{command(facts)}\n```\n\nChat template sha256 `{template[:16]}`. {_md(versions)}."
    )


def _model_index(facts: Facts, name: str) -> list[dict[str, Any]]:
    best = facts.best() or facts.baseline()
    accuracy = (best or {}).get("scores", {}).get("accuracy") or {}
    if not svg.finite(accuracy.get("value")):
        return []
    task = facts.scores["task"]
    return [
        {
            "name": name.split("/")[-1],
            "results": [
                {
                    "task": {"type": "text-generation", "name": str(task["kind"])},
                    "dataset": {"name": Path(str(task.get("data") or "held-out items")).name, "type": "held-out"},
                    "metrics": [
                        {
                            "type": "accuracy",
                            "name": str(task.get("label") or "accuracy"),
                            "value": round(accuracy["value"], 4),
                            "verified": False,
                        }
                    ],
                }
            ],
        }
    ]


def _public(value: Any) -> Any:
    """A path of this machine says nothing to a reader elsewhere and may name its user: only the file's name is left."""
    return (
        ", ".join(Path(p.strip()).name if p.strip().startswith(("/", "~")) else p.strip() for p in value.split(","))
        if isinstance(value, str)
        else value
    )


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_md(c) if i != 1 else str(c) for c in row) + " |" for i, row in enumerate(lines))


def _md(value: Any) -> str:
    """Text inside Markdown: no markup of its own, no line breaks, no table bars."""
    text = " ".join(str(value).encode("utf-8", "replace").decode("utf-8").translate(HIDDEN).split())
    return "".join(f"\\{c}" if c in "\\`*[]<>|#" else c for c in text)


def headline_points(facts: Facts) -> str:
    """The main difference in points, for a commit message: "+31.2 points (24.0 to 38.0)"; "" when nothing was compared."""
    base, best = facts.baseline(), facts.best()
    pair = results.comparison(facts, base["name"], best["name"]) if base and best else None
    return f"{points(pair['difference'])} points ({points(pair['low'])} to {points(pair['high'])})" if pair else ""
