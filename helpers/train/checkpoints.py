"""Checkpoints that move between one process and several.

A sharded run (FSDP2) keeps weights and optimizer state whole but under its own file names and keyed by parameter; a
single process keys them by position. What one wrote, the other reads here. Nothing is unpickled but tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHARDED_WEIGHTS, SHARDED_OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"  # accelerate's names
WHOLE_OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # transformers' names


def moved(folder: str | Path, sharded: bool) -> bool:
    """True for a checkpoint of the other kind: written sharded and read by one process, or the other way round."""
    return (Path(folder) / SHARDED_WEIGHTS).is_file() != sharded


def load_weights(model: Any, folder: str | Path, sharded: bool) -> None:
    """Put the trained weights of a checkpoint of the other kind into `model`."""
    if not sharded:
        model.load_state_dict(_read(Path(folder) / SHARDED_WEIGHTS), strict=False)
        return
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    saved = {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}
    # PEFT leaves the adapter's name out of what it saves.
    names = {name.replace(".default", ""): name for name in model.state_dict()} if hasattr(model, "peft_config") else {}
    state = {names.get(k, k): v for k, v in saved.items()}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


def load_optimizer(model: Any, optimizer: Any, scheduler: Any, folder: str | Path, sharded: bool) -> None:
    """Put the optimizer's and the schedule's state of a checkpoint of the other kind into those of `model`."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    ordered = [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
    if sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        saved = _read(Path(folder) / WHOLE_OPTIMIZER)
        state = _renamed(saved, dict(enumerate(ordered)))
        set_optimizer_state_dict(
            model, _plain(optimizer), optim_state_dict=state, options=StateDictOptions(full_state_dict=True)
        )
    else:
        saved = _read(Path(folder) / SHARDED_OPTIMIZER)
        optimizer.load_state_dict(_renamed(saved, {name: number for number, name in enumerate(ordered)}))
    scheduler.load_state_dict(_read(Path(folder) / SCHEDULER))


def _renamed(state: dict[str, Any], key: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state dict with its parameters under other keys."""
    groups = [{**group, "params": [key[k] for k in group["params"]]} for group in state["param_groups"]]
    return {"state": {key[k]: v for k, v in state["state"].items()}, "param_groups": groups}


def _plain(optimizer: Any) -> Any:
    """PyTorch's optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _read(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", weights_only=True)
