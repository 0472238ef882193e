"""Documents become clean text in pieces that overlap; bombs, blank scans and unsafe archives cost one document each."""

import io
import textwrap
import zipfile

import pytest

from helpers.data import documents
from helpers.data.sources import read
from helpers.data.tables import Rejects
from helpers.data.turns import RowError
from helpers.errors import TunebookError

CUT = {"tokens": 384, "overlap": 32, "least_chars": 100}
SENTENCE = "The river runs through {} countries and many people live on its banks. "


def pdf(lines):
    """A one-page PDF with real text, written by hand."""
    drawn = "BT /F1 12 Tf 50 750 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
    parts = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        "/Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    content, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n{part}\nendobj\n".encode()
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return (
        content
        + b"xref\n0 6\n0000000000 65535 f \n"
        + table
        + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(content)
    )


def docx():
    import docx as word

    document = word.Document()
    document.add_heading("Rivers")
    document.add_paragraph(SENTENCE.format(10) * 3)
    cells = document.add_table(1, 2).rows[0].cells
    cells[0].text, cells[1].text = "Rhine", "1233 km"
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def zipped(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def read_one(tmp_path, name, content, tokenizer, **options):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    rejects = Rejects(limit=1.0)
    try:
        reading = read(str(tmp_path / name), rejects, documents={"tokenizer": lambda: tokenizer, **CUT, **options})
        return [row["messages"][0]["content"] for row in reading.table.rows()], rejects
    except TunebookError as error:
        assert name in str(error)
        return [], rejects


def test_html_gives_its_article_without_menu_script_and_comments(tmp_path, tokenizer):
    body = "".join(f"<p>{SENTENCE.format(i)}</p>" for i in range(12))
    page = "<html><head><script>alert('x')</script></head><body><nav>Home | Login</nav>"
    page += f"<!-- secret --><article><h1>Rivers</h1>{body}</article></body></html>"
    pieces, rejects = read_one(tmp_path, "a.html", page, tokenizer)
    assert "through 11 countries" in " ".join(pieces) and not rejects.invalid
    assert not any(word in " ".join(pieces) for word in ("alert", "Login", "secret", "<p>"))


def test_pdf_docx_and_markdown_give_their_text(tmp_path, tokenizer):
    pieces, _ = read_one(tmp_path, "a.pdf", pdf([SENTENCE.format(i) for i in range(8)]), tokenizer)
    assert "through 7 countries" in " ".join(pieces)
    pieces, _ = read_one(tmp_path, "a.docx", docx(), tokenizer)
    assert "Rivers" in pieces[0] and "Rhine | 1233 km" in pieces[0]
    text = (
        "---\ntitle: t\n---\n# Head\n\nSee [the map](http://x.y) and ![pic](p.png) <b>bold</b>.\n\n<!-- no -->\n"
        "```sql\nSELECT <a>\n```\n" + SENTENCE * 3
    )
    pieces, _ = read_one(tmp_path, "a.md", text, tokenizer)
    assert (
        pieces[0].startswith("# Head\n\nSee the map and  bold.")
        and "SELECT <a>" in pieces[0]
        and "title" not in pieces[0]
        and "<!--" not in pieces[0]
    )


@pytest.mark.parametrize("tokens, overlap, ahead", [(64, 16, 8), (40, 0, 8), (200, 50, 8), (64, 16, 1)])
def test_pieces_hold_all_of_the_text_overlap_and_fit(tokenizer, monkeypatch, tokens, overlap, ahead):
    monkeypatch.setattr(documents, "CHARS_A_TOKEN", ahead)
    text = "\n\n".join(" ".join(f"Word{i}_{j} stands here." for j in range(9)) for i in range(30))
    pieces = list(documents.cut(text, tokenizer, tokens, overlap))
    at, shared = 0, 0
    for number, piece in enumerate(pieces):
        found = text.find(piece, max(0, at - 1000))
        assert found >= 0 and text[at:found].strip() == "", f"text is lost before piece {number}"
        shared += max(0, at - found)
        assert len(tokenizer(piece, add_special_tokens=False).input_ids) <= tokens + 2  # a cut may part a token
        at = found + len(piece)
    assert text[at:].strip() == "" and (shared > 0) == (overlap > 0)


def test_chinese_is_cut_without_spaces_and_loses_nothing(tokenizer):
    text = "这是一句没有空格的中文。" * 80
    pieces = list(documents.cut(text, tokenizer, 100, 0))
    assert "".join(pieces) == text and all(piece.endswith("。") for piece in pieces)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("deep.html", b"<div>" * 100_000, "no text"),
        ("empty.html", b"<html><body></body></html>", "no text"),
        ("broken.pdf", b"%PDF-1.4 rubbish", "broken PDF"),
        ("slip.docx", zipped({"../../evil.txt": "x", "word/document.xml": "<x/>"}), "broken DOCX"),
        ("broken.docx", b"PK\x03\x04 rubbish", "broken DOCX"),
        ("latin.md", b"caf\xe9 " * 100, "not UTF-8"),
        (
            "laughs.docx",
            zipped(
                {
                    "[Content_Types].xml": '<!DOCTYPE l [<!ENTITY a "aaaaaaaaaa">'
                    + "".join(f'<!ENTITY a{i} "{("&a%s;" % (i - 1 if i else "")) * 10}">' for i in range(12))
                    + "]><Types>&a11;</Types>"
                }
            ),
            "broken DOCX",
        ),
    ],
)
def test_a_hostile_or_empty_document_is_rejected_with_its_reason(tmp_path, tokenizer, name, content, reason):
    pieces, rejects = read_one(tmp_path, name, content, tokenizer)
    assert not pieces and dict(rejects.invalid) == {reason: 1}
    assert not (tmp_path.parent / "evil.txt").exists()


