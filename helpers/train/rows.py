"""The data stage's parquet files as training rows, every row that cannot be used counted."""

from __future__ import annotations

from typing import Any

from helpers.errors import TunebookError


def _table(path: Any, columns: list[str]) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    try:
        return Dataset(parquet.read_table(path, columns=columns))
    except (pyarrow.ArrowInvalid, OSError, KeyError) as error:
        raise TunebookError(
            f"{path} cannot be read as rows with {', '.join(columns)} ({str(error).splitlines()[0][:160]}); run notebook 01 again."
        ) from error


def supervised(data: Any, name: str, train_on: str = "completion") -> tuple[Any, dict[str, int]]:
    """(rows with id, input_ids, labels; counts) of train.parquet or eval.parquet in the data stage's manifest.

    A row without a trained token teaches nothing and would be a division by zero: it is left out and counted. Raises
    TunebookError when nothing is left.
    """
    file = data.artifact(name)
    rows = _table(file, ["id", "input_ids", "completion_mask"])
    total = len(rows)
    if not total:
        raise TunebookError(f"{file} has no rows; check the counts that notebook 01 reports.")

    def labels(row: dict[str, Any]) -> dict[str, Any]:
        mask = row["completion_mask"] if train_on == "completion" else [1] * len(row["input_ids"])
        return {"labels": [i if m else -100 for i, m in zip(row["input_ids"], mask, strict=True)]}

    rows = rows.map(labels, remove_columns=["completion_mask"], keep_in_memory=True)
    kept = [i for i, found in enumerate(rows["labels"]) if any(x != -100 for x in found[1:])]
    if not kept:
        raise TunebookError(
            f"In {file} every token is masked, so nothing would be trained; the answers are empty or cut off by max_length: "
            "check the preview of notebook 01, or set train_on to 'all'."
        )
    return rows.select(kept, keep_in_memory=True), {"rows": total, "without trained tokens": total - len(kept)}


def pairs(data: Any, name: str, max_length: int, swap: bool = False) -> tuple[Any, dict[str, Any]]:
    """(pairs with id, prompt_ids, chosen_ids, rejected_ids; counts with the reasons) of a preference file.

    Pairs over `max_length` and pairs with an empty answer are left out and counted: cut answers have no end, and an empty
    one has the mean log-probability 0/0. swap: chosen and rejected exchanged. Raises TunebookError when nothing is left.
    """
    from helpers.train.packing import drop_overlong

    file = data.artifact(name)
    rows = _table(file, ["id", "prompt_ids", "chosen_ids", "rejected_ids"])
    kept, dropped = drop_overlong(rows, max_length)
    reasons: dict[str, int] = {}
    for _, reason in dropped:
        key = reason if "empty" in reason else f"over {max_length} tokens"
        reasons[key] = reasons.get(key, 0) + 1
    same = [i for i in kept if rows[i]["chosen_ids"] == rows[i]["rejected_ids"]]
    if same:
        reasons["chosen equals rejected"] = len(same)
        kept = sorted(set(kept) - set(same))
    if not kept:
        what = ", ".join(f"{n} {r}" for r, n in reasons.items()) or "the file has no rows"
        raise TunebookError(
            f"{file} has no pair to train on ({what}); raise max_length, or check the preference data of notebook 01."
        )
    out = rows.select(kept, keep_in_memory=True)
    if swap:
        out = out.rename_columns({"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"})
    return out, {"pairs": len(rows), "left out": reasons, "left out ids": [rows[i]["id"] for i, _ in dropped][:50]}


def lengths_of(rows: Any, padded: bool = False) -> list[int]:
    """Tokens of every row or, for pairs, of both answers with their prompts (padded: the shorter as long as the longer)."""
    if "input_ids" in rows.column_names:
        return [len(ids) for ids in rows["input_ids"]]
    sides = zip(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True)
    return [2 * (len(p) + max(len(c), len(r))) if padded else 2 * len(p) + len(c) + len(r) for p, c, r in sides]


def prompts(rows: Any, tokenizer: Any, count: int = 4) -> list[dict[str, Any]]:
    """The first rows as prompts to answer: id, prompt_ids, and the reference as text."""
    found = []
    for row in rows.select(range(min(count, len(rows)))):
        if "prompt_ids" in row:
            ids, answer = row["prompt_ids"], row["chosen_ids"]
        else:
            start = next((t for t, label in enumerate(row["labels"]) if label != -100), 0)
            ids, answer = row["input_ids"][:start], row["input_ids"][start:]
        if ids:
            found.append(
                {
                    "id": row["id"],
                    "prompt_ids": list(ids),
                    "reference": tokenizer.decode(answer, skip_special_tokens=True).strip(),
                }
            )
    return found


def preview(row: dict[str, Any], tokenizer: Any) -> Any:
    """One row as it is trained: every token, the trained ones marked (HTML in a notebook, [brackets] in a terminal)."""
    import html

    from helpers.display import Html

    markup, text, last = [], [], False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        trained, piece = label != -100, tokenizer.decode([token])
        shown = html.escape(piece).replace("\n", "⏎<br>")
        markup.append(
            f"<mark style='background:#E69F0055;color:inherit'>{shown}</mark>"
            if trained
            else f"<span style='opacity:.65'>{shown}</span>"
        )
        text.append(("[" if trained and not last else "]" if last and not trained else "") + piece)
        last = trained
    return Html(
        f"<p><b>{html.escape(str(row.get('id', '')))}</b>, trained tokens marked:</p><code style='white-space:pre-wrap'>{''.join(markup)}</code>",
        "".join(text) + ("]" if last else ""),
    )
