"""Texts as hashed shingles, a whole batch at once in numpy: what duplicate search and decontamination compare.

A token is a run of letters and digits, or one character where a script puts no spaces between words (Chinese,
Japanese, Thai, …), or one symbol. A shingle is `words` tokens in a row, `chars` tokens where it begins in such a
script. Case does not count, white space never does.

Splitting and hashing words in Python makes 28,000 documents of 150 words a second. Here a word's hash is a polynomial
in a 64-bit ring (Karp and Rabin, https://doi.org/10.1147/rd.312.0249), so every step is one pass of numpy over the
characters of the batch.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
import unicodedata
from typing import Any

import numpy as np

from helpers.tasks.text_metrics import UNSPACED_RANGES

BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
INVERSE = pow(BASE, -1, 2**64)
PORTION_CHARS = 64_000  # arrays of this many 64-bit numbers stay in the processor's cache
MANY = 10
SPACE, WORD, UNSPACED, SYMBOL = 0, 1, 2, 3


def tokens(texts: list[str], symbols: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of the tokens of every text.

    Returns (hashes, offsets, unspaced): uint64 (tokens,), int64 (texts + 1,) so that text i owns
    hashes[offsets[i]:offsets[i + 1]], and bool (tokens,), true for characters of scripts without spaces.
    """
    lowered = [text.lower() for text in texts]  # some letters become two
    codes = np.frombuffer("\n".join(["", *lowered, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
    classes: np.ndarray = _classes(symbols).take(codes, mode="clip")
    is_word = classes == WORD
    starts: np.ndarray = np.flatnonzero((classes[1:] > WORD) | is_word[1:] & ~is_word[:-1]) + 1
    size = 1 << max(17, len(codes).bit_length())
    terms = _powers(BASE, size)[: len(codes)] * (codes * (classes > SPACE))  # 0 between tokens: sums may run over them
    sums = np.cumsum(terms)
    hashes = np.diff(sums[starts - 1], append=sums[-1]) * _powers(INVERSE, size)[starts]
    offsets: Any = np.searchsorted(starts, np.cumsum([1, *(len(text) + 1 for text in lowered)]))
    return mix(hashes), offsets, classes[starts] == UNSPACED


def shingles(texts: list[str], words: int = 3, chars: int = 5, symbols: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the shingles of every text, in order, repeats included: (uint64 (shingles,), int64 (texts + 1,)).

    A text of fewer than `words` tokens is one shingle; one without tokens has none.
    """
    portion = np.cumsum([len(text) for text in texts]) // PORTION_CHARS
    grouped = itertools.groupby(zip(portion.tolist(), texts, strict=True), operator.itemgetter(0))
    parts = [_shingles([text for _, text in group], words, chars, symbols) for _, group in grouped]
    flat = np.concatenate([np.zeros(0, np.uint64), *(part[0] for part in parts)])
    return flat, np.cumsum(np.concatenate([[0], *(part[1] for part in parts)]), dtype=np.int64)


def _shingles(texts: list[str], words: int, chars: int, symbols: bool) -> tuple[np.ndarray, np.ndarray]:
    """The shingles of all texts, and how many each has."""
    hashes, offsets, unspaced = tokens(texts, symbols)
    counts, gap = np.diff(offsets), max(words, chars) - 1
    ends: np.ndarray = np.repeat(offsets[1:], gap)  # zeros there, so that no shingle reaches into the next text
    hashes, unspaced = np.insert(hashes, ends, 0), np.insert(unspaced, ends, False)
    starts = offsets[:-1] + gap * np.arange(len(texts))
    sizes = np.where(counts > words, counts - words + 1, np.minimum(counts, 1))
    grams = _grams(hashes, words)
    if unspaced.any() and chars != words:
        grams = np.where(unspaced, _grams(hashes, chars), grams)
    every = np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())  # start, start + 1, … of each
    return grams[every], sizes


def many(counts: np.ndarray, texts: int) -> np.ndarray:
    """Which shingles stand in many of so many different texts: in more than MANY, of a few texts in more than half.

    counts: texts that hold each shingle. What many texts share (an instruction, a schema) does not tell them apart.
    """
    return counts > max(2, min(MANY, texts / 2))


def mix(hashes: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, in place: every input bit reaches every output bit."""
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    return hashes


def text_hash(text: str) -> int:
    """64 bits that name a text, white space and all."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _grams(hashes: np.ndarray, size: int) -> np.ndarray:
    """Hash of `size` tokens from each position on, as though the tokens went on past the end with zeros."""
    grams = hashes.copy()
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


@functools.lru_cache(maxsize=4)
def _powers(base: int, size: int) -> np.ndarray:
    """base, base**2, … modulo 2**64, uint64 (size,)."""
    return np.multiply.accumulate(np.full(size, base, np.uint64))
