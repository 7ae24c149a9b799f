"""A model's code as flat files beside its weights: `export_code(folder)`, `hf-fwp export-code DIR`.

Whoever has no hf_fwp loads the folder with `trust_remote_code=True`; where hf_fwp is installed, its own classes are
used. The files are this package's sources: those that the classes of the config and its update rules reach, with only
these lines changed, because transformers wants all files in one folder and named as `from .x import y`:

    relative imports    from ..layer import X  ->  from .hf_fwp_layer import X
    kernels, hub, bundle        an import of them raises ImportError; OTHERWISE says that there are no kernels
    the table of rules  the rules of the config only
    operators           a name of their own for every copy: PyTorch has one table of them for all
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from . import __version__
from .auto_map import ENTRY, WithAutoMap, write_files
from .hosts.table import HEADS, OF_THE_PACKAGE

ROOT = "hf_fwp"
LEFT_OUT = ("hf_fwp.kernels", "hf_fwp.hub", "hf_fwp.bundle")
TABLE = "hf_fwp.rules"  # the module with RULES
DEFAULT_RULE = "gated_delta_net"  # of a config that says nothing; transformers makes one to see what differs
# Constants of a module that are different in exported code.
OTHERWISE = {
    "hf_fwp.rules.triton_fit": {
        "HAS_TRITON": "False",
        "WITHOUT_TRITON": '"this is exported code, which has no kernels (pip install hf_fwp)"',
    }
}
HEADER = """\
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
# {source} of hf_fwp {version}, in the form that transformers loads from a model's folder. Not to be edited: load the
# model where hf_fwp is installed and call hf_fwp.export_code(folder) instead.
"""
Place = tuple[int, int]  # line, from 1, and column in bytes, as ast counts them
Edit = tuple[Place, Place, str]  # of a text: from, to, what stands there instead
ENTRY_TEXT = '''\
"""Where to find the classes that config.json names: in hf_fwp where it is installed, else in the files beside."""

try:
{installed}
except ImportError:
{here}

    # transformers copies the files that it finds named like this
{brought}
'''


def export_code(folder: str | os.PathLike[str]) -> list[str]:
    """Write the code that a saved model needs into its folder, and into its config.json where to find it.

    Whoever has no hf_fwp then loads the folder with `trust_remote_code=True`, with the same results on a processor.
    Returns the names of the files. Raises ValueError for a folder without a config.json of this package.
    """
    folder = Path(folder)
    config = config_in(folder)
    texts = code_of(folder, config)
    write_files(texts, folder)
    return sorted(name for name in texts if name.endswith(".py"))


def config_in(folder: Path) -> Any:
    """The config of a saved model of this package."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give the folder that save_pretrained or convert wrote")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, WithAutoMap):
        raise ValueError(f"{folder} has a {config.model_type!r}, no model of this package; transformers has its code")
    return config


def code_of(folder: Path, config: Any) -> dict[str, str]:
    """The files of the code of a saved model, and its config.json with the auto_map: name -> text."""
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if said.get("model_type") != config.model_type:
        raise ValueError(
            f"{folder} holds a {said.get('model_type')!r} of another library, read as a {config.model_type!r}; load it "
            "and save it with save_pretrained first"
        )
    described = json.dumps({**said, "auto_map": auto_map_of(config)}, indent=2, sort_keys=True) + "\n"
    return {**code_files(config), "config.json": described}


def auto_map_of(config: Any) -> dict[str, str]:
    """What config.json says of the code: Auto class -> file and class."""
    return {auto: f"{ENTRY}.{found.__name__}" for auto, found in classes_of(config).items()}


def classes_of(config: Any) -> dict[str, type]:
    """Auto class -> the class of this package, config and all heads."""
    found = {"AutoConfig": type(config)}
    for auto in HEADS.values():
        model_class = getattr(transformers, auto)._model_mapping.get(type(config), None)
        if model_class is not None:
            found[auto] = model_class
    return found


def code_files(config: Any) -> dict[str, str]:
    """The files that a config's model needs: name -> text."""
    classes = tuple((found.__module__, found.__name__) for found in classes_of(config).values())
    if getattr(config, "host_name", None) not in (None, *OF_THE_PACKAGE):
        raise ValueError(
            f"the family of {config.model_type!r} is not in hf_fwp/hosts/table.py, which exported code is made of; "
            "write its row there, or publish the model without its code"
        )
    return dict(_code_files(classes, frozenset([DEFAULT_RULE, *config.update_rules])))


@functools.cache
def _code_files(classes: tuple[tuple[str, str], ...], rules: frozenset[str]) -> tuple[tuple[str, str], ...]:
    texts: dict[str, str] = {}
    waiting = {module for module, _ in classes}
    while waiting:
        module = waiting.pop()
        texts[module], reached = flattened(module, rules if module == TABLE else None)
        waiting |= reached - set(texts)
    files_of = {f"{flat_name(module)}.py": text for module, text in sorted(texts.items())}
    return (*files_of.items(), (f"{ENTRY}.py", entry(classes, sorted(texts))))


