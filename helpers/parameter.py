"""One parameter: its name, type, default, bounds, unit and help; how a dataclass field becomes one; files of them."""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from helpers import machine
from helpers.errors import TunebookError

V = TypeVar("V", str, int, float, bool)
MAX_BYTES, MAX_DEPTH = 2**18, 20  # of a YAML file
MAX_TEXT = 100_000  # characters of one value


@dataclass(frozen=True)
class Param:
    """One parameter. Its type is that of `default`; "" stands for "none" or "choose for me" as the help says.

    low, high: inclusive bounds of a number (its default may lie outside); grid: useful values, those of the slider, or
    step: its step from low to high; any other value within the bounds can be typed. choices: the only values allowed.
    advanced: not in the notebook's form, yet taken by papermill and folded in the panel.
    """

    name: str
    default: Any
    help: str
    unit: str = ""
    low: float = 0
    high: float = math.inf
    step: float = 0
    grid: tuple[float, ...] = ()
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
        elif value is False and "off" in self.choices:  # what YAML makes of it
            value = "off"
        elif kind is float and type(value) is int:
            value = float(value) if abs(value) < 1e300 else value
        elif kind is int and type(value) is float and value.is_integer():
            value = int(value)
        if isinstance(value, str) and (fault := _unusable(value)):
            raise TunebookError(f"Parameter {self.name} {fault}.")  # without the value: it may hold a secret
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            said = f"which is not a valid {self.kind}"
        elif self.choices and value not in self.choices:
            said = "which is not a valid choice"
        elif kind in (int, float) and not self.low <= value <= self.high and value != self.default:
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
        low, high, own = (f"{v:,}" if type(v) is int else self.text(v) for v in (self.low, self.high, self.default))
        bounds = f" from {low} to {high}" if type(self.default) in (int, float) else ""
        if bounds and not self.low <= self.default <= self.high:
            bounds += f", or {own}"
        return f"a {self.kind}{bounds}" + (f" {self.unit}" if self.unit else "")

    @property
    def marks(self) -> tuple[float, ...]:
        """The values that its slider stops at; none where it has no slider."""
        if self.grid or not self.step:
            return self.grid
        count = round((self.high - self.low) / self.step)
        return tuple(round(self.low + number * self.step, 9) for number in range(count + 1))

    def text(self, value: Any) -> str:
        """A value as a person types it: 0.0002, 2e-5, 1 for 1.0."""
        short = isinstance(value, float) and float(f"{value:g}") == value
        return f"{value:g}".replace("e-0", "e-") if short else str(value)

    def line(self) -> str:
        """The parameter's lines in a notebook: its meaning, and a plain literal with Colab's form comment."""
        kind = {bool: "boolean", int: "integer", float: "number", str: "string"}[type(self.default)]
        form = f'{{type:"{kind}"}}'
        if self.choices:
            form = json.dumps(self.choices)
        elif self.marks and (self.step or len(self.marks) > 50):
            first, second, *_, last = self.marks
            form = f'{{type:"slider", min:{first:g}, max:{last:g}, step:{second - first:g}}}'
        elif self.marks:  # a list, into which another value can be typed
            form = json.dumps([self.text(value) for value in self.marks]) + ' {type:"raw", allow-input: true}'
        literal = json.dumps(self.default, ensure_ascii=False) if kind == "string" else repr(self.default)
        return f"# @markdown {self.meaning}\n{self.name} = {literal}  # @param {form}"

    @property
    def meaning(self) -> str:
        return self.help + (f" ({self.unit})" if self.unit else "")


def _unusable(text: str) -> str:
    """Why no parameter can be this text; "" for any other."""
    if len(text) > MAX_TEXT:
        return f"has {len(text):,} characters; {MAX_TEXT:,} are the most"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", text):
        return "holds control characters or half of a character; take them out"
    if re.search(r"://[^/\s,]*@", text):
        return (
            "names a user or a password inside an address, which would stand in params.yaml, the report and the model "
            "card; take it out and give the key in an environment variable (endpoint_key_name)"
        )
    return ""


def check_run(name: str) -> str:
    """The name of a run, which is a folder's. Raises TunebookError for one that would leave the runs folder."""
    reserved = r"(?i:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)"  # by Windows, where a drive's folders may be read too
    if not re.fullmatch(rf"(?!{reserved})[A-Za-z0-9][A-Za-z0-9._-]{{0,79}}(?<!\.)", name):
        raise TunebookError(
            f"The run name {name[:40]!r} cannot name a folder; use a to z, digits, '.', '_' and '-': at most 80, "
            "a letter or digit first, no '.' last, and no name that Windows keeps for itself, such as CON."
        )
    return name


def param(default: V, help: str, unit: str = "", choices: str = "", advanced: bool = False, **more: Any) -> V:
    """A dataclass field that is a parameter of the form. choices: separated by blanks; more: Param's other fields."""
    described = Param("", default, help, unit, choices=tuple(choices.split()), advanced=advanced, **more)
    return field(default=default, kw_only=True, metadata={"param": described})


def more(default: V, help: str, unit: str = "", **more: Any) -> V:
    """A `param` that is rarely needed: folded away in the panel, left out of the form."""
    return param(default, help, unit, advanced=True, **more)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter: a key is text and stands once; no aliases, no tags; dates and 1:30 stay text."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        said = "an alias (*name)" if self.check_event(yaml.AliasEvent) else f"the tag {tag}" if tag else ""
        if self.depth > MAX_DEPTH:
            said = f"lists and names nested over {MAX_DEPTH} deep"
        if said:
            raise yaml.composer.ComposerError(None, None, said.replace("tag:yaml.org,2002:", "!!"), event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in node.value:
            name = getattr(key, "value", None)
            if not isinstance(name, str) or name in found:
                said = f"the key {name[:60]!r} twice" if isinstance(name, str) else "a key that is not text"
                raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
            found[name] = self.construct_object(value, deep=True)
        return found


Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].endswith((":bool", ":null"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]{,17})$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"(?:[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)|[-+]?\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def read_file(file: str | Path) -> dict[str, Any]:
    """Names and values out of a YAML file; nothing in it runs code. Raises TunebookError for one that cannot be read,
    that repeats a key, or that holds something else."""
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"over {MAX_BYTES >> 10} KiB")
        values = yaml.load(content.decode("utf-8-sig"), Loader) or {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        mark, said = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f"line {mark.line + 1}: " if mark else ""
        raise TunebookError(
            f"The file {file} cannot be read ({where}{' '.join(str(said).split())[:200]}); name a YAML file of lines "
            "`name: value`, such as ci/params/cpu/sft.yaml."
        ) from None
    if not isinstance(values, dict):
        raise TunebookError(f"{file} holds a {type(values).__name__}; expected lines of `name: value`.")
    return values


def recipe_folder(name: str | Path) -> Path:
    """The folder of a recipe: a path, or a name in notebooks/recipes or ci/params."""
    known = [machine.PROJECT / place for place in ("notebooks/recipes", "ci/params")]
    for folder in (Path(os.path.expanduser(name)), *(place / name for place in known)):
        if os.path.isdir(folder):
            return folder
    names = sorted(folder.name for place in known for folder in place.glob("*/"))
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5) or names
    raise TunebookError(
        f"There is no recipe {str(name)[:100]!r}; name a folder of data.yaml, sft.yaml and so on, or {', '.join(near)}."
    )
