import importlib
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import typer
from transformers.utils import logging
from typer.testing import CliRunner

from hf_fwp import cli, telling
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.recipes import RECIPES, STUDENTS
from hf_fwp.hosts import HOSTS
from hf_fwp.presets import PRESETS
from hf_fwp.rules import RULES

ROOT = Path(__file__).parent.parent

FUNCTIONS = {
    "convert": ("hf_fwp.conversion.convert", "convert"),
    "ablate": ("hf_fwp.conversion.ablate", "ablate"),
    "evaluate": ("hf_fwp.conversion.evaluate", "evaluate"),
    "write-text": ("hf_fwp.conversion.write_text", "write_text"),
    "inspect": ("hf_fwp.inspection", "inspect"),
    "info": ("hf_fwp.cli", "info"),
    "push": ("hf_fwp.hub", "push"),
    "serve": ("hf_fwp.serving", "serve"),
    "export-code": ("hf_fwp.bundle", "export_code"),
    "bench serve": ("hf_fwp.bench.serve", "bench_serve"),
    "export": ("hf_fwp.exporting", "export"),
    "demo": ("hf_fwp.conversion.demo", "demo"),
    "bench page": ("hf_fwp.bench.page", "bench_page"),
    "bench tasks": ("hf_fwp.bench.scores", "bench_tasks"),
    "bench convert": ("hf_fwp.conversion.timing", "bench_convert"),
    "bench cpu": ("hf_fwp.bench.cpu", "bench_cpu"),
    "bench kernels": ("hf_fwp.bench.kernels", "bench_kernels"),
    "bench decode": ("hf_fwp.bench.decode", "bench_decode"),
    "bench hybrids": ("hf_fwp.bench.hybrids", "bench_hybrids"),
    "bench sequential": ("hf_fwp.bench.sequential", "bench_sequential"),
}


def command(words: str):
    found = typer.main.get_command(cli.app)
    for word in words.split():
        found = found.commands[word]
    return found


def function(words: str):
    module, name = FUNCTIONS[words]
    return getattr(importlib.import_module(module), name)


def invoke(*words: object):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.teacher_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("\n".join(tiny.TEXTS * 8))
    return file


def test_every_command_is_a_function():
    top = typer.main.get_command(cli.app).commands
    names = [f"{name} {inner}" for name in top for inner in getattr(top[name], "commands", {})]
    assert sorted(FUNCTIONS) == sorted([name for name in top if not hasattr(top[name], "commands")] + names)


@pytest.mark.parametrize("words", FUNCTIONS)
def test_a_command_has_the_argument_names_of_its_function(words):
    given = {parameter.name for parameter in command(words).params} - {"help", "quiet"}
    parameters = inspect.signature(function(words)).parameters
    assert given - {"json"} <= set(parameters)
    required = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    assert required <= given


def test_convert_offers_every_argument():
    given = {parameter.name for parameter in command("convert").params} - {"json", "help", "quiet"}
    assert given == set(inspect.signature(function("convert")).parameters)


@pytest.mark.parametrize("words", ["", *FUNCTIONS])
def test_help_is_readable(words):
    shown = invoke(*words.split(), "--help")
    assert shown.exit_code == 0
    for name in [parameter.opts[-1] for parameter in command(words).params if parameter.opts[-1].startswith("--")]:
        assert name in shown.output
    if words:
        assert inspect.getdoc(command(words).callback).splitlines()[0] in " ".join(shown.output.split())


@pytest.mark.parametrize("words", ["convert", "ablate", "demo"])
def test_the_rules_of_a_conversion_are_those_that_have_a_student(words):
    (rule,) = [parameter for parameter in command(words).params if parameter.name == "rule"]
    assert rule.help == f"Update rule: {', '.join(STUDENTS)}."


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.25", 0.25),
        ("1.0", 1.0),
        ("7", 7),
        ("0", 0),
        ("-1", -1),
        ("0,3,5", [0, 3, 5]),
        ("3,", [3]),
        ("uniform:0.25", "uniform:0.25"),
        ("recall:0.25", "recall:0.25"),
    ],
)
def test_keep_is_read_as_python_has_it(text, value):
    read = cli.parse_keep(text)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("text", ["", "half", "1,x", "0.1,0.2", "uniform"])
def test_an_unreadable_keep_is_refused(text):
    with pytest.raises(ValueError, match="give a fraction"):
        cli.parse_keep(text)


