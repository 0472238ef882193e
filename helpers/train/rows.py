"""Training examples as rows, and rows as batches.

`helpers.planner.row_plan` decides which examples share a row, `helpers.model.packed_attention` lays the row out and
keeps its documents apart, or holds what all of them begin with only once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from helpers.display import Html, escape, percent
from helpers.errors import TunebookError
from helpers.model.packed_attention import (
    IGNORE,
    MIN_PREFIX,
    example_labels,
    loss_positions,
    row_tensors,
    shareable,
    shared_tensors,
)
from helpers.planner.row_plan import Batches, batch_rows, cost
from helpers.plots import TRAINED
from helpers.train.examples import PAIR


def _parts(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of a row, which ends at its first trained token, or of a pair's chosen side."""
    if "prompt_ids" in row:
        return row["prompt_ids"], row.get("chosen_ids") or row["completion_ids"]
    start = next((t for t, label in enumerate(row["labels"]) if label != IGNORE), 0)
    return row["input_ids"][:start], row["input_ids"][start:]


def prompts(rows: Any, tokenizer: Any, count: int = 4) -> list[dict[str, Any]]:
    """The first rows as prompts to answer: id, prompt_ids, and for people the question and the reference as text."""
    markers = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    found = []
    for row in rows.select(range(min(count, len(rows)))):
        prompt, answer = _parts(row)
        parts = groupby(prompt, lambda token: token in markers)
        turns = [tokenizer.decode(list(part)).strip() for marker, part in parts if not marker]
        turns = [turn for turn in turns if turn not in ("", "assistant", "model")]  # the answer's own heading
        question = turns[-1].splitlines()[-1] if turns else ""
        reference = tokenizer.decode(answer, skip_special_tokens=True).strip()
        if prompt:
            found.append({"id": row["id"], "prompt_ids": list(prompt), "question": question, "reference": reference})
    return found


def preview(row: dict[str, Any], tokenizer: Any) -> Html:
    """One row as it is trained, the trained tokens marked (HTML in a notebook, [brackets] in a terminal)."""
    prompt, answer = _parts(row)
    labels = row.get("labels") or [IGNORE] * len(prompt) + answer
    markup, text = "", ""
    for trained, part in groupby(zip([*prompt, *answer], labels, strict=True), lambda pair: pair[1] != IGNORE):
        piece = tokenizer.decode([token for token, _ in part])
        style = f"background:{TRAINED}40" if trained else "background:none;opacity:.7"
        markup += f"<mark style='color:inherit;{style}'>{escape(piece).replace(chr(10), '⏎<br>')}</mark>"
        text += f"[{piece}]" if trained else piece
    title = f"<p><b>{escape(row.get('id', ''))}</b>, trained tokens marked:</p>"
    return Html(f"{title}<code style='white-space:pre-wrap'>{markup}</code>", text)


# ---------------------------------------------------------------- rows as batches


@dataclass(eq=False)
class PackedRows:
    """A map-style dataset whose items are rows: lists of examples that belong together.

    lengths: tokens of the examples, default those of `input_ids`. padded: rows will be padded to their longest example,
    so `budget` and the evenness of rows count padding too. partners: every example also gets `other_ids`, the answer of
    the one before it in its step of the first epoch (KTO's mismatched pairs, their reference asked once). Read in
    order, one row a batch, with `gradient_accumulation_steps = accumulation`, an optimizer step is exactly one of
    `batches`, also when accelerate deals rows out to `world_size` processes. A step's last rows may be empty.
    """

    examples: Any
    batches: Batches
    accumulation: int
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True
    lengths: Sequence[int] = ()
    budget: int | None = None
    padded: bool = False
    partners: bool = False

    def __post_init__(self) -> None:
        self.lengths = self.lengths or [len(example["input_ids"]) for example in self.examples]
        first = self.batches.epoch(self.lengths, self.seed, 0, self.shuffle) if self.partners else []
        self.before = {i: other for step in first for i, other in zip(step, step[-1:] + step[:-1], strict=True)}
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Cut the rows of this epoch, in its own order; accelerate's data loader calls it."""
        self.rows: list[list[int]] = []
        per_step = self.accumulation * self.world_size
        for batch in self.batches.epoch(self.lengths, self.seed, epoch, self.shuffle):
            self.rows += batch_rows(batch, self.lengths, per_step, self.budget, self.padded)

    def costs(self) -> list[int]:
        """Tokens that the GPU works through for each row."""
        return [cost([self.lengths[i] for i in row], self.padded) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict]:
        found = self._read(self.rows[index])
        if not self.partners:
            return found
        others = self._read([self.before[i] for i in self.rows[index]])
        both = zip(found, others, strict=True)
        return [r | {"other_ids": o["completion_ids"], "other_mask": o.get("completion_mask")} for r, o in both]

    def _read(self, row: list[int]) -> list[dict]:
        many = getattr(self.examples, "__getitems__", None)  # a dataset reads many rows at once several times as fast
        return many(row) if many and row else [self.examples[i] for i in row]


