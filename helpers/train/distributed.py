"""Several GPUs: one process a GPU under torchrun, the same job and the same loss curve as one.

    torchrun --nproc-per-node 4 -m helpers.train params.yaml

QLoRA runs data parallel (DDP) where each GPU has room for the 4-bit base. Where none has, and with LoRA on 16 bits
and full tuning, the job is sharded (FSDP2). An optimizer step sees the same rows however many processes share it
(`rows.PackedRows`).

Of a sharded job each process reads, holds and writes its rows of every tensor, and none has a whole model. The base is
built without storage and shared out; then each process reads the rows that are its own out of the safetensors files.
Checkpoints keep what is trained and the optimizer's state in `pieces/`, a safetensors file for each process that says
where its rows begin, so that any number of processes can resume. At the end of full tuning the pieces are streamed into
a model folder, one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from helpers import compat, display
from helpers.errors import TunebookError
from helpers.model import loading, merging
from helpers.model.weights import AGAIN, Weights, reading

PIECES = "pieces"  # in a checkpoint


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


def wait() -> None:
    """Until every process is here."""
    if size() > 1:
        import torch.distributed as dist

        dist.barrier()


def leave() -> None:
    """Wait for the others and end the group, so that no process dies under another's collective."""
    if size() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def sharded(params: Any) -> bool:
    """True when a job of these parameters is sharded (FSDP2) rather than data parallel."""
    whole = params.method in ("qlora", "auto") or params.quantize == "fp8"
    return size() > 1 and (not whole or params.shard_weights or params.cpu_offload)


def options(params: Any) -> dict[str, Any]:
    """Trainer arguments for this world: none for one process and for DDP, else FSDP2."""
    if not sharded(params):
        return {}
    fsdp2 = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
    fsdp2 |= {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}
    # Gradients of the model's own weights go to their shares after each row: whole, they would be 4 bytes a weight.
    each = {"gradient_accumulation_kwargs": {"sync_each_batch": params.method not in ("lora", "qlora")}}
    return {"fsdp": True, "fsdp_config": fsdp2, "accelerator_config": each}


