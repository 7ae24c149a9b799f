"""Padding must change nothing, whatever it holds; packed sequences must not see each other (I44)."""

import pytest
import torch
from tiny_fwp import assert_close, tiny_model, tokens

MASKS = {
    "left": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "interior": [0, 1, 1, 0, 0, 1, 1, 1, 0, 1],
}
LENGTHS = (4, 1, 6)


@pytest.mark.parametrize("where", MASKS)
def test_padded_equals_unpadded_even_with_nan(kind, where):
    # a window counts positions, padded ones too, so it must hold all of them to see the same tokens
    model = tiny_model(kind, **({"sliding_window": 20} if kind == "hybrid" else {}))
    mask = torch.tensor([MASKS[where], [1] * 10])
    embeds = torch.randn(2, 10, 32, dtype=torch.float64)
    poisoned = torch.where(mask[..., None].bool(), embeds, float("nan")).requires_grad_()
    full = embeds[:1, mask[0].bool()].clone().requires_grad_()
    kwargs = {"use_cache": False}
    padded_out = model.model(inputs_embeds=poisoned, attention_mask=mask, **kwargs).last_hidden_state
    real_out = padded_out[:1, mask[0].bool()]
    alone_out = model.model(inputs_embeds=full, **kwargs).last_hidden_state
    assert_close(real_out, alone_out)
    target = torch.randn_like(alone_out)
    (padded_grad,) = torch.autograd.grad((real_out * target).sum(), poisoned, retain_graph=True)
    (alone_grad,) = torch.autograd.grad((alone_out * target).sum(), full)
    assert_close(padded_grad[:1, mask[0].bool()], alone_grad)
    assert (padded_grad[0, ~mask[0].bool()] == 0).all()
    parameter_grads = torch.autograd.grad((real_out * target).sum(), list(model.model.layers.parameters()))
    assert all(torch.isfinite(grad).all() for grad in parameter_grads)


def test_padding_leaves_the_state_bit_identical(model):
    ids = tokens()
    cache = model(ids, use_cache=True).past_key_values
    before = {name: state.clone() for layer in mixers(model, cache) for name, state in layer.states.items()}
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :3])], dim=1)
    model(ids[:, :3], attention_mask=mask, past_key_values=cache, use_cache=True)
    after = {name: state for layer in mixers(model, cache) for name, state in layer.states.items()}
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)


def mixers(model, cache):
    return [cache.layers[layer_idx] for layer_idx in model.config.fast_weight_layers]


def signals(batch: int) -> dict[str, dict[str, torch.Tensor]]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).expand(batch, -1)
    numbers = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).expand(batch, -1)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    given = {"position_ids": {"position_ids": positions}, "seq_idx": {"seq_idx": numbers}}
    if batch == 1:
        given["cu_seq_lens_q"] = {"cu_seq_lens_q": ends}
    return given


@pytest.mark.parametrize(("batch", "signal"), [(1, s) for s in signals(1)] + [(2, s) for s in signals(2)])
def test_packed_equals_separate(kind, batch, signal):
    model = tiny_model(kind)
    ids = tokens(batch, sum(LENGTHS))
    packed = model(ids, **signals(batch)[signal]).logits
    separate = torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    assert_close(packed, separate)
    target = torch.randn_like(packed)
    weights = [p for p in model.parameters() if p.requires_grad]
    packed_grads = torch.autograd.grad((packed * target).sum(), weights)
    separate_grads = torch.autograd.grad((separate * target).sum(), weights)
    for packed_grad, separate_grad in zip(packed_grads, separate_grads, strict=True):
        assert (packed_grad - separate_grad).norm() <= 1e-9 * (1 + separate_grad.norm())


@pytest.mark.parametrize("signal", ["position_ids", "seq_idx"])
def test_packed_equals_separate_when_compiled(signal):
    """What depends on values is asked between two graphs; with cu_seq_lens_q there is one."""
    model = tiny_model()
    ids = tokens(1, sum(LENGTHS))
    compiled = torch.compile(model, backend="eager")
    separate = torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    assert_close(compiled(ids, **signals(1)[signal]).logits, separate)
    assert_close(compiled(ids, position_ids=torch.arange(ids.shape[1])[None]).logits, model(ids).logits)
    torch.compiler.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(whole(ids, **signals(1)["cu_seq_lens_q"]).logits, separate)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="give cu_seq_lens_q to stay in one graph"):
        whole(ids, **signals(1)[signal])


def test_ordinary_positions_are_not_packing(model):
    ids = tokens()
    assert_close(model(ids, position_ids=torch.arange(13).expand(2, -1)).logits, model(ids).logits)


def test_a_mask_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="3 dimensions"):
        tiny_model()(tokens(), attention_mask=torch.ones(1, 13, 13))
