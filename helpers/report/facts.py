"""What a report says about a run, read once from its finished stages' manifests and the files that they name.

Missing or damaged stages never stop a report: what is not there becomes a sentence in `Facts.warnings`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from helpers import machine, runs
from helpers.errors import TunebookError
from helpers.evaluate import scores as scores_file
from helpers.runs import Manifest

TITLES = {
    "data": "Data preparation",
    "sft": "Supervised fine-tuning",
    "orpo": "Preference tuning",
    "gguf": "Export",
    "eval": "Evaluation",
}
CHECKED = 30_000_000  # bytes; larger files (weights) are checked against their hash by the stages that read them

Value = TypeVar("Value")


@dataclass
class Facts:
    """What is known of a run.

    stages: finished stages; states: stage → "finished", "unfinished", "damaged" or "not run"; scores: scores.json;
    answers: lines of answers.jsonl; logs: training stage → lines of its log.jsonl; files: type → what was measured.
    """

    run: str
    folder: Path
    stages: dict[str, Manifest] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def metrics(self, stage: str) -> dict[str, Any]:
        return self.stages[stage].metrics if stage in self.stages else {}

    def first(self, key: str) -> Any:
        """The first stage's value of a manifest's key; None when no stage has one."""
        return next((m.data[key] for m in self.stages.values() if m.data.get(key)), None)

    @property
    def last(self) -> Manifest | None:
        """The manifest of the latest finished stage."""
        return next((self.stages[s] for s in reversed(runs.FOLDERS) if s in self.stages), None)

    @property
    def model(self) -> dict[str, Any]:
        """name, path, revision, origin of the base model; empty when no stage says."""
        return next((m.data["model"] for m in reversed(self.stages.values()) if m.data.get("model")), {})

    @property
    def hub_base(self) -> str:
        """The base model's id on the hub; "" when it came from a folder."""
        name = str(self.model.get("name") or "")
        return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else ""

    @property
    def seconds(self) -> float:
        return sum(m.data.get("wall_s") or 0.0 for m in self.stages.values())

    @property
    def memory(self) -> float:
        """The highest memory of any stage, GiB."""
        return max((m.data.get("peak_memory_gib") or 0.0 for m in self.stages.values()), default=0.0)

    # ------------------------------------------------------------ what was trained and what was exported

    @property
    def exported(self) -> str:
        """The stage whose result the exported files hold: "sft", "orpo" or "base"; else the last trained."""
        known = str(self.metrics("gguf").get("trained_by", ""))
        return known or next((s for s in ("orpo", "sft") if s in self.stages), "base")

    @property
    def lineage(self) -> list[str]:
        """The training stages that the exported result went through, in order."""
        made_from = self.stages[self.exported].data["parents"] if self.exported in self.stages else {}
        return [s for s in ("sft", "orpo") if s in self.stages and (s in made_from or s == self.exported)]

    # ------------------------------------------------------------ the candidates of the evaluation

    @property
    def candidates(self) -> list[dict[str, Any]]:
        return self.scores.get("candidates", [])

    @property
    def scored(self) -> list[dict[str, Any]]:
        return [c for c in self.candidates if c["status"] == "scored"]

    @property
    def baseline(self) -> dict[str, Any] | None:
        """The candidate that others are compared with: the first one scored."""
        return next(iter(self.scored), None)

    @property
    def best(self) -> dict[str, Any] | None:
        """The candidate to show beside the baseline: the one to ship, else the most accurate of the others."""
        ship = (self.scores.get("ship") or {}).get("name")
        return next((c for c in self.scored[1:] if c["name"] == ship), None) or max(
            self.scored[1:], key=lambda c: accuracy(c).get("value") or -1.0, default=None
        )

    def comparison(self, baseline: str, candidate: str) -> dict[str, Any] | None:
        """The paired comparison of the accuracy of two candidates."""
        wanted = (baseline, candidate)
        found = self.scores.get("comparisons", [])
        return next((c for c in found if (c["baseline"], c["candidate"]) == wanted), None)

    def in_order(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Values by candidate in the order in which the candidates were judged; JSON keeps its keys sorted."""
        order = {c["name"]: place for place, c in enumerate(self.candidates)}
        return dict(sorted(values.items(), key=lambda item: order.get(item[0], len(order))))


def accuracy(candidate: Mapping[str, Any] | None) -> dict[str, Any]:
    """A candidate's headline score; empty when it has none."""
    return ((candidate or {}).get("scores") or {}).get("accuracy") or {}


def gather(run: str, stage: runs.Stage | None = None) -> Facts:
    """Read a run. stage: the open evaluation stage when the report is written before its manifest is.

    Raises TunebookError only when there is no such run at all.
    """
    folder = runs.folder(run, "data").parent
    if not folder.is_dir():
        raise TunebookError(f"There is no run {run!r} in {runs.root()}; run the notebooks first, or correct the name.")
    facts = Facts(run, folder)
    for name in runs.FOLDERS:
        if stage is not None and name == stage.name:
            facts.stages[name], facts.states[name] = Manifest(stage.path, _open_manifest(stage)), "finished"
        else:
            _read_stage(facts, name)
    _check_lineage(facts)
    for name in ("sft", "orpo"):
        if name in facts.stages:
            facts.logs[name] = _log(facts, facts.stages[name].path / "log.jsonl")
    _read_fidelity(facts)
    _read_scores(facts)
    for manifest in facts.stages.values():
        _check_hashes(facts, manifest)
    # Pages and cards go to other people: no path of this machine.
    facts.warnings = list(dict.fromkeys(w.replace(str(runs.root()), "runs") for w in facts.warnings))
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


def _open_manifest(stage: runs.Stage) -> dict[str, Any]:
    """What the manifest of a stage that is about to finish will say, as far as it is known."""
    known: dict[str, Any] = next((m.data for m in reversed(stage.parents.values()) if m.data.get("model")), {})
    return {
        "params": stage.params.as_dict(),
        "metrics": {},
        "artifacts": {},
        **{key: known.get(key) for key in ("model", "template_hash", "tokenizer_hash")},
        "parents": {s: {"manifest_sha256": p.sha256} for s, p in stage.parents.items()},
        "wall_s": round(stage.seconds, 1),
        "peak_memory_gib": machine.peak_memory_gib(),
        **machine.versions(),
    }


def _check_lineage(facts: Facts) -> None:
    for name, manifest in facts.stages.items():
        for parent, known in manifest.data.get("parents", {}).items():
            current = facts.stages.get(parent)
            if current and current.data["artifacts"] and current.sha256 != known["manifest_sha256"]:
                facts.warnings.append(
                    f"{TITLES[name]} was made from an earlier {TITLES[parent].lower()} than the one shown here; "
                    f"run {runs.FOLDERS[name]} again."
                )
    if len({m.data["template_hash"] for m in facts.stages.values() if m.data.get("template_hash")}) > 1:
        facts.warnings.append("The stages were made with different chat templates; run them again from 01.")


def _check_hashes(facts: Facts, manifest: Manifest) -> None:
    for file, known in manifest.data["artifacts"].items():
        path = manifest.path / file
        if not path.is_file():
            facts.warnings.append(f"{manifest.path.name}/{file} is missing since the stage finished.")
        elif path.stat().st_size != known["bytes"] or (
            known["bytes"] <= CHECKED and runs.sha256_file(path) != known["sha256"]
        ):
            again = f"run {manifest.path.name} again"
            facts.warnings.append(f"{manifest.path.name}/{file} was changed since the stage finished; {again}.")


def _read_scores(facts: Facts) -> None:
    """scores.json and answers.jsonl, and what a reader must know before them."""
    path = runs.folder(facts.run, "eval")
    if not (path / scores_file.SCORES).is_file():
        return
    try:
        facts.scores, facts.answers = scores_file.read(path)
    except (TunebookError, KeyError, TypeError, AttributeError) as error:
        facts.warnings.append(f"The evaluation's files cannot be used: {error}")
        return
    base = (facts.baseline or {}).get("name")
    worse = [
        f"{c['candidate']} is worse than {c['baseline']}: {c['sentence']}."
        for c in facts.scores["comparisons"]
        if (c["verdict"], c["baseline"]) == ("worse", base)
    ]
    facts.warnings = facts.scores["warnings"] + worse + facts.warnings


def _read_fidelity(facts: Facts) -> None:
    """Each exported file's measurements, largest first; a file that was measured and not kept has no size."""
    if "gguf" not in facts.stages:
        return
    path = facts.stages["gguf"].path / "fidelity.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        sizes = {f["type"]: f for f in found.get("sizes") or []}
        files = {f["type"]: {"bytes": None, **sizes.get(f["type"], {}), **f} for f in found.get("files") or []}
        budgets = found.get("budgets") or {}
        for kind, file in files.items():
            file["allowed"] = budgets[kind][0] if kind in budgets else None
        facts.files = dict(sorted(files.items(), key=lambda item: -(item[1]["bytes"] or 0)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        facts.warnings.append(f"{runs.FOLDERS['gguf']}/{path.name} cannot be read ({error!r}); it is left out.")


def _log(facts: Facts, path: Path) -> list[dict[str, Any]]:
    """The readable lines of a log; a line broken off by a kill is counted, not fatal."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and "step" in row else []
        except ValueError:
            broken += bool(line.strip())
    if broken:
        place = f"{path.parent.name}/{path.name}"
        facts.warnings.append(f"{place} has {broken} unreadable lines; the curves leave them out.")
    return rows


# ---------------------------------------------------------------- the training rows


def _train_rows(facts: Facts, columns: list[str], count: int | None = None) -> Any:
    """Columns of train.parquet, first `count` rows or all, as a pyarrow table; None when it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = facts.stages["data"].path / "train.parquet"
    try:
        file = pq.ParquetFile(path)
        batches = file.iter_batches(batch_size=count or 65_536, columns=columns)
        return pa.Table.from_batches([next(batches)] if count else list(batches))
    except (pa.ArrowException, OSError, StopIteration, KeyError, ValueError) as error:
        if path.is_file():
            facts.warnings.append(f"train.parquet cannot be read ({error}).")
        return None


def row_lengths(facts: Facts) -> dict[int, int]:
    """Tokens in a training row → rows; empty when there is no such file."""
    import pyarrow.compute as pc

    table = _train_rows(facts, ["completion_mask"])
    if table is None:
        return {}
    counts = pc.value_counts(pc.list_value_length(table["completion_mask"])).to_pylist()
    return {entry["values"]: entry["counts"] for entry in counts}


def examples(facts: Facts, count: int = 3) -> list[list[tuple[str, bool]]]:
    """The first training rows as (text, trained) pieces, decoded from the ids that training saw; [] without them."""
    from tokenizers import Tokenizer

    places = [Path(str(facts.model.get("path", "")))]
    places += [facts.stages[s].path / "adapter" for s in ("sft", "orpo") if s in facts.stages]
    vocabulary = next((p / "tokenizer.json" for p in places if (p / "tokenizer.json").is_file()), None)
    table = _train_rows(facts, ["input_ids", "completion_mask"], count)
    if vocabulary is None or table is None:
        return []
    tokenizer = Tokenizer.from_file(str(vocabulary))
    shown = []
    for row in table.to_pylist():
        marked = itertools.groupby(zip(row["input_ids"], row["completion_mask"], strict=True), key=lambda pair: pair[1])
        pieces = [([token for token, _ in pairs], bool(trained)) for trained, pairs in marked]
        shown.append([(tokenizer.decode(ids, skip_special_tokens=False), trained) for ids, trained in pieces])
    return shown
