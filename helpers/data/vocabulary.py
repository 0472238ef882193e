"""What a tokenizer makes of the data, and tokens added to it where it makes too much.

    vocabulary.report(tokenizer, texts, other)            tokens per character, beside a second tokenizer; words worth a token
    vocabulary.add_tokens(model, tokenizer, tokens)       new tokens start as the mean of the pieces they replace (Hewitt 2021)
    peft.LoraConfig(..., trainable_token_indices=ids)     their rows are trained and saved with the adapter
    vocabulary.fit(model, tokenizer)                      make room for them before such an adapter is loaded

The same list added to the same tokenizer always gives the same ids, so data and training agree without passing them on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from helpers.errors import TunebookError

SAMPLE_CHARS = 2_000_000
WORD = re.compile(r"[^\W\d_]\w*")
LEAST_PIECES = 3  # a word of two pieces gains nothing from a token of its own


def report(tokenizer: Any, texts: Iterable[str], other: Any = None, words: int = 20) -> dict[str, Any]:
    """Measure `texts` (about two million characters of them) under a tokenizer, and under `other` beside it.

    Returns {"this": figures, "other": figures or None, "candidates": [...]}. Figures: name, vocabulary size, texts,
    characters, tokens, tokens_per_character, bytes_per_token, unknown_share (tokens it has no piece for), pieces_per_word.
    Candidates: the words that would save most as tokens of their own, as {"word", "count", "pieces", "saves"}, where
    `saves` is their share of all tokens that would go.
    """
    sample, size = [], 0
    for text in texts:
        if size >= SAMPLE_CHARS:
            break
        text = text[: SAMPLE_CHARS - size]
        sample.append(text)
        size += len(text)
    if not size:
        raise TunebookError("There is no text to measure the vocabulary on; the data is empty after cleaning.")
    counts: Counter = Counter()
    for text in sample:
        counts.update(WORD.findall(text))
    common = counts.most_common(5_000)
    figures = {
        "this": _figures(tokenizer, sample, size, common),
        "other": _figures(other, sample, size, common) if other is not None else None,
    }
    return figures | {"candidates": candidates(tokenizer, counts, figures["this"]["tokens"], words)}


def table(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows for what `report` found: a column for each tokenizer, the words worth a token last."""
    compared = [found["this"], *([found["other"]] if found["other"] else [])]
    keys = [key for key in compared[0] if key != "name"]
    rows = [
        (
            key.replace("_", " "),
            *(f"{one[key]:,.3f}" if isinstance(one[key], float) else f"{one[key]:,}" for one in compared),
        )
        for key in keys
    ]
    best = ", ".join(
        f"{c['word']} ({c['pieces']} pieces, {c['count']:,} times, saves {c['saves']:.1%})"
        for c in found["candidates"][:6]
    )
    return ("", *(str(one["name"]) for one in compared)), [
        *rows,
        ("words that would save most as tokens (add_tokens)", best or "none"),
    ]


def candidates(tokenizer: Any, counts: Counter, tokens: int, limit: int = 20) -> list[dict[str, Any]]:
    """Frequent words that the tokenizer cuts into three pieces or more, those that save most first.

    Words are measured as they stand after a space, where most stand; the space stays a token of its own beside an added
    word. Long runs of a script without spaces are no words and are left out.
    """
    words = _spaced([word for word, count in counts.most_common(20_000) if count > 1 and len(word) <= 40])
    if not words:
        return []
    found = []
    for word, pieces in zip(words, _lengths(tokenizer, [" " + word for word in words]), strict=True):
        if pieces >= LEAST_PIECES:
            saved = counts[word] * (pieces - 2)
            found.append(
                {"word": word, "count": counts[word], "pieces": pieces, "saves": round(saved / max(tokens, 1), 5)}
            )
    return sorted(found, key=lambda entry: (-entry["saves"], entry["word"]))[:limit]


def parse(tokens: str | Iterable[str]) -> list[str]:
    """A parameter's "<sql>, kilohertz" as a list without repeats; a list is taken as it is."""
    parts = (part.strip() for part in tokens.split(",")) if isinstance(tokens, str) else tokens
    return list(dict.fromkeys(part for part in parts if part))


