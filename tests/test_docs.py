"""The pages in docs are true: their blocks run, their links lead somewhere, the rules' are those of the code."""

import re
from pathlib import Path

import pytest
import tiny
from accelerate.commands.launch import launch_command_parser
from typer.testing import CliRunner

from hf_fwp import cli
from hf_fwp.catalogue import WHEN, rule_pages
from hf_fwp.hosts import HOSTS
from hf_fwp.rules import RULES

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("tutorial", "how-to", "explanation", "results")
# Sizes are all that is changed, and each of them stands on a page.
SMALLER = {"hidden_size=512": "hidden_size=64", "max_steps=100": "max_steps=2", "--tokens 16384": "--tokens 512"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every block of a page; "text" is not meant to be run."""
    return [(kind, text) for kind, text in BLOCK.findall((DOCS / f"{page}.md").read_text()) if kind != "text"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    tiny.teacher_folder(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    (tmp_path / "corpus.txt").write_text("\n".join(tiny.TEXTS * 8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(kind: str, source: str) -> None:
    for size, smaller in SMALLER.items():
        source = source.replace(size, smaller)
    if kind == "python":
        exec(compile(source, "docs", "exec"), {"__name__": "docs"})
        return
    for line in source.splitlines():
        program, *words = re.findall(r'"[^"]*"|\S+', line)
        assert program == "hf-fwp", f"{line}: only commands of this package are shown"
        done = CliRunner().invoke(cli.app, [word.strip('"') for word in words])
        assert done.exit_code == 0, done.output


def convert(folder: Path) -> None:
    """What the first page of the tutorial leaves for the others."""
    from hf_fwp import convert

    text = Path(folder / "corpus.txt")
    convert("HuggingFaceTB/SmolLM2-135M-Instruct", keep=0.5, recipe="closed-form", data=text, output="smol-delta")


def test_the_tutorial_runs_from_top_to_bottom(folder):
    for kind, source in blocks("tutorial"):
        run(kind, source)
    assert "smol-delta" in (folder / "inside.html").read_text()
    assert (folder / "head.png").is_file()


def test_the_how_to_page_runs(folder):
    convert(folder)
    try:
        for kind, source in blocks("how-to"):
            run(kind, source)
    finally:
        RULES.pop("fixed_rate_delta", None)
        HOSTS.pop("seed_oss", None)
    assert (folder / "for-fla" / "config.json").is_file()
    assert not (folder / "smol-onnx").exists()


def test_processes_are_started_with_options_that_accelerate_has():
    lines = re.findall(r"^accelerate launch (.*)$", (DOCS / "how-to.md").read_text(), flags=re.M)
    assert lines
    for line in lines:
        given = launch_command_parser().parse_args(line.split())
        assert given.training_script in ("train.py", "convert.py")
        assert given.num_processes == 4
        assert (given.use_fsdp, given.multi_gpu) == ("fsdp" in line, "multi_gpu" in line)


def test_the_page_of_results_is_made(folder):
    (folder / "hf_fwp").symlink_to(DOCS.parent / "hf_fwp")
    for kind, source in blocks("results"):
        run(kind, source)
    assert "Benchmarks of hf_fwp" in (folder / "results.html").read_text()


def test_the_explanation_has_nothing_to_run():
    assert blocks("explanation") == []


def test_sizes_that_are_made_smaller_stand_on_a_page():
    text = "".join((DOCS / f"{page}.md").read_text() for page in PAGES)
    assert all(size in text for size in SMALLER)


def test_links_lead_somewhere():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_pages_of_the_rules_are_those_of_the_code():
    assert set(WHEN) == set(RULES)
    for file, text in rule_pages().items():
        assert (DOCS / "rules" / file).read_text() == text, "write them with python -m hf_fwp.catalogue docs/rules"
    assert {page.name for page in (DOCS / "rules").iterdir()} == set(rule_pages())
