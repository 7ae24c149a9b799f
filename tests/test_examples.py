"""The examples run from their own files, with small models in place of large ones."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest
import tiny
import torch
from test_reproductions import QUICK
from tiny_fwp import tiny_model

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
        "attend_to_training",
        "classify_series",
        "convert_and_chat",
        "few_shot",
        "finetune_lora",
        "long_context_needle",
        "mqar",
        "paint_disks",
        "register_family",
        "retrieve",
        "sequence_classification",
        "train_from_scratch",
        *QUICK,  # tests/test_reproductions.py
    }


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_shows_its_command_what_that_printed_and_how_long_it_took(path):
    told = ast.get_docstring(ast.parse(path.read_text())) or ""
    printed = told.partition(f"    python examples/{path.stem}.py")[2]
    assert re.search(r"^( {4}\S|\|---)", printed, flags=re.MULTILINE)
    assert re.search(r"Took \d+ s of .*torch 2\.\d+\.", told, flags=re.DOTALL)


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


def test_sequence_classification_sorts_texts(teacher, tmp_path):
    rows = [{"text": f"buy now, number {n}" if n % 2 else f"see you at noon, {n}", "label": n % 2} for n in range(200)]
    (tmp_path / "mails.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"hidden_size": 32, "length": 16, "steps": 60}
    found = run(
        "sequence_classification", tokenizer=teacher, data=tmp_path / "mails.jsonl", output=tmp_path / "spam", **sizes
    )
    assert found > 0.9
    assert (tmp_path / "spam" / "model.safetensors").is_file()


def test_mqar_and_the_needle_print_their_tables(capsys):
    few = {"steps": 2, "tests": 4, "width": 16, "batch": 2, "rules": "delta_net"}
    measured = called("mqar", pairs="2", length=16, **few)
    assert list(measured) == [("delta_net", "2 pairs")]
    measured = called("long_context_needle", lengths="16,40", trained=16, piece=16, **few)
    assert list(measured) == [("delta_net", "16 tokens"), ("delta_net", "40 tokens")]
    assert "needles found" in capsys.readouterr().out


def test_the_needle_is_looked_for_in_pieces_as_in_the_whole():
    answers = runpy.run_path(str(EXAMPLES / "long_context_needle.py"))["answers"]
    model, texts = tiny_model("delta_net", dtype=torch.float64), torch.randint(1, 60, (2, 23))
    assert torch.equal(answers(model, texts, 5), model(texts).logits[:, -1].argmax(-1))


def called(example: str, **options: object):
    return runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"](**options)


def test_classify_series_learns_which_way_spirals_turn(tmp_path):
    assert run("classify_series", output=tmp_path, solver="euler", steps=30) > 0.9


@pytest.mark.slow
def test_classify_series_learns_it_by_runge_kutta(tmp_path):
    assert run("classify_series", output=tmp_path) > 0.9


@pytest.mark.parametrize("learning_rule", ["delta", "oja"])
def test_paint_disks_learns_to_paint(learning_rule):
    sizes = {"learning_rule": learning_rule, "side": 8, "strokes": 4}
    few, more = (run("paint_disks", steps=steps, **sizes) for steps in (5, 60))
    assert more < 0.6 < few


def test_attend_to_training_finds_patterns_of_the_same_class(capsys):
    assert run("attend_to_training", steps=30) > 0.8
    assert float(capsys.readouterr().out.split("differ by ")[1].split()[0]) < 1e-4


MEMORIES = ["ba_fast_weights", "fast_weight_memory", "srwm"]


@pytest.mark.parametrize("rule", MEMORIES)
def test_memories_can_be_asked_for_what_they_were_told(rule):
    assert 0 <= run("retrieve", rule=rule, pairs=2, heads=4, hidden_size=32, steps=2) <= 1
    assert 0 <= run("few_shot", rule=rule, ways=3, steps=2) <= 1


def test_few_shot_learns_classes_it_has_never_seen():
    assert run("few_shot", rule="srwm", ways=3, steps=220) > 0.55  # chance is 0.33


@pytest.mark.slow
@pytest.mark.parametrize("rule", MEMORIES)
def test_every_memory_learns_classes_it_has_never_seen(rule):
    assert run("few_shot", rule=rule, ways=3, steps=500) > 0.6


@pytest.mark.slow
def test_retrieve_answers():
    """Whoever names one of the two digits of the string at random is right half of the time."""
    assert run("retrieve", rule="ba_fast_weights", pairs=2, steps=500) > 0.75
