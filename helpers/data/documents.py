"""HTML, PDF, DOCX and Markdown to clean text, cut into pieces of tokens that overlap.

Documents come from strangers, and their parsers are C libraries: each is read in a child process with limits of memory
and time, so that a bomb costs one document and not the job. Nothing is unpacked to disk and no link is followed.
"""

from __future__ import annotations

import functools
import io
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.data import files
from helpers.data.tables import Rejects
from helpers.data.turns import RowError
from helpers.worker import Lost, Worker

SECONDS = 60  # for one document
MEMORY_GIB = 2
MAX_BYTES = 64 * 2**20
CHARS_A_TOKEN = 8  # more than most texts have
BREAKS = ("\n\n", "\n", ". ", "。", " ")


def chunks(
    file: Path, rejects: Rejects, where: str, tokenizer: Callable[[], Any], tokens: int, overlap: int, least_chars: int
) -> Iterator[tuple[int, dict]]:
    """(number of the piece from 1, {"text", "document", "piece"}) for one document.

    where: its name in rejects. tokenizer: gives the tokenizer that counts tokens. A document without text, one that
    can't be read and one shorter than `least_chars` characters are rejected or dropped, with the reason.
    """
    try:
        text = read(file)
    except RowError as error:
        rejects.total_seen += 1
        rejects.add(where, 0, error.reason, error.detail, step="document")
        return
    if len(text) < least_chars:
        rejects.total_seen += 1
        detail = f"{len(text)} characters, fewer than {least_chars}"
        rejects.add(where, 0, "document too short", detail, step="document", invalid=False)
        return
    for number, piece in enumerate(cut(text, tokenizer(), tokens, overlap), 1):
        yield number, {"text": piece, "document": file.name, "piece": number}


@functools.cache
def reader() -> Worker:
    """The child that reads documents, started anew after one has cost it its life."""
    return Worker("helpers.data.documents:parse", name="the reader of documents", memory_gib=MEMORY_GIB)


def read(file: Path) -> str:
    """The clean text of a document, plain or in .gz or .zst. Raises RowError with the reason why there is none."""
    try:
        found = reader().ask({"file": str(file.absolute()), "max_bytes": MAX_BYTES}, timeout_s=SECONDS)
    except Lost as error:
        reason = {"time": "too long to read", "memory": "document bomb"}.get(error.why, "reader died")
        raise RowError(reason, str(error)) from None
    if "text" not in found:
        raise RowError(**found)
    return found["text"]


def cut(text: str, tokenizer: Any, tokens: int, overlap: int) -> Iterator[str]:
    """Consecutive pieces of at most `tokens` tokens, each beginning at most `overlap` tokens before the last one ended.

    A piece ends at a paragraph, line or sentence where one ends in its last quarter. Every character is in some piece.
    """
    start, room = 0, CHARS_A_TOKEN * tokens  # what is tokenised to find the next end
    while start < len(text):
        ahead = text[start : start + room]
        places = tokenizer(ahead, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = places[tokens][0] if len(places) > tokens else len(ahead)
        last = start + end == len(text)
        if not last:
            ends = (at + len(sign) for sign in BREAKS if (at := ahead.rfind(sign, end - end // 4, end)) >= 0)
            end = next(ends, end)
        if piece := ahead[:end].strip():
            yield piece
        begins = [begin for begin, _ in places if begin < end]
        back = 0 if last else min(overlap, len(begins) // 2)
        start, room = start + (begins[-back] if back else end), 3 * end // 2


# ---------------------------------------------------------------- in the child


def parse(request: dict[str, Any], event: Any) -> dict[str, str]:
    """{"text"}, or {"reason", "detail"} where there is none."""
    logging.disable(logging.CRITICAL)
    file = Path(request["file"])
    kind = files.kind(file)
    try:
        return {"text": tidy(KINDS[kind](_content(file, request["max_bytes"])))}
    except RowError as error:
        return {"reason": error.reason, "detail": error.detail}
    except RecursionError:
        return {"reason": "document bomb", "detail": "it is nested past the parser's limit"}
    except MemoryError:
        raise
    except Exception as error:  # a parser may raise anything on a stranger's document; it goes back as the reason
        reason = f"broken {kind.removeprefix('.').upper()}"
        return {"reason": reason, "detail": f"{type(error).__name__}: {str(error)[:200]}"}


def _content(file: Path, most: int) -> bytes:
    with files.Unpacked(file) as packed:
        content = io.BufferedReader(packed).read(most + 1)
        if packed.problem:
            raise RowError("file ends early", packed.problem)
    if len(content) > most:
        raise RowError("document too large", f"it holds over {most / 2**20:.0f} MiB")
    return content


def tidy(text: str) -> str:
    """Line ends as \\n, no control characters, no trailing blanks, at most one empty line in a row."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "\n".join(line.rstrip(" \t") for line in text.encode("utf-8", "ignore").decode().split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _html(content: bytes) -> str:
    import trafilatura

    text = trafilatura.extract(content, include_comments=False, include_tables=True, favor_recall=True)
    if not text:
        raise RowError("no text", "no main text was found in the page")
    return text


def _pdf(content: bytes) -> str:
    import pypdf

    reader = pypdf.PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise RowError("encrypted", "the PDF wants a password")
    pages = [(page.extract_text() or "").strip() for page in reader.pages]
    if not any(pages):
        found = f"none of the PDF's {len(pages)} pages holds text"
        raise RowError("no text", f"{found}; scanned pages need character recognition first")
    return re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", "\n\n".join(pages))


def _docx(content: bytes) -> str:
    import docx

    lines = []
    for block in docx.Document(io.BytesIO(content)).iter_inner_content():
        if hasattr(block, "rows"):
            lines += [" | ".join(cell.text.strip() for cell in row.cells) for row in block.rows]
        else:
            lines.append(block.text)
        lines.append("")
    if not any(lines):
        raise RowError("no text", "the DOCX holds no text")
    return "\n".join(lines)


def _markdown(content: bytes) -> str:
    """Markdown without front matter, comments, tags and pictures; links keep their words, code stays as it is."""
    try:
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:
        raise RowError("not UTF-8", "save the document as UTF-8") from None
    text = re.sub(r"\A---\n.*?\n(?:---|\.\.\.)\n", "", text.replace("\r\n", "\n"), flags=re.DOTALL)
    parts = re.split(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", text, flags=re.DOTALL | re.MULTILINE)
    for number in range(0, len(parts), 2):
        part = re.sub(
            r"(?s:<!--.*?-->)|</?[a-zA-Z][^<>\n]{0,500}>|!\[[^\]\n]{0,500}\]\([^()\n]{0,1000}\)", "", parts[number]
        )
        parts[number] = re.sub(r"\[([^\]\n]{1,500})\]\([^()\n]{0,1000}\)", r"\1", part)
    return "".join(parts)


KINDS = {".md": _markdown, ".markdown": _markdown, ".html": _html, ".htm": _html, ".pdf": _pdf, ".docx": _docx}
