"""A row of a batch never depends on how it was padded or packed: forward and gradients equal each row alone.

transformers' own hybrids let packed rows see each other when only position_ids begin again
(huggingface/transformers#44717, #46093, #46851).
"""

import pytest
import torch
from every_model import every_model
from tiny_fwp import assert_close, tokens
from transformers import DataCollatorWithFlattening, DynamicCache

LENGTHS = (5, 1, 7)
PADDED = {
    "left": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "interior": [0, 1, 1, 0, 0, 1, 1, 1, 0, 1],
}
COLLATORS = {
    "position_ids": {},
    "seq_idx beside position_ids": {"return_seq_idx": True},
    "cu_seq_lens beside position_ids": {"return_flash_attn_kwargs": True},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "everything": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def assert_same_gradients(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-6 * (1 + b.norm())


@pytest.mark.parametrize("where", PADDED)
@pytest.mark.parametrize("use_cache", [False, True], ids=["plain", "with a cache"])
def test_padding_changes_neither_outputs_nor_gradients(name, where, use_cache):
    model = every_model(name, wide=True)
    mask = torch.tensor([PADDED[where], [1] * 10])
    real, ids = mask[0].bool(), tokens(2, 10)
    placed = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = model(ids, attention_mask=mask, position_ids=placed, use_cache=use_cache).logits
    alone = [model(ids[:1, real]).logits, model(ids[1:]).logits]
    assert_close(padded[:1, real], alone[0], 1e-6)
    assert_close(padded[1:], alone[1], 1e-6)
    target = torch.randn_like(padded)
    ours = gradients(model, (padded * target)[mask.bool()].sum())
    theirs = gradients(model, (alone[0] * target[:1, real]).sum() + (alone[1] * target[1:]).sum())
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("collator", COLLATORS)
def test_a_packed_batch_is_its_sequences_one_by_one(name, collator):
    model, rows = every_model(name), [tokens(1, length) for length in LENGTHS]
    packed = DataCollatorWithFlattening(**COLLATORS[collator])([{"input_ids": row[0].tolist()} for row in rows])
    together = model(**packed)
    counted = sum(LENGTHS) - len(LENGTHS)
    separate = [model(row) for row in rows]
    assert_close(together.logits, torch.cat([one.logits for one in separate], dim=1), 1e-6)
    losses = [model(row, labels=row).loss * (row.shape[1] - 1) for row in rows if row.shape[1] > 1]
    loss = sum(losses) / counted
    assert_close(together.loss, loss, 1e-6)
    assert_same_gradients(gradients(model, together.loss), gradients(model, loss))


def test_rows_that_pack_several_sequences_each(name):
    model, ids = every_model(name), tokens(2, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).expand(2, -1)
    separate = torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    assert_close(model(ids, position_ids=positions).logits, separate, 1e-6)


def test_a_mask_of_ones_hides_no_packing(model):
    ids = tokens(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    masked = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    assert_close(masked, model(ids, position_ids=positions).logits, 1e-9)


BOUNDARIES = {"cu_seq_lens_q": torch.tensor([0, 5, 6, 13], dtype=torch.int32), "seq_idx": torch.arange(13)[None] // 5}


@pytest.mark.parametrize("signal", BOUNDARIES)
def test_packed_and_padded_at_once_is_refused(model, signal):
    mask = torch.ones(1, 13, dtype=torch.long)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match=rf"packed \({signal}\) and padded"):
        model(tokens(1), attention_mask=mask, **{signal: BOUNDARIES[signal]})


@pytest.mark.parametrize("signal", [*BOUNDARIES, "position_ids"])
def test_packed_into_a_cache_is_refused(model, signal):
    given = {**BOUNDARIES, "position_ids": torch.arange(13)[None] % 5}[signal]
    with pytest.raises(ValueError, match=signal + ".* cannot use a cache"):
        model(tokens(1), past_key_values=DynamicCache(config=model.config), **{signal: given})


def leaking(model, monkeypatch):
    """A model that does not reset its states where a sequence begins."""
    import hf_fwp.hosts.graft
    import hf_fwp.modeling

    for module in (hf_fwp.modeling, hf_fwp.hosts.graft):
        monkeypatch.setattr(module, "packed_batch", lambda **kwargs: None)
    return model


def test_the_comparison_fails_on_a_model_that_leaks(name, monkeypatch):
    model = leaking(every_model(name), monkeypatch)
    rows = [tokens(1, length) for length in LENGTHS]
    packed = DataCollatorWithFlattening()([{"input_ids": row[0].tolist()} for row in rows])
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(model(**packed).logits, torch.cat([model(row).logits for row in rows], dim=1), 1e-6)
