"""One parameter: its name, type, default, bounds, unit and help; how a dataclass field becomes one; files of them."""

from __future__ import annotations

import ast
import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from helpers.errors import TunebookError

V = TypeVar("V", str, int, float, bool)


@dataclass(frozen=True)
class Param:
    """One parameter. Its type is that of `default`; "" stands for "none" or "choose for me" as the help says.

    low, high: inclusive bounds of a number; step: the slider's step; log: a slider on a logarithmic scale. choices:
    the only values allowed. advanced: not in the notebook's form, yet taken by papermill and folded in the panel.
    """

    name: str
    default: Any
    help: str
    unit: str = ""
    low: float = 0
    high: float = math.inf
    step: float = 0
    log: bool = False
    choices: tuple[str, ...] = ()
    advanced: bool = False

    def check(self, given: Any) -> Any:
        """`given` as this parameter's type. Raises TunebookError with the name, the value and what is allowed."""
        kind, value = type(self.default), given
        if isinstance(value, str) and kind is not str:
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                value = ast.literal_eval(value.strip().capitalize())
        if kind is str and (value is None or type(value) in (int, float)):
            value = "" if value is None else str(value)
        elif kind is float and type(value) is int:
            value = float(value) if abs(value) < 1e300 else value
        elif kind is int and type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            said = f"which is not a valid {self.kind}"
        elif self.choices and value not in self.choices:
            said = "which is not a valid choice"
        elif kind in (int, float) and not self.low <= value <= self.high:
            said = "out of bounds"
        else:
            return value
        raise TunebookError(f"Parameter {self.name} is {str(repr(given))[:200]}, {said}; it takes {self.range()}.")

    @property
    def kind(self) -> str:
        return {bool: "true/false value", int: "whole number", float: "number", str: "text"}[type(self.default)]

    def range(self) -> str:
        """What is allowed, for people: "a whole number from 4 to 128 tokens"."""
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        bounds = f" from {self.low:g} to {self.high:g}" if type(self.default) in (int, float) else ""
        return f"a {self.kind}{bounds}" + (f" {self.unit}" if self.unit else "")

    def line(self) -> str:
        """The parameter's line in a notebook: a plain literal with Colab's form comment."""
        kind = {bool: "boolean", int: "integer", float: "number", str: "string"}[type(self.default)]
        form = f'{{type:"{kind}"}}'
        if self.choices:
            form = json.dumps(self.choices)
        elif self.step and not self.log:
            form = f'{{type:"slider", min:{self.low:g}, max:{self.high:g}, step:{self.step:g}}}'
        literal = json.dumps(self.default, ensure_ascii=False) if kind == "string" else repr(self.default)
        return f"{self.name} = {literal}  # @param {form}"


def param(default: V, help: str, unit: str = "", choices: str = "", advanced: bool = False, **more: Any) -> V:
    """A dataclass field that is a parameter of the form. choices: separated by blanks; more: Param's other fields."""
    described = Param("", default, help, unit, choices=tuple(choices.split()), advanced=advanced, **more)
    return field(default=default, kw_only=True, metadata={"param": described})


def more(default: V, help: str, unit: str = "", **more: Any) -> V:
    """A `param` that is rarely needed: folded away in the panel, left out of the form."""
    return param(default, help, unit, advanced=True, **more)


def read_file(file: str | Path) -> dict[str, Any]:
    """Names and values out of a YAML file. Raises TunebookError for one that cannot be read or holds something else."""
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, no such date
        said = " ".join(str(error).split())[:200]
        raise TunebookError(
            f"The parameter file {file} cannot be read ({said}); name a YAML file such as ci/params/cpu.yaml."
        ) from None
    if not isinstance(values, dict):
        raise TunebookError(f"{file} holds a {type(values).__name__}; expected lines of `name: value`.")
    return values
