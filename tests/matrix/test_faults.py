"""Killed at any moment, or with no room left on the disk: nothing is lost, and the run goes on to the same result."""

import subprocess

import pytest
import torch
from interrupted import convert, names_in, run_with_kills, train
from safetensors.torch import load_file
from tiny import teacher_folder
from transformers import AutoModelForCausalLM

from hf_fwp.conversion.distil import newest_checkpoint

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


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own, and a function that sets the size of that disk."""

    def resize(size, option="remount"):
        mount = ["mount", "-t", "tmpfs", "-o", f"{option},size={size}k", "tmpfs", str(tmp_path)]
        return subprocess.run(mount, capture_output=True, text=True)

    made = resize(1000, option="rw")
    if made.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {made.stderr.strip()}")
    yield tmp_path, resize
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


# where the disk is full: while a stage is saved; a step of align; the Trainer's model, its optimiser, the last model
@pytest.mark.parametrize("size", [80, 200, 400, 600, 900, 1200])
def test_a_full_disk_is_named_and_what_was_finished_is_kept(size, teacher, whole, disk):
    folder, resize = disk
    resize(size)
    with pytest.raises(OSError, match=r"no space left for .*made\.partial.*resume=True"):
        convert(teacher, folder / "made")
    assert not (folder / "made").exists()
    if (folder / "made.partial" / "solve").is_dir():
        assert AutoModelForCausalLM.from_pretrained(folder / "made.partial" / "solve").num_parameters()
    resize(8000)
    convert(teacher, folder / "made")
    weights, expected = load_file(folder / "made" / "model.safetensors"), whole("conversion")
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_a_full_disk_leaves_the_checkpoint_before(disk):
    folder, resize = disk
    with pytest.raises(Exception, match=r"No space left|unexpected pos"):
        train(folder / "made")
    kept = newest_checkpoint(folder / "made.steps")
    assert kept is not None
    assert AutoModelForCausalLM.from_pretrained(kept).num_parameters()
    resize(8000)
    train(folder / "made")
    assert (folder / "made" / "model.safetensors").is_file()
