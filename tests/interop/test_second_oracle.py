"""Runs oracle.py and fla_models.py, which compare with flash-linear-attention, where that library is installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from fla_kinds import INSTALL

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason=f"needs flash-linear-attention: {INSTALL}")
@pytest.mark.parametrize("script", ["oracle.py", "fla_models.py"])
def test_i50_flash_linear_attention_says_the_same(script):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / script)]
    run = subprocess.run(command, cwd=HERE.parent.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
