"""hf-fwp bench convert."""

import json

import pytest
import tiny

from hf_fwp.conversion.timing import bench_convert


@pytest.mark.slow
def test_a_conversion_is_timed_stage_by_stage(tmp_path, capsys):
    teacher = tiny.teacher_folder(tmp_path / "teacher")
    (tmp_path / "corpus.txt").write_text("\n".join(tiny.TEXTS * 8))
    told = tmp_path / "told.json"
    result = bench_convert(teacher, data=tmp_path / "corpus.txt", json=told)
    assert json.loads(told.read_text()) == result
    *stages, whole = result["rows"]
    assert "solve" in [row["what"] for row in stages]
    assert whole["what"] == "all stages"
    assert abs(whole["ms"] - sum(row["ms"] for row in stages)) < 1e-6 * whole["ms"]
    assert result["conversion"]["peak_memory_bytes"] > result["conversion"]["teacher_bytes"] > 0
    assert "peak memory" in capsys.readouterr().out
