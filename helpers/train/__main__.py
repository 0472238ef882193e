"""Training without a notebook, on one GPU or many:

    python -m helpers.train params.yaml [--stage orpo] [-p name value ...]
    torchrun --nproc-per-node 2 -m helpers.train params.yaml

params.yaml holds a stage's parameters, as notebooks write it into their folder. Finished already with the same
parameters: nothing is done. Ends with status 1 and a message when something is in the way.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from helpers import params
from helpers.errors import TunebookError
from helpers.train import distributed, preference, sft, unsloth_backend


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
        train(given.stage, params.resolve(given.stage, {**values, **dict(given.p)}))
    except TunebookError as error:
        print(f"TunebookError: {error}", file=sys.stderr)
        return 1
    return 0


def read(file: str) -> dict:
    """Parameters out of a YAML file. Raises TunebookError with the line for a malformed one."""
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise TunebookError(
            f"The parameter file {file} cannot be read ({error.strerror}); name a YAML file such as ci/params/cpu.yaml."
        ) from None
    except yaml.YAMLError as error:
        raise TunebookError(f"{file} is not valid YAML ({' '.join(str(error).split())[:200]}).") from None
    if not isinstance(values, dict):
        raise TunebookError(f"{file} holds a {type(values).__name__}; it takes lines of `name: value`.")
    return values


def train(stage: str, resolved: params.Params) -> None:
    """Train one stage, or say that it is finished already."""
    unsloth_backend.import_first(resolved)
    distributed.setup()
    manifest = (preference if stage == "orpo" else sft).run(resolved)
    distributed.leave()
    if manifest:
        print(f"Finished in {manifest.data['wall_s']} s: {manifest.path}")


if __name__ == "__main__":
    sys.exit(main())
