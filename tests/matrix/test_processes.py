"""Two processes compute what one computes: DDP, FSDP2 and DeepSpeed ZeRO, in training and in distillation."""

import importlib
import importlib.util

import pytest
import torch
from runs import trained
from two_processes import aligning, converting, distilling, together, training

from hf_fwp.conversion import processes as sharing

distillation = importlib.import_module("hf_fwp.conversion.distil")
FSDP = {"fsdp": "full_shard", "fsdp_config": {"version": 2}}


def fsdp(**changes):
    return {**FSDP, "fsdp_config": {**FSDP["fsdp_config"], **changes}}


WAYS = {  # how the weights are spread: settings of the Trainer
    "DDP": {},
    "DDP, accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "FSDP2": fsdp(),
    "FSDP2, accumulated": {**fsdp(), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "FSDP2, activations recomputed": fsdp(activation_checkpointing=True),
    "FSDP2, weights stay together": fsdp(reshard_after_forward=False),
}
QUICK = ("FSDP2, activations recomputed",)
KINDS = {"DDP": "DistributedDataParallel Parameter", "FSDP2": "DTensor", "ZeRO": "DeepSpeedEngine"}
EXACT, SINGLE = 2e-6, 1e-4  # logged losses are float32; float32 weights after some steps


def zero(stage):
    """Every weight in pieces, however small."""
    stage = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    config = {"zero_optimization": stage, "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0}
    sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    return {"use_cpu": False, "deepspeed": config | sizes}


def needs_deepspeed(monkeypatch):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is no dependency: pip install --no-build-isolation deepspeed to run this test")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def assert_same(ours, theirs, way, tolerance):
    losses, weights, kind, *_ = ours
    assert KINDS[way.partition(",")[0]] in kind
    assert len(losses) == len(theirs[0])
    assert max(abs(a - b) for a, b in zip(losses, theirs[0], strict=True)) <= tolerance
    for key, weight in theirs[1].items():
        assert (weights[key] - weight).norm() <= tolerance * (1 + weight.norm()), key


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_two_processes_train_as_one(name, way, tmp_path):
    alone = trained(name, tmp_path / "alone")
    (pair,) = together(training, tmp_path / "pair", name, torch.float64, WAYS[way], sharded="FSDP2" in way)
    assert_same(pair, alone, way, EXACT)


@pytest.mark.slow
def test_mixed_precision_is_near_that_of_one_process(name, tmp_path):
    """FSDP2 gathers every weight in bf16, decays included, and keeps them in float32; autocast keeps both.

    The steps are short: long ones of Adam make the signs of gradients that are all rounding into losses 0.1 apart.
    """
    short = {"bf16": True, "learning_rate": 1e-3}
    losses, weights = trained(name, tmp_path / "alone", dtype=torch.float32, **short)
    settings = {**FSDP, **short}
    (pair,) = together(training, tmp_path / "pair", name, torch.float32, settings, sharded=True)
    assert max(abs(a - b) for a, b in zip(pair[0], losses, strict=True)) < 0.1
    assert {pair[1][key].dtype for key in weights} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("files", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_sharded_run_goes_on_where_it_stopped(name, files, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, **fsdp(state_dict_type=files)}
    resumed = ("checkpoint-1", "checkpoint-3")
    whole, *parts = together(training, tmp_path / "pair", name, torch.float64, saving, *resumed, sharded=True)
    for part in parts:
        assert part[0] == whole[0]
        assert all(torch.equal(part[1][key], weight) for key, weight in whole[1].items())
    assert_same(whole, trained(name, tmp_path / "alone"), "FSDP2", EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process(name, stage, tmp_path, monkeypatch):
    needs_deepspeed(monkeypatch)
    alone = trained(name, tmp_path / "alone", dtype=torch.float32)
    (pair,) = together(training, tmp_path / "pair", name, torch.float32, zero(stage), sharded=True)
    assert_same(pair, alone, "ZeRO", SINGLE)


DISTILLED = {
    "DDP": ({}, torch.float64, EXACT),
    "FSDP2": (FSDP, torch.float64, EXACT),
    "ZeRO, 2": (zero(2), torch.float32, SINGLE),
    "ZeRO, 3": (zero(3), torch.float32, SINGLE),
}


@pytest.mark.parametrize(
    ("way", "tied"),
    [
        pytest.param(way, tied, marks=[] if (way, tied) == ("FSDP2", False) else pytest.mark.slow)
        for way in DISTILLED
        for tied in (False, True)
    ],
)
def test_two_processes_distil_as_one(way, tied, tmp_path, monkeypatch):
    if "ZeRO" in way:
        needs_deepspeed(monkeypatch)
    settings, dtype, tolerance = DISTILLED[way]
    (tmp_path / "alone").mkdir()
    changes = {"tie_word_embeddings": tied}
    alone = distilling(tmp_path / "alone", dtype, changes, {"per_device_train_batch_size": 4})
    pair = together(distilling, tmp_path / "pair", dtype, changes, settings, sharded=way != "DDP")
    assert_same(pair, alone, way, tolerance)
    assert (pair[3] > 0) == (way in ("FSDP2", "ZeRO, 3")), "the teacher is in pieces where the student is"


@pytest.mark.parametrize("batch_size", [pytest.param(4, marks=pytest.mark.slow), 3])
def test_two_processes_align_as_one(batch_size, tmp_path):
    """Also where they cannot share a step evenly, and where they go on from what was saved."""
    (tmp_path / "alone").mkdir()
    alone = aligning(tmp_path / "alone", batch_size)
    pair = together(aligning, tmp_path / "pair", batch_size)
    for log, weights in ((pair[0], pair[1]), (pair[2], pair[3])):
        assert log["residual_before"] == pytest.approx(alone[0]["residual_before"], rel=EXACT)
        assert log["residual"] == pytest.approx(alone[0]["residual"], rel=EXACT)
        for key, weight in alone[1].items():
            assert (weights[key] - weight).norm() <= EXACT * (1 + weight.norm()), key


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "of_two"), [(4, 4), (2, 1)], ids=["as it says", "one more"])
def test_two_processes_convert_as_one(batch_size, of_two, tmp_path):
    """One sequence a step, which they cannot share, becomes two."""
    (tmp_path / "alone").mkdir()
    weights, report, files = converting(tmp_path / "alone", batch_size)
    theirs, said, written = together(converting, tmp_path / "pair", of_two)
    assert written == files
    assert said["kept_layers"] == report["kept_layers"]
    for stage in ("align", "distil"):
        assert said["stages"][stage]["steps"] == report["stages"][stage]["steps"] == 8 // batch_size
    assert said["evaluation"]["kl"] == pytest.approx(report["evaluation"]["kl"], rel=EXACT)
    for key, weight in weights.items():
        assert (theirs[key] - weight).norm() <= EXACT * (1 + weight.norm()), key


def test_steps_that_cannot_be_shared_are_refused(monkeypatch):
    monkeypatch.setattr(sharing, "processes", lambda: 2)
    with pytest.raises(ValueError, match="2 processes cannot share a step of 1 sequences; raise batch_size"):
        sharing.own_rows(torch.zeros(1, 4))
    monkeypatch.setattr(distillation, "processes", lambda: 2)
    with pytest.raises(
        ValueError, match="2 processes cannot share a step of 3 sequences evenly; give a batch_size that"
    ):
        distillation.own_share(3)


def test_the_comparison_fails_on_processes_that_do_not_talk(tmp_path):
    """Without a group each process trains on its own part of the batch."""
    alone = trained("hybrid", tmp_path / "alone")
    half = trained("hybrid", tmp_path / "half", per_device_train_batch_size=2)
    with pytest.raises(AssertionError):
        assert_same((*half, KINDS["DDP"]), alone, "DDP", EXACT)