def padded_tensors(documents: Sequence[dict], pad_token_id: int) -> dict[str, Any]:
    """Documents one a row, padded on the right: input_ids, labels, attention_mask (documents, longest)."""
    import torch

    def padded(rows: list[list[int]], filler: int) -> Any:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, filler)

    return {
        "input_ids": padded([d["input_ids"] for d in documents], pad_token_id),
        "labels": padded([[IGNORE, *d["labels"][1:]] for d in documents], IGNORE),
        "attention_mask": padded([[1] * len(d["input_ids"]) for d in documents], 0),
    }


@dataclass
class RowCollator:
    """Rows of `PackedRows` into one batch.

    layout "packed": one row of all documents; "padded": a row per document and an attention mask, for models whose
    attention cannot be packed and for Unsloth. share: a common prefix of packed documents is held once. For people
    there are `row_ids` and `tokens`.
    """

    pad_token_id: int
    layout: str = "packed"
    share: bool = False

    def __call__(self, rows: Sequence) -> dict[str, Any]:
        examples = [example for row in rows for example in row]
        documents = [{"input_ids": list(e["input_ids"]), "labels": example_labels(e)} for e in examples]
        prefix = shareable(documents) if self.share and self.layout == "packed" else 0
        return self._batch(examples, documents, prefix)

    def _batch(self, examples: list[dict], documents: list[dict], prefix: int) -> dict[str, Any]:
        """documents: dicts with input_ids and labels; none at all: one token that no loss counts."""
        shown = documents or [{"input_ids": [self.pad_token_id], "labels": [IGNORE]}]
        if prefix:
            batch = shared_tensors(shown, prefix)
        else:
            batch = row_tensors(shown) if self.layout == "packed" else padded_tensors(shown, self.pad_token_id)
        batch["loss_positions"] = loss_positions(batch["labels"])
        batch["row_ids"] = [str(e.get("id", "")) for e in examples]
        batch["tokens"] = sum(len(d["input_ids"]) for d in documents)
        return batch


@dataclass
class PairCollator(RowCollator):
    """Preference pairs into one batch of 2n documents: chosen of every pair, then rejected of every pair. Answers alone
    (KTO) into one of n: the good ones, then the bad ones; and `kl`, the same of their prompts with `other_ids`.

    nll: labels cover the prompts of chosen documents too (ORPO's NLL), else answers alone. Adds `completion_mask` (same
    shape as labels), `pair_count` (pairs or answers), `good` (chosen or good documents), `nll_tokens` and `keys`, which
    name each document.
    """

    nll: bool = True

    def __call__(self, rows: Sequence) -> dict[str, Any]:
        examples = [example for row in rows for example in row]
        if not any("completion_ids" in example for example in examples):
            return self._answers(examples, [(pair, side) for side in PAIR for pair in examples], len(examples))
        examples.sort(key=lambda one: not one["label"])
        good, alone = sum(one["label"] for one in examples), [(one, "completion_ids") for one in examples]
        batch = self._answers(examples, alone, good)
        if "other_ids" in examples[0]:
            batch["kl"] = self._answers(examples, [(one, "other_ids") for one in examples], good)
        return batch

    def _answers(self, examples: list[dict], answered: list[tuple[dict, str]], good: int) -> dict[str, Any]:
        import torch

        documents, masks, keys, prefix = [], [], [], 0
        for example, side in answered:
            prompt, answer = list(example["prompt_ids"]), list(example[side])
            labels = prompt if self.nll and side == "chosen_ids" else [IGNORE] * len(prompt)
            mask = example.get(f"{side[:-4]}_mask") or [1] * len(answer)  # 0: a user's turn between two answers
            labels = labels + [token if kept else IGNORE for token, kept in zip(answer, mask, strict=True)]
            documents.append({"input_ids": prompt + answer, "labels": labels})
            masks.append([0] * len(prompt) + list(mask))
            keys.append(hash((tuple(prompt), tuple(answer))))
        if self.share and self.layout == "packed" and examples:  # an answer is never part of the prefix
            prefix = min(shareable(documents, trained_prefix=True), *(len(p["prompt_ids"]) - 1 for p in examples))
            prefix = prefix if prefix >= MIN_PREFIX else 0
        batch = self._batch(examples, documents, prefix)
        if self.layout == "packed":
            flat = [[0] * prefix + [m for mask in masks for m in mask[prefix:]] or [0]]
        else:
            width = batch["input_ids"].shape[1]
            flat = [mask + [0] * (width - len(mask)) for mask in masks or [[0]]]
        batch["completion_mask"] = torch.tensor(flat)
        batch |= {"pair_count": len(examples), "good": good, "keys": keys}
        batch["nll_tokens"] = sum(label != IGNORE for d in documents[:good] for label in d["labels"][1:])
        return batch


