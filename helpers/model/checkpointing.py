"""Memory for time: how much of the forward pass is computed a second time going back, and where its inputs wait.

Nothing, the first k layers, or all of them; the layers' inputs on the card or in pinned main memory; the MLP whole or a
slice of tokens at a time. `helpers.planner.plan` picks the least that fits; this file carries it out.
"""

from __future__ import annotations

import types

import torch

from helpers.errors import TunebookError


def decoder_layers(model) -> torch.nn.ModuleList:
    """The decoder layers of a causal LM or its PEFT wrapper. Raises TunebookError when there is no such list."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    body = getattr(causal, causal.base_model_prefix, causal)
    layers = getattr(body, "layers", None) or getattr(body, "h", None)
    if layers is None or not hasattr(layers[0], "gradient_checkpointing"):
        raise TunebookError(
            f"The layers of {causal.config.model_type} cannot be recomputed one by one; "
            "set recompute to 'none' or use the model's own gradient checkpointing."
        )
    return layers


def set_recompute(model, layers: int | str = 0, offload: bool = False, tile_mlp: int = 0) -> int:
    """Recompute the first `layers` decoder layers ("all", "none" or a number) in the backward pass.

    offload: their inputs wait in pinned main memory, layers × tokens × hidden × 2 bytes of it. tile_mlp: the MLP works
    on this many tokens at a time (0: all). Returns how many layers are recomputed. Leave the trainer's own
    `gradient_checkpointing` off: it would turn every layer on again.
    """
    stack = decoder_layers(model)
    count = {"all": len(stack), "none": 0}.get(layers, layers)
    count = max(0, min(int(count), len(stack)))
    store = HiddenStore() if offload else None
    for index, layer in enumerate(stack):
        layer.gradient_checkpointing = index < count
        if index < count:
            layer._gradient_checkpointing_func = _offloaded(store) if offload else _recomputed
        _tile(layer.mlp, tile_mlp)
    return count


def _recomputed(run, *args):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=True)


def _offloaded(store):
    def call(run, hidden, *rest):
        if rest:
            raise TunebookError(
                "This model passes more than the hidden states to its layers by position, which offloading does not carry; set offload to False."
            )
        # Frozen embeddings give hidden states that need no gradient; the anchor keeps the layer in the graph.
        anchor = torch.zeros((), device=hidden.device, requires_grad=True)
        return _OffloadedLayer.apply(run, store, hidden, anchor)

    return call


PIECE = (
    1 << 23
)  # numbers of one pinned block: torch rounds blocks up to powers of two, which would double a long row's memory


class HiddenStore:
    """Layer inputs in pinned main memory: copied out and back on a stream of its own, one layer ahead of the backward."""

    def __init__(self):
        self.stream = None
        self.waiting: list[_Parked] = []

    def put(self, hidden: torch.Tensor) -> _Parked:
        parked = _Parked(hidden)
        if hidden.is_cuda:
            self.stream = self.stream or torch.cuda.Stream(hidden.device)
            self.stream.wait_stream(torch.cuda.current_stream(hidden.device))
            with torch.cuda.stream(self.stream):
                pieces = hidden.reshape(-1).split(PIECE)
                parked.host = [torch.empty(len(piece), dtype=piece.dtype, pin_memory=True) for piece in pieces]
                for host, piece in zip(parked.host, pieces, strict=True):
                    host.copy_(piece, non_blocking=True)
            hidden.record_stream(self.stream)
        else:
            parked.host = hidden.detach().clone()
        parked.index = len(self.waiting)
        self.waiting.append(parked)
        return parked

    def take(self, parked: _Parked) -> torch.Tensor:
        self._fetch(parked)
        if parked.index > 0:
            self._fetch(self.waiting[parked.index - 1])
        if parked.ready is not None:
            torch.cuda.current_stream(parked.device).wait_event(parked.ready)
            parked.card.record_stream(torch.cuda.current_stream(parked.device))
        card, parked.card, parked.host = parked.card, None, None
        del self.waiting[parked.index :]
        return card

    def _fetch(self, parked: _Parked) -> None:
        if parked.card is not None:
            return
        if parked.device.type != "cuda":
            parked.card = parked.host
            return
        with torch.cuda.stream(self.stream):
            parked.card = torch.empty(parked.shape, dtype=parked.host[0].dtype, device=parked.device)
            for host, piece in zip(parked.host, parked.card.view(-1).split(PIECE), strict=True):
                piece.copy_(host, non_blocking=True)
            parked.ready = self.stream.record_event()


class _Parked:
    def __init__(self, hidden: torch.Tensor):
        self.device, self.shape, self.host, self.card, self.ready, self.index = (
            hidden.device,
            hidden.shape,
            None,
            None,
            None,
            0,
        )


class _OffloadedLayer(torch.autograd.Function):
    """One decoder layer whose input is parked off the card and whose forward runs again in the backward pass."""

    @staticmethod
    def forward(ctx, run, store, hidden, anchor):
        ctx.run, ctx.store = run, store
        ctx.autocast = {
            "device_type": hidden.device.type,
            "enabled": torch.is_autocast_enabled(hidden.device.type),
            "dtype": torch.get_autocast_dtype(hidden.device.type),
        }
        ctx.parked = store.put(hidden)
        with torch.no_grad():
            return run(hidden)

    @staticmethod
    def backward(ctx, grad):
        hidden = ctx.store.take(ctx.parked).detach().requires_grad_(True)
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            out = ctx.run(hidden)
        torch.autograd.backward(out, grad)
        return None, None, hidden.grad, None


class _TiledMlp(torch.autograd.Function):
    """An MLP over slices of tokens; each slice's activations live only while it is worked on."""

    @staticmethod
    def forward(ctx, run, tile, x, *parameters):
        ctx.run, ctx.tile, ctx.parameters = run, tile, parameters
        ctx.autocast = {
            "device_type": x.device.type,
            "enabled": torch.is_autocast_enabled(x.device.type),
            "dtype": torch.get_autocast_dtype(x.device.type),
        }
        ctx.save_for_backward(x)
        with torch.no_grad():
            return torch.cat([run(piece) for piece in x.split(tile, dim=1)], dim=1)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        sums = [torch.zeros_like(p) for p in ctx.parameters]
        for piece, back, into in zip(
            x.split(ctx.tile, 1), grad.split(ctx.tile, 1), grad_x.split(ctx.tile, 1), strict=True
        ):
            piece = piece.detach().requires_grad_(True)
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                out = ctx.run(piece)
            found = torch.autograd.grad(out, [piece, *ctx.parameters], back)
            into.copy_(found[0])
            for total, part in zip(sums, found[1:], strict=True):
                total.add_(part)
        return None, None, grad_x, *sums


def _tile(mlp: torch.nn.Module, tokens: int) -> None:
    own = getattr(mlp, "_untiled_forward", None)
    if own is None and tokens:
        mlp._untiled_forward = mlp.forward
        own = mlp._untiled_forward
    if own is None:
        return
    if not tokens:
        mlp.forward = own
        del mlp._untiled_forward
        return

    def forward(self, x):
        if x.shape[1] <= tokens or not torch.is_grad_enabled():
            if x.shape[1] <= tokens:
                return self._untiled_forward(x)
            return torch.cat([self._untiled_forward(piece) for piece in x.split(tokens, dim=1)], dim=1)
        return _TiledMlp.apply(self._untiled_forward, tokens, x, *(p for p in self.parameters() if p.requires_grad))

    mlp.forward = types.MethodType(forward, mlp)
