"""What people see: every token is shown, colours say what is trained, nothing from the data becomes markup."""

import html
import itertools
import json
import re

import pytest

from helpers import params
from helpers.data import prepare
from helpers.errors import TunebookError
from helpers.report import data_page, data_preview

ATTACK = "</span><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; <b>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, smollm2):
    """A finished job whose every name and text tries to become markup."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [{"question": f"{i} {ATTACK}", "answer": f"{ATTACK} naïve 日本 🙂 {i}", ATTACK: ATTACK} for i in range(40)]
    rows += [{"prompt": f"{i} {ATTACK}", "chosen": ATTACK, "rejected": f"no {ATTACK}"} for i in range(20)] + [
        {"question": ATTACK, "answer": None}
    ]
    path = folder / "<img src=x onerror=alert(3)>.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEBOOK_RUNS", str(folder / "runs"))
        patch.setenv("TUNEBOOK_CACHE", str(folder / "cache"))
        job = prepare.open(
            params.resolve("data", {"dataset": str(path), "model": str(smollm2.path), "run": "x", "test_share": 0.0})
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
    assert (
        not tags & {"script", "img", "iframe", "b", "a", "link", "object"} - {"b"} and "alert(1)" in tree.text_content()
    )
    assert not any(
        attribute.startswith("on")
        for element in tree.iter()
        if isinstance(element.tag, str)
        for attribute in element.attrib
    )
    assert "default-src 'none'" in markup and not re.search(r"(?:src|href)\s*=", re.sub(r"&lt;.*?&gt;", "", markup))


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
    assert "<img" not in card and "&lt;img" in card


def test_the_preview_shows_every_token_of_a_row_with_its_id_and_colour(hostile, tokenizer):
    job, _ = hostile
    (row,) = data_preview.first_rows(job.path / "train.parquet", 1)
    markup = data_preview.tokens(tokenizer, row["input_ids"], row["completion_mask"], {2}, {1, 2})
    spans = re.findall(r'<span( class=\w)? title="id (\d+), position (\d+)">(.*?)</span>', markup, flags=re.DOTALL)
    assert [int(token) for _, token, _, _ in spans] == row["input_ids"] and [int(at) for *_, at, _ in spans] == list(
        range(len(spans))
    )
    shown = html.unescape("".join(text for *_, text in spans)).replace("·", "").replace("↵", "")
    assert shown == tokenizer.decode(row["input_ids"])
    colours = [kind.strip()[-1:] for kind, *_ in spans]
    assert [c in ("t", "e") for c in colours] == [bool(m) for m in row["completion_mask"]]
    assert colours.count("e") == 1 and spans[colours.index("e")][1] == "2"


def test_control_characters_and_half_surrogates_are_made_visible():
    assert data_page.cell("a\x00\x1b[31m\ud800<") == "a␀␛[31m?&lt;"


def test_ticks_are_round_numbers_within_the_range():
    for top in (5, 97, 512, 8191, 100_000):
        ticks = data_page.ticks(top)
        assert (
            ticks[0] == 0
            and ticks[-1] <= top
            and 2 <= len(ticks) <= 8
            and len({b - a for a, b in itertools.pairwise(ticks)}) == 1
        )


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
            view.goto((job.path / name).as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            colours = view.evaluate("""() => [...document.querySelectorAll('body, .t, .e, .s, .soft, td')].slice(0, 300).map(e => {
                let back = e; while (back && getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
                return [getComputedStyle(e).color, back ? getComputedStyle(back).backgroundColor : 'rgb(255, 255, 255)'] })""")
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
    with pytest.raises(TunebookError, match="is not a SQLite file"):
        job.database()
