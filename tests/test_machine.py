"""What the machine has: memory that is free, containers included; what the code is."""

import os
import shutil
import subprocess
import sys

import psutil
import pytest

from helpers import machine
from tests.conftest import PROJECT

GIB = 2**30


def container(tmp_path, monkeypatch, files, group="0::/"):
    (tmp_path / "own").write_text(group + "\n")
    for name, text in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "tree")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")


def plenty(monkeypatch):
    memory = psutil.virtual_memory()._replace(available=64 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_a_containers_limit_bounds_free_memory_and_the_page_cache_counts_as_free(tmp_path, monkeypatch):
    plenty(monkeypatch)
    stat = f"anon {GIB}\nactive_file {GIB}\ninactive_file {2 * GIB}\n"
    container(
        tmp_path,
        monkeypatch,
        {"memory.max": str(8 * GIB), "memory.current": str(5 * GIB), "memory.stat": stat},
    )
    assert machine.free_memory_gib() == 8 - (5 - 3)


@pytest.mark.parametrize("limited", ["inner", "outer"])
def test_the_narrowest_of_nested_groups_counts(tmp_path, monkeypatch, limited):
    plenty(monkeypatch)
    files = {}
    for level, folder in (("outer", "pod"), ("inner", "pod/job")):
        files |= {
            f"{folder}/memory.max": str(3 * GIB) if level == limited else "max",
            f"{folder}/memory.current": str(GIB),
            f"{folder}/memory.stat": "active_file 0\ninactive_file 0\n",
        }
    container(tmp_path, monkeypatch, files, "0::/pod/job")
    assert machine.free_memory_gib() == 2


def test_control_groups_of_version_one_are_read_too(tmp_path, monkeypatch):
    plenty(monkeypatch)
    container(
        tmp_path,
        monkeypatch,
        {
            "memory/memory.limit_in_bytes": str(4 * GIB),
            "memory/memory.usage_in_bytes": str(3 * GIB),
            "memory/memory.stat": f"active_file 0\ntotal_active_file {GIB}\ntotal_inactive_file {GIB}\n",
        },
        "4:memory:/docker/0123\n0::/",
    )
    assert machine.free_memory_gib() == 3


def test_without_a_container_the_systems_own_answer_counts(tmp_path, monkeypatch):
    plenty(monkeypatch)
    container(tmp_path, monkeypatch, {})
    assert machine.free_memory_gib() == 64


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what decides results, without git."""
    shutil.copytree(PROJECT / "helpers", tmp_path / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "notebooks", tmp_path / "notebooks")
    shutil.copy(PROJECT / "README.md", tmp_path)
    monkeypatch.setattr(machine, "PROJECT", tmp_path)
    return tmp_path


def test_the_codes_identity_is_its_content(project):
    first = machine.code_hash("02_qlora_sft")
    (project / "README.md").write_text("other")
    assert machine.code_hash("02_qlora_sft") == first
    with open(project / "helpers" / "runs.py", "a") as file:
        file.write("# one\n")
    second = machine.code_hash("02_qlora_sft")
    with open(project / "helpers" / "runs.py", "a") as file:
        file.write("# another\n")
    assert len({first, second, machine.code_hash("02_qlora_sft")}) == 3


def test_a_notebook_belongs_to_its_own_stage_only(project):
    sft, orpo = machine.code_hash("02_qlora_sft"), machine.code_hash("03_orpo_alignment")
    path = project / "notebooks" / "02_qlora_sft.ipynb"
    path.write_text(path.read_text().replace("notebook.start", "notebook .start"))
    assert machine.code_hash("02_qlora_sft") != sft
    assert machine.code_hash("03_orpo_alignment") == orpo


def test_outside_of_a_git_checkout_nothing_is_printed(project, capfd):
    assert machine.revision() == f"v{machine.VERSION}"
    assert capfd.readouterr() == ("", "")


def test_free_memory_is_at_most_what_the_machine_has():
    assert 0 < machine.free_memory_gib() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


@pytest.mark.parametrize(
    "listed, said",
    [
        ("", ""),
        ("4242, /usr/bin/python3, 20480 MiB\n", "python3 (process 4242, 20.0 GiB)"),
        (
            "17, /opt/tritonserver/bin/tritonserver, 512 MiB\n4242, [Not Found], [N/A]\n",
            "tritonserver (process 17, 0.5 GiB), [Not Found] (process 4242)",
        ),
        ("99, C:\\a, b\\x.exe, 1024 MiB\n", "process 99, 1.0 GiB"),
        pytest.param(f"{os.getpid()}, python, 100 MiB\n", "", id="this process"),
        ("No running processes found\n", ""),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", ""),
    ],
)
def test_who_else_holds_the_gpus_memory_is_read_from_what_nvidia_smi_lists(listed, said):
    found = machine.gpu_held(listed)
    assert said in found and bool(found) == bool(said)


def test_a_machine_without_nvidias_tools_has_nobody_to_name(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.gpu_held() == ""


class Kernel:
    """What a kernel knows of who runs it: whether it may ask, and the cells before this one."""

    def __init__(self, asks, *cells):
        self._allow_stdin, self.kernel = asks, self
        self.shell = type("Shell", (), {"user_ns": {"_ih": ["", *cells]}})


@pytest.mark.parametrize(
    "kernel, watched",
    [
        (Kernel(True), True),
        (Kernel(True, "# Parameters\nrank = 8\n"), True),
        (Kernel(False), True),
        (Kernel(False, "# @title Parameters\nrank = 16\n"), True),
        (Kernel(False, "# Parameters\nrank = 8\n"), False),
    ],
)
def test_a_papermill_run_is_watched_by_nobody(kernel, watched, monkeypatch):
    monkeypatch.delenv("TUNEBOOK_HEADLESS", raising=False)
    monkeypatch.setattr(machine, "kernel", lambda: kernel)
    assert machine.interactive() is watched and machine.unwatched() is not watched
    monkeypatch.setenv("TUNEBOOK_HEADLESS", "1")
    assert not machine.interactive() and machine.unwatched()


def test_plain_papermill_is_headless_and_nbclient_alone_is_not(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.delenv("TUNEBOOK_HEADLESS", raising=False)
    code = (
        f"import sys; sys.path.insert(0, {str(PROJECT)!r})\nfrom helpers import machine\nprint(machine.interactive())"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "-k", "python3"]
    subprocess.run(papermill, cwd=tmp_path, check=True, capture_output=True)
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text == "False\n"
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    assert notebook.cells[0].outputs[0].text == "True\n"
