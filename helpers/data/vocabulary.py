"""What a tokenizer makes of the data, and tokens added to it.

The same list added to the same tokenizer always gives the same ids, so data and training agree without passing them on.
`peft.LoraConfig(trainable_token_indices=ids)` trains the new rows and saves them with the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.errors import TunebookError

SAMPLE_CHARS = 2_000_000
WORD = re.compile(r"[^\W\d_]\w*")


def report(tokenizer: Any, texts: Iterable[str]) -> dict[str, Any]:
    """Figures for about two million characters of `texts`: vocabulary size, texts, characters, tokens,
    tokens_per_character, bytes_per_token, unknown_share (tokens without a piece of their own), pieces_per_word."""
    sample, characters = [], 0
    for text in texts:
        if characters >= SAMPLE_CHARS:
            break
        sample.append(text[: SAMPLE_CHARS - characters])
        characters += len(sample[-1])
    if not characters:
        raise TunebookError("There is no text to measure the vocabulary on; the data is empty after cleaning.")
    tokens = unknown = 0
    for at in range(0, len(sample), 500):
        for ids in token_ids(tokenizer, sample[at : at + 500]):
            tokens += len(ids)
            unknown += ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    words = [" " + word for word in WORD.findall("\n".join(sample)[: SAMPLE_CHARS // 10])]
    return {
        "vocabulary": len(tokenizer),
        "texts": len(sample),
        "characters": characters,
        "tokens": tokens,
        "tokens_per_character": round(tokens / characters, 4),
        "bytes_per_token": round(len("".join(sample).encode("utf-8", "surrogatepass")) / max(tokens, 1), 3),
        "unknown_share": round(unknown / max(tokens, 1), 6),
        "pieces_per_word": round(sum(map(len, token_ids(tokenizer, words))) / len(words), 3) if words else 0.0,
    }


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens; the Rust tokenizer without transformers' bookkeeping is four times as fast."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode_batch_fast"):
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]


def add_tokens(model: Any, tokenizer: Any, tokens: str | Iterable[str], special: bool = False) -> list[int]:
    """Add tokens to `tokenizer` and rows for them to `model`; returns their ids, in the order of `tokens`.

    Each new row of the embedding, and of an output layer of its own, starts as the mean of the rows of the pieces that
    the token is cut into now (Hewitt 2021). model: None prepares a tokenizer alone (the data stage). tokens: a list, or
    a parameter's "<sql>, kilohertz"; those of the form <|…|>, or all, become special ones. Raises TunebookError for a
    token that is one already, that holds white space at an end, or that is too long.
    """
    parts = (part.strip() for part in tokens.split(",")) if isinstance(tokens, str) else tokens
    tokens = list(dict.fromkeys(part for part in parts if part))
    known, cut = tokenizer.get_vocab(), []
    for token in tokens:
        if token != token.strip() or len(token) > 100:
            found = "it has white space at its ends, or is longer than 100 characters"
            raise TunebookError(f"{token[:100]!r} in add_tokens cannot become a token: {found}.")
        pieces = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(pieces) == 1 and (token in known or tokenizer.decode(pieces).strip() == token):
            raise TunebookError(f"{token!r} in add_tokens is a token of this tokenizer already (id {pieces[0]}).")
        cut.append(pieces)
    if not tokens:
        return []
    from tokenizers import AddedToken

    control = [token for token in tokens if special or re.fullmatch(r"<\|.+\|>", token)]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in control], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    if model is not None:
        import torch

        fit(model, tokenizer)
        given, out = model.get_input_embeddings(), model.get_output_embeddings()
        layers = [given] if out is None or out.weight is given.weight else [given, out]
        with torch.no_grad():
            for weight in (layer.weight for layer in layers):
                for row, pieces in zip(ids, cut, strict=True):
                    weight[row] = weight[pieces].float().mean(0).to(weight.dtype)  # (pieces, hidden) → (hidden,)
    return ids


def new_tokens(base: Any, tokenizer: Any) -> list[str]:
    """Tokens of a run's `tokenizer` that the tokenizer of its `base` lacks, in the order of their ids."""
    known, vocabulary = base.get_vocab(), tokenizer.get_vocab()
    return sorted(vocabulary.keys() - known.keys(), key=vocabulary.__getitem__)


def without_rows(tokenizer: Any, rows: int) -> str:
    """What is wrong where a base's own tokenizer has ordinary tokens that its embedding of `rows` has no row for."""
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
    lost = sorted((i, token) for token, i in vocabulary.items() if i >= rows and i not in special)
    found = f"{len(lost)} of its tokens, {lost[0][1]!r} first, have no row in the embedding of {rows:,}" if lost else ""
    return found and f"{found}; use the tokenizer that the model was published with."


def of_run(data: Path, base: Path | None) -> Any:
    """Folder of a run's tokenizer with its template and added tokens, as the data stage in `data` left it; the base's
    own where it left none."""
    return data / "tokenizer" if (data / "tokenizer" / "tokenizer.json").is_file() else base


def of_base(data: Any) -> Path | None:
    """Folder of the run's tokenizer for an export of the untrained base; None for the base's own. data: the manifest of
    the data stage. Raises TunebookError where the run added tokens, for which that base has no rows."""
    chosen = data.data.get("chat_template") or {}
    if chosen.get("added") or data.params.get("add_tokens"):
        raise TunebookError(
            "The run adds tokens to the vocabulary, which the untrained base has no rows for; export what was trained, "
            "or set template_tokens to eos (and add_tokens to nothing) in notebook 01."
        )
    return of_run(data.path, None) if chosen else None


def fit(model: Any, tokenizer: Any) -> bool:
    """Give `model` an embedding row for every id of `tokenizer`; true when it had to grow. Rows are never taken away:
    many models have more than their tokenizer needs. A new row is the mean of the others, so that it never wins."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return False
    import torch

    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            layer.weight[rows:] = layer.weight[:rows].float().mean(0).to(layer.weight.dtype)
    return True
