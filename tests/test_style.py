"""Habits of this code base that a reader relies on, read out of the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "hf_fwp").rglob("*.py"), *(ROOT / "conversion").rglob("*.py")])
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, FUNCTIONS)]


def names(path: Path) -> set[str]:
    return {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def code_lines(function: ast.FunctionDef) -> int:
    documented = ast.get_docstring(function) is not None
    first = function.body[1] if documented and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400
    limit = 120 if path.parent.name == "kernels" else 60
    assert not [f"{inner.name}: {code_lines(inner)} lines" for inner in functions(path) if code_lines(inner) > limit]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_say_their_types(path):
    tree = ast.parse(path.read_text())
    public = [node for node in tree.body if isinstance(node, FUNCTIONS) and not node.name.startswith("_")]
    # Triton reads the annotations of its functions: they can only say constexpr
    public = [node for node in public if not any("triton.jit" in ast.unparse(d) for d in node.decorator_list)]
    untyped = [
        f"{inner.name}({argument.arg})"
        for inner in public
        for argument in [*inner.args.posonlyargs, *inner.args.args, *inner.args.kwonlyargs]
        if argument.annotation is None
    ]
    assert untyped + [inner.name for inner in public if inner.returns is None] == []


@pytest.mark.parametrize("words", ["except Exception", "except BaseException", "except:", "TODO", "FIXME"])
def test_nothing_is_swallowed_or_left_for_later(words):
    assert not [str(path.relative_to(ROOT)) for path in SOURCES if words in path.read_text()]


def test_behaviour_does_not_hang_on_the_environment():
    assert not [str(path.relative_to(ROOT)) for path in SOURCES if {"environ", "getenv"} & names(path)]


def test_every_module_says_what_it_is_for():
    assert not [str(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]


def test_most_functions_are_short():
    lengths = sorted(code_lines(inner) for path in SOURCES for inner in functions(path))
    assert lengths[len(lengths) // 2] <= 12
    assert lengths[int(len(lengths) * 0.95)] < 50
