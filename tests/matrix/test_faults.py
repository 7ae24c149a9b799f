"""Killed at any moment, or with no room left on the disk: nothing is lost, and the run goes on to the same result."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from interrupted import convert, names_in, run_with_kills, train
from safetensors.torch import load_file
from tiny import teacher_folder
from tiny_fwp import tiny_model

KILLS = 4
RUNS = {"conversion": convert, "training": train}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return teacher_folder(tmp_path_factory.mktemp("teacher") / "tiny", layers=3)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """What a run makes that nobody kills, and how many files it writes; each run once."""
    found = {}

    def of(kind):
        if kind not in found:
            output = tmp_path_factory.mktemp("whole") / "made"
            assert run_with_kills(RUNS[kind], *arguments(kind, teacher, output), names=2, kills=0, seed=0) == 0
            found[kind] = load_file(output / "model.safetensors")
        return found[kind]

    return of


def arguments(kind, teacher, output):
    return (teacher, output) if kind == "conversion" else (output,)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize("kind", RUNS)
def test_killed_at_random_points_it_ends_with_the_same_weights(kind, seed, teacher, whole, tmp_path):
    output = tmp_path / "made"
    killed = run_with_kills(RUNS[kind], *arguments(kind, teacher, output), names=60, kills=KILLS, seed=seed)
    assert killed == KILLS
    weights, expected = load_file(output / "model.safetensors"), whole(kind)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert not [name for name in names_in(tmp_path) if ".partial" in name]