def trained_state(model: Any) -> dict[str, Any]:
    """What is trained of a model, unsharded in the first process's host memory; every process must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


# ---------------------------------------------------------------- shares of a model


class Base:
    """A base model that no process holds whole. bytes_read: by this process. quantize and double_quant: as of
    `loading.load_model`. Raises TunebookError for layers whose 4-bit rows cannot be told apart."""

    def __init__(
        self, source: loading.ModelSource, dtype: str, attention: str, quantize: str = "none", double_quant: bool = True
    ) -> None:
        from accelerate import init_empty_weights

        config = loading.load_config(source)
        self.held, self.bytes_read = Weights(source.path), 0
        loading.check_shapes(self.held, config)
        with init_empty_weights(include_buffers=False):
            self.model = loading.auto_class(config).from_config(
                config, dtype=loading.dtype(dtype), attn_implementation=attention
            )
        self.model.tie_weights()
        self.conversion = compat.Conversion(self.model, self.held.entries)
        self.names: dict[str, str] = {}
        every = [(name, id(weight)) for name, weight in self.model.named_parameters(remove_duplicate=False)]
        first = {known: name for name, known in reversed(every)}
        self.own = {name: first[known] for name, known in every}  # of shared parameters the one that stands for both
        for name, key in self.conversion.target.items():
            self.names.setdefault(self.own.get(key, key), name)
        if quantize == "nf4":
            from helpers.model import four_bit

            alone = {key: name for key, name in self.names.items() if key not in self.conversion.groups}
            four_bit.swap(self.model, self.held, alone, loading.dtype(dtype), double_quant)

    def share_out(self, model: Any, precision: str, offload: bool) -> str:
        """Shard `model`, which is this base with whatever was put onto it, and read this process's rows. offload: they
        stay in host memory. Returns what was done. Raises TunebookError for tensors that the files lack."""
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        from helpers.model import checkpointing, four_bit  # which need torch

        cuda = torch.cuda.is_available()
        bits = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        how: dict[str, Any] = {"mesh": init_device_mesh("cuda" if cuda else "cpu", (size(),))}
        # Losses, log-probabilities and sums of gradients stay in fp32.
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=bits, reduce_dtype=torch.float32 if bits else None)
        if offload:
            how["offload_policy"] = CPUOffloadPolicy(pin_memory=cuda)
        for layer in checkpointing.decoder_layers(model):
            fully_shard(layer, **how)
        causal = model.get_base_model() if hasattr(model, "peft_config") else model
        given, head = causal.get_input_embeddings(), causal.get_output_embeddings()
        if head is not None and head.weight is not given.weight:  # where they are one they belong to the root
            fully_shard(given, **how)
            fully_shard(head, **how, reshard_after_forward=False)  # its backward pass comes right after
        fully_shard(model, **how)
        made: dict[int, Any] = {}
        state = {}
        for name, layer in model.named_modules():
            if isinstance(layer, four_bit.PackedLinear):
                key = f"{name}.weight".removeprefix(merging.PREFIX).replace(".base_layer.", ".")
                place = _place(layer.weight)
                name_in_files = self.names.get(key)
                source = name_in_files if name_in_files in self.held.states else self._rows(key, *place)
                for part, rows in layer.read(self.held, source, *place).items():
                    state[f"{name}.{part}"] = torch.nn.Parameter(_like(getattr(layer, part), rows, offload), False)
                    self.bytes_read += rows.numel() * rows.element_size() * isinstance(source, str)
        for name, weight in model.named_parameters(remove_duplicate=False):
            if weight.to_local().is_meta and name not in state:
                if id(weight) not in made:
                    rows = self._rows(name.removeprefix(merging.PREFIX).replace(".base_layer.", "."), *_place(weight))
                    made[id(weight)] = torch.nn.Parameter(_like(weight, rows, offload), weight.requires_grad)
                state[name] = made[id(weight)]
        model.load_state_dict(state, strict=False, assign=True)
        read, whole = display.size(self.bytes_read), display.size(self.held.stored_bytes)
        return f"sharded over {size()} processes: the first read {read} of the base's {whole}"

    def _rows(self, key: str, start: int, stop: int) -> Any:
        """Rows of a parameter. One that several tensors of the files become together is made whole first, alone."""
        from safetensors import safe_open

        if key in self.conversion.groups:
            group = {name: self.held.read(name) for name in self.conversion.groups[key]}
            self.bytes_read += sum(t.numel() * t.element_size() for t in group.values())
            return self.conversion.forward(key, group)[key][start:stop].clone()
        if (name := self.names.get(key)) is None:
            lost = f"The model in {self.held.base} lacks {key}, which would be random numbers."
            raise TunebookError(f"{lost} Download it again.")
        with reading("The model", self.held.base, AGAIN), safe_open(self.held.entries[name].file, "pt") as file:
            rows = file.get_slice(name)[start:stop]
        self.bytes_read += rows.numel() * rows.element_size()
        return rows


def _place(tensor: Any) -> tuple[int, int]:
    """(first row, row after the last) of what this process holds of a tensor; FSDP2 cuts as torch.chunk does."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return 0, len(tensor) if tensor.dim() else 0
    rows, mesh = tensor.shape[0], tensor.device_mesh
    start = min(mesh.get_local_rank() * math.ceil(rows / mesh.size()), rows)
    return start, start + len(tensor.to_local())