def check_boundaries(model: Any, shared: bool = False) -> None:
    """Prove on the loaded model, as it trains, that packed documents do not see each other.

    Runs short documents packed, with a shared prefix where rows have one (`shared`), and each alone in the model's own
    eager attention (a few ms), and compares the hidden states of every token: a model class that drops the boundaries
    on the way, carries a state over them or attends in a way of its own is caught before it trains on leaked text.
    Raises TunebookError for a difference that rounding does not explain.
    """
    import torch

    from helpers.model import fp8

    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = getattr(body, getattr(body, "base_model_prefix", ""), body)
    device, vocab = next(body.parameters()).device, body.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prefix, *tails = (torch.randint(3, vocab, (n,), generator=generator).tolist() for n in (24, 9, 40))
    documents = [{"input_ids": prefix + tail, "labels": prefix + tail} for tail in tails]
    rows = [(0, row_tensors(documents))] + [(24, shared_tensors(documents, 24))] * shared
    wide = body.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    worst, attention = 0.0, body.config._attn_implementation

    def states_of(row: dict[str, Any]) -> Any:
        if not hasattr(model, "reshard"):
            return body(**row, use_cache=False)[0][0]
        seen: list[Any] = []  # a sharded model has its weights together within its own forward only
        hook = body.register_forward_hook(lambda _, given, found: seen.append(found[0][0]))
        model(**row, use_cache=False)
        hook.remove()
        return seen[0]

    with torch.no_grad(), _without_dropout(model), fp8.unrounded():
        body.set_attn_implementation("eager")
        alone = [states_of({"input_ids": torch.tensor([d["input_ids"]], device=device)}) for d in documents]
        body.set_attn_implementation(attention)
        for start, row in rows:
            row = {k: v.to(device) if torch.is_tensor(v) else v for k, v in row.items() if k != "labels"}
            states = states_of(row).split(row["document_lengths"])[1 if start else 0 :]
            for together, own in zip(states, (found[start:].float() for found in alone), strict=True):
                error = (together.float() - own).norm(dim=-1) / own.norm(dim=-1)
                # Medians: rounding alone may send a token to another expert. The first tokens are next to the others'.
                worst = max(worst, error.median().item(), error[:3].median().item())
    if not worst < (1e-4 if wide else 0.08):  # 16-bit kernels of two shapes differ by under 0.02
        found = f"Packed examples would see each other in {body.config.model_type}"
        raise TunebookError(f"{found} (hidden states differ by {percent(worst)}); set packing to False for this model.")


@contextlib.contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """The model in the mode that trains, which may choose other kernels, but for its dropout."""
    import torch

    training = model.training
    rates = [(m, n, v) for m in model.modules() for n, v in vars(m).items() if "dropout" in n and isinstance(v, float)]
    rates += [(module, "p", module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        model.train()
        yield
    finally:
        model.train(training)
        for module, name, value in rates:
            setattr(module, name, value)
