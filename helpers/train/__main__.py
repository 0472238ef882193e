"""Training without a notebook, on one GPU or many:

    python -m helpers.train params.yaml [--stage orpo] [-p name value ...]
    python -m helpers.train --gpus 2 params.yaml
    torchrun --nnodes 2 --nproc-per-node 8 … -m helpers.train params.yaml

params.yaml holds a stage's parameters, as notebooks write it into their folder. Finished already with the same
parameters: nothing is done. Ends with status 1 and a message when something is in the way.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from helpers import parameter, params
from helpers.display import say
from helpers.errors import TunebookError, command
from helpers.train import distributed, methods, training


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.train", description="Train a stage from a parameter file.")
    parser.add_argument("file", nargs="?", help="YAML file of the stage's parameters; none: the defaults")
    parser.add_argument("--stage", choices=("sft", "orpo"), default="sft", help="which training (default sft)")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of this machine to train on (default 1)")
    given = parser.parse_args(arguments)
    if given.gpus > 1:
        options = [word for pair in given.p for word in ("-p", *pair)] + [given.file] * bool(given.file)
        return launch(given.gpus, ["--stage", given.stage, *options])
    values = parameter.read_file(given.file) if given.file else {}
    train(params.resolve(given.stage, {**values, **dict(given.p)}))
    return 0


def launch(processes: int, arguments: list[str]) -> int:
    """Train with a process a GPU, as under torchrun, which would end what a process says in a stack of its own."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["TUNEBOOK_LAUNCHED"] = "1"  # said here, by one for all
    config = LaunchConfig(1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        elastic_launch(config, sys.executable)("-m", "helpers.train", *arguments)
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        said = failure.message if os.path.isfile(failure.error_file) else "a process failed; what it said is above."
        raise TunebookError(said.removeprefix("Stopped: ")) from None
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
