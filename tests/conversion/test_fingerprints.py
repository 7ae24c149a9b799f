"""Fingerprints: the same for the same, others for others."""

import pytest
import torch
from tiny import TEXTS, byte_tokenizer, tiny_llama

from hf_fwp.conversion.fingerprints import text_fingerprint, weights_fingerprint
from hf_fwp.conversion.teacher import empty_teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_are_told_apart(dtype):
    model = tiny_llama().to(dtype)
    said = weights_fingerprint(model)
    assert said == weights_fingerprint(tiny_llama().to(dtype))
    assert said != weights_fingerprint(tiny_llama(seed=1).to(dtype))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert said != weights_fingerprint(model)


def test_the_number_of_threads_makes_no_difference():
    model, threads = tiny_llama(), torch.get_num_threads()
    torch.nn.init.normal_(model.lm_head.weight)
    said = weights_fingerprint(model)
    torch.set_num_threads(3)
    try:
        assert weights_fingerprint(model) == said
    finally:
        torch.set_num_threads(threads)


def test_weights_that_stay_in_files_are_told_apart_by_them(tmp_path):
    said = []
    for name, size in (("a/t", "1MB"), ("b/t", "1MB"), ("c/t", "20kB"), ("d/other", "1MB")):
        tiny_llama().save_pretrained(tmp_path / name, max_shard_size=size)
        said.append(weights_fingerprint(empty_teacher(str(tmp_path / name), dtype=torch.float32)))
    assert said[0] == said[1]
    assert len(set(said)) == 3


def test_a_text_is_told_by_what_is_measured_and_by_its_beginning():
    def of(train, test=TEXTS, tokens=64):
        data = train if test is None else {"train": train, "test": test}
        return text_fingerprint(data, byte_tokenizer(), tokens=tokens)

    assert of(TEXTS) == of(list(TEXTS)) == of(TEXTS, [*TEXTS, "more than is measured"])
    others = [of(TEXTS[1:]), of(TEXTS, TEXTS[1:]), of(TEXTS[1:], None), of(TEXTS, tokens=65)]
    assert len({of(TEXTS), *others}) == 5
