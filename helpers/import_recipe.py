"""Jobs of other trainers as recipes: a LLaMA-Factory YAML (with its dataset_info.json) or an Axolotl YAML.

    tunebook import llama3_lora_sft.yaml                writes notebooks/recipes/llama3_lora_sft/{data,sft,…}.yaml

What becomes of every setting is a line of the table: taken over, approximated, refused or not needed, and why. Which is
which stands in import_keys.yaml. The file is read as plain YAML: nothing in it runs.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from helpers import display, machine, parameter, params
from helpers.cache import writing
from helpers.data import formats, sources
from helpers.errors import TunebookError
from helpers.train import config

TAKEN, NEAR, LOST, FREE = "taken over", "approximated", "refused", "not needed"
GROUPS = {"free": FREE, "near": NEAR, "lost": LOST, "refused": LOST}
LORA = ("rank", "alpha", "target_modules", *config.ADAPTERS_OWN)
LISTS = ("target_modules", "modules_to_save", "data.add_tokens")  # take several, by commas
SECRET = re.compile(r"(?:api|hub|hf|auth)_?(?:key|token)|secret|password|webhook", re.IGNORECASE)
Settings = dict[str, Any]  # ours: "data.model", "gguf.outputs", "rank" of the training stage
Found = tuple[str, str, Settings]  # what became of a setting, as what or why, and what it sets


@dataclass(repr=False)
class Imported(display.Shown):
    """A job of another trainer. recipe: stage → values; rows: (setting, value, what became of it, as what or why)."""

    told: str
    recipe: dict[str, Settings]
    rows: list[tuple[str, str, str, str]]

    @property
    def differs(self) -> list[tuple[str, str, str, str]]:
        return [row for row in self.rows if row[2] in (NEAR, LOST)]

    def _shown(self) -> display.Html:
        return display.shown(self.rows, ("setting", "value", "", "as, or why"))

    def write(self, folder: Path) -> Path:
        """Write the recipe, with every setting that differs in its first comment; the whole of it or nothing."""
        making = folder.with_name(f".{folder.name}.partial")
        if folder.exists():
            raise TunebookError(f"{folder} is there already; name another folder with --out, or remove it.")
        told = [self.told, *(f"{verdict}: {name} {value}: {why}" for name, value, verdict, why in self.differs)]
        head = "".join(f"# {' '.join(line.split())}\n" for line in map(display.clean, told))
        with writing(folder):
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            for stage, values in self.recipe.items():
                body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else "# the defaults\n"
                (making / f"{stage}.yaml").write_text(head + body, encoding="utf-8")
                head = ""
            return making.rename(folder)


def read(file: str | Path, gpus: int = 1) -> Imported:
    """The job in a file, for `gpus` GPUs. Raises TunebookError with the reason for one that cannot be a recipe."""
    given, table = parameter.read_file(file), parameter.read_file(Path(__file__).with_name("import_keys.yaml"))
    dialect = next((one for one in table["trainers"] if set(one["model"]) & set(given)), None)
    if dialect is None:
        known = ", ".join(f"{one['title']} (which has {' or '.join(one['model'])})" for one in table["trainers"])
        raise TunebookError(f"{file} is no training job of {known}.")
    own = {name: value for name, value in dialect["defaults"].items() if name not in given}
    flat, rows = dict(_flat({**own, **given})), dict[str, tuple[str, str, str]]()
    chosen, owner = {**table["always"], **dialect["always"]}, dict[str, str]()
    try:
        order = {name: place for place, name in enumerate(dialect["keys"])}  # a setting may depend on one above it
        for name, value in sorted(flat.items(), key=lambda item: order.get(item[0], len(order))):
            verdict, why, sets = _rows_of(dialect, name, flat, Path(file)) or _setting(dialect, name, value)
            chosen |= sets
            owner |= dict.fromkeys(sets, name)
            shown = "***" if SECRET.search(name) and value else display.plain(value)[:100]
            rows[name] = (f"{shown} (its default)" if name in own else shown, verdict, why)
        whole = chosen.get("method") in ("full", "freeze")
        for name in (name for name in LORA if whole and chosen.pop(name, None) is not None):
            rows[owner[name]] = (rows[owner[name]][0], FREE, "weights of the model are trained, without an adapter")
        if whole and chosen.get("precision") == "fp16":
            del chosen["precision"]
            rows[owner["precision"]] = (rows[owner["precision"]][0], NEAR, "whole weights are trained in bf16 or fp32")
        owner["data.preference_eval_share"] = owner.get("data.eval_share", "")
        recipe = _stages(chosen, gpus)
    except TunebookError as error:
        raise TunebookError(f"{file} cannot be a recipe: {error}") from None
    for stage, values in recipe.items():
        for name in list(values):
            try:
                values[name] = params.find(stage, name).check(values[name])
            except TunebookError as error:
                key = owner.get(name) or owner.get(f"{stage}.{name}")
                if key is None or name in ("model", "dataset"):
                    raise TunebookError(f"{file} cannot be a recipe of the stage {stage}: {error}") from None
                del values[name]
                rows[key] = (rows[key][0], LOST, str(error))
        if stage in ("sft", "orpo"):
            try:
                config.check(params.resolve(stage, values), (9, 0))
            except TunebookError as error:
                raise TunebookError(f"{file} cannot be a recipe. {error}") from None
    return Imported(f"From {Path(file).name} of {dialect['title']}.", recipe, [(k, *row) for k, row in rows.items()])


def _stages(chosen: Settings, gpus: int) -> dict[str, Settings]:
    """The settings by stage. Raises TunebookError for a job that trains nothing."""
    kind = chosen.pop("kind", "sft")
    chosen["batch_size"] = math.prod([gpus, *(chosen.pop(name) for name in list(chosen) if name.startswith("batch."))])
    stages: dict[str, Settings] = {"data": {}, kind: {}, "gguf": {}, "eval": {}}
    for name, value in chosen.items():
        stage, _, short = name.rpartition(".")
        stages[stage or kind][short] = value
    if kind == "gguf":
        return {"gguf": {"outputs": "merged"}}
    if kind == "orpo":
        stages["orpo"]["max_length"] = stages["data"]["max_length"]
        stages["data"]["preference_eval_share"] = stages["data"]["eval_share"]
    if missing := [name for name in ("model", "dataset") if not stages["data"].get(name)]:
        raise TunebookError(f"it names no {' and no '.join(missing)}, so there is nothing to train.")
    return stages


def _flat(values: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by their dotted names; a plugin by its class."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif name == "plugins" and isinstance(value, list):
            yield from ((f"plugins.{str(one).rpartition('.')[2]}", True) for one in value)
        else:
            yield f"{prefix}{name}", value


def _setting(dialect: dict[str, Any], name: str, value: Any) -> Found:
    """What becomes of one setting. Raises TunebookError where the job could not do without it."""
    text = str(value).lower() if isinstance(value, bool) else display.clean(value)[:100]
    off = value in (None, False, "", 0, "none", "null", [], {}) or (value == 1 and name.endswith("_size"))
    rule = dialect["keys"].get(name)
    if rule is None:
        groups = ((g, why, pattern) for g in GROUPS for why, patterns in dialect[g].items() for pattern in patterns)
        group, why = next(((g, why) for g, why, pattern in groups if fnmatchcase(name, pattern)), ("lost", ""))
        if not why and (near := difflib.get_close_matches(name, dialect["keys"], n=1, cutoff=0.85)):
            raise TunebookError(f"there is no setting {display.clean(name)[:80]!r}; did you mean {near[0]}?")
        if group == "refused" and not off:
            raise TunebookError(f"{name} is {text}, and {why}.")
        return (FREE, "off", {}) if off else (GROUPS[group], why or "a setting that is not known here", {})
    if value in (None, "", []):
        return FREE, "not set", {}
    for why, pattern in dialect["refused_models"].items() if name in dialect["model"] else ():
        if re.search(pattern, text):
            raise TunebookError(f"the model {text} {why}.")
    rule = {"to": rule} if isinstance(rule, str) else rule
    if rule.get("to") == "warmup_steps" and type(value) is float and value < 1:  # as transformers 5 reads it
        rule = {"to": "warmup_ratio"}
    listed = isinstance(value, list) and rule.get("to") in LISTS
    found, why = ",".join(map(str, value)) if listed else value, rule.get("why", "")
    if text in rule.get("cases", ()):
        found = rule["cases"][text]
        found, why = found if isinstance(found, list) else (found, why)
    elif "refuse" in rule:
        raise TunebookError(f"{name} is {text}, and {rule['refuse']}.")
    elif "near" in rule or "lost" in rule:
        return (NEAR if "near" in rule else LOST), rule.get("near") or rule["lost"], rule.get("also", {})
    elif "to" not in rule:
        return LOST, f"it takes {' or '.join(rule['cases'])}", {}
    if str(rule.get("to")).startswith("batch.") and type(value) is not int:
        raise TunebookError(f"{name} is {text}, which is not a valid whole number.")
    sets = found if isinstance(found, dict) else {rule["to"]: found}
    sets |= {rule["twice"]: 2 * value} if "twice" in rule and type(value) is int else {}
    same = ", ".join(f"{ours} = {display.plain(one)}" for ours, one in sets.items()) or "as it is here"
    return NEAR if why else TAKEN, why or same, sets


def _rows_of(dialect: dict[str, Any], name: str, given: Settings, file: Path) -> Found | None:
    """What becomes of a setting that names rows; None for any other."""
    value, to = given[name], dialect["rows"].get(name)
    if not value or to is None:
        return None
    if "types" in dialect:
        return _typed_sets(dialect, to, value if isinstance(value, list) else [value])
    if name == "train_dataset":
        described = _beside(file, str(value))
        entries = [
            one for one in (parameter.read_file(described) if described else {}).values() if isinstance(one, dict)
        ]
        if wrong := [one.get("converter") for one in entries if one.get("converter") not in ("alpaca", "sharegpt")]:
            raise TunebookError(f"{name} {value} is of {display.plain(wrong[0])} rows; alpaca and sharegpt are read.")
        found = ",".join(str(_beside(file, str(one.get("path"))) or one.get("path")) for one in entries)
        return TAKEN if found else NEAR, found or "not at hand: name files", {to: found or str(value)}
    names = given.get("dataset", "") if name == "max_samples" else value
    names = [str(one).strip() for one in (names if isinstance(names, list) else str(names).split(","))]
    if name == "max_samples" and len(names) == 1:
        return TAKEN, f"{to} = {value}", {to: value}
    if name == "max_samples":
        return NEAR, "a seeded choice of each set", {"data.caps": ",".join(f"{one}={value}" for one in names)}
    sets: Settings = {to: ",".join(names)}
    info = _beside(file, f"{given.get('dataset_dir') or 'data'}/{sources.INFO}")
    if info is None:
        return NEAR, f"its {sources.INFO} is not at hand: name it as dataset_info, or name files", sets
    sources.find(sets[to], str(info))  # raises for pictures, scripts and files that are not there
    return TAKEN, f"{to} = {sets[to]}", {**sets, "data.dataset_info": str(info)}


def _beside(file: Path, name: str) -> Path | None:
    """A file that a job names, which is relative to its trainer's own folder: here or above the job's file."""
    return next((at / name for at in (Path(), *file.absolute().parents) if os.path.isfile(at / name)), None)


def _typed_sets(dialect: dict[str, Any], to: str, entries: list[Any]) -> Found:
    """Axolotl's sets, which say of what type their rows are and in which columns they stand."""
    specs, why, columns, types = list[str](), list[str](), set[str](), dict[str, Settings]()
    for entry in ({"path": one} if isinstance(one, str) else one for one in entries):
        kind = entry.get("type") or "" if isinstance(entry, dict) else None
        own = {**entry, **kind} if isinstance(kind, dict) else entry
        head = re.split(r"[.:]", kind)[0] if isinstance(kind, str) else ""
        texts = isinstance(kind, (str, dict)) and all(isinstance(own.get(c) or "", str) for c in dialect["columns"])
        if not texts or not isinstance(own.get("path"), str) or head not in dialect["types"] or own.get("data_files"):
            said = "data_files" if texts and own.get("data_files") else display.plain(kind or entry)[:80]
            raise TunebookError(
                f"a set is given by {display.clean(said)}, which is not read here; prepare its rows as files."
            )
        types[head] = dialect["types"][head]
        fields = {part: own[key] for key, part in dialect["columns"].items() if own.get(key)}
        unlike = {part: c for part, c in fields.items() if c not in (*formats.SYNONYMS.get(part, ()), "text")}
        columns.add(",".join(f"{part}={column}" for part, column in unlike.items()))
        split = "" if own.get("split") in (None, "train") else own["split"]
        revision = f"@{own['revision']}" if own.get("revision") else ""
        specs.append(f"{own['path']}{revision}:{own.get('name') or ''}:{split}".rstrip(":"))
        more = [key for key, value in own.items() if value and key not in (*dialect["set_keys"], *dialect["columns"])]
        why += [f"{key} of {own['path']} is not read" for key in more]
    if len(columns) > 1:
        raise TunebookError(f"sets have different columns ({'; '.join(columns)}); describe them in {sources.INFO}.")
    if len({one.get("data.format") for one in types.values()}) > 1:
        raise TunebookError(f"sets are of the types {', '.join(types)}, and rows have one format; import one for each.")
    sets = types[head] | ({"data.columns": columns.pop()} if columns != {""} else {})
    if any(one != types[head] for one in types.values()):
        why.append(f"sets of the types {', '.join(filter(None, types))} are written alike, by the last one's template")
    sets[to] = ",".join(specs)
    return NEAR if why else TAKEN, "; ".join(why) or f"{to} = {sets[to]}", sets


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tunebook import", description="Write a recipe from another trainer's YAML.")
    parser.add_argument("file", help="a LLaMA-Factory or Axolotl YAML")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that it was made for: its batch is theirs together")
    parser.add_argument(
        "--out", default="", help="the recipe's folder; default: notebooks/recipes/ and the file's name"
    )
    given = parser.parse_args(arguments)
    made = read(given.file, max(1, given.gpus))
    name = re.sub(r"[^\w.-]+", "-", Path(given.file).stem)
    folder = made.write(Path(given.out) if given.out else machine.PROJECT / "notebooks" / "recipes" / name)
    counts = ", ".join(f"{sum(row[2] == kind for row in made.rows)} {kind}" for kind in (TAKEN, NEAR, LOST, FREE))
    display.say(made, f"\n{counts}. Written to {folder}; `tunebook check {folder}` looks at it.")
    return 0
