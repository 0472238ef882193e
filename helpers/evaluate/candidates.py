"""Who is judged: the base, what this run trained and exported, and any other model, GGUF file or endpoint by name.

HF candidates hold the 16-bit weights that people deploy: a stage's adapter is merged into the 16-bit base in memory, as stage 04
merges it into the file it exports. A processor without bfloat16 computes with the same weights in fp32. NF4 is how training
saves memory; on a CPU it costs time and answers nothing faster.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import cache, machine
from helpers.errors import TunebookError

ROLES = ("base", "sft", "orpo", "merged", "gguf")
_WEIGHTS = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Candidate:
    """One judged model. path: model folder or GGUF file (the base's folder for an adapter); url, model: an endpoint's.

    made_from: name of the candidate this one was exported from, "" where there is none. onto: what the adapter is merged into, "16bit" or
    "nf4" for one that was fitted to the rounded weights. trouble: why it cannot be judged,
    known already while looking for it, else "".
    """

    name: str
    role: str
    kind: str
    source: str
    path: Path | None = None
    adapter: Path | None = None
    url: str = ""
    model: str = ""
    made_from: str = ""
    onto: str = "16bit"
    trouble: str = ""

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the files a user must hold to run it; None for an endpoint or where nothing is there."""
        if self.kind == "endpoint" or self.path is None or not self.path.exists():
            return None
        return sum(_size(p) for p in (self.path, self.adapter) if p is not None)

    def content(self, precision: str) -> str:
        """Hash of all that decides its answers, the cache's name for it."""
        from helpers.evaluate import answer_store
        from helpers.model import loading

        if self.kind == "endpoint":
            return answer_store.key("endpoint", self.url, self.model)
        if self.kind == "gguf":
            return answer_store.key(
                "gguf", answer_store.content(self.path), machine.versions()["versions"].get("xllamacpp", "")
            )
        return answer_store.key(
            "hf",
            answer_store.content(self.path),
            answer_store.content(self.adapter) if self.adapter else "",
            self.onto,
            str(loading.dtype(precision)),
        )


def find(
    stages: Mapping[str, Any], wanted: str = "base,sft,orpo,gguf", extra: str = "", model: str = ""
) -> list[Candidate]:
    """The candidates named in `wanted` (in that order, those that the run has), then those in `extra`.

    stages: stage key → Manifest of the finished stages. extra: `name=what` separated by commas; what is a model folder, hub
    id, .gguf file, adapter folder, or http(s)://host/v1#model. model: the base, where the run's manifests should not decide.
    Raises TunebookError for a word that is no candidate and for a name used twice.
    """
    names = [w.strip() for w in wanted.split(",") if w.strip()]
    for word in names:
        if word not in ROLES:
            raise TunebookError(
                f"candidates names {word!r}; it takes {', '.join(ROLES)}, separated by commas. Others go into extra_candidates."
            )
    made: dict[str, list[Candidate]] = {}
    if {"base", "sft", "orpo"} & set(names):
        base = _base(stages, model)
        made["base"] = [base]
    for stage in ("sft", "orpo"):
        if stage in stages and stage in names:
            made[stage] = [_trained(stage, stages[stage], base)]
    if "gguf" in stages:
        parents, folder = stages["gguf"].data["parents"], stages["gguf"].path
        last = stages["gguf"].metrics.get("trained_by") or next((s for s in ("orpo", "sft") if s in parents), "base")
        if any((folder / "merged").glob("*.safetensors")):
            made["merged"] = [
                Candidate("merged", "merged", "hf", f"{folder.name}/merged", folder / "merged", made_from=last)
            ]
        files = sorted(folder.glob("model-*.gguf"), key=lambda p: -p.stat().st_size)
        made["gguf"] = [
            Candidate(
                f"gguf {p.stem.removeprefix('model-')}", "gguf", "gguf", f"{folder.name}/{p.name}", p, made_from=last
            )
            for p in files
        ]
    found = [c for word in dict.fromkeys(names) for c in made.get(word, [])]
    found += [_other(text.strip()) for text in extra.split(",") if text.strip()]
    twice = [c.name for i, c in enumerate(found) if c.name in {d.name for d in found[:i]}]
    if twice:
        raise TunebookError(f"Two candidates are called {twice[0]!r}; give the extra one another name.")
    if not found:
        raise TunebookError(
            f"There is nothing to judge: of {', '.join(names) or 'no candidate'} this run has none; "
            "name a model in extra_candidates."
        )
    return found


def _base(stages: Mapping[str, Any], model: str) -> Candidate:
    from helpers.model import loading

    known = next(
        (stages[s].data.get("model") for s in ("sft", "orpo", "data") if s in stages and stages[s].data.get("model")),
        None,
    )
    name = model or (known or {}).get("name") or loading.DEFAULT_MODEL
    if not model and known and (Path(known["path"]) / "config.json").is_file():
        return Candidate("base", "base", "hf", name, Path(known["path"]))
    try:
        return Candidate("base", "base", "hf", name, loading.resolve_model(name).path)
    except TunebookError as error:
        return Candidate("base", "base", "hf", name, trouble=str(error))


def _trained(stage: str, manifest: Any, base: Candidate) -> Candidate:
    """What a training stage made: an adapter, or a whole model where every weight was trained."""
    folder = manifest.path
    if (folder / "model" / "config.json").is_file():
        return Candidate(stage, stage, "hf", f"{folder.name}/model", folder / "model")
    adapter = folder / "adapter"
    missing = "" if adapter.is_dir() else f"{adapter} is missing; run the {stage} stage again"
    return Candidate(
        stage,
        stage,
        "hf",
        f"{folder.name}/adapter",
        base.path,
        adapter,
        onto=manifest.data.get("merge_onto") or "16bit",
        trouble=base.trouble or missing,
    )


def _other(text: str) -> Candidate:
    name, separator, what = text.partition("=")
    if not separator or not name.strip() or not what.strip():
        raise TunebookError(
            f"extra_candidates has {text!r}; each is name=what, where what is a model folder, a hub id, a .gguf file "
            "or http(s)://host/v1#model."
        )
    name, what = name.strip(), what.strip()
    if re.match(r"https?://", what):
        url, _, model = what.partition("#")
        shown = re.sub(r"//[^/@]*@", "//", url)
        return Candidate(name, "other", "endpoint", f"{shown}#{model}" if model else shown, url=url, model=model)
    path = Path(what).expanduser()
    if what.endswith(".gguf"):
        return Candidate(
            name, "other", "gguf", what, path, trouble="" if path.is_file() else f"the file {path} does not exist"
        )
    if (path / "adapter_config.json").is_file():
        return _adapter(name, what, path)
    from helpers.model import loading

    try:
        return Candidate(name, "other", "hf", what, loading.resolve_model(what).path)
    except TunebookError as error:
        return Candidate(name, "other", "hf", what, trouble=str(error))


def _adapter(name: str, what: str, path: Path) -> Candidate:
    import json

    from helpers.model import loading

    try:
        base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
        return Candidate(name, "other", "hf", what, loading.resolve_model(base).path, path)
    except (TunebookError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Candidate(name, "other", "hf", what, trouble=f"the base of the adapter {path} cannot be had ({error})")


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.iterdir() if p.is_file() and p.name.endswith(_WEIGHTS))


def api_key() -> str:
    """The endpoint's key from the environment; it is never printed or stored."""
    return os.environ.get("TUNEBOOK_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"


def _load_hf(candidate: Candidate, precision: str) -> Any:
    """(model, tokenizer) of a Hugging Face candidate, its adapter merged into the 16-bit weights."""
    from helpers.data.vocabulary import fit
    from helpers.model import loading

    if candidate.adapter is not None and candidate.onto == "nf4":
        return _load_on_rounded(candidate, precision)
    model = loading.load_model(candidate.path, quantize="none", dtype=precision)
    tokenizer = loading.load_tokenizer(candidate.path)
    if candidate.adapter is not None:
        from helpers.model import merging

        merging.check_adapter(candidate.adapter)
        from peft import PeftModel

        if (candidate.adapter / "tokenizer.json").is_file():
            tokenizer = loading.load_tokenizer(candidate.adapter)
            fit(model, tokenizer)  # tokens may have been added
        try:
            model = PeftModel.from_pretrained(model, candidate.adapter).merge_and_unload()
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise TunebookError(
                f"The adapter in {candidate.adapter} does not fit its base ({str(error).splitlines()[0][:200]}); "
                "name the base it was trained on."
            ) from error
        if precision == "auto" and model.dtype == loading.dtype("fp32"):
            for weight in model.parameters():  # 16 bits, as they are exported, whatever this machine computes in
                weight.data = weight.data.to(loading.dtype("bf16")).float()
    return model, tokenizer


def _load_on_rounded(candidate: Candidate, precision: str) -> Any:
    """An adapter that belongs to the base as 4-bit NormalFloat gave it back: merged tensor by tensor, as stage 04 does."""
    import tempfile

    from helpers.model import loading, merging

    with tempfile.TemporaryDirectory(dir=cache.folder()) as folder:
        merged = merging.merge(candidate.path, candidate.adapter, Path(folder) / "merged", "nf4").path
        return loading.load_model(merged, quantize="none", dtype=precision), loading.load_tokenizer(merged)


def reader(candidate: Candidate, precision: str, end_of_turn: str) -> Any:
    """The candidate, loaded: an object with encode, tokens, generate, logprobs and close.

    Raises TunebookError (or the library's OSError, RuntimeError, ValueError) when it cannot be loaded.
    """
    if candidate.trouble:
        raise TunebookError(candidate.trouble)
    if candidate.kind == "gguf":
        from helpers.gguf.runner import GgufModel

        return GgufModel(candidate.path, end_of_turn)
    if candidate.kind == "endpoint":
        from helpers.evaluate.remote_model import Endpoint

        return Endpoint(candidate.url, candidate.model, api_key())
    from helpers.evaluate.generate import HfModel

    return HfModel(*_load_hf(candidate, precision))
