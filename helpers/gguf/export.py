"""Notebook 04, step by step: choose, merge, convert, quantise, prove. Each step leaves a finished file or nothing, and is skipped when
a killed run is gone on with.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import machine
from helpers.errors import TunebookError
from helpers.gguf import convert, fidelity, importance, libraries, ollama, preflight, quantize
from helpers.model import loading, merging

OUTPUTS = ("adapter", "merged", "gguf", "adapter_gguf")


@dataclass
class Export:
    """One export under way. `source` is the base, `adapter` what was trained on it (None for a base or a wholly trained model)."""

    stage: Any
    source: loading.ModelSource
    adapter: Path | None
    trained_by: str
    onto: str
    kinds: list[str]
    outputs: list[str]
    merged: merging.Merged | None = None
    files: list[quantize.Quantised] = field(default_factory=list)
    results: list[fidelity.Result] = field(default_factory=list)
    merge_check: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.stage.path / "work"

    @property
    def merged_path(self) -> Path:
        return self.stage.path / "merged"

    @property
    def f16(self) -> Path:
        """The 16-bit GGUF that everything is quantised from."""
        return self.file("f16") if "f16" in self.kinds else self.work / "model-f16.gguf"

    def file(self, kind: str) -> Path:
        return self.stage.path / f"model-{kind}.gguf"

    def __repr__(self) -> str:
        return f"{self.source.name}, trained by {self.trained_by}, merged onto {self.onto}, as {', '.join(self.kinds)} into {self.stage.path}"

    def _repr_html_(self) -> str:
        from helpers.display import table

        return table(
            [
                ("base", f"{self.source.name} ({self.source.revision})"),
                ("trained by", self.trained_by),
                ("adapter", self.adapter or "none"),
                (
                    "merged onto",
                    {"16bit": "the 16-bit base", "nf4": "the base as 4-bit NormalFloat gave it back"}[self.onto],
                ),
                ("files", ", ".join(self.kinds)),
                ("kept", ", ".join(self.outputs)),
            ]
        )


def prepare(stage: Any) -> Export:
    """What will be exported. Raises TunebookError for parameters that cannot be met, before any work."""
    params = stage.params
    kinds, outputs = quantize.parse_types(params.quantizations), _outputs(params.outputs)
    ollama.check_name(params.model_name)
    if (
        params.llama_cpp
    ):  # for every process from here on: what quantises, what the gates run and what serves is then one build
        os.environ[libraries.OWN_BUILD] = params.llama_cpp
    trained_by, manifest = _choose(stage.parents, params.export)
    known = (manifest.data.get("model") or {}) if manifest else {}
    source = loading.resolve_model(known.get("name") or stage.parents["data"].params["model"])
    if known.get("revision") and known["revision"] != source.revision:
        raise TunebookError(
            f"The run was trained on {known['name']} at revision {known['revision'][:12]} and this machine has "
            f"{source.revision[:12]}; merging into other weights would give another model. Fetch that revision, or train again."
        )
    adapter, onto = None, params.merge_onto
    if trained_by != "base":
        adapter = manifest.path / "adapter"
        if (manifest.path / "model").is_dir():  # every weight was trained: there is nothing to merge
            source, adapter = (
                loading.ModelSource(source.name, manifest.path / "model", source.revision, trained_by),
                None,
            )
        else:
            merging.check_adapter(adapter)
    if onto == "auto":
        onto = (manifest.data.get("merge_onto") if manifest else None) or "16bit"
    return Export(stage, source, adapter, trained_by, onto if adapter else "16bit", kinds, outputs)


def check(export: Export) -> preflight.Report:
    """Preflight once more, with this run's own quantisations; raises TunebookError when the export cannot succeed."""
    return preflight.check(export.source, export.stage.params, export.adapter, export.stage.path).require()


def merge(export: Export) -> merging.Merged:
    """Adapter into base, in 16 bits, tensor by tensor."""

    def make() -> merging.Merged:
        return merging.merge(export.source.path, export.adapter, export.merged_path, export.onto)

    if (export.merged_path / "config.json").is_file():  # it takes its name only when whole
        weights = sum(f.stat().st_size for f in export.merged_path.glob("*.safetensors"))
        export.merged = merging.Merged(export.merged_path, 0, 0, weights, False)
    else:
        export.merged = _timed(export, "merge", make)
    return export.merged


