"""Who is judged: the base, what this run trained and exported, and any other model, GGUF file or endpoint by name.

HF candidates hold the 16-bit weights that people deploy: a stage's adapter is merged into the 16-bit base in memory, as
stage 04 merges it into the file it exports. A CPU without bfloat16 computes with the same weights in fp32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import cache, machine
from helpers.errors import TunebookError
from helpers.llm_client import shown_url
from helpers.model import loading
from helpers.runs import Manifest

ROLES = ("base", "sft", "orpo", "merged", "gguf")
_WEIGHTS = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Candidate:
    """One judged model.

    kind: "hf", "gguf" or "endpoint". path: model folder or GGUF file (the base's folder for an adapter); url, model: an
    endpoint's. made_by: the stage of this run whose training it holds, "base" for the untrained, "" for others.
    made_from: name of the candidate that it was exported from. onto: what the adapter is merged into, "16bit" or "nf4".
    trouble: why it cannot be judged, known already while looking for it.
    """

    name: str
    role: str
    kind: str
    source: str
    path: Path | None = None
    adapter: Path | None = None
    url: str = ""
    model: str = ""
    made_by: str = ""
    made_from: str = ""
    onto: str = "16bit"
    trouble: str = ""

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the files a user must hold to run it; None for an endpoint or where nothing is there."""
        if self.path is None or not self.path.exists():
            return None
        size = 0
        for path in filter(None, (self.path, self.adapter)):
            files = [path] if path.is_file() else [f for f in path.iterdir() if f.name.endswith(_WEIGHTS)]
            size += sum(f.stat().st_size for f in files)
        return size

    def content(self, precision: str) -> str:
        """Hash of all in its files that decides its answers: the cache's name for it. Endpoints have none."""
        files = [cache.content_hash(p) if p else "" for p in (self.path, self.adapter)]
        if self.kind == "gguf":
            return cache.key("gguf", files, machine.versions()["versions"].get("xllamacpp", ""))
        return cache.key("hf", files, self.onto, str(loading.dtype(precision)))


def find(
    stages: Mapping[str, Manifest], wanted: str = "base,sft,orpo,gguf", extra: str = "", model: str = ""
) -> list[Candidate]:
    """The candidates named in `wanted` (in that order, those that the run has), then those in `extra`.

    extra: `name=what` separated by commas; what is a model folder, hub id, .gguf file, adapter folder, or
    http(s)://host/v1#model. model: the base, where the run's manifests should not decide.
    Raises TunebookError for a word that names no candidate and for a name used twice.
    """
    names = [w.strip() for w in wanted.split(",") if w.strip()]
    if unknown := [word for word in names if word not in ROLES]:
        raise TunebookError(
            f"candidates names {unknown[0]!r}; it takes {', '.join(ROLES)}, separated by commas. Others go into "
            "extra_candidates."
        )
    made: dict[str, list[Candidate]] = {}
    if {"base", "sft", "orpo"} & set(names):
        base = _base(stages, model)
        made["base"] = [base]
        made |= {stage: [_trained(stage, stages[stage], base)] for stage in ("sft", "orpo") if stage in stages}
    if "gguf" in stages:
        exported = stages["gguf"]
        folder, last = exported.path, exported.metrics["trained_by"]
        merged = Candidate("merged", "merged", "hf", f"{folder.name}/merged", folder / "merged")
        if any((folder / "merged").glob("*.safetensors")):
            made["merged"] = [_exported(merged, last)]
        made["gguf"] = [
            _exported(
                Candidate(f"gguf {p.stem.removeprefix('model-')}", "gguf", "gguf", f"{folder.name}/{p.name}", p), last
            )
            for p in sorted(folder.glob("model-*.gguf"), key=lambda p: -p.stat().st_size)
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


def _exported(candidate: Candidate, stage: str) -> Candidate:
    """stage: "sft", "orpo" or "base" (nothing was trained)."""
    return replace(candidate, made_by=stage, made_from=stage)


def _base(stages: Mapping[str, Manifest], model: str) -> Candidate:
    known: dict[str, Any] = next(
        (m.data["model"] for s, m in stages.items() if s != "gguf" and m.data.get("model")), {}
    )
    name = model or known.get("name") or loading.DEFAULT_MODEL
    if not model and known and (Path(known["path"]) / "config.json").is_file():
        return Candidate("base", "base", "hf", name, Path(known["path"]), made_by="base")
    return _resolved(Candidate("base", "base", "hf", name, made_by="base"), name)


def _trained(stage: str, manifest: Manifest, base: Candidate) -> Candidate:
    """What a training stage made: an adapter, or a whole model where every weight was trained."""
    folder = manifest.path
    if (folder / "model" / "config.json").is_file():
        return Candidate(stage, stage, "hf", f"{folder.name}/model", folder / "model", made_by=stage)
    adapter = folder / "adapter"
    missing = "" if adapter.is_dir() else f"{adapter} is missing; run the {stage} stage again"
    trained = Candidate(stage, stage, "hf", f"{folder.name}/adapter", base.path, adapter, made_by=stage)
    return replace(trained, onto=manifest.data.get("merge_onto") or "16bit", trouble=base.trouble or missing)


def _other(text: str) -> Candidate:
    name, _, what = (part.strip() for part in text.partition("="))
    if not name or not what:
        raise TunebookError(
            f"extra_candidates has {text!r}; each is name=what, where what is a model folder, a hub id, a .gguf file "
            "or http(s)://host/v1#model."
        )
    if re.match(r"https?://", what):
        url, _, model = what.partition("#")
        return Candidate(name, "other", "endpoint", shown_url(what), url=url, model=model)
    path = Path(what).expanduser()
    if what.endswith(".gguf"):
        missing = "" if path.is_file() else f"the file {path} does not exist"
        return Candidate(name, "other", "gguf", what, path, trouble=missing)
    if not (path / "adapter_config.json").is_file():
        return _resolved(Candidate(name, "other", "hf", what), what)
    try:
        base = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        unread = f"the base of the adapter {path} cannot be read from its adapter_config.json ({error})"
        return Candidate(name, "other", "hf", what, trouble=unread)
    return _resolved(Candidate(name, "other", "hf", what, adapter=path), str(base))


def _resolved(candidate: Candidate, model: str) -> Candidate:
    try:
        return replace(candidate, path=loading.resolve_model(model).path)
    except TunebookError as error:
        return replace(candidate, trouble=str(error))
