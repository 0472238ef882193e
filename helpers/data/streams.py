"""The bytes of a file as UTF-8, unpacked on the way and never trusted: damage, bombs and endless lines end the reading, not the job."""

from __future__ import annotations

import codecs
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from helpers.data.tables import Rejects
from helpers.errors import TunebookError

MAX_LINE = 32 * 2**20  # bytes of one row; a longer one is rejected without being held
MAX_EXPANSION = 1000  # gzip and zstd may unpack to this many times their size, once past MAX_UNPACKED
MAX_UNPACKED = 2**30
BLOCK = 2**20


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
        self.pending = (
            head[skip:] if self.decode is None else self.decode.decode(head[skip:]).encode("utf-8", "surrogatepass")
        )
        self.lines: list[bytes] = []

    def _take(self, size: int) -> bytes:
        if self.ended:
            return b""
        try:
            data = self.stream.read(size)
        except (EOFError, OSError) as error:
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
                if not size and not piece:
                    continue  # an empty line, of which a bomb may hold a billion
                yield number, (b"".join(parts) if size <= MAX_LINE else None)
                parts, size = [piece], len(piece)
            if size > MAX_LINE:
                parts = []
        if size:
            yield number + 1, (b"".join(parts) if size <= MAX_LINE else None)

    def finish(self, number: int) -> None:
        """Say so when the file ended before its end. `number`: the row at which it broke off."""
        if self.ended:
            self.rejects.add(self.file, number, "file ends early", f"{self.ended}; the rows before are read")
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


def _open(file: Path) -> Any:
    try:
        raw = file.open("rb")
    except OSError as error:
        raise TunebookError(f"{file} cannot be opened ({error.strerror}); check its permissions.") from None
    if file.suffix.lower() == ".gz":
        return _Packed(raw, lambda: zlib.decompressobj(wbits=31), 2**15)
    if file.suffix.lower() == ".zst":
        import zstandard

        return _Packed(
            raw, lambda: zstandard.ZstdDecompressor().decompressobj(), 2**10
        )  # one KiB of zstd unpacks to 32 MiB at most
    return raw


class _Packed:
    """gzip or zstd, one or several members, giving up all that can be unpacked before it says that something is wrong.

    The libraries' own file objects lose the last block of a damaged gzip, and end a cut zstd as if it were whole.
    """

    def __init__(self, raw: BinaryIO, fresh: Callable[[], Any], portion: int):
        self.raw, self.fresh, self.portion = raw, fresh, portion
        self.unpacker: Any = None
        self.left = b""

    def read(self, size: int) -> bytes:
        given = bytearray()
        while len(given) < size:
            data = self.left or self.raw.read(self.portion)
            self.left = b""
            if self.unpacker is None:
                data = data.lstrip(b"\0") if self.portion == 2**15 else data  # gzip may be padded with zeros
                if not data:
                    break
                self.unpacker = self.fresh()
            if not data:
                if given:
                    break
                raise EOFError("the compressed data ends before its end marker")
            try:
                given += self.unpacker.decompress(data)
            except Exception as error:  # zlib.error or zstandard's own, whose class needs the library
                if given:
                    self.left = data
                    break
                raise EOFError(str(error)) from None
            if self.unpacker.eof:
                self.left, self.unpacker = self.unpacker.unused_data, None
        return bytes(given)

    def close(self) -> None:
        self.raw.close()


# What is no UTF-16 or UTF-32 becomes half a surrogate pair, which costs its row and no other.
codecs.register_error("half-surrogate", lambda error: ("\ud800", error.end))


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
            return (codecs.getincrementaldecoder(name)("half-surrogate") if name else None), len(mark)
    return None, 0
