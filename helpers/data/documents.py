"""HTML, PDF, DOCX, Markdown and plain text documents to clean text, cut into pieces of tokens that overlap.

Documents come from strangers, and their parsers are C libraries: each is read in a child process with limits of memory
and time, so that a bomb costs one document and not the job. Nothing is unpacked to disk and no link is followed.
"""

from __future__ import annotations

import functools
import io
import logging
import re
import statistics
import unicodedata
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
LINE_CHARS = 400  # a .txt whose lines, none of them empty, have so many at the median holds a text a line
# Where a paragraph, a sentence, a line ends.
BREAKS = [re.compile(end) for end in (r"\n\s*\n", r"[.!?…]['\")\]’”»]*\s+|[。！？][”』」）]*\s*", r"\n")]
OPEN = "<!\ue000--"  # a comment that never ends
CODE = r"(?<!`)(?P<ticks>`+)(?!`)[^\0]{1,2000}?(?<!`)(?P=ticks)(?!`)"
LINK = re.compile(rf"(?P<code>{CODE})|\[([^\]\n]{{0,500}})\]\([^()\n]{{0,1000}}\)")
PROSE = re.compile(
    rf"(?P<code>{CODE}|^[ \t]*#[ \t]*include\b[^\n]*)|<!--[^\0]*?-->|</?(?P<tag>[a-zA-Z][a-zA-Z0-9]*)"
    r"(?=[\s/>])[^<>\n]{0,500}>|!\[[^\]\n]{0,500}\]\([^()\n]{0,1000}\)",
    re.MULTILINE,
)


