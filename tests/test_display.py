"""What people are shown: numbers as the field writes them, foreign text with nothing hidden in it."""

import re

import matplotlib
import pytest

from helpers import display
from tests.conftest import PROJECT

matplotlib.use("Agg")


@pytest.mark.parametrize(("call", "said"), [
    (lambda: display.number(15340), "15,340"),
    (lambda: display.number(0.03119), "0.03119"),
    (lambda: display.number(1.234567e-5), "1.235e-05"),
    (lambda: display.number(float("nan")), "–"),
    (lambda: display.percent(0.1874), "18.7 %"),
    (lambda: display.percent(None), "–"),
    (lambda: display.points(0.3124), "+31.2"),
    (lambda: display.interval(0.1214, 0.2419), "12.1 – 24.2 %"),
    (lambda: display.size(144_703_000), "145 MB"),
    (lambda: display.size(999), "999 B"),
    (lambda: display.size(16.2e9), "16.2 GB"),
    (lambda: display.duration(7.24), "7.2 s"),
    (lambda: display.duration(430), "7 min"),
    (lambda: display.duration(9000), "2.5 h"),
    (lambda: display.plain(True), "yes"),
    (lambda: display.plain({"é": 1}), '{"é": 1}'),
])  # fmt: skip
def test_a_value_is_written_in_one_way(call, said):
    assert call() == said


def test_no_percentage_is_written_without_display():
    files = [*(PROJECT / "helpers").rglob("*.py"), *(PROJECT / "ci").glob("*.py")]
    assert len(files) > 100 and not [file for file in files if re.search(r":[\d.,+<>]*%}", file.read_text())]


@pytest.mark.parametrize("hidden", ["\x1b[2J", "\r", "\x9b", "\u202e", "\u200b", "\ud800", "\x00"])
def test_nothing_steers_a_terminal_or_hides_in_a_table(hidden):
    table = display.shown([[f"a{hidden}b", 1]], [f"n{hidden}"])
    assert hidden not in repr(table) and hidden not in table._repr_html_()
    assert "a" in repr(table) and "b" in repr(table)


def test_foreign_text_is_no_markup():
    assert "<img" not in display.table([["<img src=x onerror=alert(1)>", "'\"&"]])


def test_a_terminals_table_has_columns_of_equal_width():
    lines = display.text_table([["a", 1], ["long name", 22]], ["name", "n"]).splitlines()
    assert [line.index(n) for line, n in zip(lines, ["n", "1", "22"], strict=True)][1:] == [11, 11]


def test_what_a_cell_showed_comes_back_from_disk(tmp_path):
    from matplotlib import pyplot

    display.save(display.shown([["a<b", 1]]), tmp_path, "table")
    display.save(pyplot.figure(), tmp_path, "plot")
    display.save("text <b>", tmp_path, "text")
    display.save(None, tmp_path, "nothing")
    assert display.load(tmp_path, "table")._repr_html_() == display.shown([["a<b", 1]])._repr_html_()
    assert display.load(tmp_path, "plot").data.startswith(b"\x89PNG")
    assert "&lt;b&gt;" in display.load(tmp_path, "text")._repr_html_()
    assert display.load(tmp_path, "nothing") is None