def test_a_scanned_pdf_says_that_it_holds_no_text(tmp_path, tokenizer):
    import pypdf

    writer, buffer = pypdf.PdfWriter(), io.BytesIO()
    writer.add_blank_page(100, 100)
    writer.write(buffer)
    _, rejects = read_one(tmp_path, "scan.pdf", buffer.getvalue(), tokenizer)
    assert "character recognition" in rejects.first["no text"]["detail"]


def test_short_documents_are_dropped_and_counted_and_large_ones_refused(tmp_path, tokenizer, monkeypatch):
    _, rejects = read_one(tmp_path, "short.md", "tiny", tokenizer)
    assert dict(rejects.removed) == {"document too short": 1} and not rejects.invalid
    monkeypatch.setattr(documents, "MAX_BYTES", 1000)
    _, rejects = read_one(tmp_path, "big.md", "x" * 2000, tokenizer)
    assert dict(rejects.invalid) == {"document too large": 1}


def test_a_reader_that_hangs_or_dies_costs_one_document(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.docx").write_bytes(docx())
    assert "Rivers" in documents.read(tmp_path / "a.docx")
    documents.reader().process.kill()
    documents.reader().process.wait()
    assert "Rivers" in documents.read(tmp_path / "a.docx")  # a new one was started
    monkeypatch.setattr(documents, "SECONDS", 0.0)
    with pytest.raises(RowError, match=r"too long to read|reader died"):
        documents.read(tmp_path / "a.docx")
    monkeypatch.setattr(documents, "SECONDS", 60)
    assert "Rivers" in documents.read(tmp_path / "a.docx")


# ---------------------------------------------------------------- plain text files, pieces and their ends


def folder_rows(folder, spec, tokenizer, **options):
    reading = read(str(spec), Rejects(limit=1.0), documents={"tokenizer": lambda: tokenizer, **CUT, **options})
    return list(reading.table.rows())


@pytest.mark.parametrize("ending", ["txt", "rst", "md"])
@pytest.mark.parametrize("spec", ["", "*.{}"])
def test_a_text_file_in_a_folder_of_documents_is_one_document(tmp_path, tokenizer, ending, spec):
    manual = "\n".join(f"Line {i} of the manual\ngoes on here." + "\n" * (i % 3) for i in range(200))
    for name in "ab":
        (tmp_path / f"{name}.{ending}").write_text(manual)
    rows = folder_rows(tmp_path, tmp_path / spec.format(ending) if spec else tmp_path, tokenizer)
    assert 10 < len(rows) < 60 and all(row["kind"] == "text" for row in rows)
    assert {row["meta"]["document"] for row in rows} == {f"a.{ending}", f"b.{ending}"}


def test_a_text_a_line_stays_that_when_named_alone_or_when_its_lines_are_as_long_as_texts(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text("one text\nanother text\n")
    assert len(folder_rows(tmp_path, tmp_path / "short.txt", tokenizer)) == 2
    (tmp_path / "short.txt").write_text("\n".join(SENTENCE.format(i) * 20 for i in range(7)))
    assert len(folder_rows(tmp_path, tmp_path, tokenizer)) == 7


def test_pieces_begin_with_a_sentence_and_only_the_last_ends_the_sequence(tmp_path, tokenizer):
    from helpers.data.chat_template import inspect
    from helpers.data.labels import Encoder

    wrapped = "\n".join(textwrap.wrap(" ".join(SENTENCE.format(i).strip() for i in range(300)), 70))
    (tmp_path / "a.txt").write_text(wrapped)
    rows = folder_rows(tmp_path, tmp_path, tokenizer, tokens=100, overlap=30)
    assert len(rows) > 30 and all(row["messages"][0]["content"].startswith("The river") for row in rows)
    assert all(row["messages"][0]["content"].endswith("banks.") for row in rows)
    (encoded,) = Encoder(inspect(tokenizer)).encode([rows])
    ended = [one.ids[-1] == tokenizer.eos_token_id for one in encoded]
    assert ended == [False] * (len(rows) - 1) + [True] and [bool(one.ends) for one in encoded] == ended


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("word " * 2_000, 1.0),
        ("Kein Satz endet hier " * 300 + ". " + "word " * 500, 1.0),
        ("abcdefghij" * 2_000, 0.0),
        ("line of code();\n" * 1_000, 1.0),
    ],
)
def test_text_without_sentences_is_cut_at_lines_or_blanks_and_whole(tokenizer, text, pieces):
    found = list(documents.cut(text, tokenizer, 64, 0))
    assert "".join("".join(found).split()) == "".join(text.split())
    whole = set(text.split())
    assert sum(piece.split()[0] in whole and piece.split()[-1] in whole for piece in found) >= pieces * len(found)


