"""The structure of helpers/: imports point downwards only, no circles, one stem a file, files of a page."""

import ast
from collections import Counter, defaultdict

import pytest

from tests.conftest import PROJECT

# From the ground up. A file may import from its own layer and from those before it, never from one behind it.
LAYERS = ("core", "tasks", "model", "planner", "data", "gguf", "evaluate", "train", "report", "faces")
FACES = {"notebook", "panel", "serve", "chat", "publish", "__main__", "cli", "import_recipe", "check_recipe"}
FILES = sorted((PROJECT / "helpers").rglob("*.py"))


def module_of(path):
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def layer_of(module):
    parts = module.split(".")[1:]
    if parts and parts[0] in LAYERS:
        return LAYERS.index(parts[0])
    return LAYERS.index("faces") if parts and parts[0] in FACES else 0


def imports_of(module):
    """(imported module, line) for every import of helpers in a file, those inside functions too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
            names = [f"{node.module}.{a.name}" for a in node.names]
            names = [name if name in MODULES else node.module for name in names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "helpers"]
        yield from ((name, node.lineno) for name in names if name != module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_points_upwards(module):
    upward = [
        f"line {line}: {LAYERS[layer_of(module)]} imports {name} of {LAYERS[layer_of(name)]}"
        for name, line in imports_of(module)
        if layer_of(name) > layer_of(module)
    ]
    assert not upward, f"{module}: " + "; ".join(upward)


def test_no_files_import_each_other_in_a_circle():
    edges = defaultdict(set)
    for module in MODULES:
        edges[module] = {name for name, _ in imports_of(module) if name != "helpers"}
    done, circles = set(), []

    def visit(module, path):
        if module in path:
            circles.append(" -> ".join([*path[path.index(module) :], module]))
            return
        if module not in done:
            for other in sorted(edges[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])
    assert not circles, "\n".join(circles)


def test_every_file_has_a_stem_of_its_own_and_at_most_400_lines():
    stems = Counter(path.stem for path in FILES if not path.stem.startswith("__"))
    assert [stem for stem, count in stems.items() if count > 1] == []
    lengths = {path.relative_to(PROJECT).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_the_package_stays_small():
    """What it comes to with the jobs that people bring; 19,000 lines in 100 files remain the aim."""
    assert len(FILES) <= 119
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 26_750


@pytest.mark.parametrize(
    "library, allowed",
    [
        ("ipywidgets", {"panel.py", "chat.py"}),
        ("matplotlib", {"plots.py"}),
        ("jinja2", {"report", "template_renderer.py", "chat_template.py", "ollama.py", "worker.py", "compat.py"}),
        ("openai", {"llm_client.py"}),
    ],
)
def test_one_library_is_used_in_one_place(library, allowed):
    users = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            if any(name.split(".")[0] == library for name in names):
                users.add("report" if "report" in path.relative_to(PROJECT).parts else path.name)
    assert users <= allowed
