"""Training without a notebook, on one GPU or many:

    python -m helpers.train params.yaml [--stage orpo] [-p name value ...]
    torchrun --nproc-per-node 2 -m helpers.train params.yaml

params.yaml holds a stage's parameters, as notebooks write it into their folder. Finished already with the same
parameters: nothing is done. Ends with status 1 and a message when something is in the way.
"""

from __future__ import annotations

import argparse
import sys

from helpers import parameter, params
from helpers.display import say
from helpers.errors import command
from helpers.train import distributed, methods, training


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.train", description="Train a stage from a parameter file.")
    parser.add_argument("file", nargs="?", help="YAML file of the stage's parameters; none: the defaults")
    parser.add_argument("--stage", choices=("sft", "orpo"), default="sft", help="which training (default sft)")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter")
    given = parser.parse_args(arguments)
    values = parameter.read_file(given.file) if given.file else {}
    train(params.resolve(given.stage, {**values, **dict(given.p)}))
    return 0


def train(resolved: params.TrainingParams) -> None:
    """Train one stage, or say that it is finished already."""
    methods.import_first(resolved)
    distributed.setup()
    manifest = training.open(resolved).run()
    distributed.leave()
    if manifest:
        say(f"Finished in {manifest.data['wall_s']} s: {manifest.path}")


if __name__ == "__main__":
    sys.exit(main())
