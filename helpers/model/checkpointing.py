"""Activation checkpointing: how much of the forward pass is computed again going back, and where its inputs wait.

Nothing, the first k layers, or all of them; the layers' inputs on the GPU or offloaded to pinned host memory; the MLP
whole or a slice of tokens at a time. `helpers.planner.plan` picks the least that fits; this file carries it out.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from helpers import compat
from helpers.errors import TunebookError
from helpers.model import layer_kinds

_checkpointed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=True)
PIECE = 1 << 23  # numbers of one pinned block: torch rounds blocks up to powers of two, twice a long row's memory


def decoder_layers(model: Any) -> Any:
    """The decoder layers of a causal LM or its PEFT wrapper. Raises TunebookError when there is no such list."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    parts = layer_kinds.decoder(causal).modules()  # of the language model, where there is a vision part
    lists = (part for part in parts if isinstance(part, torch.nn.ModuleList) and len(part))
    layers = next((part for part in lists if hasattr(part[0], "gradient_checkpointing")), None)
    if layers is None:
        raise TunebookError(
            f"The layers of {causal.config.model_type} cannot be checkpointed one by one; set recompute to 'none'."
        )
    return layers


def set_recompute(model: Any, layers: int | str = 0, offload: bool = False, tile_mlp: int = 0) -> int:
    """Checkpoint the first `layers` decoder layers ("all", "none" or a number).

    offload: their inputs wait in pinned host memory, layers × tokens × hidden × 2 bytes of it. tile_mlp: the MLP works
    on this many tokens at a time (0: all). Returns how many layers are checkpointed. Leave the trainer's own
    `gradient_checkpointing` off: it would turn every layer on again.
    """
    stack = decoder_layers(model)
    wanted = len(stack) if layers == "all" else 0 if layers == "none" else int(layers)
    count = max(0, min(wanted, len(stack)))
    run = _offloaded(_HiddenStore()) if offload else _checkpointed
    for index, layer in enumerate(stack):
        compat.checkpoint_layer(layer, run if index < count else None)
        mlp = getattr(layer, "mlp", None) or getattr(layer, "feed_forward", None)
        if mlp is not None and not any(hasattr(mlp, part) for part in ("experts", "gate", "router")):
            _tile(mlp, tile_mlp)
    return count


def _offloaded(store: _HiddenStore) -> Any:
    def call(run: Any, hidden: Any, *rest: Any) -> Any:
        if not torch.is_grad_enabled():  # a reference pass: nothing will come back for the inputs
            return run(hidden, *rest)
        if any(torch.is_tensor(one) and one.requires_grad for one in rest):
            raise TunebookError(
                "This model passes more than the hidden states to its layers, trained through them, which offloading "
                "does not carry; set recompute to 'all'."
            )
        # Frozen embeddings give hidden states that need no gradient; the anchor keeps the layer in the graph.
        anchor = torch.zeros((), device=hidden.device, requires_grad=True)
        return _OffloadedLayer.apply((lambda hidden: run(hidden, *rest)) if rest else run, store, hidden, anchor)

    return call


class _HiddenStore:
    """Layer inputs in pinned host memory: copied on a stream of its own, back one layer ahead of the backward pass."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.waiting: list[_Parked] = []

    def put(self, hidden: Any) -> _Parked:
        parked = _Parked(len(self.waiting), hidden.device, hidden.shape)
        self.waiting.append(parked)
        if not hidden.is_cuda:
            parked.host = hidden.detach().clone()
            return parked
        self.stream = self.stream or torch.cuda.Stream(hidden.device)
        self.stream.wait_stream(torch.cuda.current_stream(hidden.device))
        with torch.cuda.stream(self.stream):
            pieces = hidden.reshape(-1).split(PIECE)
            parked.host = [torch.empty(len(piece), dtype=piece.dtype, pin_memory=True) for piece in pieces]
            for host, piece in zip(parked.host, pieces, strict=True):
                host.copy_(piece, non_blocking=True)
        hidden.record_stream(self.stream)
        return parked

    def take(self, parked: _Parked) -> Any:
        self._fetch(parked)
        if parked.index > 0:
            self._fetch(self.waiting[parked.index - 1])
        if parked.ready is not None:
            torch.cuda.current_stream(parked.device).wait_event(parked.ready)
            parked.back.record_stream(torch.cuda.current_stream(parked.device))
        back, parked.back, parked.host = parked.back, None, None
        del self.waiting[parked.index :]
        return back

    def _fetch(self, parked: _Parked) -> None:
        if parked.back is None and parked.device.type != "cuda":
            parked.back = parked.host
        elif parked.back is None:
            with torch.cuda.stream(self.stream):
                parked.back = torch.empty(parked.shape, dtype=parked.host[0].dtype, device=parked.device)
                for host, piece in zip(parked.host, parked.back.view(-1).split(PIECE), strict=True):
                    piece.copy_(host, non_blocking=True)
                parked.ready = self.stream.record_event()


@dataclass
class _Parked:
    """One layer's input: in `host` while it waits, in `back` once it is on its way to the GPU again."""

    index: int
    device: Any
    shape: Any
    host: Any = None
    back: Any = None
    ready: Any = None


