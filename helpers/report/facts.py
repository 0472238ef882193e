"""What a report says about a run, read once from its finished stages' manifests and the files that they name.

Missing or damaged stages never stop a report: what is not there becomes a sentence in `Facts.warnings`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from helpers import machine, params, runs
from helpers.errors import TunebookError
from helpers.evaluate import scores as scores_file
from helpers.evaluate import statistics
from helpers.gguf.trained import Merge
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


class Setting(NamedTuple):
    """A parameter as a stage used it; unit and help are "" for one that this version does not know."""

    name: str
    value: Any
    unit: str
    help: str
    changed: bool  # from the default


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

    def used(self, stage: str) -> dict[str, Any]:
        """The parameters of a finished stage, a proposed one as it was used."""
        of = self.stages[stage]
        used = {name: value or of.data.get(f"{name}_used", value) for name, value in of.params.items() if name != "run"}
        return used | {name: of.data.get(name, used[name]) for name in ("method", "quantize") if name in used}

    def settings(self, stage: str) -> list[Setting]:
        """The parameters of a finished stage, described."""
        known = {p.name: p for p in params.STAGES[stage]}
        used = [(n, v, known.get(n)) for n, v in self.used(stage).items()]
        return [
            Setting(n, v, p.unit, p.help, v != p.default) if p else Setting(n, v, "", "", False) for n, v, p in used
        ]

    def latest(self, key: str) -> Any:
        """The last stage's value of a manifest's key; None when no stage has one."""
        return next((m.data[key] for m in reversed(self.stages.values()) if m.data.get(key)), None)

    @property
    def model(self) -> dict[str, Any]:
        """name, path, revision, origin of the base model; empty when no stage says."""
        return self.latest("model") or {}

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

    @property
    def merges(self) -> list[Merge]:
        """The model that was trained, and how far the export's merges are from it."""
        return [Merge(**one) for one in self.metrics("gguf").get("merges") or []]

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
        """The candidate that the run is about, to show beside the baseline; None where that is the only one."""
        return statistics.protagonist(self.scores) if len(self.scored) > 1 else None

    @property
    def score(self) -> dict[str, Any]:
        """The headline score of the best candidate, or of the only one; empty when nothing was scored."""
        return accuracy(self.best or self.baseline)

    def comparison(self, baseline: str | None, candidate: str | None) -> dict[str, Any] | None:
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
    folder = runs.run_folder(run)
    if not folder.is_dir():
        raise TunebookError(f"There is no run {run!r} in {runs.root()}; run the notebooks first, or correct the name.")
    facts = Facts(run, folder)
    for name in runs.FOLDERS:
        if stage is not None and name == stage.name:
            facts.stages[name], facts.states[name] = _open_manifest(stage), "finished"
        else:
            _read_stage(facts, name)
    facts.logs = {name: _log(facts.stages[name].path) for name in ("sft", "orpo") if name in facts.stages}
    _check_lineage(facts)
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


def _open_manifest(stage: runs.Stage) -> Manifest:
    """What the manifest of a stage that is about to finish will say, as far as it is known."""
    parents = list(reversed(stage.parents.values()))
    known = {
        "params": stage.params.as_dict(),
        "metrics": {},
        "artifacts": {},
        "parents": {s: {"manifest_sha256": p.sha256} for s, p in stage.parents.items()},
        "wall_s": round(stage.seconds, 1),
        "peak_memory_gib": machine.peak_memory_gib(),
        **{key: next((p.data[key] for p in parents if p.data.get(key)), None) for key in runs.INHERITED},
        **machine.versions(),
    }
    return Manifest(stage.path, known)


def _check_lineage(facts: Facts) -> None:
    for manifest in facts.stages.values():
        facts.warnings += manifest.data.get("metrics", {}).get("warnings", [])
    for name, manifest in facts.stages.items():
        for parent, known in manifest.data.get("parents", {}).items():
            if parent in facts.stages and facts.stages[parent].sha256 != known["manifest_sha256"]:
                facts.warnings.append(
                    f"{TITLES[name]} was made from an earlier {TITLES[parent].lower()} than the one shown here; "
                    f"run {runs.FOLDERS[name]} again."
                )
    if len({m.data["template_hash"] for m in facts.stages.values() if m.data.get("template_hash")}) > 1:
        facts.warnings.append("The stages were made with different chat templates; run them again from 01.")


def _check_hashes(facts: Facts, manifest: Manifest) -> None:
    for file, known in manifest.data["artifacts"].items():
        path, name = manifest.path / file, manifest.path.name
        if not path.is_file():
            facts.warnings.append(f"{name}/{file} is missing since the stage finished.")
        elif path.stat().st_size != known["bytes"] or (
            known["bytes"] <= CHECKED and runs.sha256_file(path) != known["sha256"]
        ):
            facts.warnings.append(f"{name}/{file} was changed since the stage finished; run {name} again.")


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
    base, named = ((c or {}).get("name") for c in (facts.baseline, facts.best))  # the second has the headline
    worse = [c["candidate"] for c in facts.scores["comparisons"] if (c["verdict"], c["baseline"]) == ("worse", base)]
    said = (
        [f"Worse than {base} beyond chance, too: {', '.join(sorted(set(worse) - {named}))}."]
        if set(worse) - {named}
        else []
    )
    lost = (facts.scores["lost"] or {}).get("sentence")  # has a place of its own
    facts.warnings = [w for w in facts.scores["warnings"] if w != lost] + said + facts.warnings


def _read_fidelity(facts: Facts) -> None:
    """Each exported file's measurements, largest first; a file that was measured and not kept has no size."""
    path = runs.folder(facts.run, "gguf") / "fidelity.json"
    if "gguf" not in facts.stages or not path.is_file():
        return
    try:
        files = json.loads(path.read_text(encoding="utf-8")).get("files") or []
        facts.files = {f["type"]: f for f in sorted(files, key=lambda f: -(f.get("bytes") or 0))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        facts.warnings.append(f"{path.parent.name}/{path.name} cannot be read ({error!r}); it is left out.")


def _log(stage: Path) -> list[dict[str, Any]]:
    """The lines of a training log that can be read; one altered since the stage finished is warned of by its hash."""
    rows = []
    path = stage / "log.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) and "step" in row else []
    return rows