def flat_name(module: str) -> str:
    """hf_fwp_rules_base for hf_fwp.rules.base."""
    return module.replace(".", "_")


def source_path(module: str) -> str | None:
    """Where in the package the source of a module is, if it is one: rules/base.py."""
    parts = module.split(".")[1:]
    candidates = [[*parts, "__init__.py"], [*parts[:-1], f"{parts[-1]}.py"]] if parts else [["__init__.py"]]
    return next(("/".join(path) for path in candidates if files(ROOT).joinpath(*path).is_file()), None)


@functools.cache
def flattened(module: str, rules: frozenset[str] | None = None) -> tuple[str, frozenset[str]]:
    """(the text of a module as a file of a flat folder, the modules that it needs); of the table of rules only `rules`,
    if they are given."""
    path = source_path(module)
    assert path is not None, module
    text = files(ROOT).joinpath(path).read_text(encoding="utf-8")
    if rules is not None:
        text = replaced(text, _other_rules(text, rules))
    tree, edits, reached = ast.parse(text), _operators(text) + _constants(text, OTHERWISE.get(module, {})), set()
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} if rules is not None else None
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            statement, modules = _flat_import(node, package, used)
            edits.append((*_span(node), statement))
            reached |= modules
    return HEADER.format(source=f"{ROOT}/{path}", version=__version__) + replaced(text, edits), frozenset(reached)


def _flat_import(node: ast.ImportFrom, package: str, used: set[str] | None) -> tuple[str, set[str]]:
    """(what stands for a relative import, the modules that it needs); of its names those that are used, if given."""
    above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
    source = f"{above}.{node.module}" if node.module else above
    lines, names, reached = [], [], set()
    for alias in node.names:
        if used is not None and (alias.asname or alias.name) not in used:
            continue
        module = f"{source}.{alias.name}"
        if source_path(module) is None:
            names.append(alias)
            reached.add(source)
        else:
            lines.append(f"from . import {flat_name(module)} as {alias.asname or alias.name}")
            reached.add(module)
    if any(module == out or module.startswith(f"{out}.") for module in reached for out in LEFT_OUT):
        return f'raise ImportError("{source} is not part of exported code (pip install hf_fwp)")', set()
    if names:
        lines.append(ast.unparse(ast.ImportFrom(flat_name(source), names, 1)))
    return f"\n{' ' * node.col_offset}".join(lines), reached


def _span(node: Any) -> tuple[Place, Place]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _operators(text: str) -> list[Edit]:
    """Every copy of a module names its operators after itself: a second copy would take the place of the first."""
    edits = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{ROOT}::"):
            name = node.value.removeprefix(f"{ROOT}::")
            edits.append((*_span(node), f'f"{ROOT}_{{__name__.encode().hex()}}::{name}"'))
    return edits


def _constants(text: str, otherwise: Mapping[str, str]) -> list[Edit]:
    """Other values for constants of a module."""
    return [
        (*_span(node.value), otherwise[node.targets[0].id])
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in otherwise
    ]


def _other_rules(text: str, rules: frozenset[str]) -> list[Edit]:
    """What to leave out of the table of rules, one a line, so that only `rules` stay."""
    table = next(node.value for node in ast.parse(text).body if isinstance(node, ast.AnnAssign))
    assert isinstance(table, ast.Dict)
    entries = zip(table.keys, table.values, strict=True)
    out = [value for key, value in entries if isinstance(key, ast.Constant) and key.value not in rules]
    return [((value.lineno, 0), (value.lineno + 1, 0), "") for value in out]


def replaced(text: str, edits: list[Edit]) -> str:
    """The edited text."""
    lines = text.encode().splitlines(keepends=True)  # columns of the tree count bytes
    starts = [0, *itertools.accumulate(map(len, lines))]
    code = b"".join(lines)
    for begin, end, there in sorted(edits, reverse=True):
        (a, b) = (starts[line - 1] + column for line, column in (begin, end))
        code = code[:a] + there.encode() + code[b:]
    return code.decode()


def entry(classes: tuple[tuple[str, str], ...], modules: list[str]) -> str:
    """The file that the auto_map names: the classes of hf_fwp where it is installed, else those of the files here."""
    by_module: dict[str, list[str]] = {}
    for module, name in classes:
        by_module.setdefault(module, []).append(name)
    installed = [f"    from {module} import {', '.join(names)}" for module, names in by_module.items()]
    here = [f"    from .{flat_name(module)} import {', '.join(names)}" for module, names in by_module.items()]
    brought = [f"    from .{flat_name(module)} import __name__ as _" for module in modules if module not in by_module]
    return HEADER.format(source="The code", version=__version__) + ENTRY_TEXT.format(
        installed="\n".join(installed), here="\n".join(here), brought="\n".join(brought)
    )
