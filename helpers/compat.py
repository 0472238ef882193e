"""Everything here overrides or calls a private part of another library, so that an upgrade is read here and nowhere else.

`CHECKED` names the version that each was read in; tests/test_compat.py fails when a library changes under it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKED = {"transformers": "5.17.0", "trl": "1.14.0", "accelerate": "1.15.0", "peft": "0.21.2", "liger-kernel": "0.8.5"}

# liger-kernel warns about each of its optional backends (CuTe DSL, cuTile) that is not installed; Triton's is always there.
logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)


class CheckpointsOfEitherKind:
    """Mixin for a transformers Trainer: one process loads what a sharded run (FSDP2) saved, and the other way round.

    Overrides private methods of Trainer; the class it is mixed into has `moved` and `load_moved` (helpers.train.resume).
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.load_moved(resume_from_checkpoint, model):  # type: ignore[attr-defined]
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        if not self.load_moved(self.state.best_model_checkpoint):  # type: ignore[attr-defined]
            super()._load_best_model()  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.load_moved_optimizer(checkpoint):  # type: ignore[attr-defined]
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


class RowsAsTheyAre:
    """Mixin for TRL's DPO and KTO trainers, which have no `skip_prepare_dataset`: rows come tokenised and stay so."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def save_weights(trainer: Any, folder: str | None, state: dict[str, Any]) -> None:
    """Write a gathered state as the trainer writes its own; `Trainer.save_model` takes none."""
    trainer._save(folder or trainer.args.output_dir, state_dict=state)


def load_weights(trainer: Any, folder: Path) -> None:
    """Put a checkpoint's weights into the trainer's model outside its loop."""
    trainer._load_from_checkpoint(str(folder))


def on_device(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch on the trainer's device."""
    return trainer._prepare_inputs(inputs)


def drop_metrics(trainer: Any) -> None:
    """Forget what TRL's preference trainers stored for their next log line."""
    getattr(trainer, "_stored_metrics", {}).clear()


def use_one_gpu(arguments: Any) -> Any:
    """Trainer arguments held to one GPU a process: nn.DataParallel would tear packed rows and their losses apart."""
    if arguments.n_gpu > 1:
        print(
            f"{arguments.n_gpu} GPUs are here and this process uses one; "
            f"torchrun --nproc-per-node {arguments.n_gpu} -m helpers.train uses them all."
        )
        arguments._n_gpu = 1
    return arguments


def shard(trainer: Any) -> None:
    """Finish the sharding that the trainer's `fsdp` arguments ask for; call it before the model is wrapped.

    accelerate shards on accelerators only: on CPUs its state is set to the same here. Losses, log-probabilities and sums
    of gradients stay in fp32, where accelerate's policy rounds them to the 16 bits that the products are in.
    """
    if trainer.args.fsdp_plugin_args is None:
        return
    import torch
    from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = trainer.accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    if trainer.args.bf16 or trainer.args.fp16:
        dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def four_bit_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(name in the base model, layer) of every 4-bit LoRA layer of a PEFT model."""
    from peft.tuners.lora.bnb import Linear4bit

    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            yield name.removeprefix("base_model.model."), layer
