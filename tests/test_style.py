"""Limits of the house style that CONTRIBUTING.md sets and no linter checks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "magpo").rglob("*.py"))
SYSTEMS = [f for f in FILES if f.parent.name == "systems" and not f.stem.startswith("_")]
SEVEN = {"make", "init", "train_chunk", "policy_params", "initial_carry", "act", "main"}
# Modules and packages of magpo, the lowest layer first: each imports only from earlier ones; the
# modules of a package may import one another.
LAYERS = [
    *(
        "errors",
        "types",
        "values",
        "files",
        "tables",
        "metrics",
        "moments",
        "optimiser",
        "published",
    ),
    *("envs", "networks", "contract", "plugins"),
    *("config", "commands", "hardware", "report", "runs"),
    *("evaluate", "experiment", "export", "plot", "render", "reproduce", "sweep", "systems"),
    "__main__",
]
# What a system may import: people copy its file.
FOR_SYSTEMS = {
    *("commands", "contract", "envs", "errors", "experiment", "metrics", "networks", "optimiser"),
    *("moments", "plugins", "tables", "types", "values"),
}


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def nesting(node, depth=0):
    deeper = depth + isinstance(node, ast.FunctionDef | ast.Lambda)
    inner = (nesting(child, deeper) for child in ast.iter_child_nodes(node))
    return max(inner, default=deeper)


def code_lines(node, source):
    """Count the lines of a function or module, without docstrings and blank lines."""
    body = set(range(node.lineno, node.end_lineno + 1) if hasattr(node, "lineno") else [])
    body = body or set(range(1, source.count("\n") + 1))
    for owner in ast.walk(node):
        if isinstance(owner, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            owner, clean=False
        ):
            text = owner.body[0]
            body -= set(range(text.lineno, text.end_lineno + 1))
    lines = source.splitlines()
    return sum(bool(lines[i - 1].strip()) for i in body)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_functions_are_short_and_flat(file):
    source = file.read_text()
    tree = ast.parse(source)
    assert nesting(tree) <= 3  # a function, one inside it, a lambda
    for function in functions(tree):
        assert code_lines(function, source) <= 60, function.name
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert not names & {"eval", "exec", "pickle"}


@pytest.mark.parametrize("file", SYSTEMS, ids=lambda f: f.stem)
def test_a_system_is_one_readable_file(file):
    source = file.read_text()
    tree = ast.parse(source)
    assert code_lines(tree, source) <= 450
    top = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert top >= SEVEN
    assert "DictConfig" not in source and "shard" not in source


def imported(file):
    """Yield the magpo modules that a file imports when it is itself imported."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "magpo":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("magpo."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if file.stem != "__main__"],  # no module imports it
    ids=lambda f: f.relative_to(ROOT).as_posix(),
)
def test_dependencies_point_one_way(file):
    part = file.relative_to(ROOT / "magpo").parts[0].removesuffix(".py")
    found = set(imported(file)) - {"__version__", part}
    below = LAYERS[: LAYERS.index(part)] if part in LAYERS else []
    assert found <= set(below)
    if part in ("networks", "systems"):
        assert found <= {"networks": {"types"}, "systems": FOR_SYSTEMS}[part]
