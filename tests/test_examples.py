"""The examples run from their own files, with small models in place of large ones."""

import runpy
from pathlib import Path

import pytest
import tiny
from test_reproductions import QUICK

from hf_fwp.hosts import HOSTS, Host, register_family

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("\n".join(tiny.TEXTS * 8))
    return file


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tiny.teacher_folder(tmp_path_factory.mktemp("teacher"))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    return folder


def run(example: str, **options: object):
    words = [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    return runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"](words)


def test_every_example_is_tried_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "convert_and_chat",
        "finetune_lora",
        "register_family",
        "train_from_scratch",
        *QUICK,  # tests/test_reproductions.py
    }


def test_register_family_converts_what_the_table_does_not_have(tmp_path, capsys):
    try:
        run("register_family", output=tmp_path / "made")
        assert "FwpSeedOssForCausalLM with fast weights in layers [1, 3]" in capsys.readouterr().out
        with pytest.raises(ValueError, match="'seed_oss' is in the table already"):
            register_family(Host("seed_oss", "SeedOss"))
    finally:
        HOSTS.pop("seed_oss", None)


def test_train_from_scratch_lowers_the_loss(teacher, corpus, tmp_path):
    sizes = {"hidden_size": 32, "layers": 4, "sequence_length": 64}
    few = run("train_from_scratch", tokenizer=teacher, data=corpus, output=tmp_path / "few", steps=2, **sizes)
    more = run("train_from_scratch", tokenizer=teacher, data=corpus, output=tmp_path / "more", steps=20, **sizes)
    assert more < few


def test_convert_and_chat_then_finetune(teacher, corpus, tmp_path, capsys):
    run("convert_and_chat", teacher=teacher, data=corpus, output=tmp_path / "student", new_tokens=4, ask="Hello?")
    assert "> Hello?" in capsys.readouterr().out
    tuned = tmp_path / "tuned"
    run("finetune_lora", model=tmp_path / "student", data=corpus, output=tuned, steps=2, sequence_length=64)
    assert (tuned / "model.safetensors").is_file()
