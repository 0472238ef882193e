"""Claims about the report, read in a real browser: whole without a network, safe with hostile answers, legible everywhere."""

import json
import random
import re
import shutil

import pytest
import report_samples as samples
import yaml

from helpers import report, runs
from helpers.errors import TunebookError
from helpers.report import facts, model_card, svg


@pytest.fixture(scope="module")
def root(tokenizer, smollm2, tmp_path_factory):
    """Runs for all tests of this file: one whole run and three of a sweep. Tests that change one copy it first."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setenv("TUNEBOOK_RUNS", str(folder))
    samples.full_run("atlas", tokenizer=tokenizer, model_path=smollm2.path)
    for seed, (rank, rate) in enumerate([(4, 1e-3), (16, 5e-4), (32, 2e-4)]):
        samples.full_run(
            f"rank{rank}",
            seed,
            tokenizer,
            smollm2.path,
            0.3 + 0.1 * seed,
            **{"sft.rank": rank, "sft.learning_rate": rate},
        )
    report.build("atlas")
    yield folder
    patch.undo()


@pytest.fixture
def changed(root, tmp_path, monkeypatch):
    """A copy of the whole run that a test may spoil; its folder."""
    shutil.copytree(root / "atlas", tmp_path / "runs" / "atlas")
    monkeypatch.setenv("TUNEBOOK_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs" / "atlas"


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """visit(path, **context) -> page, with every console message and request written down in page.said and page.asked."""
    contexts = []

    def go(path, **context):
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.said, page.asked = [], []
        page.on("console", lambda m: page.said.append(m.text))
        page.on("pageerror", lambda e: page.said.append(str(e)))
        page.on("request", lambda r: page.asked.append(r.url))
        page.goto(path.as_uri())
        return page

    yield go
    for context in contexts:
        context.close()


def text_of(path):
    return re.sub(r"<[^>]+>", " ", path.read_text(encoding="utf-8"))


def test_the_page_is_one_small_file_that_asks_for_nothing(root, visit):
    path = root / "atlas" / "report.html"
    assert path.stat().st_size < 3_000_000
    page = visit(path)
    assert page.said == [] and page.asked == [path.as_uri()]
    assert not re.search(r"(src|href|action)=|url\(|@import", path.read_text().replace('href="#', "#"))


def test_every_part_is_there_and_the_numbers_are_those_of_the_files(root, visit):
    page = visit(root / "atlas" / "report.html")
    assert page.locator("section > h2").all_inner_texts() == [
        "Read this first",
        "Scores",
        "What was lost",
        "Fidelity and size",
        "Other measurements",
        "Answers",
        "Training",
        "Data",
        "How it was made",
    ]
    scores = json.loads((root / "atlas" / "05_evaluation" / "scores.json").read_text())
    for candidate in scores["candidates"]:
        row = page.locator(
            "#scores tr", has=page.locator("td.name", has_text=re.compile(rf"^{re.escape(candidate['name'])}$"))
        ).first.inner_text()
        if candidate["status"] == "scored":
            accuracy = candidate["scores"]["accuracy"]
            assert (
                f"{100 * accuracy['value']:.1f} %" in row
                and f"{100 * accuracy['low']:.1f} – {100 * accuracy['high']:.1f} %" in row
            )
        else:
            assert "skipped" in row and candidate["reason"] in row
    assert scores["headline"] in page.locator("header").inner_text()
    assert page.locator("#fidelity tbody tr").count() == 3 and "0.0047" in page.locator("#fidelity").inner_text()
    assert page.locator("#training svg polyline").count() >= 8 and "2.40 GiB" in page.locator("#training").inner_text()


def test_warnings_come_first_each_once(root, visit):
    said = visit(root / "atlas" / "report.html").locator("#warnings li").all_inner_texts()
    assert said[0] == "gguf q2_k was skipped: the file is truncated"
    assert any("8-grams" in w for w in said) and any("sft lost general ability" in w for w in said)
    assert len(said) == len(set(said))


def test_trained_tokens_are_marked_in_the_very_text_that_was_tokenised(root, visit):
    page = visit(root / "atlas" / "report.html")
    first = json.loads((samples.PROJECT / "datasets" / "atlas_train.jsonl").read_text().splitlines()[0])
    shown = page.locator("pre.tokens").first
    assert shown.locator("mark").all_inner_texts() == [first["sql"] + "<|im_end|>"]
    assert first["question"] in shown.inner_text() and first["question"] not in shown.locator("mark").inner_text()


def test_filters_show_what_they_say(root, visit):
    page = visit(root / "atlas" / "report.html")
    items = page.locator("#answers .item")
    assert items.count() == 180 and page.locator("#answers .item:visible").count() == 12
    lost = page.locator("#answers button[data-group=lost]")
    wanted = int(lost.inner_text().split()[-1])
    lost.click()
    page.locator(".show-more").click() if page.locator(".show-more").is_visible() else None
    visible = page.locator("#answers .item:visible")
    assert visible.count() == wanted == page.locator('#answers .item[data-group="lost"]').count() > 0
    page.locator("button[data-group=all]").click()
    page.locator("select[name=kind]").select_option("join")
    assert set(page.locator("#answers .item:visible").evaluate_all("all => all.map(i => i.dataset.kind)")) == {"join"}
    page.locator("select[name=errors]").select_option("gguf q8_0: syntax")
    errors = page.locator("#answers .item:visible").evaluate_all("all => all.map(i => i.dataset.errors)")
    assert errors and all("gguf q8_0: syntax" in e.split("\n") for e in errors)
    page.locator("#answers input").fill("no such words anywhere")
    assert page.locator("#answers .item:visible").count() == 0 and page.locator(".count").inner_text() == "0"


def test_gained_and_lost_agree_with_the_answers(root, visit):
    page = visit(root / "atlas" / "report.html")
    for row in map(json.loads, (root / "atlas" / "05_evaluation" / "answers.jsonl").read_text().splitlines()):
        before, after = row["answers"]["base"]["score"], row["answers"]["gguf q8_0"]["score"]
        group = {(0, 1): "gained", (1, 0): "lost", (0, 0): "both wrong", (1, 1): "both right"}[(before, after)]
        if row["id"] in ("t0003", "t0050", "t0100"):
            assert page.locator(".item", has_text=f"· {row['id']}").get_attribute("data-group") == group


def test_hostile_answers_are_text_and_nothing_else(changed, visit):
    scores, answers = samples.evaluation(random.Random(1))
    for row in answers[:40]:
        row["question"] = row["system"] = row["reference"] = samples.NASTY
        row["meta"] = {"kind": samples.NASTY, "origin": "\" onmouseover=\"document.title='broken'"}
        for answer in row["answers"].values():
            answer["text"] = answer["detail"] = samples.NASTY
            answer["result"] = {"columns": [samples.NASTY], "rows": [[samples.NASTY]], "count": 1}
    scores["headline"] = scores["warnings"][0] = scores["candidates"][-1]["reason"] = scores["comparisons"][0][
        "sentence"
    ] = samples.NASTY
    folder = changed / "05_evaluation"
    (folder / "manifest.json").unlink()
    folder.joinpath("scores.json").write_text(json.dumps(scores))
    folder.joinpath("answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    page = visit(report.build("atlas"))
    assert page.title() == "atlas: report" and page.said == []
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert page.locator("[onmouseover], [onerror]").count() == 0
    shown = page.locator("#answers .item .side pre", has_text="script").first.inner_text()
    assert "<script>" in shown and "␀" in shown and "␛" in shown and "⟨U+202E⟩" in shown
    assert "<script>" not in (changed / "MODEL_CARD.md").read_text().replace("\\<", "")


def test_a_script_that_got_in_all_the_same_would_not_run(root, tmp_path, visit):
    """The page's own policy is the second wall."""
    slipped = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"></main>"
    page = (root / "atlas" / "report.html").read_text().replace("</main>", slipped)
    (tmp_path / "page.html").write_text(page)
    opened = visit(tmp_path / "page.html")
    opened.wait_for_timeout(100)
    assert opened.title() == "atlas: report"