def test_options_of_mixers_are_read_as_json_has_them():
    read = cli.parse_mixer("window=64, sinks=4,o_bias=false,output_gate=none,scale=0.5")
    assert read == {"window": 64, "sinks": 4, "o_bias": False, "output_gate": "none", "scale": 0.5}
    assert cli.parse_mixer(None) is None
    for wrong in ("window", "window=", "=4", ""):
        with pytest.raises(ValueError, match="window=64,sinks=4"):
            cli.parse_mixer(wrong)


def test_dtype_is_read_by_name():
    assert cli.parse_dtype("bfloat16") is torch.bfloat16
    assert cli.parse_dtype(None) is None
    with pytest.raises(ValueError, match="unknown dtype 'int8'; the dtypes are float32"):
        cli.parse_dtype("int8")


def test_info_as_json_names_what_is_there():
    told = json.loads(invoke("info", "--json").stdout)
    assert list(told["rules"]) == list(RULES)
    assert told["rules"]["srwm"]["a sequence"] == "sequential"
    assert told["rules"]["delta_net"]["backends"] == "reference, torch, triton, step"
    assert list(told["presets"]) == list(PRESETS)
    assert told["presets"]["kimi2025-delta"]["rule"] == "kimi_delta"
    assert told["hosts"] == list(HOSTS)
    assert told["versions"]["torch"] == torch.__version__
    assert any(device.startswith("cpu") for device in told["devices"])
    assert "reference" in told["backends"]


def test_info_for_a_person_shows_the_same():
    shown = invoke("info").stdout
    assert all(name in shown for name in [*RULES, *PRESETS])
    row = next(line for line in shown.splitlines() if "delta_lstm" in line)
    assert "24704" in row
    assert "mixed" in row


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert", "TEACHER"), "needs --output"),
        (("convert", "TEACHER", "--output", "OUT", "--keep", "many"), "cannot read --keep 'many'"),
        (("convert", "TEACHER", "--output", "OUT", "--dtype", "int8"), "unknown dtype 'int8'"),
        (
            ("convert", "TEACHER", "--output", "OUT", "--device", "foo"),
            "unknown device 'foo'; the devices here are cpu",
        ),
        (("convert", "TEACHER", "--output", "OUT", "--device", "cuda:99"), "there is no device 'cuda:99' here"),
        (("ablate", "TEACHER", "--output", "OUT", "--device", "cuda:99"), "there is no device 'cuda:99' here"),
        (("bench", "serve", "TEACHER", "--against", "TEACHER", "--device", "foo"), "unknown device 'foo'"),
        (("convert", "TEACHER", "--output", "OUT", "--mixer", "window=64k"), "window is '64k'; it must be a whole"),
        (("convert", "TEACHER", "--output", "OUT", "--rule", "delta_nett"), "delta_nett"),
        (("convert", "TEACHER", "--output", "OUT", "--data", "nowhere.txt"), "nowhere.txt"),
        (("convert", "nowhere/at/all", "--output", "OUT"), "nowhere"),
        (("evaluate", "nowhere/at/all"), "nowhere"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(words, message, teacher, tmp_path):
    places = {"TEACHER": teacher, "OUT": tmp_path / "out"}
    told = invoke(*(places.get(word, word) for word in words))
    assert told.exit_code == 2
    assert told.stdout == ""
    last = told.stderr.strip().splitlines()[-1]
    assert last.startswith("hf-fwp: ")
    assert message in last


@pytest.mark.parametrize("words", FUNCTIONS)
def test_every_command_can_be_quiet(words):
    (quiet,) = [parameter for parameter in command(words).params if parameter.name == "quiet"]
    assert quiet.opts == ["--quiet", "-q"]


def test_quiet_tells_nothing_but_json_and_errors(teacher):
    assert invoke("info").stdout
    done = invoke("info", "-q")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(invoke("info", "-q", "--json").stdout)
    wrong = invoke("evaluate", "nowhere/at/all", "--quiet")
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("hf-fwp: found no model")
    assert invoke("info").stdout, "the next command speaks again"


def test_a_quiet_plan_is_not_shown(teacher, corpus, monkeypatch):
    shorten(monkeypatch)
    words = ("convert", teacher, "--recipe", "closed-form", "--keep", "1", "--data", corpus, "--dry-run")
    assert "1 of 2 layers stay softmax" in invoke(*words).stderr
    done = invoke(*words, "--quiet")
    assert (done.exit_code, done.output) == (0, "")


def test_bars_are_there_on_a_terminal_and_in_python(capsys, monkeypatch):
    def shown() -> bool:
        list(telling.progress_bar([1, 2], desc="loop"))
        return "loop" in capsys.readouterr().err

    assert shown()
    with telling.manner(bars=False, words=True):
        assert not shown()
        assert not logging.is_progress_bar_enabled(), "those of transformers follow"
        with telling.manner(bars=True, words=True):
            assert not shown(), "what is not wanted outside is not shown inside"
    assert shown()
    assert logging.is_progress_bar_enabled()
    seen = []
    monkeypatch.setattr(cli, "info", lambda: seen.append(telling.current()) or {"rules": {}, "presets": {}})
    for terminal, words in ((True, ["info"]), (False, ["info"]), (True, ["info", "-q"])):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal, raising=False)
        with pytest.raises(SystemExit) as stopped:
            cli.app(words)
        assert stopped.value.code == 0
    assert [found.bars for found in seen] == [True, False, False]


