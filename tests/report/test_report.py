"""The report, read in a real browser: whole without a network, safe with hostile answers, legible everywhere."""

import json
import re
import shutil

import pytest
import report_samples as samples
import yaml

from helpers import display, params, plots, publish, report, runs
from helpers.errors import TunebookError
from helpers.report import facts, model_card, shell
from tests.conftest import begun


@pytest.fixture(scope="module")
def root(whole_run, tmp_path_factory):
    """Runs for all tests of this file, all made from one real run; tests that change one copy it first."""
    done, made = whole_run
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folder = tmp_path_factory.mktemp("report") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEBOOK_RUNS", str(folder))
        for name in ("short", "atlas", "rank4", "rank16", "rank32"):
            samples.copy(made / "whole", folder / name)
        samples.enlarge(folder / "atlas")
        for seed, (rank, rate) in enumerate([(4, 1e-3), (16, 5e-4), (32, 2e-4)]):
            samples.enlarge(folder / f"rank{rank}", seed, 0.1 * seed - 0.15)
            samples.set_params(folder / f"rank{rank}", "sft", rank=rank, learning_rate=rate)
        report.build("short")
        report.build("atlas")
        yield folder


@pytest.fixture
def changed(root, tmp_path, monkeypatch):
    """A copy of the whole run that a test may spoil; its folder."""
    monkeypatch.setenv("TUNEBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(plots, "CURVES", {"loss": plots.CURVES["loss"]})  # enough where curves are not the matter
    return samples.copy(root / "atlas", tmp_path / "runs" / "atlas")


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """visit(path, **context) -> page, with every console message in page.said and every request in page.asked; what is
    folded is opened first, unless `folded`."""
    contexts = []

    def go(path, folded=False, **context):
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.said, page.asked = [], []
        page.on("console", lambda m: page.said.append(m.text))
        page.on("pageerror", lambda e: page.said.append(str(e)))
        page.on("request", lambda r: page.asked.append(r.url))
        page.goto(path.as_uri())
        if not folded:
            page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
        return page

    yield go
    for context in contexts:
        context.close()


def text_of(path):
    return re.sub(r"<[^>]+>", " ", path.read_text(encoding="utf-8"))


def test_the_page_is_one_small_file_that_asks_for_nothing(root, visit):
    path = root / "atlas" / "report.html"
    assert path.stat().st_size < 1_500_000
    page = visit(path)
    assert page.said == [] and page.asked == [path.as_uri()]
    assert not re.search(r"(src|href|action)=|url\((?!#)|@import", path.read_text().replace('href="#', "#"))


def test_every_part_is_there_and_the_numbers_are_those_of_the_files(root, visit):
    page = visit(root / "atlas" / "report.html")
    assert page.locator("section > h2").all_inner_texts() == [
        "Read this first",
        "Scores",
        "Forgetting",
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
            "#scores tr", has=page.locator("th.name", has_text=re.compile(rf"^{re.escape(candidate['name'])}$"))
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
    measured = json.loads((root / "atlas" / "04_gguf_export" / "fidelity.json").read_text())
    found, merges = measured["files"], measured["merges"]
    assert page.locator("#fidelity tbody tr").count() == len(found) + len(merges) and (len(found), len(merges)) == (
        2,
        2,
    )
    for file in found:
        assert f"{file['mean_kl']:.4g}" in page.locator("#fidelity").inner_text()
    assert page.locator("#training figure svg").count() >= 8 and "GB" in page.locator("#training").inner_text()


def test_a_short_real_run_has_every_part_and_no_gap_in_words(root, visit):
    """Exactly what the five notebooks left: no key that the report waits for is missing, none is printed undefined."""
    opened = visit(root / "short" / "report.html")
    assert opened.said == []
    anchors = opened.locator("nav a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert anchors == ["#scores", "#forgetting", "#fidelity", "#tasks", "#answers", "#training", "#data", "#made"]
    text = opened.locator("body").inner_text()
    assert not re.search(r"\b(None|nan|undefined|Undefined)\b|\{\{|changed since|missing since", text)
    for stage in ("sft", "orpo"):
        metrics = runs.load("short", stage).metrics
        assert re.search(rf"memory used\s+{re.escape(display.size(metrics['peak_gib'] * 2**30))}, ", text)
    curves = opened.locator("#training svg").evaluate_all("all => all.map(s => s.getAttribute('aria-label'))")
    assert not [label for label in curves if "not logged" in label]
    for title in ("loss", "learning rate", "speed", "memory", "log odds", "margin"):
        assert any(title in label for label in curves), title
    assert len(opened.locator("#answers .item").all()) == 6 and opened.locator(".tile").count() == 5


def test_warnings_come_first_each_once(root, visit):
    said = visit(root / "atlas" / "report.html").locator("#warnings li").all_inner_texts()
    assert said[0] == "gguf q2_k was left out: the file is truncated"
    assert any("training data" in w for w in said) and any("sft forgot" in w for w in said)
    assert len(said) == len(set(said))


def test_trained_tokens_are_marked_in_the_very_text_that_was_tokenised(root, visit):
    page = visit(root / "atlas" / "report.html")
    shown = page.locator("pre.tokens").first
    (answer,) = shown.locator("mark").all_inner_texts()
    rows = map(json.loads, (samples.PROJECT / "datasets" / "atlas_train.jsonl").read_text().splitlines())
    row = next(r for r in rows if f"{r['question']}<|im_end|>" in shown.inner_text())
    assert answer == row["sql"] + "<|im_end|>" and row["question"] not in answer


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


def test_hostile_answers_are_text_and_nothing_else(changed, root, visit):
    scores, answers = samples.evaluation(changed)
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
    assert samples.over_the_edge(page) == []
    long_name = "rank4_" + "w" * 50
    samples.copy(root / "rank4", changed.parent / long_name)
    assert samples.over_the_edge(visit(report.compare(["atlas", long_name]))) == []


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
    assert samples.over_the_edge(page) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")
    for selector in ("body", ".muted", ".ok", ".no", "th", "#warnings li", "svg text"):
        assert contrast(page, selector) >= 4.5, selector


def contrast(page, selector):
    """WCAG contrast of an element's text against the first opaque background behind it."""
    ink, paper = page.evaluate(
        """selector => {
      const e = document.querySelector(selector), style = getComputedStyle(e);
      let at = e, back;
      do { back = getComputedStyle(at).backgroundColor; at = at.parentElement; }
      while (at && /, 0\\)$|transparent/.test(back));
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
    assert page.locator("#answers .item:visible").count() == 4
    from pypdf import PdfReader

    page = visit(root / "atlas" / "report.html", folded=True)
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    pages = [found.extract_text() for found in PdfReader(tmp_path / "report.pdf").pages]
    assert 3 <= len(pages) <= 6
    said = " ".join(" ".join(pages).split())
    assert "Scores of the candidates" in said and "95 of 100 such intervals" in said  # what is folded on the screen
    assert "Initial learning rate" not in said and "meaning" not in said  # no tables of parameters


def test_the_verdict_stands_on_the_first_screen_and_the_rest_is_folded(root, visit):
    scores, _ = samples.evaluation(root / "atlas")
    page = visit(root / "atlas" / "report.html", folded=True, viewport={"width": 1280, "height": 800})
    assert page.evaluate("document.documentElement.scrollHeight") <= 6 * 800
    first = page.locator(".headline, .tiles, .first svg, .first .side, .cards .box")
    assert page.locator(".first svg").count() == 1 and page.locator(".first .side").count() == 2
    assert page.locator(".cards .box").all_inner_texts()[0].startswith("Ship")
    tops = first.evaluate_all("all => all.map(e => e.getBoundingClientRect().top)")
    assert max(tops) < 800 and "better" in page.locator(".headline").get_attribute("class")
    assert scores["ship"]["sentence"] in page.locator(".cards").inner_text()
    assert page.locator("#scores table").first.is_hidden()
    figure = page.locator(".first svg").get_attribute("aria-label")
    assert all(c["name"] in figure for c in scores["candidates"] if c["status"] == "scored")
    assert "gguf q8_0, to ship" in figure
    wrong = page.locator(".why").inner_text()
    (kind, count), *_ = sorted(scores["candidates"][0]["errors"].items(), key=lambda e: -e[1])
    assert f"base, {count} of 180 answers" in wrong and kind
    page.locator(".copy button").click()
    page.wait_for_function("document.querySelector('.copy button').textContent != 'Copy'")
    assert page.locator(".copy button").inner_text() in ("Copied", "Selected")
    assert page.locator(".copy pre").inner_text() == "python -m helpers.serve atlas --type q8_0"
    page.locator("nav a[href='#data']").click()
    assert page.locator("#data table").first.is_visible()


def test_tables_have_captions_and_scopes_and_one_unit_of_size(root, visit):
    page = visit(root / "atlas" / "report.html")
    assert page.locator("table").count() == page.locator("table > caption").count() > 10
    assert page.locator("th:not([scope])").count() == 0
    text = page.locator("body").inner_text()
    assert "MB" in text and "MiB" not in text and "Tunebook" in page.locator("header").inner_text()
    assert re.search(r"finished 20\d\d-\d\d-\d\d", page.locator("header").inner_text())


def test_the_exports_own_few_questions_are_gone_once_the_evaluation_asked_many(changed):
    assert "task score" not in text_of(report.build("atlas")) and "Recommended" not in text_of(changed / "report.html")
    shutil.rmtree(changed / "05_evaluation")
    alone = text_of(report.build("atlas"))
    assert "task score" in alone and "of 4" in alone


def test_what_was_forgotten_has_the_same_words_in_page_card_and_scores(changed):
    scores, answers = samples.evaluation(changed)
    said = "orpo, which gguf q8_0 was made from, forgot: chat manners 8 of 10 → 5 of 10, not certain (95 % interval 57 "
    said += "points lost to 2 gained), over task_drop = 15 points."
    scores["lost"] = {"name": "orpo", "passed": False, "sentence": said}
    scores["warnings"].append(said)
    shows = scores["forgetting"]["shows"] = "With 80 % power these items show a loss of points from 57 of chat manners."
    samples.write_evaluation(changed, scores, answers)
    page, card = text_of(report.build("atlas")), (changed / "MODEL_CARD.md").read_text()
    assert page.count(said) == 1 and card.count(said) == 1 and page.count(shows) == 1 and card.count(shows) == 1
    assert "15 points of a task" in card


def test_a_score_after_some_minutes_is_a_line_and_a_plot(changed, visit):
    points = [
        {"minutes": m, "step": 10 * m, "score": s, "low": s / 2, "high": 2 * s, "n": 24}
        for m, s in ((1, 0.1), (2, 0.2))
    ]
    samples.seal(changed / "02_qlora_sft", lambda data: data["metrics"].update(score_after=points))
    for folder in ("03_orpo_alignment", "04_gguf_export", "05_evaluation"):
        samples.seal(changed / folder)
    page = visit(report.build("atlas"))
    assert "Score after 1, 2 minutes: 10 %, 20 % (24 questions)." in page.locator(".cards").inner_text()
    assert "20 % after 2 min" in page.locator(".cards svg").get_attribute("aria-label")


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
    (changed / "02_qlora_sft" / "log.jsonl").unlink()
    (changed / "02_qlora_sft" / "log.jsonl").write_text('{"step": 1, "loss": "nan"}\n{"step": 2, "lo')
    (changed / "03_orpo_alignment" / "manifest.json").unlink()
    (changed / "04_gguf_export" / "manifest.json").write_text("{")
    warnings = text_of(report.build("atlas")).split("Read this first")[1].split("Scores")[0]
    assert "02_qlora_sft/log.jsonl was changed since the stage finished" in warnings
    assert "did not finish" in warnings and "has a damaged manifest" in warnings


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
    scores, answers = samples.evaluation(changed)
    rows = [{**row, "id": f"r{i}-{row['id']}"} for i in range(8) for row in answers]
    for row in rows:
        for answer in row["answers"].values():
            answer["text"] = answer["text"] + " 你好" * 150
    samples.write_evaluation(changed, scores, rows)
    path = report.build("atlas")
    assert path.stat().st_size < 1_500_000 and re.search(r"The \d+ most telling of 1440 are shown", path.read_text())


def test_the_command_and_its_file_repeat_every_parameter(root):
    page = text_of(root / "atlas" / "report.html")
    assert "bash ci/run.sh --run atlas-again --recipe runs/atlas/recipe" in page
    sections = params.recipe(root / "atlas" / "recipe")
    for stage, folder in runs.FOLDERS.items():
        used = yaml.safe_load((root / "atlas" / folder / "params.yaml").read_text())
        assert {**sections[stage].as_dict(), "run": used["run"]} == used
        for name in used:
            assert name in page


def test_the_model_cards_numbers_are_the_reports(root):
    text = (root / "atlas" / "MODEL_CARD.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    candidate = next(c for c in samples.evaluation(root / "atlas")[0]["candidates"] if c["name"] == "gguf q8_0")
    accuracy = candidate["scores"]["accuracy"]
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and head["license"] == "apache-2.0"
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == round(accuracy["value"], 4)
    kl = facts.gather("atlas").files["q8_0"]["mean_kl"]
    assert f"{100 * accuracy['value']:.1f} %" in text and f"{kl:.4g}" in text
    assert "gguf q2_k was left out" in text
    assert "LoRA supervised fine-tuning and then ORPO preference tuning" in text
    assert re.search(r"^- 02_qlora_sft: .*\brank 16, .*\n- 03_orpo_alignment: ", text, re.MULTILINE)
    assert str(root) not in text


def test_page_and_card_say_what_an_importance_matrix_covers(changed):
    told = "imatrix weighs 4 of 7 matrices, not blk.0.ffn_gate_exps.weight, blk.0.ffn_up_exps.weight and 1 more"
    samples.seal(changed / "04_gguf_export", lambda data: data["metrics"].update(imatrix=told))
    samples.seal(changed / "05_evaluation")
    card, page = model_card.render(facts.gather("atlas"), "gguf"), text_of(report.build("atlas"))
    assert f"The {told}." in card.replace("\\", "") and f"The {told}." in page


def test_page_and_card_say_what_merging_cost(changed):
    one = {"tokens": 900, "top1": 0.9, "task_score": 0.5, "task_count": 24, "chosen": False}
    merges = [{**one, "onto": "trained"}, {**one, "onto": "nf4", "mean_kl": 0.001, "chosen": True}]
    merges.append({**one, "onto": "16bit", "mean_kl": 0.25, "task_score": 0.3})
    samples.seal(changed / "04_gguf_export", lambda data: data["metrics"].update(merges=merges))
    samples.seal(changed / "05_evaluation")
    card, page = model_card.render(facts.gather("atlas"), "merged"), text_of(report.build("atlas"))
    assert "| merged onto 4 bits, unpacked, kept | 0.001 | 90.0 % |\n" in card and "| trained |  |  |\n" in card
    assert "| merged onto 16 bits | 0.25 | 90.0 % |\n" in card
    assert "merged onto 16 bits" in page and "mean KL 0.25 (at most 0.02)" in page


def test_the_card_and_the_published_adapter_are_those_of_the_exported_stage(changed):
    """The files hold the SFT adapter although a preference adapter was trained after it."""
    samples.seal(changed / "04_gguf_export", lambda data: data["metrics"].update(trained_by="sft"))
    samples.seal(changed / "05_evaluation")
    for kind in ("adapter", "merged", "gguf"):
        intro = model_card.render(facts.gather("atlas"), kind).split("## Evaluation")[0].split("---")[2]
        assert "made by LoRA supervised fine-tuning." in intro
        assert "The run also went through ORPO preference tuning, which is not part of" in intro
    (adapter,) = publish.plan("atlas", "user/atlas", ["adapter"])
    assert {source.parts[-3] for _, source, _ in adapter.files} == {"02_qlora_sft"}
    sft = next(c for c in samples.evaluation(changed)[0]["candidates"] if c["name"] == "sft")
    assert (
        f'"value": {round(sft["scores"]["accuracy"]["value"], 4)}' in adapter.card
        and "sft against base: " in adapter.card
    )
    assert "Exported from: supervised fine-tuning" in text_of(report.build("atlas"))


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
    assert set(page.locator("#runs tbody th.name").all_inner_texts()) == set(names)
    assert (
        all(n in page.locator("#sweep").inner_text() for n in names)
        and "accuracy" in page.locator("#sweep svg text").all_text_contents()
    )
    assert "all runs: gguf q2_k was left out" in page.locator("#warnings").inner_text()
    assert samples.over_the_edge(page) == []


def test_runs_scored_on_different_tests_are_not_put_side_by_side_in_silence(changed, root, monkeypatch):
    samples.copy(root / "rank4", changed.parent / "rank4")
    path = changed / "05_evaluation" / "scores.json"
    scores = json.loads(path.read_text())
    scores["task"]["data_sha256"] = "00"
    path.write_text(json.dumps(scores))
    assert "different test items" in text_of(report.compare(["atlas", "rank4"]))


def test_bad_names_are_a_sentence(root):
    with pytest.raises(TunebookError, match="There is no run 'nosuch'"):
        report.build("nosuch")
    with pytest.raises(TunebookError, match="cannot name a folder"):
        report.build("../up")
    with pytest.raises(TunebookError, match="two runs or more"):
        report.compare(["atlas"])


def test_curves_keep_their_peaks_and_leave_out_what_is_no_number():
    lines = [{"step": i, "grad_norm": 1.0} for i in range(5000)]
    lines[2345]["grad_norm"] = 9.0
    figure = plots.curves({"": [*lines, {"step": 5000, "grad_norm": "nan"}]}, ["grad_norm"])
    (line,) = figure.axes[0].get_lines()
    assert len(line.get_xdata()) <= plots.MOST_POINTS + 2 and max(line.get_ydata()) == 9.0
    assert (2345, 9.0) in list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_foreign_names_in_a_figure_are_text(root, visit, tmp_path):
    signs = "<script>\x1b $a_1$ \x00"
    bars = [
        plots.Bar(samples.NASTY, 0.5, 0.4, 0.6),
        plots.Bar(signs, 0.5, 0.4, 0.6),
        plots.Bar("$\\frac{a}{", 0.5, 0.4, 0.6),
    ]
    drawn = plots.svg(plots.scores(bars, "share " + signs))
    (tmp_path / "figure.html").write_text(f"<title>figure</title>{drawn}")
    opened = visit(tmp_path / "figure.html")
    assert opened.title() == "figure" and opened.locator("script, img, [onerror]").count() == 0
    texts = " ".join(opened.locator("svg text").all_text_contents())
    assert "<script>" in texts and "␛" in texts and "$a_1$" in texts and "$\\frac{a}{" in texts
    assert "$a_1$" in opened.locator("svg").get_attribute("aria-label")


def test_a_value_in_a_card_cannot_become_markdown():
    assert shell.markdown_text("a|b\n# c <img> [x](y) `z`") == "a\\|b \\# c \\<img\\> \\[x\\](y) \\`z\\`"


def test_an_evaluation_can_put_the_report_into_its_own_folder_before_it_finishes(changed):
    from helpers import params

    found = samples.evaluation(changed)
    shutil.rmtree(changed / "05_evaluation")

    stage = begun("eval", params.resolve("eval", {"run": "atlas"}))
    samples.write_evaluation(changed, *found)
    report.build("atlas", stage)
    manifest = stage.finish({})
    assert {"report.html", "MODEL_CARD.md", "scores.json"} <= set(manifest.data["artifacts"])
    assert "did not finish" not in text_of(changed / "05_evaluation" / "report.html")


def test_whatever_was_not_measured_leaves_a_gap_and_nothing_else(changed):
    scores, answers = samples.evaluation(changed)
    for key in ("ship", "forgetting", "harness", "preference", "instructions", "judge", "contamination", "seeds"):
        samples.write_evaluation(changed, {**scores, key: None}, answers)
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
                "length_controlled": {"value": 0.6, "low": 0.4, "high": 0.8, "n": 22},
                "order_agreement": 0.9,
                "failed": 1,
            }
        ],
    }
    drawn = {str(seed): {"value": 0.5, "low": 0.4, "high": 0.6, "n": 180} for seed in (17, 18)}
    seeds = {"base": {"scores": drawn, "mean": 0.5, "sd": 0.031}}
    samples.write_evaluation(changed, {**scores, "judge": judge, "seeds": seeds}, answers)
    page = text_of(report.build("atlas"))
    assert "Judge: judge" in page and "60.0 % of 22" in page
    assert "By seed of the draws" in page and "3.1 %" in page and "same structure" in page
    samples.write_evaluation(
        changed, {**scores, "candidates": skipped, "comparisons": []}, [{**a, "answers": {}} for a in answers]
    )
    assert text_of(report.build("atlas")).count("did not load") >= len(skipped)
    samples.write_evaluation(changed, {**scores, "candidates": [], "comparisons": []}, [])
    assert '<section id="answers">' not in report.build("atlas").read_text()
