"""HTML, PDF, DOCX and Markdown to clean text, cut into pieces of tokens that overlap.

Documents come from strangers, and their parsers are C libraries: each is read in a second process with a memory limit and
a clock, so that a bomb costs one document and not the job. Nothing is unpacked to disk and no link is followed.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.data.tables import Rejects

SECONDS = 60  # for one document
MEMORY = 2 * 2**30  # bytes that reading one document may take
MAX_BYTES = 64 * 2**20
MAX_TAGS_DEEP = 500  # browsers stop at 512; lxml recurses
BLOCK_CHARS = 500_000  # of a long document at a time: a token's place takes 150 bytes
MAX_UNZIPPED = 256 * 2**20
BREAKS = ("\n\n", "\n", ". ", "。", " ")


class Unreadable(Exception):
    """A document that cannot be used. args: (reason, detail)."""


def chunks(
    file: Path,
    rejects: Rejects,
    tokenizer: Callable[[], Any],
    tokens: int = 384,
    overlap: int = 32,
    least_chars: int = 100,
) -> Iterator[tuple[int, dict]]:
    """(number of the piece from 1, {"text", "document", "piece"}) for one document.

    tokenizer: gives the tokenizer that counts tokens. A document without text, one that can't be read and one shorter than
    `least_chars` characters are rejected or dropped, with the reason.
    """
    try:
        text = read(file)
    except Unreadable as error:
        rejects.saw(1)
        rejects.add(file, 0, error.args[0], error.args[1], step="document")
        return
    if len(text) < least_chars:
        rejects.add(
            file,
            0,
            "document too short",
            f"{len(text)} characters, fewer than {least_chars}",
            step="document",
            invalid=False,
        )
        return
    for number, piece in enumerate(cut(text, tokenizer(), tokens, overlap), 1):
        yield number, {"text": piece, "document": file.name, "piece": number}


def read(file: Path) -> str:
    """The clean text of a document, plain or in .gz or .zst. Raises Unreadable."""
    content = _content(file)
    names = [part.lower() for part in file.name.split(".")]
    kind = next(name for name in reversed(names) if name not in ("gz", "zst"))
    if kind in ("md", "markdown"):
        return tidy(_markdown(_decoded(content)))
    return tidy(_elsewhere(kind, content))


def _content(file: Path) -> bytes:
    from helpers.data.streams import Unpacked

    if file.suffix.lower() not in (".gz", ".zst"):
        if file.stat().st_size > MAX_BYTES:
            raise Unreadable("document too large", f"{file.stat().st_size / 2**20:.0f} MiB, over {MAX_BYTES // 2**20}")
        return file.read_bytes()
    with Unpacked(file, Rejects()) as stream:
        content = bytearray(stream.pending)
        while data := stream._take(2**20):
            content += data
            if len(content) > MAX_BYTES:
                raise Unreadable("document too large", f"unpacks to over {MAX_BYTES // 2**20} MiB")
        if stream.ended:
            raise Unreadable("file ends early", stream.ended)
    return bytes(content)


def _decoded(content: bytes) -> str:
    for encoding in ("utf-8-sig", "utf-16") if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig",):
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode(encoding)
    raise Unreadable("not UTF-8", "save the document as UTF-8")


def tidy(text: str) -> str:
    """Line ends as \\n, no control characters, no trailing blanks, at most one empty line in a row."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = text.encode("utf-8", "ignore").decode()
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def cut(text: str, tokenizer: Any, tokens: int, overlap: int) -> Iterator[str]:
    """Consecutive pieces of at most `tokens` tokens, each beginning at most `overlap` tokens before the last one ended.

    A piece ends at a paragraph, line or sentence where one ends in its last quarter. Every character is in some piece.
    """
    start = 0
    while start < len(text):
        end = start + BLOCK_CHARS
        if end < len(text):
            end = next(
                (at + len(sign) for sign in BREAKS if (at := text.rfind(sign, start + BLOCK_CHARS // 2, end)) >= 0), end
            )
        yield from _cut(text[start:end], tokenizer, tokens, min(overlap, tokens // 2))
        start = end


def _cut(text: str, tokenizer: Any, tokens: int, overlap: int) -> Iterator[str]:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    begin, start_char = 0, 0
    while begin < len(offsets):
        end = min(begin + tokens, len(offsets))
        end_char = offsets[end][0] if end < len(offsets) else len(text)
        if end < len(offsets):
            floor = offsets[begin + (3 * (end - begin)) // 4][0]
            found = [at + len(sign) for sign in BREAKS if (at := text.rfind(sign, floor, end_char)) >= 0]
            end_char = found[0] if found else end_char
            while offsets[end - 1][0] >= end_char and end > begin + 1:
                end -= 1
        if piece := text[start_char:end_char].strip():
            yield piece
        if end >= len(offsets):
            return
        begin = max(end - overlap, begin + 1)
        start_char = offsets[begin][0] if overlap else end_char


# ---------------------------------------------------------------- kinds


def _html(content: bytes) -> str:
    import trafilatura

    if _depth(content) > MAX_TAGS_DEEP:
        raise Unreadable("HTML bomb", f"tags are nested over {MAX_TAGS_DEEP} deep")
    text = trafilatura.extract(content, include_comments=False, include_tables=True, favor_recall=True)
    if not text:
        raise Unreadable("no text", "no main text was found in the page")
    return text


def _depth(content: bytes) -> int:
    """How deep tags that need an end are nested, roughly, without parsing."""
    void = {
        b"br",
        b"img",
        b"hr",
        b"meta",
        b"link",
        b"input",
        b"area",
        b"base",
        b"col",
        b"embed",
        b"source",
        b"track",
        b"wbr",
        b"p",
        b"li",
        b"td",
        b"tr",
        b"th",
        b"dt",
        b"dd",
        b"option",
    }
    deepest = depth = 0
    for match in re.finditer(rb"<(/?)([a-zA-Z][a-zA-Z0-9]*)", content):
        if match[2].lower() in void:
            continue
        depth = max(0, depth - 1) if match[1] else depth + 1
        deepest = max(deepest, depth)
    return deepest


def _pdf(content: bytes) -> str:
    import pypdf

    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("encrypted", "the PDF wants a password")
        pages = [page.extract_text() or "" for page in reader.pages]
    except pypdf.errors.PyPdfError as error:
        raise Unreadable("broken PDF", str(error)[:200]) from None
    text = "\n\n".join(page.strip() for page in pages)
    if not text.strip():
        raise Unreadable(
            "no text",
            f"none of the PDF's pages ({len(pages)}) holds text; scanned pages need character recognition first",
        )
    return re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", text)


def _docx(content: bytes) -> str:
    import docx

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = archive.infolist()
            if any(
                part.filename.startswith(("/", "\\"))
                or ".." in re.split(r"[/\\]", part.filename)
                or ":" in part.filename
                for part in parts
            ):
                raise Unreadable("unsafe path in archive", "a name in the DOCX points outside of it")
            if sum(part.file_size for part in parts) > MAX_UNZIPPED:
                raise Unreadable("document too large", f"the DOCX unpacks to over {MAX_UNZIPPED // 2**20} MiB")
        document = docx.Document(io.BytesIO(content))
    except (zipfile.BadZipFile, KeyError, ValueError, docx.opc.exceptions.PackageNotFoundError) as error:
        raise Unreadable("broken DOCX", str(error)[:200] or type(error).__name__) from None
    lines = []
    for block in document.iter_inner_content():
        if hasattr(block, "rows"):
            lines += [" | ".join(cell.text.strip() for cell in row.cells) for row in block.rows]
        else:
            lines.append(block.text)
        lines.append("")
    text = "\n".join(lines).strip()
    if not text:
        raise Unreadable("no text", "the DOCX holds no text")
    return text


def _markdown(text: str) -> str:
    """Markdown without what is not text: front matter, comments, tags and pictures; links keep their words, code stays."""
    text = re.sub(r"\A---\n.*?\n(?:---|\.\.\.)\n", "", text.replace("\r\n", "\n"), flags=re.DOTALL)
    parts = re.split(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", text, flags=re.DOTALL | re.MULTILINE)
    for number in range(0, len(parts), 2):
        part = re.sub(r"<!--.*?-->", "", parts[number], flags=re.DOTALL)
        part = re.sub(r"</?[a-zA-Z][^<>\n]{0,500}>", "", part)
        part = re.sub(r"!\[([^\]\n]{0,500})\]\([^()\n]{0,1000}\)", "", part)
        parts[number] = re.sub(r"\[([^\]\n]{1,500})\]\([^()\n]{0,1000}\)", r"\1", part)
    return "".join(parts)


READERS = {"html": _html, "htm": _html, "pdf": _pdf, "docx": _docx}


# ---------------------------------------------------------------- in a second process


class _Reader:
    """One process that reads documents, started when the first is read and again after one has cost it its life."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def read(self, kind: str, content: bytes) -> str:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "helpers.data.documents"],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            atexit.register(self.stop)
        sent, received = self.process.stdin, self.process.stdout
        clock = threading.Timer(SECONDS, self.process.kill)
        clock.start()
        try:
            sent.write(json.dumps([kind, len(content)]).encode() + b"\n" + content)
            sent.flush()
            line = received.readline()
        except BrokenPipeError:
            line = b""
        finally:
            late = not clock.is_alive()
            clock.cancel()
        if not line:
            self.stop()
            raise (
                Unreadable("too long to read", f"the document was not read within {SECONDS} s")
                if late
                else Unreadable("reader died", "the document brought its parser down")
            )
        answer = json.loads(line)
        if isinstance(answer, list):
            raise Unreadable(*answer)
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def _serve() -> None:
    """The second process: a line of JSON (kind, size) and the bytes come in, the text or [reason, detail] goes out as JSON."""
    received, sent = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a parser prints must not stand among the answers
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while header := received.readline():
        kind, size = json.loads(header)
        content = received.read(size)
        try:
            answer: Any = READERS[kind](content)
        except Unreadable as error:
            answer = error.args
        except (MemoryError, RecursionError) as error:
            answer = ("document bomb", f"{type(error).__name__} while reading")
        except Exception as error:  # a parser may raise anything on a stranger's document; it goes back as the reason
            answer = (f"broken {kind.upper()}", f"{type(error).__name__}: {str(error)[:200]}")
        sent.write(json.dumps(answer).encode() + b"\n")
        sent.flush()


_reader = _Reader()


def _elsewhere(kind: str, content: bytes) -> str:
    return _reader.read(kind, content)


if __name__ == "__main__":
    _serve()
