"""Training without a notebook, on one GPU or many:

    python -m helpers.train params.yaml [--stage orpo] [-p name value ...]
    torchrun --nproc-per-node 2 -m helpers.train params.yaml

params.yaml holds a stage's parameters, as notebooks write it into their folder. Finished already with the same
parameters: nothing is done. Ends with status 1 and a sentence when something is in the way.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from helpers import params, runs
from helpers.errors import TunebookError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.train", description="Train a stage from a parameter file.")
    parser.add_argument("file", nargs="?", help="YAML file of the stage's parameters; none: the defaults")
    parser.add_argument("--stage", choices=("sft", "orpo"), default="sft", help="which training (default sft)")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter, over the file's"
    )
    given = parser.parse_args(arguments)
    try:
        values = read(given.file) if given.file else {}
        resolved = params.resolve(given.stage, {**values, **dict(given.p)})
        print(train(given.stage, resolved), end="")
    except TunebookError as error:
        print(f"TunebookError: {error}", file=sys.stderr)
        return 1
    return 0


def read(file: str) -> dict:
    """Parameters out of a YAML file. Raises TunebookError with the line for a malformed one."""
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise TunebookError(
            f"The parameter file {file} cannot be read ({error.strerror}); name a YAML file such as ci/params/cpu.yaml."
        ) from None
    except yaml.YAMLError as error:
        raise TunebookError(f"{file} is no YAML ({' '.join(str(error).split())[:200]}).") from None
    if not isinstance(values or {}, dict):
        raise TunebookError(f"{file} holds a {type(values).__name__}; it takes lines of `name: value`.")
    return values or {}


def train(stage: str, resolved: params.Params) -> str:
    """Train one stage, or say that it is finished already."""
    from helpers.train import distributed, unsloth_backend

    unsloth_backend.early_import(resolved.as_dict())
    from helpers.train import preference, sft

    distributed.setup()
    opened = distributed.shared(
        lambda: preference.open_stage(resolved) if stage == "orpo" else runs.open_stage(stage, resolved)
    )
    manifest = (preference if stage == "orpo" else sft).run(opened)
    distributed.leave()
    return f"Finished in {manifest.data['wall_s']} s: {manifest.path}\n" if manifest else ""


if __name__ == "__main__":
    sys.exit(main())
