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

from helpers import compat, display, machine, runs
from helpers.__main__ import main as tunebook
from helpers.errors import TunebookError
from helpers.params import GgufParams
from helpers.report import facts, model_card

SUFFIX = {"adapter": "-lora", "merged": "", "gguf": "-GGUF"}
GGUF_FILES = re.compile(r"[^/]+\.gguf|Modelfile|fidelity\.(json|png)")


@dataclass
class Repository:
    """What one repository on the hub will hold. files: (name there, file here, bytes); card: text of its README.md;
    base: the base model's id on the hub, "" when it has none; url: its address, "" before the upload."""

    kind: str
    name: str
    files: list[tuple[str, Path, int]]
    card: str
    base: str = ""
    url: str = ""

    def __str__(self) -> str:
        files = [(name, size) for name, _, size in self.files] + [("README.md", len(self.card.encode()))]
        total = display.size(sum(size for _, size in files))
        lines = [f"{self.name} ({self.kind}): {len(files)} files, {total}"]
        lines += [f"  {display.size(size):>9}  {name}" for name, size in files]
        return "\n".join([*lines, f"  → {self.url}" if self.url else "  Nothing was uploaded (dry run)."])


def publish(
    run: str,
    name: str,
    what: Iterable[str] = tuple(SUFFIX),
    private: bool = True,
    dry_run: bool = True,
    licence: str = "",
    data_licence: str = "",
) -> list[Repository]:
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
    if wrong := [w for w in what if w not in SUFFIX]:
        raise TunebookError(f"There is nothing called {', '.join(wrong)} to publish; choose of {', '.join(SUFFIX)}.")
    repositories = plan(run, name, what, licence, data_licence)
    for repository in repositories if not dry_run else ():
        repository.url = _upload(run, repository, private)
    return repositories


def offer(params: GgufParams) -> display.Html:
    """Notebook 04's last cell: what would be uploaded to `publish_to`; without `publish_dry_run`, the upload itself."""
    if not params.publish_to:
        return display.said("Nothing is published. To see what would be, set publish_to to user/name on the hub.")
    text = "\n".join(map(str, publish(params.run, params.publish_to, dry_run=params.publish_dry_run)))
    return display.Html(f"<pre>{display.escape(text)}</pre>", text)


def plan(
    run: str, name: str, what: Iterable[str] = tuple(SUFFIX), licence: str = "", data_licence: str = ""
) -> list[Repository]:
    """Files, sizes and cards of every repository; every file is checked against its manifest's hash."""
    known, found = facts.gather(run), []
    for kind in what:
        stage = known.exported if kind == "adapter" else "gguf"
        if stage not in known.stages:
            continue
        manifest, files = runs.load(run, stage), []  # verifies every hash
        for artifact, entry in sorted(manifest.data["artifacts"].items()):
            inside = artifact.removeprefix(f"{kind}/")
            belongs = GGUF_FILES.fullmatch(artifact) if kind == "gguf" else inside != artifact
            if belongs and inside != "README.md":
                files.append((inside, manifest.path / artifact, entry["bytes"]))
        if files:
            there = name + SUFFIX[kind]
            card = model_card.render(known, kind, there, licence, data_licence)
            found.append(Repository(kind, there, files, card, known.hub_base))
    if not found:
        raise TunebookError(
            f"The run {run!r} has nothing to publish of {', '.join(what)}; finish 02_qlora_sft for the adapter and "
            "04_gguf_export for the merged model and the GGUF files."
        )
    return found


def _upload(run: str, repository: Repository, private: bool) -> str:
    """Create the repository and commit its files; a blob that the hub has is not sent again. Returns its address."""
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    token, name = get_token(), repository.name
    if not token:
        raise TunebookError(f"No token for the hub is on this machine; {machine.login()}.")
    content: dict[str, Path | bytes] = {there: here for there, here, _ in repository.files}
    content["README.md"] = repository.card.encode()
    if repository.base and isinstance(config := content.get("adapter_config.json"), Path):
        named = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": repository.base}
        content["adapter_config.json"] = json.dumps(named, indent=2, sort_keys=True).encode()  # no path of this machine
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    compat.hub_in_time()
    api = HfApi(token=token, endpoint=endpoint)
    try:
        url = api.create_repo(name, repo_type="model", private=private, exist_ok=True)
        adds = [CommitOperationAdd(there, str(c) if isinstance(c, Path) else c) for there, c in content.items()]
        api.create_commit(name, adds, commit_message=f"{repository.kind} of run {run}")
        return str(url)
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = " ".join(str(error).replace(token, "***").split())[:300]
    # Raised out here: an error that carries the token must not be kept as this one's cause.
    if status in (401, 403):
        raise TunebookError(
            f"The hub refused to write to {name} (status {status}): the token is wrong, expired, or has no write "
            f"access there; make a new one and {machine.login()}."
        )
    found = f"answered {status} for {name}" if status else f"at {endpoint} cannot be reached, or did not take {name}"
    raise TunebookError(f"The hub {found} ({said}). The same command resumes the upload.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tunebook publish", description="Publish a run to the hub. Without --yes nothing is uploaded."
    )
    parser.add_argument("run")
    parser.add_argument("name", help="user/name of the repository")
    parser.add_argument("--only", default=",".join(SUFFIX), help="adapter, merged, gguf; separated by commas")
    parser.add_argument("--public", action="store_true", help="make new repositories public (default: private)")
    parser.add_argument("--licence", default="", help="of the base model, for the card (default: as its own card says)")
    parser.add_argument("--data-licence", default="", help="of the training data, for the card")
    parser.add_argument("--yes", action="store_true", help="upload")
    given = parser.parse_args(arguments)
    what = [w.strip() for w in given.only.split(",") if w.strip()]
    done = publish(given.run, given.name, what, not given.public, not given.yes, given.licence, given.data_licence)
    display.say(*done)
    return 0


if __name__ == "__main__":
    sys.exit(tunebook(["publish", *sys.argv[1:]]))
