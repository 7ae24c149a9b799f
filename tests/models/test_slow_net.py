"""The LSTM as slow network is PyTorch's own, whatever is padded, packed or carried, and the layer reads it."""

import pytest
import torch
from tiny_fwp import assert_close, tiny_model, tokens

import hf_fwp
from hf_fwp import FastWeightLayer, MixerOptions
from hf_fwp.slow_net import SlowLstm

SIZES = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "state_heads": "grouped"}
WIDTHS = [24, 12, 12, 2]


@pytest.fixture
def lstm():
    torch.manual_seed(0)
    module = SlowLstm(5, [4, 3]).double()
    module.init_weights()
    return module


def by_torch(lstm, x_TD, h=None, c=None):
    """PyTorch's module on one sequence: outputs, h and c."""
    plain = torch.nn.LSTM(5, 7, batch_first=True).double()
    plain.load_state_dict(lstm.state_dict())
    given = None if h is None else (h[None, None], c[None, None])
    out, (h, c) = plain(x_TD[None], given)
    return out[0], h[0, 0], c[0, 0]


def test_plain_padded_packed_and_one_token(lstm):
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    states = {name: torch.randn(3, 7, dtype=torch.float64) for name in ("slow_h", "slow_c")}
    for sizes in ([6, 6, 6], [2, 6, 0]):
        mask = torch.arange(6) < torch.tensor(sizes)[:, None]
        parts, kept = lstm(x, states, mask_BT=None if min(sizes) == 6 else mask, cu_seqlens=None)
        for row, size in enumerate(sizes):
            if size == 0:
                assert all(torch.equal(kept[name][row], states[name][row]) for name in states)
                continue
            out, h, c = by_torch(lstm, x[row, :size], states["slow_h"][row], states["slow_c"][row])
            assert_close(torch.cat(parts, dim=-1)[row, :size], out)
            assert_close(kept["slow_h"][row], h)
            assert_close(kept["slow_c"][row], c)
    ends = torch.tensor([0, 2, 2, 6])
    parts, _ = lstm(x[:1], {}, mask_BT=None, cu_seqlens=ends)
    expected = torch.cat([by_torch(lstm, x[0, :2])[0], by_torch(lstm, x[0, 2:])[0]])
    assert_close(torch.cat(parts, dim=-1)[0], expected)
    _, kept = lstm(x[:, :1], states, mask_BT=torch.tensor([[True], [False], [True]]), cu_seqlens=None)
    assert torch.equal(kept["slow_c"][1], states["slow_c"][1])
    assert_close(kept["slow_c"][2], by_torch(lstm, x[2, :1], states["slow_h"][2], states["slow_c"][2])[2])


def test_a_batch_of_padding_changes_nothing(lstm):
    states = {name: torch.randn(2, 7, dtype=torch.float64) for name in ("slow_h", "slow_c")}
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    parts, kept = lstm(torch.randn(2, 4, 5).double(), states, mask_BT=nothing, cu_seqlens=None)
    assert [part.shape for part in parts] == [(2, 4, 4), (2, 4, 3)]
    assert all(torch.equal(kept[name], states[name]) for name in states)


def test_the_layer_reads_q_k_v_and_beta_off_the_lstm():
    torch.manual_seed(0)
    options = {"rule_options": {"slow_net": "lstm"}, "conv_size": 0, "feature_map": "identity", "output_norm": False}
    layer = FastWeightLayer(MixerOptions(rule="delta_net", **SIZES, **options), 0).double()
    assert not [name for name in ("q_proj", "k_proj", "v_proj", "b_proj") if hasattr(layer, name)]
    plain = torch.nn.LSTM(24, sum(WIDTHS), batch_first=True).double()
    plain.load_state_dict(layer.slow_net.state_dict())
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    q, k, v, b = plain(x)[0].split(WIDTHS, dim=-1)
    q, k, v = (part.unflatten(-1, (-1, 6)) for part in (q, k, v))
    expected, _ = hf_fwp.delta_rule(q, k, v, b.sigmoid(), use_qk_l2norm_in_kernel=True)
    assert_close(layer.mixed_reads(x), expected.flatten(2))


@torch.no_grad()
def test_its_states_are_float32_under_bf16(lstm):
    x = torch.randn(2, 300, 5)
    parts, kept = lstm.bfloat16()(x.bfloat16(), {}, mask_BT=None, cu_seqlens=None)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert {state.dtype for state in kept.values()} == {torch.float32}
    exact, _ = lstm.double()(x.bfloat16().double(), {}, mask_BT=None, cu_seqlens=None)
    assert_close(torch.cat(parts, dim=-1).double(), torch.cat(exact, dim=-1), 5e-3)


@torch.no_grad()
def test_it_compiles_without_a_break():
    model = tiny_model("delta_net of an LSTM", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tokens(), use_cache=False).logits, model(tokens(), use_cache=False).logits)
