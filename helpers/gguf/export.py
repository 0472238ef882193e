"""Notebook 04, step by step: choose, merge, convert, quantise, prove.

Everything is made in `work/` first and takes its place only when whole, so that a killed run leaves no scraps among
the artefacts and the same command resumes after the last finished file. What shall not be kept stays in `work/`,
which is removed when the manifest is written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from helpers import display, machine, runs, steps
from helpers.data import chat_template, vocabulary
from helpers.data.rendering import Chat
from helpers.errors import TunebookError
from helpers.gguf import convert, fidelity, libraries, ollama, preflight, trained
from helpers.gguf.convert import Quantised
from helpers.gguf.fidelity import Result
from helpers.gguf.runner import GgufModel
from helpers.gguf.trained import Merge
from helpers.model import loading, merging
from helpers.model.weights import check_adapter, count_weights
from helpers.params import GgufParams
from helpers.tasks import questions, text_to_sql
from helpers.tasks.questions import Decoding

SMALL = 2 << 30  # bytes of a 16-bit file; above it one file is compared at a time
MERGES = "merges.json"  # in work/: what was measured of the merges
AHEAD = "f16.gguf"  # in work/: made while its merge was measured
OUTPUTS = ("adapter", "merged", "gguf", "adapter_gguf")
TRAINED = "TRAINING rows, as the data has no held-out part: the figures flatter the files"


@dataclass(frozen=True)
class Source:
    """The base, the adapter trained on it (None for a base or a wholly trained model), what it may be merged onto,
    how training saw the base ("16bit", "nf4", "fp8"), and the folder that it saw where that is another one's packed
    weights."""

    base: loading.ModelSource
    adapter: Path | None
    trained_by: str
    onto: tuple[str, ...] = ("16bit",)
    bits: str = "16bit"
    saw: Path | None = None


def open(params: GgufParams) -> ExportJob:
    """The export of `params.run`. Raises TunebookError for parameters that cannot be met; nothing is written yet."""
    return ExportJob(runs.stage("gguf", params), params)


class ExportJob(steps.Job):
    """The steps of notebook 04. files: what was made; results: what was measured, `f16` first."""

    def __init__(self, stage: runs.Stage, params: GgufParams):
        super().__init__(stage)
        self.params, self.work = params, stage.path / "work"
        self.kinds = convert.parse_types(params.quantizations)
        self.outputs = [t.strip() for t in params.outputs.split(",") if t.strip()]
        if not self.outputs or not set(self.outputs) <= set(OUTPUTS):
            raise TunebookError(f"outputs is {params.outputs!r}; it takes {', '.join(OUTPUTS)}, separated by commas.")
        ollama.check_name(params.model_name)
        if params.llama_cpp:
            os.environ[libraries.OWN_BUILD] = params.llama_cpp
        self.files: list[Quantised] = []
        self.results: list[Result] = []
        self.merges: list[Merge] = []
        self.seconds: dict[str, float] = {}
        self.text = "held-out rows"
        if stage.done:
            self.base = stage.done.metrics["base"]
            shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed after its manifest
        else:
            self.source = _source(stage, params)
            self.base = self.source.base.name

    @property
    def merged(self) -> Path:
        return self._place("merged", "merged" in self.outputs)

    @property
    def best(self) -> Path:
        """The recommended file, or the first where none passes its gates."""
        found = self.stage.done.metrics["recommended"] if self.stage.done else fidelity.recommend(self.results)
        return self.file(found["type"] or self.kinds[0])

    def file(self, kind: str) -> Path:
        return self._place(f"model-{kind}.gguf", kind in self.kinds and "gguf" in self.outputs)

    def _place(self, name: str, kept: bool) -> Path:
        return (self.stage.path if kept else self.work) / name

    @steps.look
    def check(self) -> display.Html:
        """What will be exported, and preflight with this run's quantisations; raises when that cannot succeed."""
        source, onto = self.source, {"16bit": "the 16-bit base", "nf4": "the base as 4-bit NormalFloat gave it back"}
        onto["fp8"] = "the base as FP8 gave it back"
        if packed := loading.quantizer(loading.load_config(source.base)):
            onto["nf4"] = f"the {packed} weights, unpacked, that training saw; model_16bit can name the original ones"
        rows = [
            ("base", f"{source.base.name} ({source.base.revision})"),
            ("trained by", source.trained_by),
            ("adapter", source.adapter or "none"),
            ("merged onto", " or ".join(onto[o] for o in source.onto) + ", by measurement" * (len(source.onto) > 1)),
            ("files", ", ".join(self.kinds)),
            ("kept", ", ".join(self.outputs)),
        ]
        folder = vocabulary.of_base(self.stage.parents["data"]) if source.trained_by == "base" else None
        report = preflight.check(source.base, self.params, source.adapter, self.stage.path, folder).require()
        return display.shown(rows, ("to export", "")) + report.shown()

    @steps.step
    def merge(self) -> merging.Merged:
        """Adapter into base, in 16 bits, tensor by tensor; of several merges the one nearest to what was trained."""
        source, made = self.source, None
        if not self.merged.exists() or (self.work / MERGES).is_file():
            self._compare_merges()
        if not self.merged.exists():
            chosen = next((m.onto for m in self.merges if m.chosen), source.onto[0])
            kept = self.work / f"merged-{chosen}"
            made = self._merged(chosen)
            os.replace(kept, self.merged)
            for other in self.work.glob("merged-*"):
                shutil.rmtree(other)
        size = sum(f.stat().st_size for f in self.merged.glob("*.safetensors"))
        return replace(made, path=self.merged) if made else merging.Merged(self.merged, 0, 0, size, False)

    @steps.step
    def convert(self) -> display.Html:
        """The 16-bit GGUF, the importance matrix when asked for, and every quantisation; a table of them."""
        self.merge()
        if (ahead := self.work / AHEAD).is_file() and not self.file("f16").exists():
            os.replace(ahead, self.file("f16"))
        for kind in ("f16", "bf16"):
            if kind == "f16" or kind in self.kinds:
                name = self.params.model_name
                self._make(self.file(kind), partial(convert.convert, self.merged, outtype=kind, name=name))
        small = [k for k in self.kinds if k not in convert.TYPES_16]
        matrix = self.stage.path / "imatrix.gguf" if self.params.imatrix and small else None
        if matrix:
            trained = self._rows("train.parquet", self.params.imatrix_tokens)
            self._make(matrix, partial(convert.importance, self.merged, self.file("f16"), trained))
        for kind in machine.progress(small, "Quantising"):
            self._make(self.file(kind), partial(convert.quantize, self.file("f16"), kind=kind, imatrix=matrix))
        self.files = [convert.describe(self.file(k), k) for k in self.kinds]
        rows = []
        for f in self.files:
            types = ", ".join(f"{count} {kind}" for kind, count in f.types.items())
            took = display.duration(self.seconds.get(f.type, 0))
            rows.append((f.type, display.size(f.bytes), f"{f.bits_per_weight:.2f}", types, took))
        self.weighed = convert.weighed(self.file("f16"), matrix) if matrix else ""
        return display.shown(rows, ("file", "size", "bits per weight", "tensors", "time")) + display.said(self.weighed)

    @steps.step
    def prove(self) -> display.Html:
        """Every file compared with the merged model, in fidelity.json and as a table; raises when a gate fails."""
        self.convert()
        started, rows = time.monotonic(), self._held_out()
        asked = self._questions(max(self.params.fidelity_answers, 4))
        tokenizer = loading.load_tokenizer(self.merged)
        self.chat = Chat(chat_template.inspect(tokenizer)) if tokenizer.chat_template else None
        talks = [(self.chat.shown({"messages": q, "tools": t}), self.chat.prompt(q, t)) for q, t in asked if self.chat]
        prompts = [ids for _, ids in talks[: self.params.fidelity_answers]]
        prompts = prompts or [row[: len(row) // 2] for row in rows[: self.params.fidelity_answers] if len(row) > 1]
        if window := convert.lost_window(self.merged, self.file("f16")):
            self.text += f", within the window of {window} tokens that llama.cpp does not have"
            rows, prompts = ([ids[:window] for ids in one] for one in (rows, prompts))
        files = {kind: self.file(kind) for kind in ["f16", *self.kinds]}
        shown = [talk for talk, _ in talks if not talk[1]][:2]  # llama.cpp's server writes a tool list anew
        made = fidelity.Reference(self.merged, rows, prompts, work=self._fresh(), conversations=shown)
        with closing(made) as reference:
            reference.model = None  # what the files are measured against is on disk
            # A small model does not keep many cores busy; the copies of a large one would not all have room.
            lanes = libraries.lanes(len(files)) if files["f16"].stat().st_size < SMALL else 1
            compared = partial(self._compared, reference, files, libraries.threads() // lanes)
            with ThreadPoolExecutor(lanes) as pool:  # one at a time is done here, where an interrupt ends it
                made_of = (pool.map if lanes > 1 else map)(compared, files)
                self.results = list(machine.progress(made_of, "Comparing the files", len(files)))
        for file, result in ((f, r) for f in self.files for r in self.results if f.type == r.type):
            result.bytes, result.bits_per_weight = file.bytes, file.bits_per_weight
        self.seconds["fidelity"] = round(time.monotonic() - started, 2)
        found: dict[str, Any] = {"text": self.text, "merges": [asdict(m) for m in self.merges]}
        found["budgets"] = {r.type: fidelity.budget(r) for r in self.results}
        found["files"] = [r.as_dict() for r in self.results]
        runs.write_json(self.stage.path / "fidelity.json", found)
        if self.params.fidelity_gates:
            fidelity.require(self.results, self.merges)
        return fidelity.table(self.results, self.merges, self.text)

    @steps.step
    def figure(self) -> Any:
        """Size against divergence and, where it was measured, against the task score."""
        self.prove()
        drawn = fidelity.figure(self.results)
        display.save(drawn, self.stage.path, "fidelity")
        return drawn

    @steps.step
    def modelfile(self) -> display.Html:
        """The Modelfile of the recommended file, and the commands for each runtime."""
        self.prove()
        if "gguf" not in self.outputs:
            return display.said("outputs keeps no GGUF file, so there is none to write a Modelfile for.")
        if "merged" not in self.outputs:  # of it its tokenizer and template are kept
            small = shutil.ignore_patterns("*.safetensors*")
            self._make(self.stage.path / "merged", lambda out: shutil.copytree(self.merged, out, ignore=small))
        out, name, context = self.stage.path / "Modelfile", self.params.model_name, self.params.context_length
        return ollama.write(self.stage.path / "merged", self.best, out, name=name, context=context).shown()

    @steps.step
    def finish(self) -> runs.Manifest:
        """The adapter where it was asked for, then the manifest; what shall not be kept goes last, with `work/`."""
        self.modelfile()
        adapter = self.source.adapter
        if adapter and "adapter" in self.outputs:
            self._make(self.stage.path / "adapter", partial(shutil.copytree, adapter))
        if adapter and "adapter_gguf" in self.outputs:
            write = partial(convert.convert_adapter, adapter, self.merged, self.file("f16"))
            self._make(self.stage.path / "adapter.gguf", write)
        metrics = {"base": self.base, "trained_by": self.source.trained_by, "text": self.text, "seconds": self.seconds}
        metrics |= {"recommended": fidelity.recommend(self.results), "imatrix": self.weighed}
        metrics |= {"merges": [asdict(m) for m in self.merges]}
        manifest = self.stage.finish(metrics)
        shutil.rmtree(self.work, ignore_errors=True)
        return manifest

    def _fresh(self) -> Path:
        """The one folder for what is under way, without the scraps of a killed run."""
        fresh = self.work / "new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        return fresh

    def _make(self, final: Path, make: Callable[[Path], Any]) -> Any:
        """`final`, made by `make(path)` in `_fresh` and moved; None where it is there already."""
        if final.exists():
            return None
        fresh, started = self._fresh(), time.monotonic()
        made = make(fresh / final.name)
        os.replace(fresh / final.name, final)
        name = final.name.removeprefix("model-").removesuffix(".gguf")
        self.seconds[{"merged": "merge"}.get(name, name)] = round(time.monotonic() - started, 2)
        return made

    def _rows(self, name: str, tokens: int) -> list[list[int]]:
        """Token ids of whole conversations of the data stage until `tokens` are reached, the last one cut."""
        import pyarrow.parquet as pq

        path, room = self.stage.parents["data"].path / name, tokens
        rows: list[list[int]] = []
        for batch in pq.ParquetFile(path).iter_batches(64, columns=["input_ids"]) if path.is_file() else ():
            for row in batch.column("input_ids").to_pylist():
                cut = row[: min(room + 1, 2048)]
                if room <= 0:
                    return rows
                rows += [cut] if len(cut) > 1 else []
                room -= len(cut) - 1
        return rows

    def _questions(self, count: int) -> list[questions.Asked]:
        """Conversations to answer: test prompts, or evaluation rows without their last answer; none of plain text."""
        import pyarrow.parquet as pq

        data = self.stage.parents["data"]
        test = data.path / "test.parquet"
        if test.is_file() and pq.read_metadata(test).num_rows:
            return [item.asked for item in questions.read(test)[:count] if item.prompt]
        found = pq.read_table(data.artifact("eval.parquet")).slice(0, count).to_pylist()
        asked = [questions.Asked(json.loads(row["messages"])[:-1], row.get("tools")) for row in found]
        return [one for one in asked if one.messages]

    def _held_out(self) -> list[list[int]]:
        """Rows to compare on; of the training data, and said so, where there are no others."""
        rows = self._rows("eval.parquet", self.params.fidelity_tokens)
        if not rows:
            self.text, rows = TRAINED, self._rows("train.parquet", self.params.fidelity_tokens)
            display.say(f"Compared on {self.text}")
        return rows

    def _merged(self, onto: str) -> Any:
        source, out = self.source, self.work / f"merged-{onto}"
        base = source.saw if onto == "nf4" and source.saw else source.base.path
        own = vocabulary.of_base(self.stage.parents["data"]) if source.trained_by == "base" else None
        return self._make(out, lambda path: merging.merge(base, source.adapter, path, onto, own))

    def _compare_merges(self) -> None:
        """Measure every merge that may be kept against the adapter on its base as training saw it; kept in `MERGES`."""
        source, file = self.source, self.work / MERGES
        if file.is_file():
            self.merges = [Merge(**one) for one in json.loads(file.read_text())]
        if self.merges or source.adapter is None:
            return
        size_gib = 2 * count_weights(source.base.path)[0] / 2**30
        if 2.2 * size_gib > machine.free_memory_gib():
            display.say(f"The merge onto {source.onto[0]} is not measured: {2.2 * size_gib:.0f} GiB are not free.")
            return
        started = time.monotonic()
        own = source.adapter if (source.adapter / "tokenizer.json").is_file() else source.base.path
        tokenizer, how, asked = loading.load_tokenizer(own), trained.placement(size_gib), self._asked()

        def score(model: Any) -> tuple[float | None, int]:
            chat = Chat(chat_template.inspect(tokenizer)) if asked else None
            ids = [chat.prompt(*q.asked) for q in asked if chat]
            said = trained.answers(model, tokenizer, ids, Decoding().max_new_tokens)
            return self._score(asked, [text for text, _ in said])

        models = {"trained": partial(trained.load, source.saw, source.adapter, tokenizer, source.bits, **how)}
        for onto in source.onto:
            self._merged(onto)
            models[onto] = partial(loading.load_model, self.work / f"merged-{onto}", **how)
        with ThreadPoolExecutor(1) as pool:  # a GPU leaves the cores to the conversion of the one that there is
            write = partial(convert.convert, self.work / f"merged-{source.onto[0]}", name=self.params.model_name)
            ahead = [pool.submit(write, self.work / AHEAD)] if machine.gpu() and len(source.onto) == 1 else []
            self.merges = trained.compare(models, self._held_out(), score)
            for one in ahead:
                one.result()
        runs.write_json(file, [asdict(m) for m in self.merges])
        self.seconds["merges compared"] = round(time.monotonic() - started, 2)

    def _asked(self) -> list[questions.Item]:
        """Test questions for the task score: none without a database."""
        data, count = self.stage.parents["data"].path, self.params.task_questions
        if not count or not (data / "test.parquet").is_file() or not (data / "database.sqlite").is_file():
            return []
        return questions.read(data / "test.parquet", count, self.params.seed)

    def _score(self, asked: list[questions.Item], texts: list[str]) -> tuple[float | None, int]:
        """(execution accuracy as notebook 05 judges, questions that count)."""
        if not asked:
            return None, 0
        database = self.stage.parents["data"].path / "database.sqlite"
        with closing(text_to_sql.Judge([text_to_sql.open_readonly(database)])) as judge:
            scores = [judge.score(text, q.reference)["score"] for text, q in zip(texts, asked, strict=True)]
        known = [s for s in scores if s is not None]
        return (round(sum(known) / len(known), 4) if known else None), len(known)

    def _compared(self, reference: fidelity.Reference, files: dict[str, Path], threads: int, kind: str) -> Result:
        """A file against the merged model, with its execution accuracy on the test questions."""
        weights = None if kind in convert.TYPES_16 else reference.weights_kl(files[kind], files["f16"], threads)
        with closing(GgufModel(files[kind], chat=self.chat, threads=threads)) as model:
            result, asked = fidelity.measure(reference, model, kind, weights), self._asked()
            if asked:
                made = model.generate([model.encode(*q.asked) for q in asked], Decoding())
                result.task_score, result.task_count = self._score(asked, [answer.text for answer in made])
        return result


def _source(stage: runs.Stage, params: GgufParams) -> Source:
    """The latest trained stage, or the one that `export` names. Raises TunebookError without it or its base."""
    wanted = params.export
    stages = ("orpo", "sft") if wanted == "auto" else (wanted,)
    trained_by = next((name for name in stages if name in stage.parents), "base")
    if trained_by != wanted and wanted != "auto":
        raise TunebookError(
            f"export is {wanted!r}, but this run has no finished stage of that name; run its notebook, or set "
            "export='auto'."
        )
    manifest = stage.parents.get(trained_by)
    known = (manifest.data.get("model") if manifest else None) or {}
    base = loading.resolve_model(known.get("name") or stage.parents["data"].params["model"])
    if known.get("revision") and known["revision"] != base.revision:
        raise TunebookError(
            f"The run was trained on {known['name']} at revision {known['revision'][:12]} and this machine has "
            f"{base.revision[:12]}: merged, they give another model. Fetch that revision, or train again."
        )
    if manifest is not None and (manifest.path / "model").is_dir():  # every weight was trained: nothing to merge
        whole = loading.ModelSource(base.name, manifest.path / "model", base.revision, trained_by)
        return Source(whole, None, trained_by)
    packed, saw = loading.quantizer(loading.load_config(base)), base.path
    if params.model_16bit:
        original = loading.resolve_model(params.model_16bit)
        merging.check_parent(original.path, base.path)
        base = original
    bits = trained.saw(manifest) if manifest and not packed else "16bit"
    choices = [bits] if bits != "16bit" else ["nf4"] * bool(packed and not params.model_16bit)
    choices += ["16bit"] * bool(not packed or params.model_16bit)  # where it is named it is what was asked for
    onto = tuple(choices) if params.merge_onto == "auto" else (params.merge_onto,)
    if packed and onto == ("16bit",) and not params.model_16bit:
        raise TunebookError(
            f"merge_onto is '16bit', and {base.name} holds only {packed} weights; name the 16-bit model that they were "
            "made from as model_16bit, or set merge_onto to 'auto'."
        )
    if manifest is None:
        return Source(base, None, "base", onto[-1:], saw=saw)
    check_adapter(manifest.path / "adapter")
    return Source(base, manifest.path / "adapter", trained_by, onto, bits, saw)
