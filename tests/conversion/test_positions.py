"""Models with a table of positions are given no longer sequences; all others any."""

from dataclasses import replace

import pytest
import torch
from teachers import tiny_teacher
from tiny import TEXTS, byte_tokenizer

from hf_fwp import FwpConfig, FwpForCausalLM
from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.evaluate import decode_speed, evaluate
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.positions import positions_of
from hf_fwp.conversion.recipes import find_recipe
from hf_fwp.conversion.report import measure
from hf_fwp.hosts import HOSTS

LEARNED = {"gpt2", "opt"}
QUIET = {"progress": False, "needles": 0}


@pytest.mark.parametrize("name", HOSTS)
def test_families_with_a_table_read_no_further_and_others_do(name):
    """As the models themselves have it: the last position there is can be read, the next cannot."""
    teacher = tiny_teacher(name, max_position_embeddings=12)
    assert positions_of(teacher) == positions_of(copy_teacher(teacher, layers=[0])) == (12 if name in LEARNED else None)
    longest, ids_BT = 12 if name in LEARNED else 30, torch.ones(1, 30, dtype=torch.long)
    with torch.no_grad():
        teacher(input_ids=ids_BT[:, :longest])
        if name in LEARNED:
            with pytest.raises(IndexError):
                teacher(input_ids=ids_BT[:, : longest + 1])


@pytest.mark.parametrize(("kind", "expected"), [("learned", 12), ("sinusoidal", None), ("rope", None), ("none", None)])
def test_models_of_our_own(kind, expected):
    shapes = {"vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2}
    config = FwpConfig(**shapes, position_embedding=kind, max_position_embeddings=12)
    assert positions_of(FwpForCausalLM(config)) == expected


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_speed_is_measured_up_to_the_last_position(name):
    teacher = tiny_teacher(name, max_position_embeddings=12)
    rows = decode_speed(teacher, (8, 9, 10, 100), new_tokens=2, progress=False)
    assert [row["length"] for row in rows] == [8, 9]
    rotary = decode_speed(tiny_teacher("llama", max_position_embeddings=12), (30,), new_tokens=2, progress=False)
    assert [row["length"] for row in rotary] == [30]
    ids_NT, student = torch.ones(2, 8, dtype=torch.long), copy_teacher(teacher, layers=[0])
    parts = {"baseline_tokens": 0, "residual_tokens": 0, "needles": 0, "progress": False}
    assert "decode" not in measure(student, teacher, ids_NT, lengths=(100,), **parts)


def test_longer_sequences_are_refused_before_anything_starts():
    teacher, long_NT = tiny_teacher("gpt2", max_position_embeddings=64), torch.ones(2, 65, dtype=torch.long)
    given = {"tokenizer": byte_tokenizer(), **QUIET}
    told = "sequence_length is 512, but GPT2LMHeadModel has 64 positions; give at most 64"
    for dry_run in (False, True):
        with pytest.raises(ValueError, match=told):
            evaluate(teacher, data=TEXTS, dry_run=dry_run, **given)
        with pytest.raises(ValueError, match="the length of the token ids is 65, but"):
            evaluate(tiny_teacher("llama"), against=teacher, data=long_NT, dry_run=dry_run, **given)
    assert evaluate(teacher, data=long_NT[:, :64], **given)["sequence_length"] == 64
    recipe = replace(find_recipe("closed-form"), sequence_length=64)
    for changes, told in [({"sequence_length": 65}, "sequence_length is 65"), (EXTENDED, "extend_length is 96")]:
        with pytest.raises(ValueError, match=told):
            convert(teacher, tokenizer=byte_tokenizer(), data=TEXTS, recipe=replace(recipe, **changes))


EXTENDED = {"extend_tokens": 960, "extend_length": 96}
