"""The exported code: the package's own sources, flat, complete and closed; and who wins where both are there."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every_model import every_model
from hub_stand_in import client_of, serving
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from teachers import tiny_config as host_config
from tiny import byte_tokenizer
from tiny_fwp import KINDS, tiny_config, tiny_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import (
    get_class_from_dynamic_module,
    get_imports,
    get_relative_imports,
)
from typer.testing import CliRunner

import hf_fwp
from hf_fwp import bundle, cli
from hf_fwp.auto_map import ENTRY
from hf_fwp.exporting import FORMATS
from hf_fwp.hosts import HOSTS, Host, register_family, student_config
from hf_fwp.modeling import MODELS

FOREIGN = {"huggingface_hub", "safetensors", "torch", "transformers"}
CONFIGS = {
    **{kind: lambda kind=kind: tiny_config(kind) for kind in KINDS},
    **{name: lambda name=name: student_config(host_config(name), layers=[1]) for name in HOSTS},
}
REPO = "you/tiny-delta"
SAVED = ("delta_net", "llama converted")
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def exported():
    """kind of model: (its config, its files)."""
    configs = {kind: make() for kind, make in CONFIGS.items()}
    return {kind: (config, bundle.code_files(config)) for kind, config in configs.items()}


@pytest.fixture(scope="module")
def every_file(exported, tmp_path_factory):
    """All files of all kinds, each in a folder of its own where kinds differ."""
    found = sorted({(name, text) for _, texts in exported.values() for name, text in texts.items()})
    paths = []
    for number, (name, text) in enumerate(found):
        paths.append(tmp_path_factory.mktemp(f"file{number}") / name)
        paths[-1].write_text(text)
    return paths


def test_transformers_finds_every_file_from_the_entry(exported, every_file):
    names = {(path.name, path.read_text()): {f"{x}.py" for x in get_relative_imports(path)} for path in every_file}
    for _, texts in exported.values():
        assert names[f"{ENTRY}.py", texts[f"{ENTRY}.py"]] | {f"{ENTRY}.py"} == set(texts)
        for name, text in texts.items():
            assert names[name, text] <= set(texts)
            for node in ast.walk(ast.parse(text)) if name == "hf_fwp_rules.py" else ():
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert {f"{node.module or alias.name}.py" for alias in node.names} <= set(texts)


def test_nothing_else_needs_to_be_installed(every_file):
    for path in every_file:
        assert set(get_imports(path)) - set(sys.stdlib_module_names) <= FOREIGN, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and path.stem != ENTRY:
                assert node.level <= 1
                assert "kernels" not in (node.module or "")
                assert (node.module or "").partition(".")[0] not in ("triton", "hf_fwp")


def test_every_file_says_its_licence_its_version_and_where_it_is_from(every_file):
    for text in (path.read_text() for path in every_file):
        head = text.splitlines()[:3]
        assert "Apache License, Version 2.0" in head[0]
        assert f"hf_fwp {hf_fwp.__version__}" in head[1]
        assert "Not to be edited" in head[1]
        assert ast.get_docstring(ast.parse(text))


def test_only_the_rules_of_the_config_are_there(exported):
    for config, texts in exported.values():
        named = {rule for rule in hf_fwp.RULES if f'    "{rule}": ' in texts["hf_fwp_rules.py"]}
        assert named == {*config.update_rules, "gated_delta_net"}
        assert ("hf_fwp_rules_srwm.py" in texts) == bool({"srwm", "self_modifying_delta"} & named)
        assert ("hf_fwp_hosts_graft.py" in texts) == (config.model_type != "fwp")


def without_imports(text):
    """The tree of a source without what the bundler may change: imports, names of operators, the table of rules."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        for field in ("body", "orelse", "handlers", "finalbody"):
            inner = getattr(node, field, None)
            if isinstance(inner, list):
                kept = [x for x in inner if not isinstance(x, (ast.ImportFrom, ast.Raise, ast.AnnAssign))]
                setattr(node, field, kept)
    shown = ast.unparse(tree)
    return re.sub(r"""["']hf_fwp::|f["']hf_fwp_\{__name__.encode\(\).hex\(\)\}::""", "OPERATOR", shown)


def test_the_code_is_that_of_the_package(every_file):
    modules = {f"{bundle.flat_name(module)}.py": module for module in sys.modules if module.startswith("hf_fwp.")}
    for path in every_file:
        if path.stem != ENTRY and modules[path.name] not in bundle.OTHERWISE:
            source = bundle.files("hf_fwp").joinpath(bundle.source_path(modules[path.name])).read_text()
            assert without_imports(path.read_text()) == without_imports(source), path


def test_the_constants_of_exported_code_are_there_to_be_changed():
    for module, constants in bundle.OTHERWISE.items():
        for name, value in constants.items():
            assert f"{name} = {value}\n" in bundle.flattened(module)[0]