@pytest.mark.parametrize("width, scheme", [(1200, "light"), (1200, "dark"), (360, "light"), (360, "dark")])
def test_nothing_runs_over_the_edge_and_text_stands_out_in_every_scheme(root, visit, width, scheme):
    page = visit(root / "atlas" / "report.html", viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")
    for selector in ("body", ".muted", ".ok", ".no", "th", ".warnings li", "svg text"):
        assert contrast(page, selector) >= 4.5, selector


def contrast(page, selector):
    """WCAG contrast of an element's text against the first opaque background behind it."""
    ink, paper = page.evaluate(
        """selector => {
      const e = document.querySelector(selector), style = getComputedStyle(e);
      let at = e, back;
      do { back = getComputedStyle(at).backgroundColor; at = at.parentElement; } while (at && /, 0\\)$|transparent/.test(back));
      return [e.tagName.toLowerCase() === "text" ? style.fill : style.color, back];
    }""",
        selector,
    )

    def light(colour):
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    a, b = sorted((light(ink), light(paper)))
    return (b + 0.05) / (a + 0.05)


def test_on_paper_it_is_a_few_light_pages_without_buttons(root, visit, tmp_path):
    page = visit(root / "atlas" / "report.html", color_scheme="dark")
    page.emulate_media(media="print")
    assert page.locator(".filters").is_hidden() and page.locator("nav").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#answers .item:visible").count() == 8
    from pypdf import PdfReader

    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert 4 <= len(PdfReader(tmp_path / "report.pdf").pages) <= 20


def test_without_scripts_everything_is_there(root, visit):
    page = visit(root / "atlas" / "report.html", java_script_enabled=False)
    assert page.locator("#answers .item:visible").count() == 180 and page.locator(".filters").is_hidden()


@pytest.mark.parametrize(
    "missing",
    [
        ["05_evaluation"],
        ["05_evaluation", "04_gguf_export"],
        ["03_orpo_alignment", "04_gguf_export", "05_evaluation"],
        ["02_qlora_sft", "03_orpo_alignment", "04_gguf_export", "05_evaluation"],
        ["01_data_prep", "02_qlora_sft", "03_orpo_alignment", "04_gguf_export", "05_evaluation"],
    ],
)
def test_a_run_with_stages_missing_has_a_page_that_says_so(changed, missing):
    for folder in missing:
        shutil.rmtree(changed / folder)
    page = report.build("atlas").read_text()
    assert page.count(": not run</li>") == len(missing)
    assert '<section id="scores">' not in page and (changed / "MODEL_CARD.md").is_file()
    assert ('<section id="data">' in page) == ("01_data_prep" not in missing)


def test_altered_unfinished_and_damaged_stages_are_said_at_the_top(changed):
    (changed / "02_qlora_sft" / "log.jsonl").write_text('{"step": 1, "loss": "nan"}\n{"step": 2, "lo')
    (changed / "03_orpo_alignment" / "manifest.json").unlink()
    (changed / "04_gguf_export" / "manifest.json").write_text("{")
    warnings = text_of(report.build("atlas")).split("Read this first")[1].split("Scores")[0]
    assert "02_qlora_sft/log.jsonl was changed since the stage finished" in warnings and "1 unreadable line" in warnings
    assert "did not finish" in warnings and "is damaged" in warnings


def test_an_evaluation_that_left_its_schema_is_a_warning_not_a_crash(changed):
    for content in ("{}", "[]", "not json", '{"schema_version": 9}'):
        (changed / "05_evaluation" / "scores.json").write_text(content)
        assert "evaluation" in text_of(report.build("atlas")).split("Read this first")[1][:600]


def test_undefined_scores_are_dashes(changed):
    path = changed / "05_evaluation" / "scores.json"
    scores = json.loads(path.read_text())
    for candidate in scores["candidates"]:
        for score in candidate["scores"].values():
            score.update(value=None, low=None, high=None)
    for comparison in scores["comparisons"]:
        comparison.update(difference=None, low=None, high=None, p=None, p_holm=None, detectable=None)
    scores["forgetting"]["candidates"]["sft"].update(loss=None, change=None, perplexity=None)
    path.write_text(json.dumps(scores))
    said = text_of(report.build("atlas")).split("</script>")[0]
    assert "–" in said and "None" not in said and "nan" not in said.split("How it was made")[0]


def test_a_thousand_long_answers_still_make_a_small_page(changed):
    scores, answers = samples.evaluation(random.Random(2))
    rows = [{**row, "id": f"r{i}-{row['id']}"} for i in range(8) for row in answers]
    for row in rows:
        for answer in row["answers"].values():
            answer["text"] = answer["text"] + " 你好" * 150
    samples.write_evaluation(changed / "05_evaluation", scores, rows)
    path = report.build("atlas")
    assert path.stat().st_size < 3_000_000 and re.search(r"The \d+ most telling of 1440 are shown", path.read_text())


def test_the_command_and_its_file_repeat_every_parameter(root):
    page = text_of(root / "atlas" / "report.html")
    assert "bash ci/run.sh --run atlas-again --params runs/atlas/params.yaml" in page
    sections = yaml.safe_load((root / "atlas" / "params.yaml").read_text())
    for stage, folder in runs.FOLDERS.items():
        used = yaml.safe_load((root / "atlas" / folder / "params.yaml").read_text())
        assert {**sections[stage], "run": "atlas"} == used
        for name in used:
            assert name in page


def test_the_model_cards_numbers_are_the_reports(root):
    text = (root / "atlas" / "MODEL_CARD.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    accuracy = json.loads((root / "atlas" / "05_evaluation" / "scores.json").read_text())["candidates"][4]["scores"][
        "accuracy"
    ]
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and head["license"] == "apache-2.0"
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == round(accuracy["value"], 4)
    assert (
        f"{100 * accuracy['value']:.1f} %" in text
        and "0.0644" in text
        and "gguf q2\\_k was skipped" in text.replace("q2_k", "q2\\_k")
    )
    assert "QLoRA supervised fine-tuning and then ORPO preference tuning" in text
    assert str(root) not in text


@pytest.mark.parametrize("kind", ["adapter", "merged", "gguf"])
def test_each_kind_of_card_says_how_to_run_it(root, kind):
    text = model_card.render(facts.gather("atlas"), kind, "user/atlas")
    assert {
        "adapter": "AutoPeftModelForCausalLM",
        "merged": "vllm serve user/atlas",
        "gguf": "llama-server -hf user/atlas:Q8_0",
    }[kind] in text


def test_a_sweep_is_one_page_with_what_differs_and_a_line_a_run(root, visit):
    names = ["atlas", "rank4", "rank16", "rank32"]
    page = visit(report.compare(names))
    assert page.said == [] and len(page.asked) == 1
    head = page.locator("#runs th").all_inner_texts()
    assert "learning_rate" in head and "rank" in head and "max_length" not in head and "run" in head
    assert set(page.locator("#runs td.name").all_inner_texts()) == set(names)
    assert (
        page.locator("svg.sweep path.run").count() == 4
        and page.locator("svg.sweep .label").all_text_contents()[-1] == "accuracy"
    )
    assert "all runs: gguf q2_k was skipped" in page.locator("#warnings").inner_text()
    assert (
        visit(root / "compare.html", viewport={"width": 360, "height": 700}).evaluate(
            "document.documentElement.scrollWidth"
        )
        <= 360
    )


def test_runs_scored_on_different_tests_are_not_put_side_by_side_in_silence(changed, root, monkeypatch):
    shutil.copytree(root / "rank4", changed.parent / "rank4")
    path = changed / "05_evaluation" / "scores.json"
    scores = json.loads(path.read_text())
    scores["task"]["data_sha256"] = "00"
    path.write_text(json.dumps(scores))
    assert "different test items" in text_of(report.compare(["atlas", "rank4"]))


def test_bad_names_are_a_sentence(root):
    with pytest.raises(TunebookError, match="There is no run 'nosuch'"):
        report.build("nosuch")
    with pytest.raises(TunebookError, match="not usable as a folder"):
        report.build("../up")
    with pytest.raises(TunebookError, match="two runs or more"):
        report.compare(["atlas"])


def test_curves_keep_their_peaks_and_leave_out_what_is_no_number():
    points = [(i, 1.0) for i in range(5000)]
    points[2345] = (2345, 9.0)
    drawn = svg.lines({"loss": [*points, (5000, float("nan"))]}, "Loss", "step", "nats")
    assert len(re.findall(r"[\d.]+,[\d.]+", drawn)) <= svg.MOST_POINTS + 2 and "1 point not a number" in drawn
    ys = [float(y) for y in re.findall(r"[\d.]+,([\d.]+)", drawn)]
    assert max(ys) - min(ys) > 150
    assert svg.lines({"loss": [(0, float("inf"))]}, "Loss", "step", "") == ""


def test_an_evaluation_can_put_the_report_into_its_own_folder_before_it_finishes(changed):
    shutil.rmtree(changed / "05_evaluation")
    from helpers import params

    stage = runs.open_stage("eval", params.resolve("eval", {"run": "atlas"}))
    scores, answers = samples.evaluation(random.Random(3))
    samples.write_evaluation(stage.path, scores, answers)
    report.build("atlas", stage)
    manifest = stage.finish({})
    assert {"report.html", "MODEL_CARD.md", "scores.json"} <= set(manifest.data["artifacts"])
    assert "did not finish" not in text_of(changed / "05_evaluation" / "report.html")


def test_whatever_was_not_measured_leaves_a_gap_and_nothing_else(changed):
    folder = changed / "05_evaluation"
    scores, answers = samples.evaluation(random.Random(4))
    for key in ("ship", "forgetting", "harness", "preference", "instructions", "judge", "contamination", "seeds"):
        samples.write_evaluation(folder, {**scores, key: None}, answers)
        assert '<section id="scores">' in report.build("atlas").read_text()
    for row in answers[:20]:
        row["answers"].pop("orpo")
        row.update(gold=None, nonempty=None, contaminated=None, meta={}, reference="", system="")
    nothing = {"status": "skipped", "reason": "did not load", "scores": {}, "groups": {}, "errors": {}, "speed": {}}
    skipped = [{**c, **nothing} for c in scores["candidates"]]
    judge = {
        "model": "judge",
        "estimate": {},
        "pairs": [
            {
                "baseline": "base",
                "candidate": "sft",
                "n": 40,
                "win_rate": 0.7,
                "low": 0.55,
                "high": 0.82,
                "length_controlled": None,
                "order_agreement": 0.9,
                "failed": 1,
            }
        ],
    }
    samples.write_evaluation(folder, {**scores, "judge": judge}, answers)
    assert "Judge: judge" in report.build("atlas").read_text()
    samples.write_evaluation(
        folder, {**scores, "candidates": skipped, "comparisons": []}, [{**a, "answers": {}} for a in answers]
    )
    assert text_of(report.build("atlas")).count("did not load") >= len(skipped)
    samples.write_evaluation(folder, {**scores, "candidates": [], "comparisons": []}, [])
    assert '<section id="answers">' not in report.build("atlas").read_text()
