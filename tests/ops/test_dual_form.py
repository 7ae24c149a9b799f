"""I41: a linear layer trained by gradient descent is the layer of the start, and attention over its training."""

import pytest
import torch
from torch import nn

from hf_fwp import dual_form


def trained(bias: bool = True, steps: int = 5):
    """A layer inside a deep network, trained with a changing rate, several passes per step and other uses between."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=bias), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with dual_form(net[2], optimizer) as memory:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.zero_grad()
            for _ in range(2):
                net(torch.randn(2, 7, 4).double()).square().sum().backward()
            with torch.no_grad():
                net(torch.randn(3, 4).double())
            optimizer.step()
    return net, memory


@pytest.mark.parametrize("bias", [True, False])
def test_i41_the_trained_layer_is_attention_over_its_training(bias):
    net, memory = trained(bias)
    x = torch.randn(11, 6).double()
    torch.testing.assert_close(memory(x), net[2](x), rtol=1e-10, atol=1e-10)
    assert memory.inputs.shape == (5 * 2 * 14, 6)
    assert memory.attention(x).shape == (11, 140)
    untrained = nn.functional.linear(x, memory.weight, memory.bias)
    assert not torch.allclose(untrained, net[2](x), atol=1e-2)


def test_it_fails_for_patterns_that_were_forgotten_or_weighted_wrongly():
    net, memory = trained()
    x = torch.randn(11, 6).double()
    memory._errors[-1] *= 1.01
    assert not torch.allclose(memory(x), net[2](x), rtol=1e-10, atol=1e-10)


def test_nothing_is_recorded_any_more_afterwards():
    net, memory = trained()
    net(torch.randn(2, 4).double()).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert len(memory.inputs) == 140
    assert not net[2]._forward_hooks


def test_without_training_it_is_the_layer():
    net, memory = trained(steps=0)
    x = torch.randn(2, 6).double()
    assert torch.equal(memory(x), net[2](x))


REFUSED = {
    "plain gradient descent, not for this Adam": lambda layer: torch.optim.Adam(layer.parameters()),
    "plain gradient descent, not for this SGD": lambda layer: torch.optim.SGD(layer.parameters(), lr=1, momentum=0.9),
    "does not train this layer": lambda layer: torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1),
    "have different settings": lambda layer: torch.optim.SGD([{"params": [p]} for p in layer.parameters()], lr=1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_dual_form_is_named(message):
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=message), dual_form(layer, REFUSED[message](layer)):
        pass