def chunks(
    file: Path, rejects: Rejects, where: str, tokenizer: Callable[[], Any], tokens: int, overlap: int, least_chars: int
) -> Iterator[tuple[int, dict]]:
    """(number of the piece from 1, {"text", "document", "piece"}) for one document, "goes_on" where it does.

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
    pieces = list(cut(text, tokenizer(), tokens, overlap))
    for number, piece in enumerate(pieces, 1):
        goes_on = {"goes_on": True} if number < len(pieces) else {}  # no end of sequence is trained there
        yield number, {"text": piece, "document": file.name, "piece": number, **goes_on}


def is_document(file: Path) -> bool:
    """Whether a .txt is one document and not a text a line."""
    with files.Unpacked(file) as content:
        lines = files.opened(content).read(files.BLOCK).rstrip().split("\n")
    return len(lines) < 2 or not all(map(str.strip, lines)) or statistics.median(map(len, lines)) < LINE_CHARS


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
    """Consecutive pieces of at most `tokens` tokens that begin where a sentence does, up to `overlap` tokens before the
    last one ended.

    A piece ends at a paragraph, sentence or line where one ends in its last quarter, else at the last such place, else
    at a blank. Every character is in some piece.
    """
    start, room = 0, CHARS_A_TOKEN * tokens  # what is tokenised to find the next end
    while start < len(text):
        ahead = text[start : start + room]
        places = tokenizer(ahead, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = places[tokens][0] if len(places) > tokens else len(ahead)
        last = start + end == len(text)
        if not last:
            lasts = [max((found.end() for found in sign.finditer(ahead, 0, end)), default=0) for sign in BREAKS]
            late = (place for place in lasts if place >= end - end // 4)
            end = next(late, max(lasts)) or ahead.rfind(" ", 0, end) + 1 or end
        if piece := ahead[:end].strip():
            yield piece
        begins = [begin for begin, _ in places if begin < end]
        back = 0 if last else min(overlap, len(begins) // 2)
        after = (found.end() for sign in BREAKS[:2] for found in sign.finditer(ahead, begins[-back], end))
        start, room = (
            start + (min((place for place in after if place < end), default=end) if back else end),
            3 * end // 2,
        )


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
    return typeset("\n\n".join(pages))


def typeset(text: str) -> str:
    """A page's text without ligatures, dot leaders and hyphens at line ends."""
    text = re.sub("[\ufb00-\ufb06]", lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = re.sub(r"[ \t]*(?:\.{5,}|(?:[ \t]\.){4,}|…{2,})[. \t]*", " … ", text)  # what leads to a page's number

    def joined(found: re.Match[str]) -> str:  # a hyphen stays where the document has it elsewhere too
        whole = f"{found[1]}-{found[2]}"
        return found[0] if not found[2][0].islower() else whole if whole in text else found[1] + found[2]

    return re.sub(r"([^\W\d_]+)[-\u2010\u00ad]\n([^\W\d_]+)", joined, text)


def _docx(content: bytes) -> str:
    """The text as it stands with all changes accepted, text boxes behind their paragraph, then foot- and endnotes."""
    import docx
    from docx.oxml import parse_xml

    part = docx.Document(io.BytesIO(content)).part
    notes = [rel.target_part for rel in part.rels.values() if rel.reltype.endswith(("/footnotes", "/endnotes"))]
    lines = [line for root in (part.element.body, *(parse_xml(note.blob) for note in notes)) for line in _blocks(root)]
    if not any(lines):
        raise RowError("no text", "the DOCX holds no text")
    return "\n".join(lines)


def _blocks(node: Any) -> Iterator[str]:
    """The lines of the paragraphs and tables below an element of a DOCX, an empty one behind each."""
    for child in node.iterchildren("*"):
        name = child.tag.rpartition("}")[2]
        if name == "p":
            yield from ("".join(_runs(child)), "")
            for box in child.iterdescendants("{*}txbxContent"):
                if not any(above.tag.endswith("}Fallback") for above in box.iterancestors()):
                    yield from _blocks(box)
        elif name == "tbl":
            rows = (
                [" ".join(filter(None, _blocks(cell))) for cell in row.iter("{*}tc")] for row in child.iter("{*}tr")
            )
            yield from (*(" | ".join(row) for row in rows), "")
        elif name not in UNSEEN:
            yield from _blocks(child)


def _runs(node: Any) -> Iterator[str]:
    """The pieces of a paragraph's own text."""
    for child in node.iterchildren("*"):
        name = child.tag.rpartition("}")[2]
        if name == "t":
            yield child.text or ""
        elif name in SIGNS:
            yield SIGNS[name]
        elif name not in UNSEEN:
            yield from _runs(child)


def _plain(content: bytes) -> str:
    try:
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:
        raise RowError("not UTF-8", "save the document as UTF-8") from None
    return text.replace("\r\n", "\n")


def _markdown(content: bytes) -> str:
    """Markdown without front matter, comments, HTML and pictures; links keep their words, code stays as it is."""
    from markdown_it import MarkdownIt

    text = re.sub(r"\A---\n.*?\n(?:---|\.\.\.)\n", "", _plain(content), flags=re.DOTALL)
    lines, parts, at = text.split("\n"), list[str](), 0
    for token in MarkdownIt("commonmark").parse(text):
        if token.type in ("fence", "code_block") and token.map:
            begin, end = token.map
            parts += [_prose("\n".join(lines[at:begin])), *lines[begin:end]]
            at = end
    return "\n".join([*parts, _prose("\n".join(lines[at:]))])


def _prose(text: str) -> str:
    from lxml.html import defs

    closed = {name.lower() for name in re.findall(r"</([a-zA-Z0-9]+)", text)} | defs.empty_tags

    def shown(found: re.Match[str]) -> str:
        tag, before = (found["tag"] or "").lower(), text[max(0, found.start() - 1) : found.start()]
        typed = (before.isalnum() or before == "_") and tag not in closed  # List<Object>
        return found[0] if found["code"] or (tag and (tag not in defs.tags or typed)) else ""

    before, end, after = text.rpartition("-->")
    text = before + end + after.replace("<!--", OPEN)  # what never closes is not looked for to the end each time
    text = LINK.sub(lambda found: found[0] if found["code"] else found[3], PROSE.sub(shown, text))
    return text.replace(OPEN, "<!--")


UNSEEN = ("del", "moveFrom", "Fallback", "txbxContent", "instrText", "delText", "pPr", "rPr", "tblPr", "sdtPr")
SIGNS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
KINDS = {
    ".txt": _plain,
    ".rst": _plain,
    ".md": _markdown,
    ".markdown": _markdown,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
    ".docx": _docx,
}
