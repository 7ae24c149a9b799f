"""What the README shows is run as it stands, in a folder where the Hub ids it names are small local models."""

import re
from pathlib import Path

import pytest
import tiny

from hf_fwp import catalogue
from hf_fwp.hosts import HOSTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)

# Sizes are all that is changed, and each of them stands in the README.
SMALLER = {"hidden_size=512": "hidden_size=64", "max_steps=100": "max_steps=2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    tiny.teacher_folder(folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    (folder / "corpus.txt").write_text("\n".join(tiny.TEXTS * 8))
    return folder


def test_sizes_that_are_made_smaller_stand_in_the_readme():
    assert all(size in README for size in SMALLER)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_readme_runs(number, folder, monkeypatch):
    if '"smol-delta"' in BLOCKS[number] and "output=" not in BLOCKS[number] and not (folder / "smol-delta").exists():
        pytest.skip("the block that converts the model has not run")
    source = BLOCKS[number]
    for size, smaller in SMALLER.items():
        source = source.replace(size, smaller)
    monkeypatch.chdir(folder)
    exec(compile(source, f"README.md, block {number}", "exec"), {"__name__": "readme"})


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quoted(name: str) -> str:
    return README.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0].strip()


def test_the_table_of_rules_is_the_one_in_the_code():
    assert quoted("rules") == catalogue.markdown(
        catalogue.rule_table(), first="rule", code=("what a token does",)
    ), "print it with python -m hf_fwp.catalogue"


def test_the_table_of_hosts_is_the_one_in_the_code():
    rows = [(f"`{host.name}`", host.title, f"`{host.model_type}`") for host in HOSTS.values()]
    assert quoted("hosts") == table(("model type", "family", "converted model type"), rows)