def _autocast(device: str) -> dict[str, Any]:
    """The autocast in force, to be put in force again in the backward pass."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return {"device_type": device, "enabled": enabled, "dtype": dtype}


def _random(device: Any) -> list[Any]:
    """Random states of now, for `_as_drawn`: dropout has to fall the same way when a forward runs again."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextlib.contextmanager
def _as_drawn(states: list[Any], device: Any) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], device)
        yield


class _OffloadedLayer(torch.autograd.Function):
    """One decoder layer whose input is parked off the GPU and whose forward runs again in the backward pass."""

    @staticmethod
    def forward(ctx, run, store, hidden, anchor):
        ctx.run, ctx.store = run, store
        ctx.autocast, ctx.random = _autocast(hidden.device.type), _random(hidden.device)
        ctx.parked = store.put(hidden)
        with torch.no_grad():
            return run(hidden)

    @staticmethod
    def backward(ctx, *grads):
        hidden = ctx.store.take(ctx.parked).detach().requires_grad_(True)
        with torch.enable_grad(), torch.autocast(**ctx.autocast), _as_drawn(ctx.random, hidden.device):
            out = ctx.run(hidden)
        made = zip(out if isinstance(out, tuple) else (out,), grads, strict=True)
        pairs = [(one, grad) for one, grad in made if grad is not None and one.requires_grad]
        torch.autograd.backward([one for one, _ in pairs], [grad for _, grad in pairs])
        return None, None, hidden.grad, None


class _TiledMlp(torch.autograd.Function):
    """An MLP over slices of tokens; each slice's activations live only while it is worked on."""

    @staticmethod
    def forward(ctx, run, tile, x, *parameters):
        ctx.run, ctx.tile, ctx.parameters = run, tile, parameters
        ctx.autocast, ctx.random = _autocast(x.device.type), _random(x.device)
        ctx.save_for_backward(x)
        with torch.no_grad():
            return torch.cat([run(piece) for piece in x.split(tile, dim=1)], dim=1)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        sums = [torch.zeros_like(p) for p in ctx.parameters]
        with _as_drawn(ctx.random, x.device):
            for piece, back, into in zip(*(t.split(ctx.tile, 1) for t in (x, grad, grad_x)), strict=True):
                piece = piece.detach().requires_grad_(True)
                with torch.enable_grad(), torch.autocast(**ctx.autocast):
                    out = ctx.run(piece)
                found = torch.autograd.grad(out, [piece, *ctx.parameters], back)
                into.copy_(found[0])
                for total, part in zip(sums, found[1:], strict=True):
                    total.add_(part)
        return None, None, grad_x, *sums


def _tile(mlp: Any, tokens: int) -> None:
    """Let an MLP work on `tokens` tokens at a time; 0: on all, as it came."""
    own = getattr(mlp, "_untiled_forward", None) or mlp.forward
    if not tokens:
        if hasattr(mlp, "_untiled_forward"):
            mlp.forward = own
            del mlp._untiled_forward
        return

    def forward(self: Any, x: Any, *more: Any) -> Any:
        if x.shape[1] <= tokens or more:  # Bloom's takes the residual, too
            return self._untiled_forward(x, *more)
        return _TiledMlp.apply(self._untiled_forward, tokens, x, *(p for p in self.parameters() if p.requires_grad))

    mlp._untiled_forward = own
    mlp.forward = types.MethodType(forward, mlp)
