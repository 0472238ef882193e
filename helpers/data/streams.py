"""The bytes of a file as UTF-8, unpacked on the way and never trusted: damage, bombs and endless lines end the reading, not the job."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from helpers.data.rows import Rejects
from helpers.errors import TunebookError

MAX_LINE = 32 * 2**20  # bytes of one row; a longer one is rejected without being held
MAX_EXPANSION = 1000  # gzip and zstd may unpack to this many times their size, once past MAX_UNPACKED
MAX_UNPACKED = 2**30
BLOCK = 2**20
ENDS_EARLY = (EOFError, zlib.error, gzip.BadGzipFile)


class Unpacked(io.RawIOBase):
    """A file's bytes, unpacked, in UTF-8: a BOM is taken off, UTF-16 and UTF-32 are recoded.

    Reading stops, with one rejection, where a packed file is damaged, ends early or expands without measure.
    """

    def __init__(self, file: Path, rejects: Rejects):
        super().__init__()
        self.file, self.rejects = file, rejects
        self.given = 0
        self.ended = ""
        self.stream = _open(file)
        self.packed_bytes = max(1, file.stat().st_size) if file.suffix.lower() in (".gz", ".zst") else 0
        head = self._take(4)
        self.decode, skip = _encoding(head)
        self.pending = head[skip:] if self.decode is None else self.decode.decode(head[skip:]).encode("utf-8", "surrogatepass")
        self.lines: list[bytes] = []

    def _take(self, size: int) -> bytes:
        if self.ended:
            return b""
        try:
            data = self.stream.read(size)
        except Exception as error:
            if not isinstance(error, (*ENDS_EARLY, OSError)) and type(error).__name__ != "ZstdError":
                raise
            self.ended = f"the packed data is damaged or ends early ({error})"
            return b""
        self.given += len(data)
        if self.packed_bytes and self.given > max(MAX_UNPACKED, MAX_EXPANSION * self.packed_bytes):
            self.ended = f"the file unpacks to more than {MAX_EXPANSION} times its size; the rest was not read"
        return data

    def block(self) -> bytes:
        """The next piece of about 1 MiB; b"" at the end."""
        if self.pending:
            data, self.pending = self.pending, b""
            return data
        data = self._take(BLOCK)
        if self.decode is not None and (data or not self.ended):
            return self.decode.decode(data, final=not data).encode("utf-8", "surrogatepass")
        return data

    def split(self) -> Iterator[tuple[int, bytes | None]]:
        """(line number, line without its end); None for a line over MAX_LINE."""
        number, parts, size = 0, [], 0
        while True:
            data = self.block()
            if not data:
                break
            pieces = data.split(b"\n")
            parts.append(pieces[0])
            size += len(pieces[0])
            for piece in pieces[1:]:
                number += 1
                yield number, (b"".join(parts) if size <= MAX_LINE else None)
                parts, size = [piece], len(piece)
            if size > MAX_LINE:
                parts = []
        if size:
            yield number + 1, (b"".join(parts) if size <= MAX_LINE else None)

    def finish(self, number: int) -> None:
        """Say so when the file ended before its end. `number`: the row at which it broke off."""
        if self.ended:
            self.rejects.add(self.file.name, number, "file ends early", f"{self.ended}; the rows before are read")
            self.rejects.saw(1)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.block()
        size = min(len(buffer), len(data))
        buffer[:size] = data[:size]
        self.pending = data[size:] + self.pending
        return size

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
        super().close()


def _open(file: Path) -> BinaryIO:
    try:
        if file.suffix.lower() == ".gz":
            return gzip.open(file, "rb")
        if file.suffix.lower() == ".zst":
            import zstandard

            return zstandard.open(file, "rb")
        return file.open("rb")
    except OSError as error:
        raise TunebookError(f"{file} cannot be opened ({error.strerror}); check its permissions.") from None


def _encoding(head: bytes) -> tuple[Any, int]:
    """(incremental decoder, bytes of BOM to skip); the decoder is None for UTF-8."""
    marks = (
        (codecs.BOM_UTF8, None),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    )
    for mark, name in marks:
        if head.startswith(mark):
            return (codecs.getincrementaldecoder(name)("replace") if name else None), len(mark)
    return None, 0
