"""The decode step in ONNX, and what runs it: tokens in, tokens out, by onnxruntime.

folder/decode_step.onnx         inputs input_ids [B, 1], position_ids [B, 1], layer.N.NAME ...
                                outputs logits [B, V], new.layer.N.NAME ...
folder/initial_state.npz        the states before the first token, for one row
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP, INITIAL, NEW = "decode_step.onnx", "initial_state.npz", "new."


def write(model: Any, folder: Path) -> None:
    """Write the decode step of a model of this package.

    Raises:
        ValueError: the model has a layer that cannot be exported, or is not in float32 or float64.
        ImportError: onnxscript is not installed.
    """
    import torch

    from .decode_step import DecodeStep

    check(model)
    training = model.training
    try:
        step = DecodeStep(model.eval())
        program = step.program()
        names = step.names
        written = torch.onnx.export(
            program,
            input_names=["input_ids", "position_ids", *names],
            output_names=["logits", *(f"{NEW}{name}" for name in names)],
            verbose=False,
        )
    finally:
        model.train(training)
    assert written is not None
    folder.mkdir(parents=True, exist_ok=True)
    written.save(folder / STEP)
    initial: Any = {name: state.cpu().numpy() for name, state in step.initial.items()}
    np.savez(folder / INITIAL, **initial)


def check(model: Any) -> None:
    """Raise ValueError for a model in the wrong dtype, or with a layer that cannot be exported."""
    import torch

    from .decode_step import refuse_what_cannot_be_exported

    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the model is in {model.dtype}; onnxruntime computes the step in float32: use model.float()")
    refuse_what_cannot_be_exported(model)


class OnnxDecoder:
    """Runs what `hf_fwp.export(..., format="onnx")` wrote.

        decoder = hf_fwp.OnnxDecoder("folder")
        tokens = decoder.generate(ids, max_new_tokens=20)      # greedy, as model.generate
        logits, states = decoder(ids[:, 0], 0, decoder.start(rows=1))

    Raises:
        ValueError: the folder holds no such step.
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        file = Path(folder) / STEP
        if not file.is_file():
            raise ValueError(f"{folder} holds no {STEP}; write one with hf_fwp.export(model, folder, format='onnx')")
        from onnxruntime import InferenceSession

        self.session = InferenceSession(str(file), providers=["CPUExecutionProvider"])
        with np.load(Path(folder) / INITIAL) as initial:
            self.initial: dict[str, NDArray[Any]] = dict(initial)
        self.asked = {given.name for given in self.session.get_inputs()}

    def start(self, *, rows: int) -> dict[str, NDArray[Any]]:
        """The states before the first token."""
        return {name: np.repeat(state, rows, axis=0) for name, state in self.initial.items()}

    def __call__(
        self, token_B: NDArray[np.int64], position: int, states: dict[str, NDArray[Any]]
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        """One token of every row: its logits [B, V], and the states after it."""
        ids_B1 = np.asarray(token_B, dtype=np.int64)[:, None]
        given = {"input_ids": ids_B1, "position_ids": np.full_like(ids_B1, position), **states}
        found: Any = self.session.run(None, {name: x for name, x in given.items() if name in self.asked})
        logits_BV, *after = found
        return logits_BV, dict(zip(states, after, strict=True))

    def generate(
        self, input_ids: Any, *, max_new_tokens: int = 20, eos_token_id: int | None = None
    ) -> NDArray[np.int64]:
        """Greedy continuation of a prompt [B, T] without padding; rows that ended are filled with eos_token_id."""
        ids_BT = np.asarray(input_ids, dtype=np.int64)
        if ids_BT.ndim != 2 or not ids_BT.shape[1]:
            raise ValueError(f"input_ids has shape {list(ids_BT.shape)}; give [rows, tokens], with at least one token")
        states = self.start(rows=ids_BT.shape[0])
        ended_B = np.zeros(ids_BT.shape[0], dtype=bool)
        logits_BV = np.empty(0)
        for t in range(ids_BT.shape[1]):
            logits_BV, states = self(ids_BT[:, t], t, states)
        for _ in range(max_new_tokens):
            token_B = logits_BV.argmax(-1)
            token_B = token_B if eos_token_id is None else np.where(ended_B, eos_token_id, token_B)
            ids_BT = np.concatenate([ids_BT, token_B[:, None]], axis=1)
            ended_B |= token_B == eos_token_id
            if ended_B.all():
                break
            logits_BV, states = self(token_B, ids_BT.shape[1] - 1, states)
        return ids_BT
