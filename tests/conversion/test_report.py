"""The report: complete as JSON, readable as a page that needs nothing else, and a model card."""

import json
import re
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import TEXTS, byte_tokenizer, tiny_llama

from hf_fwp.card import bytes_shown, number
from hf_fwp.conversion import report as reports
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.plots import draw
from hf_fwp.conversion.report import license_of, measure, peak_memory, write_report

HISTORY = [{"step": 1, "residual": 0.5}, {"step": 2, "residual": 0.3}]


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    teacher = tiny_llama()
    return measure(
        copy_teacher(teacher, layers=[1]),
        teacher,
        TEXTS,
        tokenizer=byte_tokenizer(),
        tokens=128,
        sequence_length=32,
        baseline_tokens=64,
        residual_tokens=32,
        lengths=(8, 16),
        prompts=("A delta rule <b>",),
        new_tokens=2,
        needles=1,
        progress=False,
    )


@pytest.fixture
def report(measured):
    return {
        "teacher": "HuggingFaceTB/SmolLM2-135M",
        "license": "apache-2.0",
        "rule": "gated_delta_net",
        "recipe": "quick",
        "keep": 0.5,
        "num_layers": 2,
        "kept_layers": [0],
        "tokens": 4096,
        "ranking": {0: 0.02, 1: 0.01},
        "choices": {1: {"half_life": [2.0, 38.0], "dtype": torch.float32}},
        "stages": {"solve": {"seconds": 3.21}, "align": {"seconds": 70, "tokens": 2048, "history": HISTORY}},
        **measured,
    }


def test_everything_is_measured_on_as_many_tokens_as_asked_for(measured):
    assert set(measured) == {"evaluation", "baselines", "residuals", "decode", "recall", "samples"}
    assert measured["evaluation"]["tokens"] == 128
    assert {row["tokens"] for row in measured["baselines"].values()} == {64}
    assert list(measured["residuals"]) == [1]
    assert [row["length"] for row in measured["decode"]["teacher"]] == [8, 16]


def test_parts_can_be_left_out():
    teacher = tiny_llama()
    ids_NT = torch.randint(0, 200, (1, 16))
    measured = measure(
        teacher,
        teacher,
        ids_NT,
        baseline_tokens=0,
        residual_tokens=0,
        lengths=(),
        prompts=(),
        needles=0,
        progress=False,
    )
    assert list(measured) == ["evaluation"]


def test_the_report_reads_back_as_it_was_given(report, tmp_path):
    returned = write_report(tmp_path / "smol", report)
    read = json.loads((tmp_path / "smol" / "report.json").read_text())
    assert read == returned
    assert read["evaluation"] == report["evaluation"]
    assert read["ranking"] == {"0": 0.02, "1": 0.01}
    assert read["choices"]["1"]["dtype"] == "torch.float32"
    assert read["name"] == "smol"
    assert read["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert read["peak_memory_bytes"] > 2**20
    assert read["environment"]["versions"]["torch"] == torch.__version__
    assert {"date", "device", "threads", "commit"} <= set(read["environment"])


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_report(tmp_path, {"evaluation": {"perplexity": float("inf"), "kl": float("nan")}, "seed": torch.tensor(3)})
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert read["evaluation"] == {"perplexity": None, "kl": None}
    assert read["seed"] == 3


def test_a_crash_leaves_the_earlier_report_whole(report, tmp_path, monkeypatch):
    write_report(tmp_path, {"seed": 1})
    before = (tmp_path / "report.json").read_text()

    def crash(*names):
        raise OSError("disk full")

    monkeypatch.setattr(reports.os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, report)
    assert (tmp_path / "report.json").read_text() == before


class Addresses(HTMLParser):
    """Everything a browser would fetch, and whether every element is closed."""

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file_and_no_network(report, tmp_path):
    write_report(tmp_path, report)
    page = (tmp_path / "report.html").read_text()
    parser = Addresses()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.found) == 4
    assert all(address.startswith("data:image/svg+xml;base64,") for address in parser.found)
    assert not re.search(r"url\(|@import|<script|<link", page)


