"""The bootstrap cell and what it calls, with folders and a git repository in place of Colab's."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import types

import nbformat
import pytest

from ci import colab, stamp
from helpers import machine
from helpers.errors import TunebookError
from tests.conftest import PROJECT

CHOSEN = ("HF_TOKEN", "TUNEBOOK_KEEP", "TUNEBOOK_KEEP_CHOSEN")


@pytest.fixture
def outside(monkeypatch, tmp_path):
    for name in CHOSEN:  # set first, so that what a test leaves is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(colab, "MOUNT", tmp_path / "drive")


@pytest.fixture
def secrets(outside, monkeypatch):
    """google.colab as far as it is asked: these secrets, and a drive that is a folder."""
    kept = {}

    def get(name):
        if name not in kept:
            raise LookupError(f"Secret {name} does not exist.")
        return kept[name]

    package = types.ModuleType("google.colab")
    package.userdata, package.drive = types.SimpleNamespace(get=get), types.SimpleNamespace(mount=lambda place: None)
    monkeypatch.setitem(sys.modules, "google.colab", package)
    return kept


def test_runs_go_to_the_drive_only_when_that_is_asked_for(secrets, capsys):
    colab.keep("this session")
    assert "TUNEBOOK_KEEP" not in os.environ and not colab.MOUNT.exists()
    colab.keep("Google Drive")
    place = colab.MOUNT / "MyDrive/tunebook/runs"
    assert (
        os.environ["TUNEBOOK_KEEP"] == str(place) and f"kept in {place}; there already: none" in capsys.readouterr().out
    )
    (place / "first").mkdir()
    colab.keep("Google Drive")
    assert "there already: first." in capsys.readouterr().out
    colab.keep("this session")
    assert "TUNEBOOK_KEEP" not in os.environ


def test_a_folder_may_be_named_and_one_that_cannot_be_written_is_a_message(outside, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEBOOK_KEEP", str(tmp_path / "own"))
    colab.keep("this session")  # what a person has set is not taken back
    assert os.environ["TUNEBOOK_KEEP"] == str(tmp_path / "own")
    colab.keep(str(tmp_path / "nas"))
    assert os.environ["TUNEBOOK_KEEP"] == str(tmp_path / "nas")
    (tmp_path / "file").write_text("")
    with pytest.raises(TunebookError, match=r"keep_runs_in is .*file.* cannot be written"):
        colab.keep(str(tmp_path / "file"))
    with pytest.raises(TunebookError, match="only Colab mounts one"):
        colab.keep("Google Drive")


def test_the_token_comes_from_the_secret_and_is_never_shown(secrets, capsys):
    colab.token()
    assert "Secret HF_TOKEN does not exist" in (said := capsys.readouterr().out) and "Colab's secrets" in said
    secrets["HF_TOKEN"] = "hf_not_to_be_seen\n"
    colab.token()
    assert os.environ["HF_TOKEN"] == "hf_not_to_be_seen"
    assert "secret HF_TOKEN" in (said := capsys.readouterr().out) and "hf_not" not in said


LOCK = """# a comment
absent-base==1.0
absent-lora==2.0  # training, unsloth
absent-judge==3.0  # evaluation
pyyaml==0.0.1
"""


def test_a_notebook_installs_what_it_needs_and_what_is_asked_for():
    here = importlib.metadata.version("psutil")
    assert colab.wanted(LOCK + f"psutil=={here}\n", set()) == ["absent-base==1.0", "pyyaml==0.0.1"]
    assert "absent-lora==2.0" in colab.wanted(LOCK, {"unsloth", ""})
    assert "absent-judge==3.0" not in colab.wanted(LOCK, {"training"})
    lock = colab.LOCK.read_text()
    for notebook, extra in (
        ("data", "unsloth"),
        ("sft", "lm-eval"),
        ("gguf", "presidio-analyzer"),
        ("quick", "unsloth"),
    ):
        assert not [p for p in colab.wanted(lock, colab.GROUPS[notebook]) if p.startswith(extra)]
    assert [p for p in colab.wanted(lock, {"unsloth"}) if p.startswith("unsloth==")]


def test_the_bootstrap_imports_nothing_that_it_installs():
    code = "import sys; from ci import colab; print(colab.imported(colab.wanted(colab.LOCK.read_text(), {'unsloth'})))"
    code += "; names = {'torch', 'numpy', 'pyarrow', 'transformers', 'tokenizers', 'datasets', 'peft', 'accelerate'}"
    done = subprocess.check_output([sys.executable, "-c", code + "; print(names & set(sys.modules))"], cwd=PROJECT)
    assert done.decode().split() == ["[]", "set()"]


def test_also_install_takes_what_the_notebook_offers(outside):
    with pytest.raises(TunebookError, match="also_install is 'unsloth'; in this notebook it takes '' or 'presidio'"):
        colab.prepare("data", also_install="unsloth")


def test_a_package_that_is_imported_already_is_named_after_it_is_replaced(monkeypatch, capsys):
    import yaml

    assert colab.imported(["pyyaml==0.0.1", "absent-base==1.0"]) == [f"pyyaml {yaml.__version__}"]
    monkeypatch.setattr(colab.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", ""))
    with pytest.raises(TunebookError, match=f"pyyaml {yaml.__version__} had been imported.*Restart session"):
        colab.install(["pyyaml==0.0.1"])
    assert "Installing 1 packages, about 0.7 s and their download: pyyaml 0.0.1" in capsys.readouterr().out


def test_packages_that_cannot_be_had_are_one_message(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(TunebookError, match=r"pip could not install them .*no-such-package"):
        colab.install(["no-such-package-of-ours==1.0"])


@pytest.mark.parametrize(
    ("smi", "said"),
    [
        ("echo 'Tesla T4, 15360'", "Tesla T4, 15 GiB, "),
        ("printf 'NVIDIA L4, 23034\\nNVIDIA L4, 23034\\n'", "2 × NVIDIA L4, 22.5 GiB, "),
        ("echo 'No devices were found'; exit 6", f"no GPU, {os.cpu_count()} CPU cores, "),
    ],
)
def test_the_last_line_says_what_is_here(smi, said, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert colab.ready() == f"{said}{machine.memory_gib():.3g} GiB of memory: ready"


# ---------------------------------------------------------------- the cell itself


@pytest.fixture
def elsewhere(tmp_path):
    """A folder outside of the project, and run(source, commit, colab): the bootstrap of 04 there, in a new process."""
    content = tmp_path / "content"
    content.mkdir()

    def run(source="", commit="", colab=True):
        cell = stamp.bootstrap("gguf").replace("/content", str(content)).replace(f'"{machine.COMMIT}"', f'"{commit}"')
        assert cell.count(f'"{commit}"') and str(content) in cell
        fake = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')\n" if colab else ""
        # ci/colab.py of the checkout would install; here it says where it is
        (tmp_path / "cell.py").write_text(fake + cell.replace("colab.prepare(", "print(colab.__file__, "))
        env = {**os.environ, "TUNEBOOK_SOURCE": source, "GIT_CONFIG_GLOBAL": str(tmp_path / "none")}
        done = subprocess.run(
            [sys.executable, tmp_path / "cell.py"], cwd=content, env=env, capture_output=True, text=True
        )
        return done, content / "tunebook"

    return run


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small git repository with the files that the bootstrap looks for: (address, first commit, second commit)."""
    folder = tmp_path_factory.mktemp("published")
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    (folder / "helpers").mkdir()
    (folder / "ci").mkdir()
    (folder / "helpers/params.py").write_text("")
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    commits = []
    for text in ("first = 1", "second = 2"):
        (folder / "ci/colab.py").write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", text], check=True)
        commits.append(subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip())
    subprocess.run([*git, "config", "uploadpack.allowAnySHA1InWant", "true"], check=True)
    return f"file://{folder}", *commits


