"""Publish a run to the Hugging Face hub: adapter, merged model and GGUF files, each in a repository with a card of its own.

    python -m helpers.publish myrun user/name                      lists every file and size, uploads nothing
    python -m helpers.publish myrun user/name --yes                uploads; the same command goes on where a killed one stopped
    python -m helpers.publish myrun user/name --only gguf --public --yes

Repositories: user/name (merged), user/name-lora (adapter), user/name-GGUF. Only files that a finished stage's manifest lists are
published, and only while they still have the hashes written there. The token comes from `huggingface-cli login` or HF_TOKEN; it
is never a parameter, never printed and never stored.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import runs
from helpers.errors import TunebookError

KINDS = ("adapter", "merged", "gguf")
SUFFIX = {"adapter": "-lora", "merged": "", "gguf": "-GGUF"}


@dataclass(frozen=True)
class Repository:
    """What one repository on the hub will hold. files: (name there, file here, bytes); card: text of its README.md."""

    kind: str
    name: str
    files: list[tuple[str, Path, int]]
    card: str

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size in self.files) + len(self.card.encode())


@dataclass(frozen=True)
class Published:
    """What was planned or done. urls: repository -> address, empty after a dry run."""

    repositories: list[Repository]
    urls: dict[str, str]

    def __repr__(self) -> str:
        from helpers.report.markup import size

        lines = []
        for repository in self.repositories:
            lines.append(
                f"{repository.name} ({repository.kind}): {len(repository.files) + 1} files, {size(repository.bytes)}"
            )
            lines += [
                f"  {size(bytes_):>9}  {name}"
                for name, _, bytes_ in [*repository.files, ("README.md", Path(), len(repository.card.encode()))]
            ]
            if url := self.urls.get(repository.name):
                lines.append(f"  → {url}")
        if not self.urls:
            lines.append("Nothing was uploaded (dry run).")
        return "\n".join(lines)


def publish(
    run: str,
    name: str,
    what: Iterable[str] = KINDS,
    private: bool = True,
    dry_run: bool = True,
    licence: str = "",
    data_licence: str = "",
) -> Published:
    """Upload a run's results, or list what would be uploaded.

    name: "user/name" of the merged model's repository; the others add -lora and -GGUF. what: of "adapter", "merged", "gguf"; kinds
    the run does not have are left out unless they alone were asked for. licence, data_licence: written into the cards.

    Raises TunebookError for a run without such results, altered files, a bad name, a missing or refused token, or a hub that
    cannot be reached; an interrupted upload is gone on with by the same call.
    """
    what = tuple(what)
    _check(name, what)
    repositories = plan(run, name, what, licence, data_licence)
    if dry_run:
        return Published(repositories, {})
    return Published(repositories, {r.name: _upload(run, r, private) for r in repositories})


def plan(
    run: str, name: str, what: Iterable[str] = KINDS, licence: str = "", data_licence: str = ""
) -> list[Repository]:
    """Files, sizes and cards of every repository; nothing is uploaded. Every file is checked against its manifest's hash."""
    from helpers.report import facts, model_card

    known = facts.gather(run)
    found = []
    for kind in what:
        stage, prefix = _source(known, kind)
        if stage is None:
            continue
        manifest = runs.load(run, stage)  # verifies every hash
        files = []
        for artifact, entry in manifest.data["artifacts"].items():
            inside = _name_there(kind, artifact, prefix)
            if inside and inside != "README.md":
                files.append((inside, manifest.path / artifact, entry["bytes"]))
        if files:
            text = model_card.render(known, kind, name + SUFFIX[kind], licence, data_licence)
            found.append(Repository(kind, name + SUFFIX[kind], sorted(files), text))
    if not found:
        raise TunebookError(
            f"The run {run!r} has nothing to publish of {', '.join(what)}; finish 02_qlora_sft for the adapter and "
            "04_gguf_export for the merged model and the GGUF files."
        )
    return found


def _source(known: Any, kind: str) -> tuple[str | None, str]:
    """The stage that holds a kind of result, and the folder inside it."""
    if kind == "adapter":
        return next((s for s in ("orpo", "sft") if s in known.stages), None), "adapter/"
    return ("gguf" if "gguf" in known.stages else None), "merged/" if kind == "merged" else ""


def _name_there(kind: str, artifact: str, prefix: str) -> str:
    """An artifact's name in the repository; "" when it does not belong there."""
    if kind == "gguf":
        wanted = "/" not in artifact and (
            artifact.endswith(".gguf") or artifact in ("Modelfile", "fidelity.json", "fidelity.png")
        )
        return artifact if wanted else ""
    return artifact.removeprefix(prefix) if artifact.startswith(prefix) else ""