# ---------------------------------------------------------------- nothing is lost


KEPT = [
    "    #include <iostream>\n    std::vector<int> a;",
    "~~~cpp\nstd::map<int, b> m;\n~~~",
    "````\n```\n<div>\n```\n````",
    "- item\n\n      <td>cell</td>",
    "`std::vector<int>` and ``a ` <b>``",
    "#include <map>",
    "std::vector<int> and List<Object> and <https://x.org/a>",
    "if a < b and b > c",
]


@pytest.mark.parametrize("text", KEPT)
def test_code_in_markdown_is_kept_in_and_out_of_fences(text):
    assert text in documents._markdown(f"Before <b>bold</b>.\n\n{text}\n\nAfter [x](y) <br> ![p](q).".encode())


def test_comments_that_never_end_are_text_and_cost_no_more_than_others(tmp_path):
    (tmp_path / "a.md").write_text("x <!-- c --> y <!-- z `<!-- code` [l](u)" + " <!-- w" * 300_000)
    text = documents.read(tmp_path / "a.md")  # within a child's minute; looked for to the end each time it takes hours
    assert text.startswith("x  y <!-- z `<!-- code` l <!-- w <!-- w") and text.count("<!--") == 300_002


def test_markdown_loses_its_html_comments_pictures_and_link_targets_only():
    text = documents._markdown(b"A <b>c</b><br/>[![badge](u)](v) [w `a<i>`](x) <!-- no\nno --> <a href='q'>link</a>")
    assert "".join(text.split()) == "Acw`a<i>`link"


def test_a_docx_gives_insertions_controls_boxes_and_notes_but_no_deletions():
    import docx as word
    from docx.opc.constants import RELATIONSHIP_TYPE
    from docx.opc.packuri import PackURI
    from docx.opc.part import Part
    from docx.oxml import parse_xml

    spaces = (
        'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" '
        'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
    )
    run = "<w:r><w:t>{}</w:t></w:r>".format
    box = f"<w:txbxContent><w:p>{run('boxed')}</w:p></w:txbxContent>"
    document = word.Document()
    for inside in (
        f"<w:p>{run('plain ')}<w:ins>{run('inserted')}</w:ins><w:del><w:r><w:delText>deleted</w:delText></w:r></w:del>"
        f"<w:moveFrom>{run('moved')}</w:moveFrom><w:hyperlink>{run(' linked')}</w:hyperlink></w:p>",
        f"<w:sdt><w:sdtContent><w:p>{run('controlled')}</w:p></w:sdtContent></w:sdt>",
        f"<w:p><w:sdt><w:sdtContent>{run('inline')}</w:sdtContent></w:sdt><w:r><w:tab/><w:t>tabbed</w:t></w:r></w:p>",
        f"<w:p>{run('anchor')}<w:r><mc:AlternateContent><mc:Choice>{box}</mc:Choice><mc:Fallback>{box}</mc:Fallback>"
        "</mc:AlternateContent></w:r></w:p>",
        f"<w:tbl><w:tr><w:tc><w:p>{run('a')}</w:p></w:tc><w:tc><w:sdt><w:sdtContent><w:p>{run('b')}</w:p></w:sdtContent>"
        "</w:sdt></w:tc></w:tr></w:tbl>",
    ):
        document.element.body.append(parse_xml(inside.replace(">", f" {spaces}>", 1)))
    notes = f"<w:footnotes {spaces}><w:footnote><w:p>{run('noted')}</w:p></w:footnote></w:footnotes>".encode()
    part = Part(PackURI("/word/footnotes.xml"), "application/xml", notes, document.part.package)
    document.part.relate_to(part, RELATIONSHIP_TYPE.FOOTNOTES)
    buffer = io.BytesIO()
    document.save(buffer)
    lines = list(filter(None, documents._docx(buffer.getvalue()).split("\n")))
    assert lines == ["plain inserted linked", "controlled", "inline\ttabbed", "anchor", "boxed", "a | b", "noted"]


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("The o\ufb03ce \ufb01le \ufb02ows", "The office file flows"),
        ("Introduction ............ 5", "Introduction … 5"),
        ("Index . . . . . . . . 12", "Index … 12"),
        ("Wait... and then.", "Wait... and then."),
        ("a govern-\nment and ein Gr\u00fc-\n\u00dfen", "a government and ein Gr\u00fc\u00dfen"),
        ("a well-\nknown and well-known thing", "a well-known and well-known thing"),
        ("pages 3-\n5, Anglo-\nSaxon", "pages 3-\n5, Anglo-\nSaxon"),
    ],
)
def test_what_a_page_s_typesetting_broke_is_mended(text, mended):
    assert documents.typeset(text) == mended
