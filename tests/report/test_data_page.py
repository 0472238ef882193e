"""What people see: every token is shown, colours say what is trained, nothing from the data becomes markup."""

import html
import json
import re

import pytest
import report_samples as samples

from helpers import params
from helpers.data import prepare
from helpers.errors import TunebookError
from helpers.report import data_page

ATTACK = "</span><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; <b>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, smollm2, tiny_llama):
    """A finished job whose every name and text tries to become markup."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [{"question": f"{i} {ATTACK}", "answer": f"{ATTACK} naïve 日本 🙂 {i}", ATTACK: ATTACK} for i in range(40)]
    rows += [{"prompt": f"{i} {ATTACK}", "chosen": ATTACK, "rejected": f"no {ATTACK}"} for i in range(20)] + [
        {"question": ATTACK, "answer": None}
    ]
    path = folder / f"<img src=x onerror=alert(3)>{'w' * 90}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEBOOK_RUNS", str(folder / "runs"))
        patch.setenv("TUNEBOOK_CACHE", str(folder / "cache"))
        job = prepare.open(
            params.resolve(
                "data",
                {"dataset": str(path), "model": str(smollm2.path), "run": "x", "test_share": 0.0}
                | {"compare_tokenizer": str(tiny_llama)},
            )
        )
        shown = [
            job.read(),
            job.clean(),
            job.mix(),
            job.split(),
            job.template(),
            job.vocabulary(),
            job.encode(),
            job.pairs(),
            data_page.preview(job),
            data_page.write(job),
        ]
        job.finish()
    return job, [value._repr_html_() for value in shown]


def texts_and_tags(markup):
    """Tags of a page, and its text, by a parser that is not ours."""
    from lxml import html as parser

    tree = parser.fromstring(markup)
    return {element.tag for element in tree.iter() if isinstance(element.tag, str)}, tree


@pytest.mark.parametrize("name", ["report.html", "preview.html"])
def test_nothing_from_the_data_becomes_markup_in_the_pages(hostile, name):
    job, _ = hostile
    markup = (job.path / name).read_text()
    tags, tree = texts_and_tags(markup)
    assert not tags & {"img", "iframe", "a", "link", "object"} and "alert(1)" in tree.text_content()
    attributes = {name for element in tree.iter() if isinstance(element.tag, str) for name in element.attrib}
    assert not attributes & {"src", "href", "action"} and not any(name.startswith("on") for name in attributes)
    assert len(tree.xpath("//script")) == 1 and "alert" not in tree.xpath("//script")[0].text
    assert "default-src 'none'" in markup


def test_nothing_from_the_data_becomes_markup_in_the_notebook(hostile):
    for markup in hostile[1]:
        tags, _ = texts_and_tags(f"<div>{markup}</div>")
        assert not tags & {"script", "img", "iframe"}


def test_the_data_card_has_front_matter_and_lets_no_name_out_of_its_table(hostile):
    import yaml

    job, _ = hostile
    card = (job.path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["size_categories"] == ["n<1K"] and {c["config_name"] for c in front["configs"]} == {
        "sft",
        "preference",
    }
    for config in front["configs"]:
        for part in config["data_files"]:
            assert (job.path / part["path"]).is_file()
    assert "<img" not in card.replace("\\<", "") and "\\<img" in card


def test_the_preview_shows_every_token_of_a_row_with_its_id_and_colour(hostile, tokenizer):
    job, shown = hostile
    (row,) = data_page.first_rows(job.path / "train.parquet", 1)
    found = data_page.tokens(tokenizer, row["input_ids"], row["completion_mask"], {2}, {1, 2})
    assert [(token, at) for _, token, at, _ in found] == list(zip(row["input_ids"], range(len(found)), strict=True))
    text = "".join(text for *_, text in found).replace("·", "").replace("↵", "")
    assert text == tokenizer.decode(row["input_ids"])
    kinds = [kind for kind, *_ in found]
    assert [kind in ("t", "e") for kind in kinds] == [bool(m) for m in row["completion_mask"]]
    assert kinds.count("e") == 1 and found[kinds.index("e")][1] == 2
    for markup in ((job.path / "preview.html").read_text(), shown[-2]):
        first = markup[markup.index('<div class="tokens">') :]
        first = first[: first.index("</div>")]
        spans = re.findall(r'<span(?: class="(\w)")? title="id (\d+), position (\d+)">(.*?)</span>', first, re.DOTALL)
        assert [(kind, int(token), int(at)) for kind, token, at, _ in spans] == [f[:3] for f in found]
        assert [html.unescape(text) for *_, text in spans] == [text for *_, text in found]


COLOURS = """() => [...document.querySelectorAll('body, .t, .e, .s, .muted, .sub, td')].slice(0, 300).map(e => {
    const ground = e => getComputedStyle(e).backgroundColor;
    let back = e;
    while (back && ground(back) === 'rgba(0, 0, 0, 0)') back = back.parentElement;
    return [getComputedStyle(e).color, back ? ground(back) : 'rgb(255, 255, 255)'] })"""


@pytest.mark.parametrize("scheme, width", [("light", 1100), ("dark", 390)])
def test_the_pages_fit_a_desk_and_a_phone_and_can_be_read_in_light_and_dark(hostile, chromium, scheme, width):
    from playwright.sync_api import sync_playwright

    job, _ = hostile
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
        said = []
        view.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        for name in ("report.html", "preview.html"):
            view.set_viewport_size({"width": width, "height": 900})
            view.goto((job.path / name).as_uri())
            assert samples.over_the_edge(view) == []
            colours = view.evaluate(COLOURS)
            assert min(contrast(*pair) for pair in colours) >= 4.5
        browser.close()
    assert not said


def contrast(one, other):
    """WCAG 2 contrast ratio of two CSS colours."""

    def light(colour):
        parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
        r, g, b = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_folder_named_as_database_is_refused(hostile, tmp_path):
    job, _ = hostile
    (tmp_path / "text.sqlite").write_text("not a database")
    job.chosen["database"] = str(tmp_path / "text.sqlite")
    with pytest.raises(TunebookError, match="is not a SQLite database"):
        job.database()
