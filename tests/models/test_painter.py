"""The fast weight painter against its equations (I33), and that it learns to paint."""

import pytest
import torch

from hf_fwp import FastWeightPainter

VARIANTS = {
    "delta": {},
    "oja": {"learning_rule": "oja"},
    "latent inputs": {"inputs": "latent", "latent_start": True},
    "squashed": {"tanh_values": True, "tanh_inputs": True, "tanh_output": True, "latent_start": True},
    "raw keys": {"softmax_keys": False},
    "raw oja": {"softmax_keys": False, "learning_rule": "oja", "tanh_values": True},
}


def painter(**changes):
    torch.manual_seed(0)
    return FastWeightPainter(5, **{"side": 6, "channels": 2, "steps": 4, "hidden_size": 16, **changes}).double()


def by_hand(model, latent, *, learning_rule="delta", softmax_keys=True, tanh_values=False, tanh_output=False, **_):
    z, _ = model.lstm(model._inputs(latent), model._start(latent))
    pictures = torch.zeros(len(latent), model.channels, model.side, model.side).double()
    for n in range(len(latent)):
        for c, rows in enumerate(model.kvb_proj(z[n]).unflatten(-1, (model.channels, -1)).unbind(1)):
            W = torch.zeros(model.side, model.side).double()  # of the paper: rows are values
            for t, row in enumerate(rows):
                k, v, β = row[: model.side], row[model.side : -1], row[-1].sigmoid()
                v = v.tanh() if tanh_values else v
                k = k - W.T @ v if learning_rule == "oja" else k
                k = k.softmax(-1) if softmax_keys else k
                if learning_rule == "oja":
                    W = W + β * torch.outer(v, k)
                else:
                    W = W + torch.outer(v, k) if t == 0 else W + β * torch.outer(v - W @ k, k)
            pictures[n, c] = W
    return pictures.tanh() if tanh_output else pictures


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_its_equations(variant):
    model, latent = painter(**VARIANTS[variant]), torch.randn(3, 5).double()
    images = model.generate_matrix(latent)
    assert images.shape == (3, 2, 6, 6)
    torch.testing.assert_close(images, by_hand(model, latent, **VARIANTS[variant]), rtol=1e-10, atol=1e-10)
    assert torch.equal(model(latent), images)
    other = by_hand(model, latent, learning_rule="oja" if variant != "oja" else "delta")
    assert variant in ("raw oja", "squashed") or not torch.allclose(images, other, atol=1e-6)
    grads = torch.autograd.grad(images.square().sum(), list(model.parameters()))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert all(grad.norm() > 0 for grad in grads)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_i33_the_rank_is_that_of_the_steps(steps):
    images = painter(steps=steps)(torch.randn(3, 5).double())
    assert set(torch.linalg.matrix_rank(images, rtol=1e-10).flatten().tolist()) == {steps}


@pytest.mark.parametrize(("learning_rule", "same"), [("delta", True), ("oja", False)])
def test_i33_the_first_step_of_the_delta_rule_is_not_gated(learning_rule, same):
    latent, images = torch.randn(2, 5).double(), []
    for bias in (0.0, 3.0):
        model = painter(steps=1, learning_rule=learning_rule)
        model.kvb_proj.bias.data.view(2, -1)[:, -1] = bias
        images.append(model(latent))
    assert torch.equal(*images) == same
    model = painter(steps=2)
    before = model(latent)
    model.kvb_proj.bias.data.view(2, -1)[:, -1] += 1
    assert not torch.equal(model(latent), before)


REFUSED = {
    "choose from 'delta', 'oja'": {"learning_rule": "hebb"},
    "choose from 'steps', 'latent'": {"inputs": "noise"},
    "a size is 0": {"steps": 0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_mistake_is_named(message):
    with pytest.raises(ValueError, match=message):
        painter(**REFUSED[message])
    with pytest.raises(ValueError, match="it must be"):
        painter()(torch.randn(5).double())
