"""Who may import whom: the table below is the law, read out of the sources without importing them."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a part may import of hf_fwp at the top of a file. A part not named here may import anything but conversion.
MAY_IMPORT = {
    "hf_fwp.rules": set(),
    "hf_fwp.features": {"hf_fwp.rules"},
    "hf_fwp.packing": {"hf_fwp.rules"},
    "hf_fwp.inputs": set(),
    "hf_fwp.heads": set(),
    "hf_fwp.cross_entropy": set(),
    "hf_fwp.auto_map": set(),
    "hf_fwp.registration": set(),
    "hf_fwp.weights": set(),
    "hf_fwp.loading": {"hf_fwp.options", "hf_fwp.weights"},
    "hf_fwp.cache": {"hf_fwp.rules", "hf_fwp.ops", "hf_fwp.packing"},
    "hf_fwp.ops": {"hf_fwp.rules"},
    "hf_fwp.options": {"hf_fwp.rules", "hf_fwp.features"},
    "hf_fwp.own": {"hf_fwp.options"},
    "hf_fwp.slow_net": {"hf_fwp.rules", "hf_fwp.options"},
    "hf_fwp.window": {"hf_fwp.cache", "hf_fwp.options", "hf_fwp.packing", "hf_fwp.rotation"},
    "hf_fwp.rotation": set(),
    "hf_fwp.presets": set(),
    "hf_fwp.configuration": {
        "hf_fwp.rules",
        "hf_fwp.features",
        "hf_fwp.options",
        "hf_fwp.presets",
        "hf_fwp.auto_map",
        "hf_fwp.cache",  # the name of its layer type
    },
    "hf_fwp.companions": {"hf_fwp.rules", "hf_fwp.packing"},
    "hf_fwp.decoding": {"hf_fwp.rules", "hf_fwp.cache", "hf_fwp.companions", "hf_fwp.options"},
    "hf_fwp.layer": {
        "hf_fwp.rules",
        "hf_fwp.companions",
        "hf_fwp.decoding",
        "hf_fwp.features",
        "hf_fwp.ops",
        "hf_fwp.cache",
        "hf_fwp.configuration",
        "hf_fwp.options",
        "hf_fwp.own",
        "hf_fwp.packing",
        "hf_fwp.rotation",
        "hf_fwp.slow_net",
        "hf_fwp.window",
    },
    "hf_fwp.series": {
        "hf_fwp.rules",
        "hf_fwp.cache",
        "hf_fwp.layer",
        "hf_fwp.options",
        "hf_fwp.packing",
    },
    "hf_fwp.block": {"hf_fwp.series", "hf_fwp.layer", "hf_fwp.cache", "hf_fwp.configuration"},
    "hf_fwp.modeling": {
        "hf_fwp.block",
        "hf_fwp.layer",
        "hf_fwp.cache",
        "hf_fwp.generation",
        "hf_fwp.heads",
        "hf_fwp.inputs",
        "hf_fwp.loading",
        "hf_fwp.configuration",
        "hf_fwp.cross_entropy",
        "hf_fwp.options",
        "hf_fwp.packing",
        "hf_fwp.registration",
        "hf_fwp.rules",
    },
}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in (("hf_fwp", "hf_fwp"), ("conversion", "hf_fwp.conversion")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in inner if part != "__init__")])] = path
    return found


MODULES = modules()


def imports(name: str, *, top_only: bool) -> set[str]:
    """Absolute names of the modules that a module imports; imports for type checking only do not count."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in _nodes(ast.parse(path.read_text()), top_only=top_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            source = ".".join(filter(None, [base, node.module])) if node.level else node.module or ""
            submodules = {f"{source}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= submodules or {source}
    return found


def _nodes(tree: ast.AST, *, top_only: bool):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield node
        yield from _nodes(node, top_only=top_only)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def part(name: str) -> str:
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("name", [name for name in MODULES if part(name) in MAY_IMPORT])
def test_a_part_imports_only_what_stands_below_it(name):
    ours = {source for source in imports(name, top_only=True) if within(source, {"hf_fwp"})}
    above = {source for source in ours if not within(source, MAY_IMPORT[part(name)] | {part(name)})}
    assert not above, f"{name} imports {', '.join(sorted(above))}"


@pytest.mark.parametrize("name", [name for name in MODULES if part(name) == "hf_fwp.rules"])
def test_rules_need_nothing_but_torch(name):
    foreign = {source.partition(".")[0] for source in imports(name, top_only=False)} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "hf_fwp"}


@pytest.mark.parametrize("name", [name for name in MODULES if part(name) != "hf_fwp.conversion"])
def test_the_library_does_not_import_the_conversion(name):
    lazily = name in {"hf_fwp", "hf_fwp.cli", "hf_fwp.inspection"}
    assert not {source for source in imports(name, top_only=lazily) if within(source, {"hf_fwp.conversion"})}


@pytest.mark.parametrize("name", [name for name in MODULES if part(name) == "hf_fwp.conversion"])
def test_the_conversion_imports_itself_relatively_and_never_the_command_line(name):
    tree = ast.parse(MODULES[name].read_text())
    absolute = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    absolute |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not {source for source in absolute if within(source, {"hf_fwp.conversion", "conversion", "hf_fwp.cli"})}


@pytest.mark.parametrize("name", list(MODULES))
def test_kernels_and_triton_are_imported_by_the_call_that_needs_them(name):
    if part(name) != "hf_fwp.kernels":
        assert not {source for source in imports(name, top_only=True) if within(source, {"hf_fwp.kernels", "triton"})}


@pytest.mark.parametrize("name", [name for name in MODULES if part(name) != "hf_fwp.rules"])
def test_no_choice_by_the_name_of_a_rule_outside_the_rules(name):
    from hf_fwp.rules import RULES

    compared = [
        side.value
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        if isinstance(side, ast.Constant) and side.value in set(RULES)
    ]
    assert compared == []


def test_no_module_is_named_like_one_of_the_standard_library():
    assert not {name for name in MODULES if name.rpartition(".")[2] in sys.stdlib_module_names}


def test_every_dependency_is_declared():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    declared = {re.split(r"[<>=;\[]", line)[0] for line in lines}
    needed = {source.partition(".")[0] for name in MODULES for source in imports(name, top_only=True)}
    undeclared = needed - declared - set(sys.stdlib_module_names) - {"hf_fwp", "triton"}
    assert not undeclared
