"""Texts as hashed shingles, a whole batch at once in numpy: what duplicate search and decontamination compare.

A token is a run of letters and digits, or one character where a script puts no spaces between words (Chinese,
Japanese, Thai, …), or one symbol. A shingle is `words` tokens in a row, `chars` tokens where it begins in such a
script. Case does not count, white space never does.

Splitting and hashing words in Python makes 28,000 documents of 150 words a second. Here a word's hash is a
difference of prefix sums of a polynomial in a 64-bit ring (Karp and Rabin, https://doi.org/10.1147/rd.312.0249),
so every step is one pass of numpy over the characters of the batch.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np

from helpers.tasks.text_metrics import UNSPACED_RANGES

BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
INVERSE = pow(BASE, -1, 2**64)
PORTION_CHARS = 64_000  # arrays of this many 64-bit numbers stay in the cache: twice as fast as 100,000
SPACE, WORD, UNSPACED, SYMBOL = 0, 1, 2, 3
_KEPT = threading.local()


def tokens(texts: list[str], symbols: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of the tokens of every text.

    Returns (hashes, offsets, unspaced): uint64 (tokens,), int64 (texts + 1,) so that text i owns
    hashes[offsets[i]:offsets[i + 1]], and bool (tokens,), true for characters of scripts without spaces.
    """
    joined = "\n".join(texts)
    if joined.isascii():
        lengths = map(len, texts)
        raw = f"\n{joined}\n".encode("ascii").lower()
        codes, classes = np.frombuffer(raw, np.uint8), np.frombuffer(raw.translate(_ascii_classes(symbols)), np.uint8)
    else:
        lowered = [text.lower() for text in texts]  # some letters become two
        lengths = map(len, lowered)
        codes = np.frombuffer("\n".join(["", *lowered, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
        classes = _classes(symbols).take(codes, mode="clip")
    is_word = classes == WORD  # false at both ends
    is_single = classes >= UNSPACED
    starts: np.ndarray = np.flatnonzero(is_word[1:] & ~is_word[:-1] | is_single[1:]) + 1
    ends = np.flatnonzero(is_word[:-1] & ~is_word[1:] | is_single[:-1])
    powers, inverses = _powers(1 << max(17, len(codes).bit_length()))
    terms, sums = _scratch(len(codes))
    np.multiply(codes, powers[: len(codes)], out=terms)
    np.cumsum(terms, out=sums)
    hashes = sums[ends]
    hashes -= sums[starts]
    hashes += terms[starts]
    hashes *= inverses[starts]
    ends_of_texts = np.cumsum(np.fromiter(lengths, np.int64, len(texts)) + 1) + 1
    offsets: np.ndarray = np.zeros(len(texts) + 1, np.int64)
    offsets[1:] = np.searchsorted(starts, ends_of_texts)
    return mix(hashes), offsets, classes[starts] == UNSPACED


def shingles(texts: list[str], words: int = 3, chars: int = 5, symbols: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the shingles of every text, in order, repeats included: (uint64 (shingles,), int64 (texts + 1,)).

    A text of fewer than `words` tokens is one shingle; one without tokens has none.
    """
    parts = [_shingles(part, words, chars, symbols) for part in _portions(texts)]
    offsets: np.ndarray = np.zeros(len(texts) + 1, np.int64)
    if not parts:
        return np.zeros(0, np.uint64), offsets
    np.cumsum(np.concatenate([np.diff(part[1]) for part in parts]), out=offsets[1:])
    return np.concatenate([part[0] for part in parts]), offsets


def _portions(texts: list[str]) -> Iterator[list[str]]:
    """`texts` in lists of about PORTION_CHARS characters."""
    first, size = 0, 0
    for i, text in enumerate(texts):
        size += len(text)
        if size >= PORTION_CHARS:
            yield texts[first : i + 1]
            first, size = i + 1, 0
    if first < len(texts):
        yield texts[first:]


def _shingles(texts: list[str], words: int, chars: int, symbols: bool) -> tuple[np.ndarray, np.ndarray]:
    hashes, offsets, unspaced = tokens(texts, symbols)
    counts = np.diff(offsets)
    if not len(hashes):
        return hashes, np.zeros(len(texts) + 1, np.int64)
    grams = _grams(hashes, words)
    if unspaced.any() and chars != words:
        left = np.repeat(offsets[1:], counts) - np.arange(len(hashes))  # tokens from here to the end of the text
        grams = np.where(unspaced & (left >= chars), _grams(hashes, chars), grams)
    short = np.flatnonzero((counts > 0) & (counts < words))
    if len(short):
        whole: np.ndarray = np.zeros(len(short), np.uint64)
        for k in range(words - 1):
            more = counts[short] > k
            whole[more] = whole[more] * np.uint64(BASE) + hashes[offsets[short[more]] + k]
        grams[offsets[short]] = mix(whole + counts[short].astype(np.uint64))
    keep: np.ndarray = np.ones(len(hashes), bool)
    for k in range(1, words):  # the last words - 1 positions begin no shingle
        keep[offsets[1:][counts >= k] - k] = False
    keep[offsets[short]] = True
    sizes = np.where(counts >= words, counts - words + 1, np.minimum(counts, 1))
    result: np.ndarray = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(sizes, out=result[1:])
    return grams[keep], result


def mix(hashes: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, in place: every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        hashes ^= hashes >> np.uint64(30)
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(27)
        hashes *= np.uint64(0x94D049BB133111EB)
        hashes ^= hashes >> np.uint64(31)
    return hashes


def text_hash(text: str) -> int:
    """64 bits that name a text, white space and all."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """bool (n,): which of `values` are in the sorted array `ordered`."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    at: Any = np.searchsorted(ordered, values)
    at[at == len(ordered)] = 0
    return ordered[at] == values


def _grams(hashes: np.ndarray, size: int) -> np.ndarray:
    """Hash of `size` tokens from each position on, as though the tokens went on past the end with zeros."""
    grams = hashes.copy()
    with np.errstate(over="ignore"):
        for k in range(1, size):
            grams *= np.uint64(BASE)
            grams[:-k] += hashes[k:]
    return mix(grams)


@functools.cache
def _classes(symbols: bool) -> np.ndarray:
    """Class of every code point, uint8 (0x110000,)."""
    if not symbols:
        return np.where(_classes(True) == SYMBOL, SPACE, _classes(True))
    table: np.ndarray = np.zeros(0x110000, np.uint8)
    for code in range(0x30000):
        char = chr(code)
        if char.isspace() or code == 0:
            continue
        group = unicodedata.category(char)[0]
        if group in "LNM":
            table[code] = WORD
        elif group in "PS":
            table[code] = SYMBOL
    table[0xE0100:0xE01F0] = WORD  # variation selectors belong to the character before them
    for low, high in UNSPACED_RANGES:
        span = table[low : high + 1]
        span[(span == WORD) | (low >= 0x20000)] = UNSPACED
    return table


@functools.cache
def _ascii_classes(symbols: bool) -> bytes:
    return _classes(symbols)[:256].tobytes()


def _scratch(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two uint64 (size,) to be overwritten, kept by the thread: fresh pages would cost as much as the arithmetic."""
    held = getattr(_KEPT, "arrays", None)
    if held is None or len(held[0]) < size:
        held = _KEPT.arrays = (np.empty(size, np.uint64), np.empty(size, np.uint64))
    return held[0][:size], held[1][:size]


@functools.lru_cache(maxsize=2)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE**i and BASE**-i modulo 2**64 for i < size."""
    tables = []
    for base in (BASE, INVERSE):
        table: np.ndarray = np.full(size, base, np.uint64)
        table[0] = 1
        tables.append(np.multiply.accumulate(table))
    return tables[0], tables[1]
