"""Rows of a small model as CUDA graphs: all kernels of a forward or backward pass are launched at once.

Python launches one layer of a small model more slowly than a GPU computes it. A graph holds the kernels of a pass with
the addresses they read and write, so rows come in a few lengths, in the same places:

    row      a a a b b c c c c                 9 tokens, 3 documents
    padded   a a a b b c c c c|0 0 0|          12 tokens, 6 documents: the tail is one without labels, others are empty

The graphs begin at the tokens and end at their log-probabilities, and back at the trained weights' gradients: losses,
metrics and the optimizer stay as they are. A row that fits no graph, and a model whose pass cannot be captured, are
computed as without graphs; `off` says why. Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.nn.functional import pad

from helpers.display import say
from helpers.model import chunked_loss
from helpers.model.packed_attention import IGNORE

GRAIN = 128  # tokens that a padded row is a multiple of
SAME = 0.03  # relative distance of results; kernels that add in any order lie below it
SHARES = (0.6, 0.9, 1.0)  # of the rows, that fit each of the lengths


@dataclass(frozen=True)
class Form:
    """What rows of one graph have in common. longest: tokens of a document; positions: places with a trained token."""

    tokens: int
    documents: int
    longest: int
    positions: int

    def holds(self, row: dict[str, Any]) -> bool:
        tokens, documents = row["input_ids"].shape[1], len(row["cu_seq_lens_q"]) - 1
        room = (self.documents - documents) * self.longest
        positions = len(row["loss_positions"])
        return tokens <= self.tokens <= tokens + room and max(positions, 1) <= self.positions


def forms(costs: Sequence[int], lengths: Sequence[int], documents: int) -> list[Form]:
    """Forms for rows of so many tokens. lengths: of documents, or more; documents: most in a row."""
    order = sorted(costs)
    sizes = {-(-order[round(share * (len(order) - 1))] // GRAIN) * GRAIN for share in SHARES}
    longest = min(-(-max(lengths) // GRAIN) * GRAIN, max(sizes))
    return [Form(size, documents + -(-size // longest), longest, 0) for size in sorted(sizes)]


def padded(row: dict[str, Any], form: Form) -> dict[str, Any]:
    """A row of `packed_attention.row_tensors` with its `loss_positions`, in a form that holds it: the same loss."""
    count, ends = row["input_ids"].shape[1], row["cu_seq_lens_q"]
    left = form.tokens - count
    more = torch.arange(1, form.documents + 2 - len(ends), device=ends.device, dtype=ends.dtype) * form.longest
    ends = torch.cat([ends, more + count]).clamp(max=form.tokens)
    places = torch.arange(left, device=ends.device)[None] % form.longest
    positions = row["loss_positions"]
    return {
        "input_ids": pad(row["input_ids"], (0, left)),
        "labels": pad(row["labels"], (0, left), value=IGNORE),
        "position_ids": torch.cat([row["position_ids"], places], dim=1),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": form.longest,
        "max_length_k": form.longest,
        # The last token predicts nothing.
        "loss_positions": pad(positions, (0, form.positions - len(positions)), value=form.tokens - 1),
    }


class _Row:
    """A form's tensors and, with CUDA, its two graphs; a CPU computes the padded row as it is."""

    def __init__(self, owner: Graphs, form: Form, model: Any, row: dict[str, Any]) -> None:
        self.owner, self.form, self.go = owner, form, cast(Any, None)
        self.given = {name: v.clone() if torch.is_tensor(v) else v for name, v in padded(row, form).items()}
        self.given["cu_seq_lens_k"] = self.given["cu_seq_lens_q"]
        if not row["input_ids"].is_cuda:
            return
        self.grad = torch.zeros_like(self.given["labels"], dtype=torch.float32)
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # the stream is waited for
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries made ready
            known = owner.forward(model, self.given)
            grads = owner.backward(known, self.grad.fill_(1.0))
        torch.cuda.current_stream().wait_stream(stream)
        go, self.back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        how = {"pool": owner.pool, "capture_error_mode": "thread_local"}  # other threads may wait for the GPU
        with torch.cuda.graph(go, **how):
            logps = owner.forward(model, self.given)
        with torch.cuda.graph(self.back, **how):
            found = zip(owner.sums, owner.backward(logps, self.grad), strict=True)
            pairs = [(total, one.to(total.dtype)) for total, one in found if one is not None]
            torch._foreach_add_([total for total, _ in pairs], [one for _, one in pairs])
        self.go, self.logps = go, logps.detach()
        self._prove(known.detach(), grads)

    def _prove(self, known: torch.Tensor, grads: list[torch.Tensor | None]) -> None:
        """Raise RuntimeError where a graph does not give what its kernels gave."""
        before = self.owner.whole.clone()
        self.go.replay()
        self.owner.whole.zero_()
        self.back.replay()
        pairs = [(one, total) for one, total in zip(grads, self.owner.sums, strict=True) if one is not None]
        error = sum(((a.float() - b) ** 2).sum() for a, b in pairs) / sum((a.float() ** 2).sum() for a, _ in pairs)
        apart = torch.stack([(self.logps - known).norm() / known.norm(), error.sqrt()]).tolist()
        self.owner.whole.copy_(before)
        if not max(apart) < SAME:
            raise RuntimeError(f"its results are {apart[0]:.2g} and its gradients {apart[1]:.2g} from the kernels' own")

    def __call__(self, model: Any, row: dict[str, Any]) -> torch.Tensor:
        for name, value in padded(row, self.form).items():
            if torch.is_tensor(value):
                self.given[name].copy_(value, non_blocking=True)
        if self.go is None:
            return self.owner.forward(model, self.given)
        return _Replay.apply(torch.zeros((), device=self.grad.device, requires_grad=True), self)