def test_the_group_is_as_quiet_as_its_commands(tmp_path):
    rows = [{"what": "forward", "ms": 1.0, "ms_quartiles": [1.0, 1.0]}]
    (tmp_path / "old.json").write_text(json.dumps({"machine": {}, "rows": rows}))
    words = ("--compare", tmp_path / "old.json", tmp_path / "old.json")
    assert "forward" in invoke("bench", *words).stdout
    done = invoke("bench", "-q", *words)
    assert (done.exit_code, done.stdout) == (0, "")


def test_colours_are_for_terminals_only(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "\x1b[" not in invoke("info").stdout


def test_an_unknown_option_is_exit_code_2():
    told = invoke("convert", "x", "--no-such-option")
    assert told.exit_code == 2
    assert "--no-such-option" in told.stderr


def test_an_interrupt_is_exit_code_130(monkeypatch, teacher, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[function("convert").__module__], "convert", interrupted)
    told = invoke("convert", teacher, "--output", tmp_path / "out")
    assert told.exit_code == 130
    assert "interrupted" in told.stderr


def test_no_traceback_reaches_the_terminal():
    run = subprocess.run(
        [sys.executable, "-m", "hf_fwp.cli", "convert", "x"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert run.stderr.strip().splitlines()[-1].startswith("hf-fwp: convert needs --output")


def shorten(monkeypatch) -> None:
    """A recipe for tiny teachers and texts."""
    few = replace(RECIPES["closed-form"], sequence_length=64, solve_tokens=512, rank_solve_tokens=320, rank_tokens=64)
    monkeypatch.setitem(RECIPES, "closed-form", few)


def test_convert_then_evaluate_from_the_command_line(teacher, corpus, tmp_path, monkeypatch, capsys):
    shorten(monkeypatch)
    output = tmp_path / "student"
    words = ("convert", teacher, "--recipe", "closed-form", "--keep", "1", "--data", corpus, "--output", output)
    converted = invoke(*words, "--json")
    assert converted.exit_code == 0, converted.output
    cli.show_report(json.loads(converted.stdout), output, as_json=False)
    screen = capsys.readouterr().out
    assert "1 of 2" in screen
    assert "{" not in screen, "parts of the report that are for report.html"
    assert len(screen.splitlines()) < 40
    assert "1 of 2 layers stay softmax" in converted.stderr
    assert "layer/s" not in converted.stderr, "a bar where nobody sees it move"
    assert (output / "config.json").is_file()
    measured = invoke("evaluate", output, "--against", teacher, "--data", corpus, "--tokens", "1024", "--json")
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.stdout)
    again = invoke(*words)
    assert again.exit_code == 2
    assert str(output) in again.stderr


def test_inspect_ends_with_a_line_for_each_layer(tmp_path):
    copy_teacher(tiny.tiny_llama(), layers=[1]).save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    words = ("inspect", tmp_path / "model", "--text", "fast weights", "--output", tmp_path / "page.html")
    shown = invoke(*words)
    assert shown.exit_code == 0, shown.output
    (line,) = [line for line in shown.stdout.splitlines() if "gated_delta_net" in line]
    assert line.split()[1] == "1"
    assert json.loads(invoke(*words, "--json").stdout)["layers"].keys() == {"1"}
