"""LLaMA-Factory's `dataset_info.json`, read as it is: which file or hub set a name means, and how its rows are shaped.

An entry's `columns` replaces the whole default mapping: a column that it does not list plays no part, even when the file
has it (`{"prompt", "response"}` leaves `input` out). That is how LLaMA-Factory reads it; here the unused columns are named.
Format: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers.data.formats import Shape
from helpers.errors import TunebookError

FILE = "dataset_info.json"
MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class Entry:
    """One named set: where it is (`file` beside dataset_info.json, or `hub`), its shape, and how much of it to take.

    num_samples: rows to take from the start, 0 for all. media: columns of pictures, videos or sounds, which can't be read here.
    problem: why this set cannot be read, as a sentence; the others of the file can.
    """

    name: str
    shape: Shape
    file: Path | None = None
    hub: str = ""
    subset: str = ""
    split: str = "train"
    folder: str = ""
    num_samples: int = 0
    media: tuple[str, ...] = ()
    problem: str = ""


def read(path: Path) -> dict[str, Entry]:
    """Every set that the file describes. Raises TunebookError for a file that is not such a JSON object."""
    try:
        described = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise TunebookError(
            f"{path} cannot be read as dataset_info.json ({error}); it should be a JSON object of dataset names."
        ) from None
    if not isinstance(described, dict) or not all(isinstance(value, dict) for value in described.values()):
        raise TunebookError(
            f"{path} is not a dataset_info.json; a JSON object of dataset names, each with an object, was expected."
        )
    return {name: _entry_or_problem(name, value, path) for name, value in described.items()}


def beside(file: Path) -> Entry | None:
    """The entry that describes `file` in the dataset_info.json of its folder, if there is one."""
    info = file.parent / FILE
    if not info.is_file():
        return None
    return next(
        (
            entry
            for entry in read(info).values()
            if entry.file is not None and entry.file.name == file.name and entry.file == file
        ),
        None,
    )


def _entry_or_problem(name: str, described: dict[str, Any], path: Path) -> Entry:
    try:
        return _entry(name, described, path)
    except TunebookError as error:
        problem = str(error)
    except (AttributeError, TypeError, ValueError) as error:
        problem = f"Dataset {name!r} in {path} is described in another way than LLaMA-Factory reads ({error})."
    return Entry(name, Shape("text"), problem=problem)


def _entry(name: str, described: dict[str, Any], path: Path) -> Entry:
    formatting = described.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise TunebookError(
            f"Dataset {name!r} in {path} has formatting {formatting!r}; 'alpaca', 'sharegpt' or 'openai' was expected."
        )
    file_name, columns, tags = described.get("file_name"), described.get("columns"), described.get("tags")
    hub = described.get("hf_hub_url", "")
    if not file_name and not hub and not described.get("ms_hub_url") and not described.get("om_hub_url"):
        script = " (a script would have to run code, which data never does here)" if described.get("script_url") else ""
        raise TunebookError(f"Dataset {name!r} in {path} names no file_name and no hf_hub_url{script}.")
    shape = _shape(formatting, columns, tags, bool(described.get("ranking")))
    return Entry(
        name=name,
        shape=replace(shape, exact=True),
        file=path.parent / file_name if file_name else None,
        hub=hub,
        subset=described.get("subset") or "",
        split=described.get("split") or "train",
        folder=described.get("folder") or "",
        num_samples=int(described.get("num_samples") or 0),
        media=tuple(column for part in MEDIA if (column := (columns or {}).get(part))),
    )


def _shape(formatting: str, columns: dict[str, str] | None, tags: dict[str, str] | None, ranking: bool) -> Shape:
    if columns is None:
        columns = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
    part = {
        name: columns.get(name) or ""
        for name in ("prompt", "query", "response", "history", "messages", "system", "tools", "chosen", "rejected")
    }
    label = columns.get("kto_tag") or ""
    pair = {"chosen": part["chosen"], "rejected": part["rejected"]} if ranking else {}
    if formatting in ("sharegpt", "openai"):
        role_tag, content_tag, roles = _tags(formatting, tags)
        kind = "preference" if ranking else "kto" if label else "sharegpt" if formatting == "sharegpt" else "messages"
        return Shape(
            kind,
            messages=part["messages"] or "conversations",
            system=part["system"],
            tools=part["tools"],
            label=label,
            role_tag=role_tag,
            content_tag=content_tag,
            roles=roles,
            **pair,
        )
    common = {
        "prompt": part["prompt"],
        "query": part["query"],
        "history": part["history"],
        "system": part["system"],
        "tools": part["tools"],
    }
    if ranking:
        return Shape("preference", **common, **pair)
    if not part["response"]:
        return Shape("text", prompt=part["prompt"])
    return Shape("kto" if label else "alpaca", response=part["response"], label=label, **common)


def _tags(formatting: str, tags: dict[str, str] | None) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """How roles are spelt. Like `columns`, a `tags` block replaces the defaults; the last spelling is ours, as a courtesy."""
    if tags is None:
        if formatting == "openai":
            return "role", "content", Shape("messages").roles
        tags = {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "observation_tag": "observation",
            "function_tag": "function_call",
            "system_tag": "system",
        }
    meanings = {
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function_call",
        "system_tag": "system",
    }
    roles = {tags[tag]: role for tag, role in meanings.items() if tags.get(tag)}
    if "system_tag" not in tags:
        roles.setdefault("system", "system")
    return tags.get("role_tag") or "from", tags.get("content_tag") or "value", tuple(roles.items())