def _like(tensor: Any, rows: Any, offload: bool = False) -> Any:
    """A tensor sharded as `tensor` is, with these rows of this process."""
    from torch.distributed.tensor import DTensor

    mesh = tensor.device_mesh
    rows = rows.to(mesh.device_type, tensor.dtype)
    made = DTensor.from_local(
        rows, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return made.cpu() if offload else made


# ---------------------------------------------------------------- what each process writes and anyone reads


class Pieces:
    """The tensors of a folder of pieces by name. extra: what the first process wrote beside its own."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.shapes: dict[str, list[int]] = {}
        self.extra: dict[str, Any] = {}
        self.parts: dict[str, list[tuple[int, int, Path]]] = {}
        with reading("The checkpoint", folder, "resume from another one."):
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    told = json.loads(file.metadata()["pieces"])
                    self.extra |= told["extra"]
                    for name, (start, stop, shape) in told["places"].items():
                        self.parts.setdefault(name, []).append((start, stop, path))
                        self.shapes[name] = shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """The whole tensor, or these rows of it."""
        import torch
        from safetensors import safe_open

        if not self.shapes[name]:
            with safe_open(self.parts[name][0][2], "pt") as file:
                return file.get_tensor(name)
        stop, found = self.shapes[name][0] if stop is None else stop, []
        with reading("The checkpoint", self.folder, "resume from another one."):
            for first, last, path in sorted(self.parts[name]):
                if max(first, start) < min(last, stop):
                    with safe_open(path, "pt") as file:
                        found.append(file.get_slice(name)[max(first, start) - first : min(last, stop) - first])
        if sum(map(len, found)) != stop - start:
            raise TunebookError(f"The checkpoint {self.folder} lacks rows of {name}; resume from another one.")
        return torch.cat(found) if found else torch.empty(0, *self.shapes[name][1:])


class OneProcess(Pieces):
    """The same of a checkpoint that one process wrote, which everyone reads whole. optimizer: whose state is wanted."""

    def __init__(self, folder: Path, model: Any, optimizer: Any) -> None:
        import torch
        from safetensors.torch import load_file

        names = {name.replace(".default", ""): name for name in named(model)}  # PEFT leaves the adapter's name out
        self.tensors: dict[str, Any] = {}
        for file in folder.glob("*.safetensors"):
            self.tensors |= {f"model/{names.get(name, name)}": tensor for name, tensor in load_file(file).items()}
        if optimizer:
            kept = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            for name, values in zip(_order(model, optimizer), kept["state"].values(), strict=True):
                self.tensors |= {f"{key}/{name}": torch.as_tensor(value) for key, value in values.items()}
            self.extra = {"groups": _rates(kept["param_groups"])}
        self.shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        return self.tensors[name][start:stop] if self.shapes[name] else self.tensors[name]


def write(folder: Path, tensors: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """This process's rows of every tensor into its own file of `folder`; whole tensors are the first one's."""
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    mine, places = {}, {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor if first() else None
        if local is not None and local.numel():
            mine[name], places[name] = local.detach().cpu().contiguous(), (*_place(tensor), list(tensor.shape))
    folder.mkdir(parents=True, exist_ok=True)
    told = json.dumps({"places": places, "extra": extra})
    save_file(mine, folder / f"{int(os.environ.get('RANK', 0)):05d}.safetensors", metadata={"pieces": told})


def named(model: Any) -> dict[str, Any]:
    """What is trained, by name, each in its sharded form: a forward pass alone leaves the last layers gathered, and an
    optimizer made then would train copies."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def write_checkpoint(folder: Path, model: Any, optimizer: Any = None) -> None:
    """What is trained, and the state of a PyTorch optimizer over it, into `folder`/pieces."""
    state, groups = (optimizer.state, optimizer.param_groups) if optimizer else ({}, [])
    tensors = {}
    for name, weight in named(model).items():
        tensors[f"model/{name}"] = weight
        tensors |= {f"{key}/{name}": value for key, value in state.get(weight, {}).items()}
    write(folder / PIECES, tensors, {"groups": _rates(groups)})


def _rates(groups: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{key: float(group[key]) for key in ("lr", "initial_lr") if key in group} for group in groups]


def _order(model: Any, optimizer: Any) -> list[str]:
    """Names of the weights in the order of the optimizer's state."""
    names = {id(weight): name for name, weight in named(model).items()}
    return [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]


def read_weights(pieces: Pieces, model: Any) -> None:
    """Put trained weights into a model, sharded or whole."""
    import torch

    with torch.no_grad():
        for name, weight in named(model).items():
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            local.copy_(pieces.read(f"model/{name}", *_place(weight)))


def read_optimizer(pieces: Pieces, model: Any, optimizer: Any) -> None:
    """Put the optimizer's state back, sharded or whole as the weights are."""
    state, kinds = optimizer.state_dict(), {name.partition("/")[0] for name in pieces.shapes} - {"model"}
    weights = named(model)
    for number, name in enumerate(_order(model, optimizer)):
        known = [key for key in sorted(kinds) if f"{key}/{name}" in pieces.shapes]
        state["state"][number] = {key: _value(pieces, f"{key}/{name}", weights[name]) for key in known}
    for group, rates in zip(state["param_groups"], pieces.extra["groups"], strict=True):
        group |= rates
    optimizer.load_state_dict(state)


def _value(pieces: Pieces, name: str, weight: Any) -> Any:
    if pieces.shapes[name] != list(weight.shape):
        return pieces.read(name)
    rows = pieces.read(name, *_place(weight))
    return _like(weight, rows, weight.to_local().device.type == "cpu") if hasattr(weight, "to_local") else rows


class Trained(Weights):
    """The base's tensors as full tuning left them: those of `pieces` in place of the files', one at a time. What shares
    a parameter with others in the files (experts) is taken apart again."""

    def __init__(self, base: Base, pieces: Pieces) -> None:
        super().__init__(base.held.base)
        self.of, self.pieces, self.apart = base, pieces, dict[str, Any]()

    def read(self, name: str) -> Any:
        key = self.of.conversion.target.get(name, name)
        key = self.of.own.get(key, key)
        if f"model/{key}" not in self.pieces.shapes:
            return super().read(name)
        if key not in self.of.conversion.groups:
            return self.pieces.read(f"model/{key}")
        if name not in self.apart:
            whole = {k: self.pieces.read(f"model/{k}") for k in self.of.conversion.targets(key)}
            self.apart |= self.of.conversion.back(key, whole)
        return self.apart.pop(name)
