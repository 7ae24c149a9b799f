"""Feature maps: sizes, laws (I36, I37), and what starts as what."""

import pytest
import torch
from tiny_fwp import assert_close, tiny_model, tokens

from hf_fwp.conversion.memory import recompute_activations
from hf_fwp.features import FEATURES, QK_NORMS, Favor, Hedgehog, feature_size, make_feature_map

x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*FEATURES, "dpfp:3", "favor:10", "favor:10,eps=0,redraw=1", "hedgehog:2"])
def test_size_and_sharing(name):
    features = make_feature_map(name, 8).double()
    q, k = features(x, x)
    assert q.shape == k.shape == (2, 5, 3, feature_size(name, 8))
    assert torch.equal(q, k)


def test_i36_dpfp_is_homogeneous_of_degree_two_and_non_negative():
    dpfp = make_feature_map("dpfp:3", 8)
    phi = dpfp(x, x)[0]
    assert (phi >= 0).all()
    assert_close(dpfp(3 * x, x)[0], 9 * phi)


def test_dpfp_of_one_vector_by_hand():
    phi = make_feature_map("dpfp:1", 2)(torch.tensor([2.0, -3.0]), x)[0]
    # r = [2, 0, 0, 3]; rolled by one: [3, 2, 0, 0]
    assert phi.tolist() == [6, 0, 0, 0]


def test_i36_favor_estimates_the_exponential_kernel():
    favor = Favor(8, 20000).double()
    a, b = 0.3 * torch.randn(8).double(), 0.3 * torch.randn(8).double()
    phi_a, phi_b = favor(a, b)
    assert abs((phi_a @ phi_b - (a @ b).exp()).item()) < 0.05 * (a @ b).exp().item()


def test_favor_settings():
    plain, bare = Favor(8, 16).double(), Favor(8, 16, eps=0, prescale=True).double()
    bare.omega = plain.omega
    assert_close(plain(x, x)[0] - bare(8**0.25 * x, x)[0], torch.full((2, 5, 3, 32), 1e-4 * 32**-0.5).double(), 1e-6)


def test_favor_draws_anew_in_training_only_and_where_it_is_asked_for():
    favor = Favor(8, 16, redraw=True)
    start = favor.omega
    favor.eval().advance()
    assert favor.omega is start
    favor.train().advance()
    assert not torch.equal(favor.omega, start)
    gram = favor.omega[:, :8].T @ favor.omega[:, :8]
    assert_close(gram, torch.diag(gram.diagonal()), 1e-5)
    never = Favor(8, 16)
    start = never.omega
    never.advance()
    assert never.omega is start


def test_checkpointing_meets_the_same_random_features():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("linear_attention", feature_map="favor:8,redraw=1", dropout=0.2).train()
        if checkpointing:
            recompute_activations(model, on=True)
        torch.manual_seed(0)
        loss = sum(model(tokens(), labels=tokens()).loss for _ in range(2))  # the second forward draws others
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_favor_directions_are_orthogonal():
    omega = Favor(8, 8).omega
    gram = omega.T @ omega
    assert_close(gram, torch.diag(gram.diagonal()), 1e-5)


def test_hedgehog_starts_as_a_softmax_over_both_signs():
    q, _ = Hedgehog(8).double()(x, x)
    assert_close(q, torch.cat([x, -x], -1).softmax(-1))
    assert_close(q.sum(-1), torch.ones_like(q.sum(-1)))
    sharper = make_feature_map("hedgehog:2", 8).double()(x, x)[0]
    assert_close(sharper, torch.cat([2 * x, -2 * x], -1).softmax(-1))


@pytest.mark.parametrize(("name", "norm"), [("softmax", "none"), ("elu1", "sum"), ("relu", "sum"), ("dpfp:3", "sum")])
def test_i37_keys_that_sum_to_one_make_contractions(name, norm):
    keys = QK_NORMS[norm](make_feature_map(name, 8)(x, x)[1])
    assert (keys.norm(dim=-1) <= 1).all()
    eye = torch.eye(keys.shape[-1], dtype=torch.float64)
    for k, beta in zip(keys.flatten(0, -2), torch.linspace(0, 2, 30), strict=True):
        assert torch.linalg.matrix_norm(eye - beta * torch.outer(k, k), ord=2) <= 1 + 1e-12


def test_norms():
    phi = x.abs()
    assert_close(QK_NORMS["l2"](phi).square().sum(-1), torch.ones(2, 5, 3).double(), 1e-5)
    summed = QK_NORMS["sum"](phi)
    assert_close(summed.sum(-1), torch.ones(2, 5, 3).double(), 1e-4)
    assert (summed.norm(dim=-1) <= 1).all()
    assert QK_NORMS["none"](phi) is phi