def _check(name: str, what: tuple[str, ...]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,60}/[A-Za-z0-9][\w.-]{0,80}", name) or ".." in name or "--" in name:
        raise TunebookError(f"{name!r} is no repository name; write user/name with letters, digits, '-', '_' and '.'.")
    if wrong := [w for w in what if w not in KINDS]:
        raise TunebookError(f"There is nothing called {', '.join(wrong)} to publish; choose out of {', '.join(KINDS)}.")


# ---------------------------------------------------------------- upload


def staged(run: str, repository: Repository) -> Path:
    """A folder that looks like the repository: links to the run's own files, the card, and an adapter's config with the hub's base id.

    It stays at runs/<run>/publish/<kind>: links cost no room, and the same call finds the same files again.
    """
    folder = runs.folder(run, "data").parent / "publish" / repository.kind
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {name for name, _, _ in repository.files} | {"README.md"}
    for old in [p for p in folder.rglob("*") if p.is_symlink() or p.is_file()]:
        inside = old.relative_to(folder).as_posix()
        if inside not in wanted:
            old.unlink()
    for name, source, _ in repository.files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "adapter_config.json":
            _write_if_new(target, _public_config(source, run))
        elif not (target.is_symlink() and target.resolve() == source.resolve()):
            target.unlink(missing_ok=True)
            target.symlink_to(source.resolve())
    _write_if_new(folder / "README.md", repository.card)
    return folder


def _public_config(source: Path, run: str) -> str:
    """An adapter's config whose base is the model's hub id: a path of this machine would load nowhere else."""
    from helpers.report import facts

    config = json.loads(source.read_text(encoding="utf-8"))
    name = str(facts.gather(run).model.get("name") or "")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        config["base_model_name_or_path"] = name
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _write_if_new(path: Path, text: str) -> None:
    """Write a small file atomically; an equal one is left alone."""
    if path.is_symlink() or not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.unlink(missing_ok=True)
        runs.write_atomic(path, text)


def _upload(run: str, repository: Repository, private: bool) -> str:
    from huggingface_hub import HfApi, errors, get_token

    token = get_token()
    if not token:
        raise TunebookError(
            "No token for the hub is on this machine; run `huggingface-cli login`, or set HF_TOKEN in the environment."
        )
    folder = staged(run, repository)
    api = HfApi(token=token, endpoint=os.environ.get("HF_ENDPOINT") or None)
    again = "The same command goes on where this one stopped."
    try:
        url = api.create_repo(repository.name, repo_type="model", private=private, exist_ok=True)
        # resumable by itself: what is committed is skipped, what the hub has is not sent again, large folders go in several commits
        api.upload_folder(
            repo_id=repository.name,
            folder_path=folder,
            repo_type="model",
            commit_message=f"{repository.kind} of run {run}",
        )
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise TunebookError(
                f"The hub refused to write to {repository.name} (status {status}): the token is wrong, expired, or has no "
                "write access there; make a new one and run `huggingface-cli login`."
            ) from _quiet(error, token)
        raise TunebookError(
            f"The hub answered {status or 'with an error'} for {repository.name}: {_hide(str(error), token)[:300]}. {again}"
        ) from _quiet(error, token)
    except (OSError, RuntimeError, ValueError) as error:
        raise TunebookError(
            f"The upload to {repository.name} broke off: {_hide(str(error), token)[:300]}. {again}"
        ) from _quiet(error, token)
    return str(url)


def _hide(text: str, token: str) -> str:
    return " ".join(text.replace(token, "***").split())


def _quiet(error: BaseException, token: str) -> BaseException | None:
    """The error as a cause for the traceback, unless it carries the token."""
    return None if token in str(error) else error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.publish", description="Publish a run to the hub. Without --yes nothing is uploaded."
    )
    parser.add_argument("run")
    parser.add_argument("name", help="user/name of the repository")
    parser.add_argument("--only", default=",".join(KINDS), help="adapter, merged, gguf; separated by commas")
    parser.add_argument("--public", action="store_true", help="make new repositories public (default: private)")
    parser.add_argument("--licence", default="", help="of the base model, for the card (default: as its own card says)")
    parser.add_argument("--data-licence", default="", help="of the training data, for the card")
    parser.add_argument("--yes", action="store_true", help="upload")
    options = parser.parse_args(arguments)
    try:
        print(
            publish(
                options.run,
                options.name,
                [w.strip() for w in options.only.split(",") if w.strip()],
                private=not options.public,
                dry_run=not options.yes,
                licence=options.licence,
                data_licence=options.data_licence,
            )
        )
    except TunebookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