def test_the_page_begins_with_the_answer(report, tmp_path):
    write_report(tmp_path / "smol", {**report, "evaluation": {**report["evaluation"], "ratio": 1.234}})
    page = (tmp_path / "smol" / "report.html").read_text()
    body = page[page.index("<body>") :]
    assert body.index("1.23 &times;") < body.index("<h2>")
    assert "1 of 2 layers kept as softmax" in body
    assert "A delta rule &lt;b&gt;" in body  # what models say is text, never markup
    for heading in (
        "baselines",
        "What they find again",
        "What they say",
        "Layer by layer",
        "Speed and memory",
        "How it was made",
    ):
        assert heading in body


@pytest.mark.parametrize(
    "missing",
    [
        "evaluation",
        "baselines",
        "residuals",
        "ranking",
        "decode",
        "recall",
        "samples",
        "stages",
        "choices",
        "kept_layers",
        "rule",
    ],
)
def test_any_part_may_be_missing(report, tmp_path, missing):
    write_report(tmp_path, {key: value for key, value in report.items() if key != missing})
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "report.html", "README.md"}


def test_every_heads_half_life_is_drawn(report, tmp_path):
    scales = [{"half_life": [2.0, 38.0]}, {"half_life": [4.0, 8.0]}]
    drawn = [
        draw({"choices": choices}, [])["half_lives"]
        for choices in ({}, {1: {"residual": 0.1}}, {1: {"time_scales": scales[:1]}}, {"1": {"time_scales": scales}})
    ]
    assert drawn[:2] == [None, None]
    assert len({*drawn[2:]}) == 2
    write_report(tmp_path, {**report, "choices": {1: {"time_scales": scales}}})
    assert drawn[3] in (tmp_path / "report.html").read_text()


def test_an_empty_report_is_a_report(tmp_path):
    write_report(tmp_path, {})
    assert "How it was made" in (tmp_path / "report.html").read_text()


def test_the_card_is_one_that_the_hub_reads(report, tmp_path):
    write_report(tmp_path / "smol", report)
    card = ModelCard.load(tmp_path / "smol" / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"hf_fwp", "gated_delta_net"} <= set(card.data.tags)
    assert 'AutoModelForCausalLM.from_pretrained("smol")' in card.text
    assert "in 1 of 2 layers" in card.text
    assert f"| this model | {number(report['evaluation']['perplexity'])} |" in card.text
    assert "solve 3 s, align 70 s" in card.text
    theirs, ours = (report["recall"][who]["needles"][512]["found"] for who in ("teacher", "student"))
    assert f"| a number of seven digits in 512 tokens of noise | {theirs:.0%} | {ours:.0%} |" in card.text


def test_a_local_teacher_is_no_base_model_and_its_place_stays_private(report, tmp_path):
    teacher = tmp_path / "someone" / "teacher"
    teacher.mkdir(parents=True)
    (teacher / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# A model\n")
    written = write_report(tmp_path / "out", {"teacher": teacher, "rule": "delta_net"})
    assert "base_model" not in written
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "someone" not in card + (tmp_path / "out" / "report.html").read_text()


def test_the_licence_is_only_what_the_teacher_says(tmp_path):
    assert license_of("") is None
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("# A model\nlicense: mit\n")
    assert license_of(str(tmp_path)) is None
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF....general.license\x08\0\0\0" + (10).to_bytes(8, "little") + b"apache-2.0more")
    assert license_of(str(file)) == "apache-2.0"


def test_without_the_packages_for_the_page_it_says_so_once(report, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "PAGE_NEEDS", ("jinja2", "a_package_nobody_has"))
    with pytest.warns(UserWarning, match=r"needs a_package_nobody_has; run `pip install") as warned:
        write_report(tmp_path, report)
    assert len(warned) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "README.md"}


def test_numbers_are_shown_with_three_digits_that_count():
    shown = [number(value) for value in (0, 0.01234, 1.005, 47.62, 999.6, 80597.2, 3.2e7, 12, None, "x", True)]
    assert shown == ["0", "0.0123", "1.00", "47.6", "1000", "80597", "3.20e+07", "12.0", "-", "x", "True"]
    assert [bytes_shown(value) for value in (None, 0, 900, 23 * 2**20)] == ["-", "0 B", "900 B", "23.0 MiB"]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells the peak of one program")
def test_the_peak_of_memory_is_not_that_of_the_parent():
    held = torch.ones(2**28)  # 1 GiB
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        peak = process.submit(peak_memory).result()
    assert peak_memory() > held.nbytes > peak > 2**20
