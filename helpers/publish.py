"""Publish a run to the Hugging Face hub: adapter, merged model and GGUF files, each in a repository with its own card.

    python -m helpers.publish myrun user/name                      lists every file and size, uploads nothing
    python -m helpers.publish myrun user/name --yes                uploads; the same command resumes a killed upload
    python -m helpers.publish myrun user/name --only gguf --public --yes

Repositories: user/name (merged), user/name-lora (adapter, the one that was exported), user/name-GGUF. Only files that a
finished stage's manifest lists are published, and only while they still have the hashes written there. The token comes
from `hf auth login` or HF_TOKEN; it is never a parameter, never printed and never stored.
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

from helpers import display, runs
from helpers.errors import TunebookError
from helpers.report import facts, model_card

SUFFIX = {"adapter": "-lora", "merged": "", "gguf": "-GGUF"}
KINDS = tuple(SUFFIX)
RESUME = "The same command resumes the upload."


@dataclass(frozen=True)
class Repository:
    """What one repository on the hub will hold. files: (name there, file here, bytes); card: text of its README.md."""

    kind: str
    name: str
    files: list[tuple[str, Path, int]]
    card: str
    base: str = ""  # the base model's id on the hub, "" when it has none


@dataclass(frozen=True)
class Published:
    """What was planned or done. urls: repository → address, empty after a dry run."""

    repositories: list[Repository]
    urls: dict[str, str]

    def __repr__(self) -> str:
        lines = []
        for repository in self.repositories:
            files = [*repository.files, ("README.md", Path(), len(repository.card.encode()))]
            total = display.size(sum(size for *_, size in files))
            lines.append(f"{repository.name} ({repository.kind}): {len(files)} files, {total}")
            lines += [f"  {display.size(size):>9}  {name}" for name, _, size in files]
            lines += [f"  → {self.urls[repository.name]}"] if repository.name in self.urls else []
        return "\n".join(lines + ([] if self.urls else ["Nothing was uploaded (dry run)."]))


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

    name: "user/name" of the merged model's repository; the others add -lora and -GGUF. what: of "adapter", "merged",
    "gguf"; kinds that the run does not have are left out. licence, data_licence: written into the cards. An
    interrupted upload is resumed by the same call.
    """
    what = tuple(what)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,60}/[A-Za-z0-9][\w.-]{0,80}", name) or ".." in name or "--" in name:
        raise TunebookError(
            f"{name!r} is not a valid repository name; write user/name with letters, digits, '-', '_' and '.'."
        )
    if wrong := [w for w in what if w not in KINDS]:
        raise TunebookError(f"There is nothing called {', '.join(wrong)} to publish; choose out of {', '.join(KINDS)}.")
    repositories = plan(run, name, what, licence, data_licence)
    return Published(repositories, {} if dry_run else {r.name: _upload(run, r, private) for r in repositories})


def plan(
    run: str, name: str, what: Iterable[str] = KINDS, licence: str = "", data_licence: str = ""
) -> list[Repository]:
    """Files, sizes and cards of every repository; every file is checked against its manifest's hash."""
    known = facts.gather(run)
    found = []
    for kind in what:
        stage = known.exported if kind == "adapter" else "gguf"
        if stage not in known.stages:
            continue
        manifest = runs.load(run, stage)  # verifies every hash
        files = [
            (inside, manifest.path / artifact, entry["bytes"])
            for artifact, entry in manifest.data["artifacts"].items()
            if (inside := _name_there(kind, artifact)) and inside != "README.md"
        ]
        if files:
            card = model_card.render(known, kind, name + SUFFIX[kind], licence, data_licence)
            found.append(Repository(kind, name + SUFFIX[kind], sorted(files), card, known.hub_base))
    if not found:
        raise TunebookError(
            f"The run {run!r} has nothing to publish of {', '.join(what)}; finish 02_qlora_sft for the adapter and "
            "04_gguf_export for the merged model and the GGUF files."
        )
    return found


def _name_there(kind: str, artifact: str) -> str:
    """An artifact's name in the repository; "" when it does not belong there."""
    if kind == "gguf":
        wanted = artifact.endswith(".gguf") or artifact in ("Modelfile", "fidelity.json", "fidelity.png")
        return artifact if wanted and "/" not in artifact else ""
    return artifact.removeprefix(f"{kind}/") if artifact.startswith(f"{kind}/") else ""


# ---------------------------------------------------------------- upload


def _upload(run: str, repository: Repository, private: bool) -> str:
    """Create the repository and commit its files; a blob that the hub has is not sent again. Returns its address."""
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, get_token

    token, name = get_token(), repository.name
    if not token:
        raise TunebookError(
            "No token for the hub is on this machine; run `hf auth login`, or set HF_TOKEN in the environment."
        )
    content: dict[str, Path | bytes] = {there: here for there, here, _ in repository.files}
    content["README.md"] = repository.card.encode()
    if repository.base and isinstance(config := content.get("adapter_config.json"), Path):
        named = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": repository.base}
        content["adapter_config.json"] = json.dumps(named, indent=2, sort_keys=True).encode()  # no path of this machine
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    api = HfApi(token=token, endpoint=endpoint)
    try:
        url = api.create_repo(name, repo_type="model", private=private, exist_ok=True)
        adds = [CommitOperationAdd(there, str(c) if isinstance(c, Path) else c) for there, c in content.items()]
        api.create_commit(name, adds, commit_message=f"{repository.kind} of run {run}")
        return str(url)
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        said = f"The hub answered {status} for {name}: {_without(token, error)}. {RESUME}"
        if status in (401, 403):
            said = (
                f"The hub refused to write to {name} (status {status}): the token is wrong, expired, or has no write "
                "access there; make a new one and run `hf auth login`."
            )
    except (httpx.TransportError, ConnectionError) as error:
        said = f"The hub at {endpoint} cannot be reached ({_without(token, error)}). {RESUME}"
    except (OSError, RuntimeError, ValueError) as error:
        said = f"The upload to {name} broke off: {_without(token, error)}. {RESUME}"
    raise TunebookError(said)


def _without(token: str, error: BaseException) -> str:
    """An error in one line without the token; it is not kept as a cause either, for it may carry the token."""
    return " ".join(str(error).replace(token, "***").split())[:300]


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
    given = parser.parse_args(arguments)
    what = [w.strip() for w in given.only.split(",") if w.strip()]
    try:
        print(publish(given.run, given.name, what, not given.public, not given.yes, given.licence, given.data_licence))
    except TunebookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