class _Replay(torch.autograd.Function):
    """The log-probabilities of a filled graph. Its backward pass leaves the gradients where an optimizer looks."""

    @staticmethod
    def forward(ctx, anchor, captured):
        ctx.captured = captured
        captured.go.replay()
        return captured.logps.clone()

    @staticmethod
    def backward(ctx, grad):
        captured = ctx.captured
        captured.grad.copy_(grad)
        captured.owner.ready()
        captured.back.replay()
        return None, None


class Graphs:
    """Gives the log-probabilities (1, tokens) of a packed row, or None; a row goes back before the next goes forward.
    missed: rows that no form held."""

    def __init__(self, model: Any, shapes: Sequence[Form]) -> None:
        self.forms, self.off, self.rows, self.missed = list(shapes), "", dict[int, _Row](), 0
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.whole = torch.zeros(sum(weight.numel() for weight in self.trained), device=self.trained[0].device)
        parts = self.whole.split([weight.numel() for weight in self.trained])
        self.sums = [part.view_as(weight) for part, weight in zip(parts, self.trained, strict=True)]
        self.pool = torch.cuda.graph_pool_handle() if self.whole.is_cuda else None
        model.zero_grad = self._forget

    def __call__(self, model: Any, row: dict[str, Any]) -> torch.Tensor | None:
        if self.off or not torch.is_grad_enabled():
            return None
        try:
            known = self._of(model, row)
        except RuntimeError as error:
            while isinstance(error.__context__, RuntimeError):  # what ended a capture, not that it ended
                error = error.__context__
            self.off = str(error).strip().split("\n")[0][:200]
            say(f"CUDA graphs: none, kernels are launched one by one; a pass of this model fits no graph: {self.off}")
            self.rows.clear()
            return None
        self.missed += known is None
        return known(model, row)[:, : row["input_ids"].shape[1]] if known else None

    def _of(self, model: Any, row: dict[str, Any]) -> _Row | None:
        """The graphs for a row, made where they are not there yet."""
        tokens, positions = row["input_ids"].shape[1], len(row["loss_positions"])
        form = next((form for form in self.forms if form.tokens >= tokens), None)
        if form is None or "cu_seq_lens_q" not in row or not positions:
            return None
        known = self.rows.get(form.tokens)
        if known is None or known.form.positions < positions:  # room for other rows, the second time for all of them
            share = min(1.0, 1.5 * positions / tokens) if known is None else 1.0
            room = min(form.tokens, -(-max(1, round(share * form.tokens)) // GRAIN) * GRAIN)
            form = replace(form, positions=room)
            if form.holds(row):
                self.rows.pop(form.tokens, None)
                known = self.rows[form.tokens] = _Row(self, form, model, row)
        return known if known and known.form.holds(row) else None

    def forward(self, model: Any, given: dict[str, Any]) -> torch.Tensor:
        torch.clear_autocast_cache()  # the copies of weights that it keeps would stay those of the first step
        try:
            with chunked_loss.on_device():
                return model(**given, token_logps=True, use_cache=False).logps
        finally:
            torch.clear_autocast_cache()

    def backward(self, logps: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad(logps, self.trained, grad, allow_unused=True))

    def _forget(self, set_to_none: bool = True) -> None:
        for weight in self.trained:
            weight.grad = None

    def ready(self) -> None:
        """Let the trained weights' gradients be `sums`, which a step begins at zero."""
        grads = [weight.grad for weight in self.trained]
        if all(own is total for own, total in zip(grads, self.sums, strict=True)):
            return
        self.whole.zero_()
        for weight, total, own in zip(self.trained, self.sums, grads, strict=True):
            if own is not None:  # of a row without graphs
                total.add_(own)
            weight.grad = total