def test_the_auto_map_names_every_head(exported):
    for config, _ in exported.values():
        heads = {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        if config.model_type in ("fwp", "fwp_llama", "fwp_gpt2"):
            tasks = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
            heads |= {f"AutoModelFor{task}" for task in tasks}
        assert heads <= set(bundle.auto_map_of(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models with their code."""
    made = {kind: tmp_path_factory.mktemp("made") / kind for kind in SAVED}
    for kind, folder in made.items():
        every_model(kind, dtype=torch.float32).save_pretrained(folder)
        hf_fwp.export_code(folder)
    return made


@pytest.fixture(params=SAVED)
def folder(request, folders):
    return folders[request.param]


@torch.no_grad()
def test_the_package_wins_and_saves_the_code_again(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("hf_fwp.")
    model.save_pretrained(tmp_path)
    assert {path.name: path.read_text() for path in folder.glob("*.py")} == {
        path.name: path.read_text() for path in tmp_path.glob("*.py")
    }
    maps = [json.loads((place / "config.json").read_text())["auto_map"] for place in (folder, tmp_path)]
    assert maps[0] == maps[1] == bundle.auto_map_of(model.config)


@pytest.mark.slow
def test_the_package_is_used_where_it_is_installed_and_not_imported(folders, tmp_path):
    look = f"""
import sys
from transformers import AutoModelForCausalLM
for kind, folder in {[(kind, str(folder)) for kind, folder in folders.items()]}:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(kind)
    print("class", type(model).__module__, type(model.config).__module__)
print("class", *[name for name in sys.modules if name.startswith("transformers_modules") and "hf_fwp_" in name])
"""
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", look], env=surroundings, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # others print too: deepspeed does when it is imported
    *classes, loaded = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("class")]
    assert len(classes) == len(folders)
    assert all(name.startswith("hf_fwp.") for line in classes for name in line)
    assert not loaded
    for kind, folder in folders.items():
        assert (tmp_path / kind / f"{ENTRY}.py").read_text() == (folder / f"{ENTRY}.py").read_text()


def test_a_map_to_code_of_others_is_not_saved(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    config.auto_map = {"AutoConfig": "theirs.Config", "AutoModel": f"{ENTRY}.FwpModel"}
    config.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert config.auto_map["AutoConfig"] == "theirs.Config"
    config.auto_map = {"AutoConfig": f"{REPO}--{ENTRY}.Any"}  # as transformers completes it
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == bundle.auto_map_of(config)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A folder of this test's own for the code that transformers copies."""
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@torch.no_grad()
def test_package_and_exported_code_in_one_process(folder, own_cache, monkeypatch):
    ours = AutoModelForCausalLM.from_pretrained(folder)
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, type(ours).__module__, None)
        hidden.setitem(sys.modules, type(ours.config).__module__, None)
        theirs = get_class_from_dynamic_module(f"{ENTRY}.{type(ours).__name__}", str(folder))
    assert theirs.__module__.startswith("transformers_modules.")
    assert theirs.config_class.__module__.startswith("transformers_modules.")
    brought = theirs.from_pretrained(folder)
    chunked = [sys.modules[f"{theirs.__module__.rpartition('.')[0]}.hf_fwp_rules_chunked_op"], hf_fwp.rules.chunked_op]
    assert len({module.linear_class_forward._qualname for module in chunked}) == 2
    for model in (ours, brought, ours):
        assert torch.equal(model(tokens()).logits, ours(tokens()).logits)
        for how in ({}, {"prompt_lookup_num_tokens": 2}, {"cache_implementation": "static"}):
            row = tokens(1)
            made = model.generate(row, max_new_tokens=6, do_sample=False, **how)
            assert torch.equal(made, ours.generate(row, max_new_tokens=6, do_sample=False, use_cache=False))


REFUSED = {  # told: what was done to the folder
    "has no config.json; give the folder": lambda f: (f / "config.json").unlink(),
    "has a 'llama', no model of this package": lambda f: host_config("llama").save_pretrained(f),
    "holds a 'gated_deltanet' of another library, read as a 'fwp'": lambda f: (f / "config.json").write_text(
        json.dumps({"model_type": "gated_deltanet", "hidden_size": 64, "num_heads": 1, "head_dim": 32})
    ),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_cannot_be_exported_is_told(told, tmp_path):
    tiny_config("delta_net").save_pretrained(tmp_path)
    REFUSED[told](tmp_path)
    with pytest.raises(ValueError, match=told):
        hf_fwp.export_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))


OTHER_HEADS = [model_class for auto, model_class in MODELS.items() if auto is not AutoModelForCausalLM]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model_class", OTHER_HEADS)
def test_only_a_causal_language_model_is_exported(model_class, format, dry_run, tmp_path):
    """Another one would be written with a head of random weights, or without its own."""
    model = tiny_model("delta_net", model_class=model_class, dtype=torch.float32, num_key_value_heads=4)
    model.save_pretrained(tmp_path / "made")
    for given in (model, tmp_path / "made"):
        with pytest.raises(ValueError, match=rf"{model_class.__name__}.* give a causal language model"):
            hf_fwp.export(given, tmp_path / "out", format=format, dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_what_its_base_model_is(tmp_path, capsys):
    tiny_model("delta_net", dtype=torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    hf_fwp.export(tmp_path / "adapter", tmp_path / "out", format="onnx", dry_run=True)
    assert "would write FwpForCausalLM" in capsys.readouterr().err
    for given in (tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")):
        for dry_run in (True, False):
            with pytest.raises(ValueError, match=r"format='fla' holds no adapter; merge it first"):
                hf_fwp.export(given, tmp_path / "out", format="fla", dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_a_family_from_outside_has_no_code_to_export(monkeypatch):
    monkeypatch.setattr("hf_fwp.hosts.table.HOSTS", HOSTS)  # undone with it
    row = Host("seed_oss", "SeedOss", dict(HOSTS["llama"].mixer))
    monkeypatch.setitem(HOSTS, "seed_oss", row)
    register_family(row)
    import transformers

    config = student_config(transformers.SeedOssConfig(num_hidden_layers=2), layers=[1])
    with pytest.raises(ValueError, match=r"the family of 'fwp_seed_oss' is not in hf_fwp/hosts/table\.py"):
        bundle.code_files(config)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as server, client_of(server, tmp_path / "cache", monkeypatch):
        yield server


def test_pushed_with_its_code(hub, tmp_path):
    model = tiny_model("delta_net", dtype=torch.float32)
    model.save_pretrained(tmp_path / "made")
    byte_tokenizer().save_pretrained(tmp_path / "made")
    before = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert not [path for path in hf_fwp.push(tmp_path / "made", REPO).files if path.endswith(".py")]
    assert "trust_remote_code" not in ModelCard(hub.files(REPO)["README.md"].decode()).text
    pushed = hf_fwp.push(tmp_path / "made", REPO, with_code=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == before
    there = hub.files(REPO)
    assert {path: len(content) for path, content in there.items()} == pushed.files
    assert {name: there[name].decode() for name in there if name.endswith(".py")} == bundle.code_files(model.config)
    assert json.loads(there["config.json"])["auto_map"] == bundle.auto_map_of(model.config)
    card = ModelCard(there["README.md"].decode()).text
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in card
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}", trust_remote_code=True)' in card
    blocks = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:  # both as they stand
        assert len([line for line in block.splitlines() if line]) <= 4
        names = {}
        exec(block, names)
        assert torch.equal(names["model"](tokens()).logits, model(tokens()).logits)
    again = AutoModelForCausalLM.from_pretrained(REPO)
    again.push_to_hub("you/another")  # what came with its code goes with it
    assert f"{ENTRY}.py" in hub.files("you/another")
    model.push_to_hub("you/third", with_code=True)
    assert hub.files("you/third").keys() == hub.files("you/another").keys()
    assert "trust_remote_code=True" in hub.files("you/third")["README.md"].decode()


def test_a_card_that_convert_wrote_learns_of_the_code(hub, folder, tmp_path):
    from hf_fwp.card import card_of

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.auto_map = {}
    model.save_pretrained(tmp_path / "made")
    (tmp_path / "made" / "README.md").write_text(card_of(model, name="made", address="made") + "\nBy hand.\n")
    hf_fwp.push(tmp_path / "made", REPO, with_code=True)
    card = hub.files(REPO)["README.md"].decode()
    assert card.count(f'("{REPO}", trust_remote_code=True)') == 1
    assert "By hand." in card
    assert '("made"' not in card


def test_code_that_is_not_there_is_told(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / f"{ENTRY}.py").unlink()
    with pytest.raises(ValueError, match=r"names code that is not there .modeling_hf_fwp.py.; give with_code=True"):
        hf_fwp.push(tmp_path, REPO, dry_run=True)
    assert f"{ENTRY}.py" in hf_fwp.push(tmp_path, REPO, with_code=True, dry_run=True).files


def test_the_commands(tmp_path):
    tiny_model("delta_net", dtype=torch.float32).save_pretrained(tmp_path / "made")
    run = CliRunner().invoke(cli.app, ["push", str(tmp_path / "made"), REPO, "--with-code", "--dry-run"])
    assert run.exit_code == 0, run.output
    assert f"{ENTRY}.py" in run.stdout
    run = CliRunner().invoke(cli.app, ["export-code", str(tmp_path / "made")])
    assert run.exit_code == 0, run.output
    assert (tmp_path / "made" / f"{ENTRY}.py").is_file()