def test_the_pinned_commit_is_fetched_and_no_other(elsewhere, published, monkeypatch):
    address, first, _ = published
    monkeypatch.setattr(stamp, "BOOTSTRAP", stamp.BOOTSTRAP.replace("https://github.com/{repository}", address))
    done, checkout = elsewhere(commit=first)
    assert done.returncode == 0 and str(checkout / "ci/colab.py") in done.stdout, done.stderr
    assert (checkout / "ci/colab.py").read_text() == "first = 1"


def test_a_commit_that_is_not_there_is_one_message_with_the_remedy(elsewhere, published, monkeypatch):
    monkeypatch.setattr(stamp, "BOOTSTRAP", stamp.BOOTSTRAP.replace("https://github.com/{repository}", published[0]))
    done, checkout = elsewhere(commit="0" * 40)
    assert done.returncode and f"could not be fetched from {published[0]}" in done.stderr
    assert f"upload the folder to {checkout}, or set TUNEBOOK_SOURCE" in done.stderr
    assert not (checkout / "helpers").exists()


def test_a_source_of_ones_own_is_an_address_or_a_folder(elsewhere, published, tmp_path):
    done, checkout = elsewhere(source=published[0])
    assert done.returncode == 0 and (checkout / "ci/colab.py").read_text() == "second = 2", done.stderr
    folder = tmp_path / "uploaded"
    shutil.move(checkout, folder)
    done, checkout = elsewhere(source=str(folder))
    assert str(folder / "ci/colab.py") in done.stdout and not checkout.exists()


