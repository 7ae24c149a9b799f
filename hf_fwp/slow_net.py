"""A slow network that remembers earlier tokens: an LSTM in place of the projections.

[q; k; v; b]_t = h_t,    h_t, c_t = LSTM(x_t, h_{t-1}, c_{t-1})              code of Irie et al. 2021
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from transformers import initialization as init

from .options import MixerOptions
from .rules.base import keep_valid
from .rules.checks import sequence_bounds

CARRIED = ("slow_h", "slow_c")


class SlowLstm(nn.Module):
    """One LSTM whose hidden state is everything that a layer projects: x [B,T,D] -> parts of the given widths.

    Carried are h and c [B, sum of the widths] in float32 (float64 for float64 inputs). The parameters are those of
    torch.nn.LSTM by name and shape; a module of that class cannot be compiled.
    """

    def __init__(self, hidden: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths, self.hidden_size = list(widths), sum(widths)
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * self.hidden_size, hidden))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * self.hidden_size, self.hidden_size))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * self.hidden_size))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * self.hidden_size))
        self.init_weights()

    def init_weights(self) -> None:
        """Uniform in 1 / sqrt(size), as PyTorch starts every LSTM."""
        bound = self.hidden_size**-0.5
        for weight in self.parameters():
            init.uniform_(weight, -bound, bound)

    def forward(
        self, x_BTD: Tensor, states: dict[str, Tensor], *, mask_BT: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """(parts [B,T,width], {"slow_h", "slow_c"}). Real tokens stand before padded ones, which give anything."""
        batch, length, _ = x_BTD.shape
        x = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        h, c = (states[name] if name in states else x.new_zeros(count, self.hidden_size) for name in CARRIED)
        with torch.autocast(x.device.type, enabled=False):
            if cu_seqlens is not None:
                sizes = [end - start for start, end in sequence_bounds(cu_seqlens, length)]
                out, h, c = self._ragged(x[0].split(sizes), h, c)
                out = torch.cat([row[:size] for row, size in zip(out, sizes, strict=True)])[None]
            elif mask_BT is None:
                out, h, c = self._even(x, h, c)
            elif length == 1:  # a decode step does not wait for the device
                out, *new = self._even(x, h, c)
                h, c = (keep_valid(after, mask_BT[:, 0], before) for after, before in zip(new, (h, c), strict=True))
            else:
                rows = [row[:size] for row, size in zip(x, mask_BT.sum(1).tolist(), strict=True)]
                out, h, c = self._ragged(rows, h, c)
                out = nn.functional.pad(out, (0, 0, 0, length - out.shape[1]))
        return list(out.to(x_BTD.dtype).split(self.widths, dim=-1)), dict(zip(CARRIED, (h, c), strict=True))

    def _weights(self, like: Tensor) -> list[Tensor]:
        return [weight.to(like.dtype) for weight in self.parameters()]

    def _even(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # in training always: cuDNN needs it for a backward, and without dropout it changes nothing
        out, h, c = torch.lstm(x, (h[None], c[None]), self._weights(x), True, 1, 0.0, True, False, True)
        return out, h[0], c[0]

    def _ragged(self, rows: Sequence[Tensor], h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs [N, L, size] of rows [L_n, D], and h and c after each row; one without tokens keeps its own."""
        real = [n for n, row in enumerate(rows) if len(row)]
        if not real:
            return h.new_zeros(len(rows), 0, self.hidden_size), h, c
        packed = pack_sequence([rows[n] for n in real], enforce_sorted=False)
        index = torch.tensor(real, device=h.device)
        order = index[packed.sorted_indices]
        given = (h[order][None], c[order][None])
        data, new_h, new_c = torch.lstm(
            packed.data, packed.batch_sizes, given, self._weights(h), True, 1, 0.0, True, False
        )
        outs, _ = pad_packed_sequence(packed._replace(data=data), batch_first=True)
        out = outs.new_zeros(len(rows), *outs.shape[1:]).index_copy(0, index, outs)
        return out, h.index_copy(0, order, new_h[0]), c.index_copy(0, order, new_c[0])


def make_slow_net(options: MixerOptions, *, takes_beta: bool) -> SlowLstm | None:
    """The LSTM that stands for the projections of q, k, v and beta, where the rule's options ask for it."""
    if options.rule_options.get("slow_net", "linear") == "linear":
        return None
    query, key = options.num_attention_heads * options.head_dim, options.num_key_value_heads * options.head_dim
    rates = [options.num_states] if takes_beta else []
    return SlowLstm(options.hidden_size, [query, key, options.num_value_heads * options.value_head_dim, *rates])