def add_tokens(model: Any, tokenizer: Any, tokens: str | Iterable[str]) -> list[int]:
    """Add tokens to `tokenizer` and rows for them to `model`; returns their ids, in the order of `tokens`.

    Each new row of the embedding, and of an output layer of its own, is the mean of the rows of the pieces that the token
    is cut into now. model: None prepares a tokenizer alone (the data stage). Tokens in the form <|…|> become special
    ones. Raises TunebookError for a token that is already one, that holds white space at an end, or that is too long.
    """
    tokens = parse(tokens)
    known = tokenizer.get_vocab()
    for token in tokens:
        if token != token.strip() or len(token) > 100:
            raise TunebookError(
                f"{token[:100]!r} cannot become a token: white space at its ends, or longer than 100 characters; correct add_tokens."
            )
        if len(pieces := _pieces(tokenizer, token)) == 1 and (
            token in known or tokenizer.decode(pieces).strip() == token
        ):
            raise TunebookError(
                f"{token!r} is a token of this tokenizer already (id {pieces[0]}); leave it out of add_tokens."
            )
    if not tokens:
        return []
    from tokenizers import AddedToken

    cut = [_pieces(tokenizer, token) for token in tokens]
    special = [token for token in tokens if re.fullmatch(r"<\|.+\|>", token)]
    plain = [token for token in tokens if token not in special]
    ordered = plain + special
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in special], special_tokens=True)
    ids = dict(zip(ordered, tokenizer.convert_tokens_to_ids(ordered), strict=True))
    if model is not None:
        fit(model, tokenizer)
        for layer in _embeddings(model):
            _start_as_mean(layer.weight, [(ids[token], pieces) for token, pieces in zip(tokens, cut, strict=True)])
    return [ids[token] for token in tokens]


def fit(model: Any, tokenizer: Any) -> bool:
    """Give `model` an embedding row for every id of `tokenizer`; true when it had to grow. Rows are never taken away:
    many models have more than their tokenizer needs.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return False
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return True


def added_since(base: Any, tokenizer: Any) -> list[str]:
    """Tokens that `tokenizer` has and `base` has not, in the order of their ids."""
    before, after = base.get_vocab(), tokenizer.get_vocab()
    return sorted(set(after) - set(before), key=after.__getitem__)


def _embeddings(model: Any) -> list[Any]:
    """The input embedding, and the output layer where it has weights of its own."""
    given, out = model.get_input_embeddings(), model.get_output_embeddings()
    return [given] if out is None or out.weight is given.weight else [given, out]


def _start_as_mean(weight: Any, rows: list[tuple[int, list[int]]]) -> None:
    import torch

    with torch.no_grad():
        for row, pieces in rows:
            weight[row] = weight[pieces].float().mean(0).to(weight.dtype)  # (pieces, hidden) → (hidden,)


def _pieces(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _lengths(tokenizer: Any, texts: list[str]) -> list[int]:
    return [len(ids) for ids in _token_ids(tokenizer, texts)]


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The Rust tokenizer without transformers' bookkeeping where there is one: four times as fast."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode_batch_fast"):
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _figures(tokenizer: Any, texts: list[str], characters: int, common: list[tuple[str, int]]) -> dict[str, Any]:
    tokens = unknown = 0
    unk = tokenizer.unk_token_id
    for at in range(0, len(texts), 500):
        for ids in _token_ids(tokenizer, texts[at : at + 500]):
            tokens += len(ids)
            unknown += ids.count(unk) if unk is not None else 0
    words = sum(count for _, count in common)
    lengths = _lengths(tokenizer, [" " + word for word, _ in common]) if common else []
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return {
        "name": str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "texts": len(texts),
        "characters": characters,
        "tokens": tokens,
        "tokens_per_character": round(tokens / characters, 4),
        "bytes_per_token": round(size / max(tokens, 1), 3),
        "unknown_share": round(unknown / max(tokens, 1), 6),
        "pieces_per_word": round(
            sum(n * count for n, (_, count) in zip(lengths, common, strict=True)) / max(words, 1), 3
        ),
    }


def _spaced(words: list[str]) -> list[str]:
    """The words without a character of a script that puts no spaces between words."""
    import numpy as np

    from helpers.data.shingles import tokens

    _, offsets, unspaced = tokens(words)
    before = np.concatenate([[0], np.cumsum(unspaced)])  # characters without spaces before each token
    return [word for word, found in zip(words, np.diff(before[offsets]).tolist(), strict=True) if not found]
