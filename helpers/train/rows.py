"""The data stage's parquet files as training rows, every row that cannot be used counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

from helpers.display import Html, escape
from helpers.errors import TunebookError
from helpers.model.packed_attention import IGNORE
from helpers.runs import Manifest


def has_rows(data: Manifest, name: str) -> bool:
    """Whether the data stage wrote this file with rows in it."""
    import pyarrow.parquet as parquet

    file = data.path / name
    return file.is_file() and parquet.read_metadata(file).num_rows > 0


def _table(file: Any, columns: list[str]) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    try:
        return Dataset(parquet.read_table(file, columns=columns))
    except (pyarrow.ArrowInvalid, OSError, KeyError) as error:
        why = str(error).splitlines()[0][:160]
        raise TunebookError(f"{file} cannot be read as rows with {', '.join(columns)} ({why}); rerun 01.") from error


def supervised(data: Manifest, name: str, train_on: str = "completion") -> tuple[Any, dict[str, int]]:
    """(rows with id, input_ids, labels; counts) of train.parquet or eval.parquet in the data stage's manifest.

    A row without a trained token teaches nothing and would be a division by zero: it is left out and counted. Raises
    TunebookError when nothing is left.
    """
    file = data.artifact(name)
    rows = _table(file, ["id", "input_ids", "completion_mask"])

    def labels(row: dict[str, Any]) -> dict[str, Any]:
        mask = row["completion_mask"] if train_on == "completion" else [1] * len(row["input_ids"])
        return {"labels": [i if m else IGNORE for i, m in zip(row["input_ids"], mask, strict=True)]}

    labelled = rows.map(labels, remove_columns=["completion_mask"], keep_in_memory=True)
    found = labelled["labels"] if len(rows) else []
    kept = [i for i, labels_ in enumerate(found) if any(x != IGNORE for x in labels_[1:])]
    if not kept:
        raise TunebookError(
            f"{file} has {len(rows)} rows and every token is masked, so nothing would be trained; the answers are "
            "empty or cut off by max_length: check the preview of notebook 01, or set train_on to 'all'."
        )
    counts = {"rows": len(rows), "without trained tokens": len(rows) - len(kept)}
    return labelled.select(kept, keep_in_memory=True), counts


def pairs(data: Manifest, name: str, max_length: int, swap: bool = False) -> tuple[Any, dict[str, Any]]:
    """(pairs with id, prompt_ids, chosen_ids, rejected_ids; counts with the reasons) of a preference file.

    Pairs over `max_length` and pairs with an empty answer are left out and counted: cut answers have no end, and an
    empty one has the mean log-probability 0/0. swap: chosen and rejected exchanged. The pairs may be none at all.
    """
    rows = _table(data.artifact(name), ["id", "prompt_ids", "chosen_ids", "rejected_ids"])
    reasons = [unusable(row, max_length) for row in rows]
    out = rows.select([i for i, reason in enumerate(reasons) if not reason], keep_in_memory=True)
    if swap:
        out = out.rename_columns({"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"})
    left_out = [row_id for row_id, reason in zip(rows["id"], reasons, strict=True) if reason]
    counted = dict(Counter(filter(None, reasons)))
    return out, {"pairs": len(rows), "left out": counted, "left out ids": left_out[:50]}


def unusable(pair: dict[str, Any], max_length: int) -> str:
    """Why a preference pair cannot be trained on; empty when it can."""
    chosen, rejected = pair["chosen_ids"], pair["rejected_ids"]
    if not chosen or not rejected:
        return f"{'rejected' if chosen else 'chosen'} is empty"
    if len(pair["prompt_ids"]) + max(len(chosen), len(rejected)) > max_length:
        return f"over {max_length} tokens"
    return "chosen equals rejected" if chosen == rejected else ""


def lengths_of(rows: Any, padded: bool = False) -> list[int]:
    """Tokens of every row; of pairs of both answers with their prompts (padded: the shorter as long as the longer)."""
    if "input_ids" in rows.column_names:
        return [len(ids) for ids in rows["input_ids"]]
    sides = zip(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True)
    return [2 * (len(p) + max(len(c), len(r))) if padded else 2 * len(p) + len(c) + len(r) for p, c, r in sides]


def _parts(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of a row, which ends at its first trained token, or of a pair's chosen side."""
    if "prompt_ids" in row:
        return row["prompt_ids"], row["chosen_ids"]
    start = next((t for t, label in enumerate(row["labels"]) if label != IGNORE), 0)
    return row["input_ids"][:start], row["input_ids"][start:]


def prompts(rows: Any, tokenizer: Any, count: int = 4) -> list[dict[str, Any]]:
    """The first rows as prompts to answer: id, prompt_ids, and the reference as text."""
    found = []
    for row in rows.select(range(min(count, len(rows)))):
        prompt, answer = _parts(row)
        reference = tokenizer.decode(answer, skip_special_tokens=True).strip()
        if prompt:
            found.append({"id": row["id"], "prompt_ids": list(prompt), "reference": reference})
    return found


def preview(row: dict[str, Any], tokenizer: Any) -> Html:
    """One row as it is trained: every token, the trained ones marked (HTML in a notebook, [brackets] in a terminal)."""
    prompt, answer = _parts(row)
    labels = row.get("labels") or [IGNORE] * len(prompt) + answer
    markup, text, before = [], [], False
    for token, label in zip([*prompt, *answer], labels, strict=True):
        trained, piece = label != IGNORE, tokenizer.decode([token])
        style = "background:#E69F0055;color:inherit" if trained else "background:none;opacity:.65"
        markup.append(f"<mark style='{style}'>{escape(piece).replace(chr(10), '⏎<br>')}</mark>")
        text += ["[" if trained and not before else "]" if before and not trained else "", piece]
        before = trained
    title = f"<p><b>{escape(row.get('id', ''))}</b>, trained tokens marked:</p>"
    shown = f"{title}<code style='white-space:pre-wrap'>{''.join(markup)}</code>"
    return Html(shown, "".join(text) + ("]" if before else ""))
