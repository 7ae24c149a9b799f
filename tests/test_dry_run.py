"""--dry-run: every command that costs time says what it would do, and does nothing."""

import inspect
import time
from pathlib import Path

import pytest
import tiny
from test_cli import FUNCTIONS, command, function, invoke, shorten
from tiny_fwp import tiny_model
from transformers import AutoModelForCausalLM

import hf_fwp
from hf_fwp import estimates
from hf_fwp.bench import cpu, hybrids, scores
from hf_fwp.conversion import evaluate

QUICK = {"info", "export-code", "bench page", "serve"}  # serve takes the time that its user gives it
DRY = sorted(set(FUNCTIONS) - QUICK)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.teacher_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A model of one rule, with a tokenizer."""
    folder = tmp_path_factory.mktemp("own")
    tiny_model("delta_net", vocab_size=257, num_key_value_heads=4).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("words", DRY)
def test_every_command_that_costs_time_has_a_dry_run(words):
    assert "--dry-run" in {parameter.opts[0] for parameter in command(words).params}
    assert inspect.signature(function(words)).parameters["dry_run"].default is False


def planned(words: str, places: dict[str, Path], folder: Path) -> str:
    """What a dry run says, which leaves everything as it was."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = invoke(*(places.get(word, word) for word in words.split()), "--dry-run")
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("demo TEACHER --output OUT", "solve 1024 tokens: about"),
        ("convert TEACHER --output OUT --recipe standard --data CORPUS", "distil 28000000 tokens: about"),
        ("convert TEACHER --output OUT --recipe standard --data CORPUS", "tokens are missing: the data has"),
        ("ablate TEACHER --output OUT --choices no --data CORPUS", "runs, about"),
        ("evaluate OWN --against TEACHER --data CORPUS --tokens 512", "on 512 tokens: about"),
        ("write-text TEACHER OUT.jsonl --data CORPUS --tokens 2k", "write 2000 tokens of"),
        ("inspect OWN --text hello --against TEACHER --output OUT", "2 of 2 layers while it reads"),
        ("export OWN OUT --format fla", "would write FwpForCausalLM"),
        ("export OWN OUT --format onnx", "would write FwpForCausalLM"),
        ("bench serve OWN --against TEACHER --contexts 8,16 --json OUT", "after 8, 16 tokens: 0.1 MiB of weights"),
        ("bench convert TEACHER --data CORPUS --json OUT", "solve 1024 tokens: about"),
        ("bench kernels --json OUT", "chunked operators: 84 rows, at least 10 s"),
        ("bench decode --json OUT", "decode step: 68 rows, at least 8 s"),
        ("bench sequential --json OUT", "sequential rules: 72 rows, at least 9 s"),
    ],
)
def test_a_dry_run_says_what_would_be_done_and_does_nothing(words, told, teacher, own, tmp_path, monkeypatch):
    shorten(monkeypatch)
    (tmp_path / "corpus.txt").write_text("\n".join(tiny.TEXTS * 8))
    monkeypatch.setattr("hf_fwp.conversion.demo.demo_corpus", lambda: ("tiny texts", tiny.TEXTS * 8, tiny.TEXTS))
    monkeypatch.setattr("hf_fwp.bench.kernels.fla", lambda operator: None)
    places = {"TEACHER": teacher, "OWN": own, "OUT": tmp_path / "out", "CORPUS": tmp_path / "corpus.txt"}
    assert told in planned(words, places, tmp_path)


def test_the_time_of_a_bench_is_that_of_its_parts(tmp_path, capsys, monkeypatch):
    asked = []

    def one_second(*given, **more):
        asked.append(given)
        return [{"ms": 600.0, "transformers_ms": 400.0}]

    monkeypatch.setattr(cpu, "time_case", one_second)
    assert cpu.bench_cpu(dry_run=True, json=tmp_path / "out", repeats=4) == {}
    assert asked[0] == ("gated_delta_rule", (1, 256, 9, 64), "float32", 1)
    assert "6 things, ours beside transformers', 4 times each: about 4 minutes" in capsys.readouterr().err
    monkeypatch.setattr(hybrids, "time_family", one_second)
    assert hybrids.bench_hybrids(dry_run=True, json=tmp_path / "out", families=["qwen3_5"], tokens=80) == {}
    assert asked[-1] == ("qwen3_5", 10, 1)
    monkeypatch.setattr(time, "perf_counter", iter((0.0, 2.0, 2.0, 6.0)).__next__)  # 0.5 s a step, and 2 s of questions
    monkeypatch.setattr(scores, "TASKS", {"parity": scores.TASKS["parity"]})
    monkeypatch.setattr(scores, "scored", lambda *given, **more: {})
    assert scores.bench_tasks(rules=["delta_net"], steps=101, dry_run=True, json=tmp_path / "out") == {}
    assert "1 trainings of 101 steps: about 52 s" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_would_be_refused_is_refused_in_a_dry_run(teacher, own, tmp_path):
    with pytest.raises(ValueError, match="a vocabulary of"):
        evaluate(own, against=tiny_model("delta_net", vocab_size=77), dry_run=True)
    with pytest.raises(ValueError, match=r"there is no data at .*nowhere\.txt"):
        evaluate(own, data=tmp_path / "nowhere.txt", dry_run=True)
    with pytest.raises(ValueError, match="no model with rule=srwm"):
        hf_fwp.export(tiny_model("srwm"), tmp_path / "out", format="fla", dry_run=True)
    with pytest.raises(ValueError, match="has no fast-weight layers"):
        hf_fwp.export(teacher, tmp_path / "out", format="onnx", dry_run=True)
    with pytest.raises(ValueError, match="has no fast-weight layer;"):
        hf_fwp.inspect(teacher, "hello", dry_run=True)


def test_a_folder_of_texts_is_data_in_a_dry_run_too(own, tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("hello\n")
    assert evaluate(own, data=tmp_path, tokens=512, dry_run=True) == {}
    assert "on 512 tokens" in capsys.readouterr().err


def test_a_model_is_timed_once(own):
    runs = []
    model = AutoModelForCausalLM.from_pretrained(own)
    model.base_model.register_forward_hook(lambda *_: runs.append(1))
    assert estimates.seconds_per_token(model) == estimates.seconds_per_token(model)
    assert len(runs) == 2, "the faster of two passes"


def test_an_inspection_that_was_not_made_holds_nothing(own):
    found = hf_fwp.inspect(own, "hello", dry_run=True)
    assert found.layers == {}
    assert len(found.tokens) == found.total > 0
