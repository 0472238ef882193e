"""Personal data with a form is masked without a network, what has none is said to be missed; toxicity by a scorer."""

import socket

import pytest

from helpers.data import cleaning, privacy
from helpers.data.tables import StepReport
from helpers.data.turns import batches, make_row
from helpers.errors import TunebookError


def talk(question, answer="fine", at=1):
    return make_row(
        "sft", [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], file="f", row=at
    )


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever opens a connection to anywhere but this machine fails the test."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"a connection to {address} was tried")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: pytest.fail(f"{host} was looked up"))


def mask(texts, **options):
    report = StepReport("privacy")
    rows = [
        row
        for batch in privacy.mask_personal_data(
            batches([talk(t, at=i) for i, t in enumerate(texts)], 2), report, **options
        )
        for row in batch
    ]
    return rows, report


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mail anna.muster@example.com or bob@firma.co.uk, thanks", "mail <EMAIL_ADDRESS> or <EMAIL_ADDRESS>, thanks"),
        ("call +49 30 901820 or (212) 555-0123!", "call <PHONE_NUMBER> or <PHONE_NUMBER>!"),
        ("card 4111 1111 1111 1111 exp 12/26", "card <CREDIT_CARD> exp 12/26"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN <IBAN_CODE>."),
        ("from 192.168.1.17 and 2001:0db8:85a3::8a2e:0370:7334 ok", "from <IP_ADDRESS> and <IP_ADDRESS> ok"),
        ("ssn 078-05-1121", "ssn <US_SSN>"),
        ("to 1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN2 please", "to <CRYPTO> please"),
        ("我的邮箱是zhang@qq.com，电话13812345678。", "我的邮箱是<EMAIL_ADDRESS>，电话<PHONE_NUMBER>。"),
        ("müller@example.de schrieb", "<EMAIL_ADDRESS> schrieb"),
    ],
)
def test_personal_data_is_masked(text, masked):
    rows, report = mask([text])
    assert rows[0]["messages"][0]["content"] == masked
    assert report.changed == 1 and sum(report.figures["found"].values()) == masked.count("<")
    assert any(key.startswith("masked ") for key in report.examples)


@pytest.mark.parametrize(
    "text",
    [
        "SELECT count(*) FROM orders WHERE date >= '2021-03-04 12:33:21' AND id = 1234567890 LIMIT 10",
        "std::vector<int> a::b; foo@bar; @property; x@y.notatld",
        "Population 1,234,567 and pi 3.14159265358979 from 1990-2020",
        "aspect 16:9, time 12:33:21, chapter 4.12.1",
        "4111 1111 1111 1112 fails the checksum",
        "一二三四五六七八九十",
    ],
)
def test_numbers_code_and_dates_are_left_alone(text):
    rows, report = mask([text])
    assert rows[0]["messages"][0]["content"] == text and report.changed == 0 and report.figures["found"] == {}


def test_the_report_says_what_is_not_found():
    _, report = mask(["My name is Anna Muster and I live at 12 Long Lane."])
    assert report.figures["found"] == {}
    assert "names of people" in report.figures["not_looked_for"] and "addresses" in report.figures["not_looked_for"]


def test_answers_and_pairs_are_masked_too_and_rows_can_be_dropped_or_counted():
    pair = make_row(
        "preference",
        [{"role": "user", "content": "q"}],
        chosen=[{"role": "assistant", "content": "a@example.com"}],
        rejected=[{"role": "assistant", "content": "no"}],
    )
    report = StepReport("privacy")
    out = next(privacy.mask_personal_data([[pair]], report))
    assert out[0]["chosen"][0]["content"] == "<EMAIL_ADDRESS>" and out[0]["id"] != pair["id"]
    texts = ["write to a@example.com", "nothing here"]
    rows, report = mask(texts, action="drop")
    assert (
        len(rows) == 1
        and report.dropped == {"personal data": 1}
        and report.examples["personal data"]["detail"] == "1 EMAIL_ADDRESS"
    )
    rows, report = mask(texts, action="count")
    assert [r["messages"][0]["content"] for r in rows] == texts and report.figures["found"] == {"EMAIL_ADDRESS": 1}


def test_a_long_line_is_searched_to_its_end():
    text = "word " * 20_000 + "anna@example.com" + " word" * 20_000 + "x" * 9_000 + " bob@example.com"
    assert [(text[a:b], kind) for a, b, kind in privacy.find(text)] == [
        ("anna@example.com", "EMAIL_ADDRESS"),
        ("bob@example.com", "EMAIL_ADDRESS"),
    ]


# ---------------------------------------------------------------- toxicity


def judge(rows, scorer, **options):
    report = StepReport("toxicity")
    return [row for batch in cleaning.drop_toxic(batches(rows, 2), report, scorer, **options) for row in batch], report


ROWS = [talk("hello", at=1), talk("you idiot", at=2), talk("thanks", at=3)]


def test_a_function_or_a_registered_name_scores(monkeypatch):
    kept, report = judge(ROWS, lambda texts: [0.9 if "idiot" in t else 0.1 for t in texts])
    assert [r["row"] for r in kept] == [1, 3] and report.dropped == {"toxic": 1}
    assert report.figures["highest_score"] == 0.9
    monkeypatch.setitem(cleaning.SCORERS, "house rules", lambda texts: [float("thanks" in t) for t in texts])
    assert [r["row"] for r in judge(ROWS, "house rules")[0]] == [1, 2]


@pytest.mark.parametrize(
    "scorer",
    [
        "nonsense",
        "no_such_module:score",
        "http://anna:s3cret@127.0.0.1:1/v1",
        "http://127.0.0.1:1/v1",
        "transformers:/no/such",
    ],
)
def test_a_scorer_that_cannot_be_loaded_is_refused(scorer):
    with pytest.raises(TunebookError) as caught:
        judge(ROWS, scorer)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("answer", [[0.1], [1.5, 0.0], ["a", "b"], [float("nan"), 0.0]])
def test_a_scorer_that_gives_no_marks_is_refused(answer):
    with pytest.raises(TunebookError, match="one number from 0 to 1"):
        judge(ROWS, lambda texts: answer)


def test_a_local_classifier_scores(tmp_path, tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    labels = {0: "neutral", 1: "toxic"}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        id2label=labels,
    )
    torch.manual_seed(1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    score = cleaning.load_scorer(f"transformers:{tmp_path}")
    harmless = cleaning.load_scorer(f"transformers:{tmp_path}#neutral")
    texts = ["hello", "you idiot", "a much longer text " * 50]
    assert all(0 < s < 1 for s in score(texts)) and len(set(score(texts))) == 3
    assert [a + b for a, b in zip(score(texts), harmless(texts), strict=True)] == pytest.approx([1, 1, 1], abs=1e-5)
    with pytest.raises(TunebookError, match="neutral, toxic"):
        cleaning.load_scorer(f"transformers:{tmp_path}#rude")


def test_a_classifier_that_scores_nan_is_refused_and_its_row_named(tmp_path, tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {0: "neutral", 1: "toxic"}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, id2label=labels, **size)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TunebookError, match="gave nan for row 1 of f"):
        judge(ROWS, f"transformers:{tmp_path}")