def convert_and_quantize(export: Export) -> list[quantize.Quantised]:
    """The 16-bit GGUF, the importance matrix when asked for, and every quantisation."""
    name = export.stage.params.model_name
    wanted = [k for k in export.kinds if k not in convert.TYPES_16]
    for kind, path in [("f16", export.f16)] + [("bf16", export.file("bf16"))] * ("bf16" in export.kinds):
        if not path.is_file():
            _timed(export, kind, lambda k=kind, p=path: convert.convert(export.merged_path, p, k, name))
    matrix = None
    if export.stage.params.imatrix and wanted:
        matrix = export.stage.path / "imatrix.gguf"
        if not matrix.is_file():
            rows = training_rows(export.stage, export.stage.params.imatrix_tokens)
            _timed(export, "imatrix", lambda: importance.write(export.merged_path, export.f16, rows, matrix))
    export.files = [quantize.describe(export.file(k), k) for k in export.kinds if k in convert.TYPES_16]
    for kind in machine.progress(wanted, "Quantising"):
        out = export.file(kind)
        made = (
            quantize.describe(out, kind)
            if out.is_file()
            else _timed(export, kind, lambda k=kind, o=out: quantize.quantize(export.f16, o, k, matrix))
        )
        export.files.append(made)
    export.files.sort(key=lambda f: export.kinds.index(f.type))
    return export.files


def prove(export: Export) -> list[fidelity.Result]:
    """Measure the 16-bit file and every quantisation against the merged model; write fidelity.json; raise when a gate fails."""
    from helpers import runs

    params = export.stage.params
    export.work.mkdir(exist_ok=True)
    started = time.time()
    rows = held_out_rows(export.stage, params.fidelity_tokens)
    questions = held_out_questions(export.stage, max(params.fidelity_answers, 4))
    tokenizer = loading.load_tokenizer(export.merged_path)
    prompts = [
        tokenizer.apply_chat_template(q, tokenize=True, return_dict=False, add_generation_prompt=True)
        for q in questions[: params.fidelity_answers]
    ]
    reference = fidelity.Reference(export.merged_path, rows, prompts, work=export.work, conversations=questions[:2])
    files = {kind: export.f16 if kind == "f16" else export.file(kind) for kind in ["f16", *export.kinds]}
    try:
        weights = {
            kind: reference.weights_kl(file, export.f16) for kind, file in files.items() if kind not in convert.TYPES_16
        }
        reference.free()
        export.merge_check = merge_check(export, reference)
        for kind, file in machine.progress(list(files.items()), "Comparing with the trained model"):
            export.results.append(fidelity.measure(reference, file, kind, weights.get(kind)))
    finally:
        reference.close()
    from helpers.gguf import task_score

    task_score.add(export)
    export.seconds["fidelity"] = round(time.time() - started, 2)
    runs.write_json(
        export.stage.path / "fidelity.json",
        {
            "merge": export.merge_check,
            "budgets": {r.type: list(fidelity.BUDGETS[r.type]) for r in export.results},
            "files": [r.as_dict() for r in export.results],
            "sizes": [f.as_dict() for f in export.files],
        },
    )
    if params.fidelity_gates:
        fidelity.require(export.results)
    return export.results


def finish(export: Export, written: Any = None) -> Any:
    """Drop what was not asked for, write the other outputs, then the manifest."""
    if "adapter" in export.outputs and export.adapter:
        shutil.copytree(export.adapter, export.stage.path / "adapter", dirs_exist_ok=True)
    if "adapter_gguf" in export.outputs and export.adapter:
        from helpers.gguf import adapter_gguf

        adapter_gguf.write(export.adapter, export.merged_path, export.stage.path / "adapter.gguf")
    if "merged" not in export.outputs:
        for file in export.merged_path.glob("*.safetensors*"):
            file.unlink()
    if "gguf" not in export.outputs:
        for kind in export.kinds:
            export.file(kind).unlink(missing_ok=True)
    shutil.rmtree(export.work, ignore_errors=True)
    by_type = {r.type: r for r in export.results}
    metrics = {
        "trained_by": export.trained_by,
        "merge": export.merge_check,
        "seconds": export.seconds,
        "files": {
            f.type: f.as_dict() | {"fidelity": by_type[f.type].as_dict() if f.type in by_type else None}
            for f in export.files
        },
    }
    from helpers.report import export_views

    metrics["recommended"] = export_views.recommend(export.files, export.results)
    extra = {"modelfile": written.as_dict()} if written is not None else {}
    return export.stage.finish(metrics, extra=extra)


# ---------------------------------------------------------------- pieces


