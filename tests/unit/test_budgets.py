"""Rules of the code base that a reader relies on: sizes of files and functions, and who may import what."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megakd", "tools", "examples", "tests", "benchmarks", "slurm")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
LIBRARY = [file for file in FILES if file.is_relative_to(ROOT / "megakd")]
LINES, LINES_OF_TRAIN, LINES_OF_FUNCTION = 600, 300, 100
NEEDS_NO_TORCH = ("cli", "comparison", "config", "errors", "interruption", "layout", "log", "manifest")
"""Modules of megakd that load no torch, nor does what they import of megakd."""


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def at(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT).as_posix()}:{node.lineno}"


def imports(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Every module that is imported: `from a.b import c` gives a.b and a.b.c."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module), node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one that run when the module is imported: none in functions, none for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        type_checking = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not type_checking and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from run_at_import(child)


def is_of(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def test_files_are_found():
    assert len(LIBRARY) > 30 and len(FILES) > len(LIBRARY)


def test_every_folder_of_tests_is_run(pytestconfig):
    [run] = re.findall(r"addprefix tests/,([a-z0-9 ]+)\)", (ROOT / "Makefile").read_text())
    folders = {file.relative_to(ROOT / "tests").parts[0] for file in (ROOT / "tests").rglob("test_*.py")}
    assert sorted(run.split()) == sorted(folders)
    assert not folders & set(pytestconfig.getini("norecursedirs"))


def test_files_are_short():
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {str(file): length for file, length in lengths.items() if length > LINES} == {}
    assert lengths[ROOT / "megakd" / "train.py"] <= LINES_OF_TRAIN


def test_functions_are_short():
    functions = ((file, node) for file in FILES for node in ast.walk(tree_of(file))
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    assert [at(file, node) for file, node in functions if node.end_lineno - node.lineno >= LINES_OF_FUNCTION] == []


def test_no_half_of_a_merge_is_left():
    texts = [file for suffix in ("md", "py", "yaml", "sbatch", "sh", "json") for folder in (*FOLDERS, "docs")
             for file in (ROOT / folder).rglob(f"*.{suffix}")] + list(ROOT.glob("*.md"))
    assert ROOT / "docs" / "decisions.md" in texts
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    assert [str(file) for file in texts for line in file.read_text(encoding="utf-8").splitlines()
            if line.startswith(marks)] == []


def test_only_mcore_imports_megatron():
    others = [file for file in LIBRARY if not file.is_relative_to(ROOT / "megakd" / "mcore")]
    assert [at(file, node) for file in others for module, node in imports(ast.walk(tree_of(file)))
            if is_of(module, "megatron")] == []


def test_nobody_reads_global_process_groups():
    """`parallel_state` holds one grid for the whole process; here several live side by side."""
    sets_up = ROOT / "megakd" / "mcore" / "runtime.py"  # for the parts of megatron-core that read it
    found = []
    for file in LIBRARY:
        for node in ast.walk(tree_of(file)):
            match node:
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) | ast.ImportFrom(module=name):
                    if "parallel_state" in str(name) and file != sets_up:
                        found.append(at(file, node))
    assert found == []


def test_no_error_is_swallowed():
    handlers = ((file, node) for file in LIBRARY for node in ast.walk(tree_of(file))
                if isinstance(node, ast.ExceptHandler))
    assert [at(file, node) for file, node in handlers
            if node.type is None or all(isinstance(line, ast.Pass) for line in node.body)] == []


def test_nothing_is_unpickled():
    """A pickle runs code of whoever wrote it: models and checkpoints are safetensors and JSON."""
    found = []
    for file in LIBRARY:
        found += [at(file, node) for module, node in imports(ast.walk(tree_of(file)))
                  if is_of(module, "pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")]
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Attribute):
                # torch's collectives of objects pickle them.
                pickles = node.attr.endswith(("_object", "_object_list"))
                if pickles or ast.unparse(node) in ("torch.load", "torch.save"):
                    found.append(at(file, node))
    assert found == []


@pytest.mark.parametrize("name", NEEDS_NO_TORCH)
def test_no_torch_where_a_mistake_is_told(name):
    """A mistake in a recipe is told at once, not after the seconds that torch takes."""
    reached = [ROOT / "megakd" / "__init__.py", ROOT / "megakd" / f"{name}.py"]
    for file in reached:  # it grows
        for module, node in imports(run_at_import(tree_of(file))):
            assert not is_of(module, "torch", "megatron", "transformers"), f"{at(file, node)} imports {module}"
            path = ROOT / module.replace(".", "/")
            own = [path.with_suffix(".py"), path / "__init__.py"] if is_of(module, "megakd") else []
            reached += [each for each in own if each.is_file() and each not in reached]
