"""Several GPUs: one process a GPU under torchrun, the same job and the same loss curve as one.

    torchrun --nproc-per-node 4 -m helpers.train params.yaml

QLoRA runs data parallel (DDP): 4-bit weights cannot be sharded and fit anyway. LoRA on a 16-bit base and full tuning
run sharded (FSDP2). An optimizer step sees the same rows however many processes share it (`rows.PackedRows`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from helpers.errors import TunebookError


def size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first() -> bool:
    """True in the process that writes."""
    return int(os.environ.get("RANK", 0)) == 0


def setup() -> None:
    """Take this process's GPU and join the others; nothing for a single process.

    Raises TunebookError when there are more processes than GPUs.
    """
    if size() == 1:
        return
    import torch
    import torch.distributed as dist

    gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if gpus and local_rank >= gpus:
        raise TunebookError(
            f"Process {local_rank} has no GPU of its own: this machine has {gpus}; start torchrun with "
            f"--nproc-per-node {gpus}."
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(minutes=30))


def shared(make: Callable[[], Any]) -> Any:
    """What `make` returns in the first process, in every process; its TunebookError too."""
    if size() == 1:
        return make()
    import torch.distributed as dist

    box: list[Any] = [None]
    if first():
        try:
            box = [make()]
        except TunebookError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], TunebookError):
        raise box[0]
    return box[0]


def leave() -> None:
    """Wait for the others and end the group, so that no process dies under another's collective."""
    if size() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def sharded(method: str) -> bool:
    """True when this job is sharded (FSDP2) rather than data parallel."""
    return size() > 1 and method not in ("qlora", "auto")


def options(method: str) -> dict[str, Any]:
    """Trainer arguments for this world: none for one process and for DDP, FSDP2 for a 16-bit base."""
    if not sharded(method):
        return {}
    fsdp2 = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
    fsdp2 |= {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}
    return {"fsdp": True, "fsdp_config": fsdp2}


def whole_state(model: Any, adapter_only: bool) -> dict[str, Any]:
    """The unsharded state of a model in the first process's host memory; every process must call it.

    adapter_only: just what is trained; gathering the base as well takes 10 s at 8B.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter_only)
    return get_model_state_dict(model, options=options)
