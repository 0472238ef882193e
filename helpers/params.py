"""Every notebook parameter, once: its name, default, bounds, unit and help.

The `@param` comments, the sliders, the names that papermill takes and the checks all come from `STAGES` below.
`cell(stage)` renders a notebook's parameters cell from it, `resolve` checks values against it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from helpers.errors import TunebookError

Value = str | int | float | bool


@dataclass(frozen=True)
class Param:
    """One parameter. Its type is that of `default`; "" stands for "none" or "choose for me" as the help says.

    low, high: inclusive bounds of a number; step: the slider's step; log: a slider on a logarithmic scale.
    choices: the only values allowed. advanced: not in the notebook's form, yet taken by papermill and shown folded in the panel.
    """

    name: str
    default: Value
    help: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    choices: tuple[Value, ...] | None = None
    advanced: bool = False

    def check(self, value: Any) -> Value:
        """`value` as this parameter's type. Raises TunebookError naming the parameter, the value and what is allowed."""
        kind, given = type(self.default), value
        if kind is bool and isinstance(value, str) and value.strip().lower() in ("true", "false"):
            value = value.strip().lower() == "true"
        elif kind in (int, float) and not isinstance(value, bool) and isinstance(value, (str, int, float)):
            value = self._number(value, kind)
        elif kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        elif kind is str and value is None:
            value = ""
        if type(value) is not kind:
            raise TunebookError(f"Parameter {self.name} is {given!r}, which is no {self.kind}; it takes {self.range()}.")
        if kind is float and not math.isfinite(value):
            raise TunebookError(f"Parameter {self.name} is {given!r}; it takes {self.range()}.")
        if self.choices is not None and value not in self.choices:
            raise TunebookError(f"Parameter {self.name} is {given!r}; it takes {self.range()}.")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise TunebookError(f"Parameter {self.name} is {given!r}, out of bounds; it takes {self.range()}.")
        return value

    @staticmethod
    def _number(value: str | int | float, kind: type) -> Any:
        try:
            number = float(value)
        except ValueError:
            return value
        if kind is float:
            return number
        return int(number) if number.is_integer() else value

    @property
    def kind(self) -> str:
        return {bool: "true/false value", int: "whole number", float: "number", str: "text"}[type(self.default)]

    def range(self) -> str:
        """What is allowed, for people: "a whole number from 4 to 128"."""
        if self.choices is not None:
            return "one of " + ", ".join(repr(c) for c in self.choices)
        bounds = [f"from {self.low:g}" if self.low is not None else "", f"to {self.high:g}" if self.high is not None else ""]
        return " ".join(filter(None, [f"a {self.kind}", *bounds, self.unit]))

    def line(self) -> str:
        """The parameter's line in a notebook: a plain literal with Colab's form comment."""
        if type(self.default) is bool:
            form = '{type:"boolean"}'
        elif self.choices is not None:
            form = "[" + ", ".join(_literal(c) for c in self.choices) + "]"
        elif isinstance(self.default, str):
            form = '{type:"string"}'
        elif self.step and not self.log and self.low is not None and self.high is not None:
            form = f'{{type:"slider", min:{self.low:g}, max:{self.high:g}, step:{self.step:g}}}'
        else:
            form = '{type:"number"}' if isinstance(self.default, float) else '{type:"integer"}'
        return f"{self.name} = {_literal(self.default)}  # @param {form}"


def _literal(value: Value) -> str:
    import json
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


RUN = Param("run", "default", "Name of the run: its folder under runs/")
MODEL_AGAIN = Param("model", "", "Base model; empty: the model that the data was prepared for", advanced=True)