def held_out_rows(stage: Any, tokens: int) -> list[list[int]]:
    """Token ids of held-out conversations of this job, whole rows until `tokens` are reached, the last one cut."""
    return _rows(stage, "eval.parquet", tokens) or _rows(stage, "train.parquet", tokens)


def training_rows(stage: Any, tokens: int) -> list[list[int]]:
    return _rows(stage, "train.parquet", tokens)


def held_out_questions(stage: Any, count: int) -> list[list[dict]]:
    """Conversations to answer: test prompts, or the evaluation rows without their last answer."""
    import pyarrow.parquet as pq

    test = stage.parents["data"].path / "test.parquet"
    if test.is_file():
        prompts = pq.read_table(test, columns=["prompt"])["prompt"][:count].to_pylist()
        return [[{"role": m["role"], "content": m["content"]} for m in p] for p in prompts]
    found = pq.read_table(stage.parents["data"].artifact("eval.parquet"), columns=["messages"])["messages"][
        :count
    ].to_pylist()
    return [json.loads(m)[:-1] for m in found]


def merge_check(export: Export, reference: fidelity.Reference) -> dict[str, float]:
    """Adapter beside its base against the merged model, on the first held-out rows: what rounding the merge to 16 bits costs."""
    if export.adapter is None:
        return {}
    import torch
    from peft import PeftModel

    if 4.4 * merging.count_weights(export.source.path)[0] / 2**30 > fidelity.available_gib():
        return {}  # a second model in float32 does not fit; the gates on the files themselves remain
    base = loading.load_model(export.source, quantize="nf4" if export.onto == "nf4" else "none", dtype="fp32")
    tokenizer = loading.load_tokenizer(export.merged_path)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = PeftModel.from_pretrained(base, export.adapter).eval()
    kept, at, kl, same = reference.open(), 0, [], []
    for row in reference.rows[:2]:
        mine = fidelity.logprobs(model, row).cpu()
        theirs = kept[at : at + len(mine)]
        kl.append(fidelity.divergence(mine, theirs))
        same.append(mine.argmax(1) == theirs.argmax(1))
        at += len(mine)
    return {
        "tokens": int(at),
        "mean_kl": max(float(torch.cat(kl).mean()), 0.0),
        "top1": float(torch.cat(same).float().mean()),
    }


def _rows(stage: Any, name: str, tokens: int) -> list[list[int]]:
    import pyarrow.parquet as pq

    path = stage.parents["data"].path / name
    rows, room = [], tokens
    if not path.is_file():
        return rows
    for ids in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["input_ids"]):
        for row in ids.column("input_ids").to_pylist():
            cut = row[: min(room + 1, 2048)]
            if room <= 0 or len(cut) < 2:
                return rows
            rows.append(cut)
            room -= len(cut) - 1
    return rows


def _choose(parents: dict[str, Any], wanted: str) -> tuple[str, Any]:
    """("orpo" | "sft" | "base", its manifest)."""
    if wanted == "base":
        return "base", None
    for name in ("orpo", "sft") if wanted == "auto" else (wanted,):
        if name in parents:
            return name, parents[name]
    if wanted == "auto":
        return "base", None
    raise TunebookError(
        f"export is {wanted!r}, but this run has no finished stage of that name; run its notebook first, or set export to 'auto'."
    )


def _outputs(text: str) -> list[str]:
    names = [t.strip() for t in text.split(",") if t.strip()]
    unknown = next((n for n in names if n not in OUTPUTS), None)
    if unknown or not names:
        raise TunebookError(f"outputs is {text!r}; it takes {', '.join(OUTPUTS)}, separated by commas.")
    return names


def _timed(export: Export, step: str, work: Callable[[], Any]) -> Any:
    started = time.time()
    made = work()
    export.seconds[step] = round(time.time() - started, 2)
    return made


def table(files: list[quantize.Quantised]) -> Any:
    """Sizes, bits per weight, types and fallbacks of the files, as a notebook shows them."""
    from helpers.display import Html
    from helpers.display import table as draw

    rows = [
        (
            f.type,
            f"{f.bytes / 2**20:.1f}",
            f"{f.bits_per_weight:.2f}",
            ", ".join(f"{n} {t}" for t, n in f.types.items()),
            ", ".join(f"{n} tensors {what}" for what, n in f.fallback.items()) or "none",
            f"{f.wall_s:.1f}",
        )
        for f in files
    ]
    text = "\n".join(" | ".join(map(str, row)) for row in rows)
    return Html(draw(rows, ("file", "MiB", "bits per weight", "tensors", "fell back", "seconds")), text)