def test_outside_of_colab_nothing_is_fetched(elsewhere, published):
    done, checkout = elsewhere(source=published[0], colab=False)
    assert done.returncode and "only Colab fetches it" in done.stderr and not checkout.exists()


def test_an_uploaded_folder_is_found_in_colab(elsewhere, tmp_path):
    _, checkout = elsewhere(source=str(tmp_path / "nothing"), colab=False)
    for name in ("helpers/params.py", "ci/colab.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("")
    done, _ = elsewhere()
    assert done.returncode == 0 and str(checkout / "ci/colab.py") in done.stdout, done.stderr


def test_the_failed_bootstrap_is_a_line_in_a_notebook(tmp_path):
    import nbclient

    cell = stamp.bootstrap("gguf").replace("/content", str(tmp_path))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        nbclient.NotebookClient(
            notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
    (error,) = (output for output in notebook.cells[0].outputs if output.output_type == "error")
    assert len(error.traceback) == 1 and "set TUNEBOOK_SOURCE" in error.traceback[0]


def test_an_owner_that_is_not_set_is_nobodys_and_a_name_that_is_set_is_one():
    owner = machine.REPOSITORY.split("/")[0]
    assert owner.startswith("_") or len(machine.COMMIT) == 40  # GitHub's names begin with a letter or a digit


def test_publishing_writes_one_file_and_refuses_what_is_no_repository(tmp_path, monkeypatch):
    (tmp_path / "helpers").mkdir()
    shutil.copy(PROJECT / "helpers/machine.py", tmp_path / "helpers")
    monkeypatch.setattr(stamp, "PROJECT", tmp_path)
    for name in ("REPOSITORY", "COMMIT"):
        monkeypatch.setattr(machine, name, getattr(machine, name))
    stamp.publish("somebody/tunebook", "a" * 40)
    text = (tmp_path / "helpers/machine.py").read_text()
    assert 'REPOSITORY = "somebody/tunebook"' in text and f'COMMIT = "{"a" * 40}"' in text
    assert f'"{"a" * 40}"' in stamp.bootstrap("sft") and "github.com/somebody/tunebook" in stamp.bootstrap("sft")
    for wrong in (("_x/y", "a" * 40), ("x/y", "main"), ("x", "a" * 40)):
        with pytest.raises(SystemExit, match="give owner/name"):
            stamp.publish(*wrong)


def test_a_tag_that_is_named_exists_and_holds_the_pinned_commit():
    if not machine.TAG:
        assert "/blob/" in stamp.address("quick")
        return
    git = ["git", "-C", str(PROJECT)]
    if subprocess.check_output([*git, "rev-parse", "--is-shallow-repository"], text=True).strip() == "true":
        pytest.skip("a shallow checkout has no tags")
    subprocess.run([*git, "merge-base", "--is-ancestor", machine.COMMIT, f"{machine.TAG}^{{commit}}"], check=True)