STAGES: dict[str, tuple[Param, ...]] = {
    "data": (
        RUN,
        Param("model", "HuggingFaceTB/SmolLM2-135M-Instruct", "Base model: hub id or local folder; its tokenizer and template render the data"),
        Param("dataset", "datasets/atlas_train.jsonl", "Training data: files, folders, globs or hub ids, separated by commas"),
        Param("format", "auto", "Shape of the rows", choices=("auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text",
                                                            "preference", "kto", "context_qa")),
        Param("test_dataset", "datasets/atlas_test.jsonl", "Held-out questions for evaluation; empty: a split of the training data"),
        Param("preference_dataset", "datasets/atlas_preference.jsonl", "Preference pairs; empty: none"),
        Param("database", "datasets/atlas.sqlite", "SQLite database that answers are executed on; empty: none"),
        Param("max_length", 512, "Longest row", unit="tokens", low=16, high=131072, step=16),
        Param("seed", 17, "Seed of every random choice", low=0, high=2**31 - 1),
    ),
    "sft": (
        RUN,
        MODEL_AGAIN,
        Param("rank", 16, "Rank r of the LoRA adapter", low=1, high=256, step=1),
        Param("alpha", 32, "LoRA's scaling numerator alpha", low=1, high=512, step=1),
        Param("learning_rate", 1e-3, "Peak learning rate", low=1e-7, high=1e-1, log=True),
        Param("seed", 17, "Seed of every random choice", low=0, high=2**31 - 1),
    ),
    "orpo": (
        RUN,
        MODEL_AGAIN,
        Param("seed", 17, "Seed of every random choice", low=0, high=2**31 - 1),
    ),
    "gguf": (
        RUN,
        Param("quantizations", "q8_0,q4_k_m", "Quantisation types, separated by commas"),
    ),
    "eval": (
        RUN,
        Param("limit", 0, "Questions per contender; 0: all", low=0, high=10**6),
        Param("seed", 17, "Seed of the bootstrap", low=0, high=2**31 - 1),
    ),
}


class Params:
    """A stage's parameters: read as attributes, checked again whenever one is set."""

    def __init__(self, stage: str, values: Mapping[str, Value]):
        object.__setattr__(self, "stage", stage)
        object.__setattr__(self, "_values", dict(values))

    def __getattr__(self, name: str) -> Value:
        try:
            return object.__getattribute__(self, "_values")[name]
        except KeyError:
            raise AttributeError(f"the {self.stage} stage has no parameter {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._values[name] = find(self.stage, name).check(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def as_dict(self) -> dict[str, Value]:
        return dict(self._values)

    def changed(self) -> dict[str, Value]:
        """Only what differs from the defaults."""
        return {n: v for n, v in self._values.items() if v != find(self.stage, n).default}

    def _repr_html_(self) -> str:
        from helpers.notebook import table
        rows = [(p.name, self._values[p.name], p.unit, "" if self._values[p.name] == p.default else f"default {p.default!r}", p.help)
                for p in STAGES[self.stage]]
        return table(rows, ("parameter", "value", "unit", "changed", "meaning"))

    def __repr__(self) -> str:
        return "\n".join(f"{n} = {v!r}" for n, v in self._values.items())


def find(stage: str, name: str) -> Param:
    """The parameter of that name. Raises TunebookError with the nearest names when there is none."""
    for param in STAGES[stage]:
        if param.name == name:
            return param
    near = difflib.get_close_matches(name, [p.name for p in STAGES[stage]], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "its parameters are " + ", ".join(p.name for p in STAGES[stage]) + "."
    raise TunebookError(f"The {stage} stage has no parameter {name!r}; {hint}")


def resolve(stage: str, given: Mapping[str, Any] | None = None) -> Params:
    """The defaults of `stage` with `given` laid over them, every value checked."""
    if stage not in STAGES:
        raise TunebookError(f"There is no stage {stage!r}; the stages are {', '.join(STAGES)}.")
    values = {p.name: p.default for p in STAGES[stage]}
    for name, value in (given or {}).items():
        values[name] = find(stage, name).check(value)
    return Params(stage, values)


def read_globals(stage: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """A notebook's parameters among its globals. A plain value under another name is taken for a misspelt parameter."""
    plain = {n: v for n, v in namespace.items() if not n.startswith("_") and n not in ("In", "Out")
             and (v is None or isinstance(v, (str, int, float, bool, list, dict, tuple)))}
    for name in plain:
        find(stage, name)
    return plain


def cell(stage: str) -> str:
    """Source of the notebook's parameters cell."""
    return "\n".join(["# @title Parameters", *(p.line() for p in STAGES[stage] if not p.advanced)])
