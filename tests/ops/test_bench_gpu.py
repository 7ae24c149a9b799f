"""The benches for a GPU on a machine without one: who is called with what, floors, ratios, table and picture."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hf_fwp.bench import decode, device, kernels, sequential, traffic, tune
from hf_fwp.bench.device import Ceilings, Work
from hf_fwp.rules import RULES

ROOT = Path(__file__).parent.parent.parent
LIMITS = Ceilings(bytes_per_s=1e9, flops_per_s=1e12)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def measure(run):
    """Runs the call, and tells a time that is easy to reckon with."""
    run()
    return {"ms": 2.0, "first_ms": 50.0, "launches": 3, "peak_mib": 1.0}


@without_gpu
@pytest.mark.parametrize("bench", [kernels.bench_kernels, decode.bench_decode, sequential.bench_sequential])
def test_without_a_gpu_the_request_is_refused(bench):
    with pytest.raises(ValueError, match=r"needs an NVIDIA or AMD GPU .* hf-fwp bench cpu"):
        bench()


@pytest.mark.parametrize("bench", [kernels.bench_kernels, decode.bench_decode, sequential.bench_sequential])
def test_an_unknown_dtype_is_refused(bench):
    with pytest.raises(ValueError, match="unknown dtype 'int8'; choose from float32"):
        bench(dtypes=["int8"])


def test_a_missing_matplotlib_is_told_before_the_measuring(monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--plot needs matplotlib: pip install matplotlib"):
        kernels.bench_kernels(plot="x.png")


@pytest.fixture
def on_cpu(monkeypatch):
    runs = kernels.runs
    monkeypatch.setattr(kernels, "runs", lambda *arguments: runs(*arguments, place="cpu"))


def test_kernels_rows(on_cpu):
    rows = kernels.measured([(1, 70, 2, 16)], "float32", measure, LIMITS)
    found = {(row["operator"], row["what"], row["implementation"]) for row in rows}
    assert {name for _, _, name in found} >= {"hf_fwp", "hf_fwp, backend torch", "transformers", "SDPA"}
    assert {(operator, what) for operator, what, _ in found} == {(o, w) for o in kernels.GATES for w in kernels.WHAT}
    assert len(found) == len(rows)
    assert {row["ratio"] for row in rows} == {1.0}


def test_the_first_call_compiles_into_an_empty_folder():
    knobs = pytest.importorskip("triton", reason="Triton is published for Linux only").knobs
    before = knobs.cache.dir
    with kernels._compiled_anew():
        assert not list(Path(knobs.cache.dir).iterdir())
        assert knobs.cache.dir != before
    assert knobs.cache.dir == before


def test_the_whole_bench_of_kernels(on_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "require_gpu", lambda: None)
    monkeypatch.setattr(device, "ceilings", lambda dtype: LIMITS)
    monkeypatch.setattr(device, "measure", measure)
    monkeypatch.setattr(traffic, "counted_bytes", lambda bench, calls: list(range(len(calls))))
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    result = kernels.bench_kernels(json=tmp_path / "x.json", shapes=[(1, 8, 1, 16)], commit="abc")
    assert json.loads((tmp_path / "x.json").read_text()) == result
    counted = [row["bytes"] for row in result["rows"] if row["implementation"] not in traffic.SLOW]
    assert counted == list(range(len(counted)))
    assert {row["bytes"] for row in result["rows"] if row["implementation"] == "transformers"} == {None}


def test_the_whole_bench_of_decode(monkeypatch, tmp_path):
    runs = decode.runs
    monkeypatch.setattr(decode, "CONTEXT", 32)
    monkeypatch.setattr(decode, "runs", lambda *given: runs(*given[:4], "cpu"))
    monkeypatch.setattr(traffic, "counted_bytes", lambda bench, calls: [len(bench)] * len(calls))
    monkeypatch.setattr(decode, "measure_in_graph", measure)
    monkeypatch.setattr(device, "require_gpu", lambda: None)
    monkeypatch.setattr(device, "ceilings", lambda dtype: LIMITS)
    result = decode.bench_decode(json=tmp_path / "x.json", shapes=[(2, 1, 16)], commit="abc")
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert result["machine"]["commit"] == "abc"
    assert {row["bytes"] for row in result["rows"] if row["implementation"] not in traffic.SLOW} == {len("decode")}


def test_what_runs_on_a_gpu_machine_needs_no_datasets():
    code = "import sys, pytest, hf_fwp.cli, hf_fwp.bench.kernels; pytest.main(['--collect-only', '-q', 'tests/gpu'])"
    code += "; print('loaded:', sorted({'datasets', 'gguf', 'llama_cpp', 'matplotlib'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "no tests" not in found.stdout
    assert "error" not in found.stdout.splitlines()[-2]
    assert found.stdout.splitlines()[-1] == "loaded: []"


def test_few_files_come_back_from_a_gpu_machine(tmp_path):
    told = subprocess.run(
        ["make", "-n", "gpu", f"RESULTS={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    files = {line.split()[-1] for line in told.splitlines() if line.strip().startswith("mv ")}
    files |= set(re.findall(r"--json (\S+)", told))
    assert {Path(file).name for file in files} >= {"machine.json", "kernels.json", "decode.json"}
    assert len(files) <= 8
    assert "--plot" not in told


@pytest.mark.parametrize("rule", sequential.SEQUENTIAL)
def test_sequential_rows(rule, monkeypatch):
    monkeypatch.setattr(sequential, "SEQUENTIAL", (rule,))
    rows = sequential.measured([(1, 3, 2, 4)], "bfloat16", measure, place="cpu")
    assert [row["implementation"] for row in rows] == list(sequential.BACKENDS)
    assert {row["operator"] for row in rows} == {rule}
    assert {row["ratio"] for row in rows} == {1.0}


def test_the_sequential_bench_has_every_rule_with_a_kernel():
    kernels_of = {name: rule.apply.args[0].kernel for name, rule in RULES.items() if rule.own}
    assert set(sequential.SEQUENTIAL) == {name for name, kernel in kernels_of.items() if kernel}


def test_the_whole_bench_of_sequential_rules(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "require_gpu", lambda: None)
    monkeypatch.setattr(device, "median_ms", lambda run: measure(run)["ms"])
    made = sequential.measured
    monkeypatch.setattr(sequential, "measured", lambda *given: made(*given, place="cpu"))
    monkeypatch.setattr(sequential, "SEQUENTIAL", ("srwm",))
    result = sequential.bench_sequential(json=tmp_path / "x.json", shapes=[(1, 3, 1, 4)], commit="abc")
    assert json.loads((tmp_path / "x.json").read_text()) == result


def test_every_implementation_of_an_operator_computes_the_same():
    tensors = kernels.inputs((1, 70, 2, 16), "float32", "cpu")
    ours, torch_, theirs = (
        kernels.IMPLEMENTATIONS[name]("gated_delta_rule")(tensors)
        for name in list(kernels.IMPLEMENTATIONS)[:4]
        if name != "flash-linear-attention"
    )
    torch.testing.assert_close(ours, torch_)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_decay_of_a_channel_is_timed_as_it_is_called():
    tensors = kernels.inputs((1, 70, 2, 16), "float32", "cpu", "kimi_delta")
    assert tensors["g"].shape == (1, 70, 2, 16)
    ours, torch_ = (kernels.IMPLEMENTATIONS[name]("kimi_delta")(tensors) for name in list(kernels.IMPLEMENTATIONS)[:2])
    torch.testing.assert_close(ours, torch_)
    works = [kernels.work_of("hf_fwp", o, (1, 70, 2, 16), "float32", "forward") for o in ("kimi_delta", "delta_rule")]
    assert works[0].bytes - works[1].bytes == 4 * 70 * 2 * 16


def test_decode_rows(monkeypatch):
    monkeypatch.setattr(decode, "CONTEXT", 32)
    rows = decode.measured([(2, 3, 16)], "float32", measure, LIMITS, place="cpu")
    assert {row["operator"] for row in rows} == set(kernels.GATES)
    assert {"hf_fwp", "transformers", "SDPA"} <= {row["implementation"] for row in rows}
    whole = [row for row in rows if row["what"] == "whole mixer"]
    assert {row["implementation"] for row in whole} == {decode.MANY}  # the kernel of one launch needs a GPU
    alone = next(row for row in rows if row["operator"] == whole[0]["operator"])
    assert whole[0]["bandwidth_floor_ms"] > alone["bandwidth_floor_ms"]  # it reads weights, too


@pytest.mark.parametrize("operator", decode.STOCK)
def test_decode_implementations_compute_the_same(operator):
    tensors = decode.token((2, 3, 16), "float32", "cpu", operator)
    stock = decode.transformers_fallback(operator)
    if stock is None:
        pytest.skip(f"this version of transformers has no {decode.STOCK[operator][1]}")
    theirs = stock(tensors)
    before = tensors["state"].clone()
    ours = decode.without_gradient(decode.ours(operator), tensors)()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, tensors["state"])


def test_floors_of_the_specification():
    """One tensor [8, 4096, 16, 128] in bf16 is X = 134 MB; forward moves 4 X in 0.16 ms at 3.35 TB/s, backward 7 X."""
    shape, X = (8, 4096, 16, 128), 8 * 4096 * 16 * 128 * 2
    forward, both = (kernels.work_of("hf_fwp", "linear_attention", shape, "bfloat16", what) for what in kernels.WHAT)
    assert (forward.bytes, both.bytes) == (4 * X, 11 * X)
    gated = kernels.work_of("hf_fwp", "gated_delta_rule", shape, "bfloat16", "forward")
    assert gated.bytes == 4 * X + 8 * 4096 * 16 * (2 + 4)
    assert gated.flops == 8 * 4096 * 16 * (4 * 2 * 64 * 128 + 3 * 2 * 128 * 128)
    row = device.judged({"ms": 0.32}, forward, Ceilings(3.35e12, 8e14))
    assert row["bandwidth_floor_ms"] == pytest.approx(0.16, abs=0.001)
    assert row["share_of_bandwidth_floor"] == pytest.approx(0.5, abs=0.01)


def test_floor_of_a_decode_step_is_the_state_twice():
    work = decode.work_of("hf_fwp", "gated_delta_rule", (64, 16, 128), "bfloat16")
    assert work.bytes == 64 * 16 * (2 * 128 * 128 * 4 + 4 * 128 * 2 + 2 + 4)
    cached = decode.work_of("SDPA", "gated_delta_rule", (64, 16, 128), "bfloat16")
    assert cached.bytes == 64 * 16 * (2 * 4096 + 4) * 128 * 2


def test_shares_and_rates():
    row = device.judged({"ms": 4.0}, Work(bytes=2_000_000, flops=10**9), LIMITS)
    assert row["bandwidth_floor_ms"] == 2.0
    assert row["arithmetic_floor_ms"] == 1.0
    assert row["share_of_bandwidth_floor"] == 0.5
    assert row["share_of_arithmetic_floor"] == 0.25
    assert row["gb_s"] == 0.5


def test_ratios_are_to_our_row_of_the_same_problem():
    rows = [
        {"shape": [1], "implementation": "hf_fwp", "ms": 2.0},
        {"shape": [1], "implementation": "peer", "ms": 5.0},
        {"shape": [2], "implementation": "hf_fwp", "ms": 4.0},
        {"shape": [2], "implementation": "peer", "ms": 2.0},
        {"shape": [2], "implementation": "large", "ms": None},
        {"shape": [3], "implementation": "peer", "ms": 1.0},
    ]
    assert [row["ratio"] for row in device.with_ratios(rows, "hf_fwp", ["shape"])] == [1, 2.5, 1, 0.5, None, None]


def test_table_json_and_picture(tmp_path, capsys):
    base = {"operator": "delta_rule", "shape": [1, 2], "dtype": "float32", "what": "forward"}
    rows = [
        base | {"implementation": "hf_fwp", "ms": 2.0, "ratio": 1.0, "bytes": 10},
        base | {"implementation": "peer", "ms": None, "note": "out of memory"},
    ]
    result = {"machine": device.about("abc"), "rows": rows}
    device.write(result, json=tmp_path / "x.json", plot=tmp_path / "x.png", title="operators")
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert result["machine"]["commit"] == "abc"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    shown = " ".join(capsys.readouterr().out.split())
    assert "peer" in shown
    assert "eager" not in shown


def test_counters_are_read_out_of_a_trace():
    read, written = traffic.COUNTERS
    events = [{"name": "kernel"}, {"args": {read: 10.0, written: 5}}, {"args": {read: "1", written: 2.0}}]
    assert traffic.bytes_in({"traceEvents": events}) == 18
    assert traffic.bytes_in({"traceEvents": events[:1]}) is None


@without_gpu
def test_without_counters_there_are_no_bytes(capsys):
    calls = [["delta_rule", [1, 64, 1, 16], "float32", "forward", "hf_fwp"]]
    assert traffic.counted_bytes("kernels", calls) == [None]
    assert "not every byte was counted" in capsys.readouterr().err


class Launch(NamedTuple):
    columns: int
    num_warps: int
    num_stages: int


class Launches(NamedTuple):
    first: Launch
    second: Launch


def test_tuning_finds_the_fastest_row_and_leaves_the_table_alone():
    row = Launches(Launch(64, 4, 1), Launch(64, 4, 1))
    table = {"key": row}

    def time(run):
        first, second = table["key"]
        if first.columns == 128:
            return None  # does not fit
        return abs(first.num_warps - 8) + abs(second.columns - 32) + second.num_stages + 1.0

    best, ms, before = tune.descend(table, "key", lambda: None, time)
    assert (best.first.num_warps, best.second.columns, best.second.num_stages) == (8, 32, 1)
    assert (ms, before) == (2.0, 38.0)
    assert table == {"key": row}


def test_a_row_that_does_not_run_is_not_tuned():
    with pytest.raises(ValueError, match="does not run on this device"):
        tune.descend({"key": Launches(Launch(1, 1, 1), Launch(1, 1, 1))}, "key", lambda: None, lambda run: None)


def fails(*given, **named):
    raise ValueError("Hopper\nand this Triton")


def test_a_peer_that_fails_leaves_a_note_and_the_other_rows(on_cpu, monkeypatch, tmp_path):
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(device, "quartiles_ms", lambda run: [1.0, 2.0, 3.0])
    monkeypatch.setattr(device, "launches", lambda run: 3)
    monkeypatch.setattr(device, "require_gpu", lambda: None)
    monkeypatch.setattr(device, "ceilings", lambda dtype: LIMITS)
    monkeypatch.setattr(traffic, "counted_bytes", lambda bench, calls: [1] * len(calls))
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "flash-linear-attention", lambda operator: fails)
    rows = kernels.bench_kernels(json=tmp_path / "x.json", shapes=[(1, 8, 1, 16)])["rows"]
    theirs = [row for row in rows if row["implementation"] == "flash-linear-attention"]
    assert {row["note"] for row in theirs} == {"ValueError: Hopper and this Triton"}
    assert {row["ms"] for row in rows if row not in theirs} == {2.0}
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "hf_fwp", lambda operator: fails)
    with pytest.raises(RuntimeError, match=r"8 of our rows .* delta_rule \[1, 8, 1, 16\] forward: ValueError: Hopper"):
        kernels.bench_kernels(json=tmp_path / "y.json", shapes=[(1, 8, 1, 16)])
    assert len(json.loads((tmp_path / "y.json").read_text())["rows"]) == len(rows)


def test_a_peer_that_is_broken_or_has_no_version_is_left_out(monkeypatch, tmp_path, capsys):
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("raise OSError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, module)
    assert kernels.fla("delta_rule") is None
    assert decode.fla("delta_rule") is None
    assert "chunk_delta_rule is left out: OSError: no driver" in capsys.readouterr().err
    assert device.version("no-such-package") == "unknown"
    assert device.about(None)["triton"]


def test_a_table_of_each_family_of_kernels_is_tuned(monkeypatch, capsys):
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H")
    monkeypatch.setattr(kernels, "inputs", lambda *given: inputs(*given[:2], "cpu", *given[3:]))
    monkeypatch.setattr(tune, "timed", lambda run: 1.0)
    found = tune.best_launches([(1, 8, 1, 16)], ["bfloat16"])
    assert [row["table"] for row in found] == ["linear_class", "channel_decay"]
    assert "channel_decay (2, 64): Launches(" in capsys.readouterr().out


inputs = kernels.inputs
