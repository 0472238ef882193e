"""Everything a report says about a run, read once from its manifests and the files they name.

Missing or damaged stages never stop a report: what is not there becomes a sentence in `Facts.warnings`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import runs
from helpers.errors import TunebookError
from helpers.runs import Manifest

TITLES = {
    "data": "Data preparation",
    "sft": "Supervised fine-tuning",
    "orpo": "Preference tuning",
    "gguf": "Export",
    "eval": "Evaluation",
}
CHECKED = (
    30_000_000  # bytes; files up to this size are held against their hash, weights are left to the stages themselves
)


@dataclass
class Facts:
    """What is known of a run. states: stage -> "finished", "unfinished", "damaged" or "not run"."""

    run: str
    folder: Path
    stages: dict[str, Manifest] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Any] | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    fidelity: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    def metrics(self, stage: str) -> dict[str, Any]:
        return self.stages[stage].metrics if stage in self.stages else {}

    @property
    def last(self) -> Manifest | None:
        """The manifest of the latest finished stage."""
        return next((self.stages[s] for s in reversed(runs.FOLDERS) if s in self.stages), None)

    @property
    def model(self) -> dict[str, Any]:
        """name, path, revision, origin of the base model; empty when no stage says."""
        return next((m.data["model"] for m in reversed(self.stages.values()) if m.data.get("model")), {})

    def baseline(self) -> dict[str, Any] | None:
        """The candidate that others are compared with: the first one scored."""
        return next((c for c in self.candidates() if c["status"] == "scored"), None)

    def candidates(self) -> list[dict[str, Any]]:
        return self.scores["candidates"] if self.scores else []

    def best(self) -> dict[str, Any] | None:
        """The candidate to show beside the baseline: the one to ship, else the most accurate tuned one."""
        others = [c for c in self.candidates() if c["status"] == "scored" and c is not self.baseline()]
        ship = (self.scores or {}).get("ship") or {}
        named = next((c for c in others if c["name"] == ship.get("name")), None)
        return named or max(
            others, key=lambda c: (c["scores"].get("accuracy") or {}).get("value") or -1.0, default=None
        )


def gather(run: str, stage: Any = None) -> Facts:
    """Read a run. stage: the open evaluation stage when the report is written before its manifest is.

    Raises TunebookError only when there is no such run at all.
    """
    folder = runs.folder(run, "data").parent
    if not folder.is_dir():
        raise TunebookError(f"There is no run {run!r} in {runs.root()}; run the notebooks first, or correct the name.")
    facts = Facts(run, folder)
    for name in runs.FOLDERS:
        if name != getattr(stage, "name", None):
            _read_stage(facts, name)
    if stage is not None:
        facts.stages[stage.name] = Manifest(stage.path, _open_manifest(stage))
        facts.states[stage.name] = "finished"
    _lineage(facts)
    for name in ("sft", "orpo"):
        if name in facts.stages:
            facts.logs[name] = _json_lines(facts, facts.stages[name].path / "log.jsonl", name)
    if "gguf" in facts.stages:
        facts.fidelity = _json(facts, facts.stages["gguf"].path / "fidelity.json", "gguf")
        parts = [facts.fidelity.get(k) or [] for k in ("files", "sizes")] if facts.fidelity else []
        if not all(isinstance(p, list) and all(isinstance(f, dict) and "type" in f for f in p) for p in parts):
            facts.warnings.append(
                f"{runs.FOLDERS['gguf']}/fidelity.json has another shape than the export writes; it is left out."
            )
            facts.fidelity = None
    _read_scores(facts)
    for name in facts.stages:
        if name != getattr(stage, "name", None):
            _check_hashes(facts, name)
    # pages and cards go to other people: no path of this machine
    facts.warnings = list(dict.fromkeys(w.replace(f"{runs.root()}", "runs") for w in facts.warnings))
    return facts


def _read_stage(facts: Facts, name: str) -> None:
    path = runs.folder(facts.run, name)
    if not path.is_dir():
        facts.states[name] = "not run"
        return
    try:
        facts.stages[name] = runs.load(facts.run, name, verify=False)
        facts.states[name] = "finished"
    except TunebookError as error:
        facts.states[name] = "damaged" if (path / "manifest.json").exists() else "unfinished"
        if any(path.iterdir()):
            facts.warnings.append(str(error))


def _open_manifest(stage: Any) -> dict[str, Any]:
    """What the manifest of a stage that is about to finish will say, as far as it is known."""
    from helpers import machine

    known = next((m.data for m in reversed(stage.parents.values()) if m.data.get("model")), {})
    return {
        "stage": stage.name,
        "run": stage.params.run,
        "params": stage.params.as_dict(),
        "metrics": {},
        "artifacts": {},
        "model": known.get("model"),
        "template_hash": known.get("template_hash"),
        "tokenizer_hash": known.get("tokenizer_hash"),
        "parents": {s: {"folder": p.path.name, "manifest_sha256": p.sha256} for s, p in stage.parents.items()},
        "wall_s": round(stage.seconds, 1),
        "peak_memory_gib": machine.peak_memory_gib(),
        **machine.versions(),
    }


def _lineage(facts: Facts) -> None:
    for name, manifest in facts.stages.items():
        for parent, known in manifest.data.get("parents", {}).items():
            if (
                parent in facts.stages
                and facts.stages[parent].data.get("artifacts")
                and facts.stages[parent].sha256 != known["manifest_sha256"]
            ):
                facts.warnings.append(
                    f"{TITLES[name]} was made from an earlier {TITLES[parent].lower()} than the one shown here; run {runs.FOLDERS[name]} again."
                )
    hashes = {m.data["template_hash"] for m in facts.stages.values() if m.data.get("template_hash")}
    if len(hashes) > 1:
        facts.warnings.append("The stages were made with different chat templates; run them again from 01.")


def _read_scores(facts: Facts) -> None:
    from helpers.evaluate import scores

    path = runs.folder(facts.run, "eval")
    if not (path / scores.SCORES).is_file():
        return
    try:
        facts.scores, facts.answers = scores.read(path)
    except (TunebookError, KeyError, TypeError, AttributeError) as error:
        facts.warnings.append(f"The evaluation's files cannot be used: {error}")
        return
    facts.warnings = list(facts.scores["warnings"]) + facts.warnings
    for candidate in facts.scores["candidates"]:
        if candidate["status"] == "skipped" and not any(candidate["name"] in w for w in facts.warnings):
            facts.warnings.insert(0, f"{candidate['name']} was skipped: {candidate['reason'] or 'no reason given'}")
    for comparison in facts.scores["comparisons"]:
        if (
            comparison["verdict"] == "worse"
            and comparison["metric"] == "accuracy"
            and comparison["baseline"] == (facts.baseline() or {}).get("name")
        ):
            facts.warnings.append(
                f"{comparison['candidate']} is worse than {comparison['baseline']}: {comparison['sentence']}."
            )
    for name, lost in ((facts.scores["forgetting"] or {}).get("candidates") or {}).items():
        if lost.get("passed") is False and not any(
            name in w and (lost.get("sentence") or "general") in w for w in facts.warnings
        ):
            facts.warnings.append(f"{name} lost general ability: {lost.get('sentence', '')}")


def _check_hashes(facts: Facts, name: str) -> None:
    manifest = facts.stages[name]
    for file, known in manifest.data.get("artifacts", {}).items():
        path = manifest.path / file
        if not path.is_file():
            facts.warnings.append(f"{manifest.path.name}/{file} is missing since the stage finished.")
        elif path.stat().st_size != known["bytes"] or (
            known["bytes"] <= CHECKED and runs.sha256_file(path) != known["sha256"]
        ):
            facts.warnings.append(
                f"{manifest.path.name}/{file} was changed since the stage finished; run {manifest.path.name} again."
            )


def _json(facts: Facts, path: Path, name: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        problem = "it is no object"
    except (OSError, ValueError) as error:
        problem = str(error)
    facts.warnings.append(f"{runs.FOLDERS[name]}/{path.name} cannot be read ({problem}); it is left out.")
    return None


def _json_lines(facts: Facts, path: Path, name: str) -> list[dict[str, Any]]:
    """The readable lines of a log; a line broken off by a kill is counted, not fatal."""
    if not path.is_file():
        return []
    rows, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
        except ValueError:
            broken += bool(line.strip())
    if broken:
        facts.warnings.append(
            f"{runs.FOLDERS[name]}/{path.name} has {broken} unreadable lines; the curves leave them out."
        )
    return rows


def examples(facts: Facts, count: int = 3) -> list[list[tuple[str, bool]]]:
    """The first training rows as (text, trained) pieces, decoded from the very ids that training saw; [] when not possible."""
    path = facts.stages["data"].path / "train.parquet" if "data" in facts.stages else None
    vocabulary = next(
        (
            p
            for p in (
                Path(str(facts.model.get("path", ""))) / "tokenizer.json",
                *(facts.stages[s].path / "adapter" / "tokenizer.json" for s in ("sft", "orpo") if s in facts.stages),
            )
            if p.is_file()
        ),
        None,
    )
    if path is None or not path.is_file() or vocabulary is None:
        return []
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    try:
        table = next(pq.ParquetFile(path).iter_batches(batch_size=count, columns=["input_ids", "completion_mask"]))
        rows = table.to_pylist()
        tokenizer = Tokenizer.from_file(str(vocabulary))
    except (pa.ArrowException, OSError, StopIteration, KeyError, ValueError) as error:
        facts.warnings.append(f"The training rows cannot be shown ({error}).")
        return []
    shown = []
    for row in rows:
        pieces: list[tuple[list[int], bool]] = []
        for token, trained in zip(row["input_ids"], row["completion_mask"], strict=True):
            if not pieces or pieces[-1][1] != bool(trained):
                pieces.append(([], bool(trained)))
            pieces[-1][0].append(token)
        shown.append([(tokenizer.decode(ids, skip_special_tokens=False), trained) for ids, trained in pieces])
    return shown


def lengths(facts: Facts) -> list[int]:
    """Tokens of every training row, in the file's order; [] when there is no such file."""
    path = facts.stages["data"].path / "train.parquet" if "data" in facts.stages else None
    if path is None or not path.is_file():
        return []
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        column = pq.read_table(path, columns=["completion_mask"])["completion_mask"]
    except (pa.ArrowException, OSError, KeyError) as error:
        facts.warnings.append(f"train.parquet cannot be read ({error}).")
        return []
    return pc.list_value_length(column).to_pylist()
