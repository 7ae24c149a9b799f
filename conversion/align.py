"""Stage 2, align: every converted layer learns to answer what the teacher's attention answers to the same input.

    minimise  sum_l ||y_l - A_l||² / ||A_l||²       y_l = mixer_l(x_l)

x_l, A_l: input and output of the teacher's attention of layer l, seen by hooks during one pass of the teacher without
gradients. Each hook runs its mixer forward and backward and changes it at once, so that one layer's graph and gradient
are in memory at a time. Only mixers are trained: AdamW(.9, .95), no weight decay, each mixer's gradient clipped to 1,
cosine. A layer learns the same whichever others learn beside it. Several processes share the sequences of a step and
sum what they find: the result is that of one.

In memory while steps are taken: the teacher's weights, one layer's activations and gradient, and 20 % at most. That
holds on a CPU with a folder, where the mixers' weights and Adam's two moments lie in files and come into memory while
their layer learns. On a GPU, and without a folder, those of all mixers are there throughout: up to three times the
weights of the mixers more. Before and after the steps all mixers' weights are in memory everywhere.
SmolLM2-135M, all 30 layers, 4 sequences of 512 tokens: 0.50 GiB of teacher, 0.31 of a layer (with two threads in bf16
0.37), 0.02 of a mixer with its moments and gradient; 1.33 with 0.45 of Python and its libraries (1.76 in memory).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fwp.layer import FastWeightLayer, layers_of
from hf_fwp.telling import progress_bar

from .checkpoint import check_settings, latest, load, save
from .dropout import NEVER, drawn, leaving_out, rate
from .hooks import hooked
from .memory import forget, freed_memory_kept, give_back_freed_memory, mapped
from .processes import is_first, meet, own_rows, summed, wait
from .scores import without_dropout

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, as PyTorch calls them
CLIP = 1.0
WARMUP = 0.05  # of all steps
LOGGED = 100  # entries of the history, at most


def align(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids_NT: Tensor,
    *,
    steps: int | None = None,
    batch_size: int = 4,
    lr: float = 1e-3,
    lr_projections: float = 1e-4,
    lr_end: float = 0.01,
    layers: Iterable[int] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    save_every: int = 50,
    bf16: bool | None = None,
    window_dropout: Sequence[float] = NEVER,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the mixers of `student` on the token blocks ids_NT; returns what was measured on the way.

    Without `steps`, one pass over the blocks. q/k/v/o projections learn at `lr_projections`, the rest of a mixer at
    `lr` (0: it stays as it is); both end at `lr_end` times that. With `checkpoint` (a folder) the run is saved every
    `save_every` steps and when it is interrupted; `resume` continues it with the same result as if it had never
    stopped; and on a CPU what is learned lies in files there, which are gone with the run. `bf16`: matrix products in
    bf16, weights in float32; None: where the device is made for it. `window_dropout`: how often windows are left out,
    in the first and in the last step (dropout.py).
    """
    steps = len(ids_NT) // batch_size if steps is None else steps
    if steps < 1 or len(ids_NT) < 1:
        raise ValueError(f"{len(ids_NT)} sequences make {steps} steps of {batch_size}; give more text or fewer a step")
    meet(student.device)
    mixers = chosen_mixers(student, teacher, layers)
    bf16 = fast_bf16(student.device) if bf16 is None else bf16
    disk = checkpoint if student.device.type == "cpu" else None
    rates = {"lr": lr, "lr_projections": lr_projections}
    adams = {layer: optimizer(mixer, **rates, disk=disk) for layer, mixer in mixers.items()}
    run = Run(mixers, adams, steps=steps, lr_end=lr_end, bf16=bf16, disk=disk)
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "lr_projections": lr_projections,
        "lr_end": lr_end,
        "layers": list(mixers),
        "blocks": list(ids_NT.shape),
        "bf16": bf16,
        "window_dropout": list(window_dropout),
        "seed": seed,
    }
    with (
        weights_on_disk(run),
        trainable(mixers, adams.values()),
        hooked(teacher, mixers, run.layer_step),
        without_dropout(teacher),
        freed_memory_kept(),
    ):
        if checkpoint is not None:
            run.restore(checkpoint, settings, resume=resume)
        shown = progress and is_first()
        step = batch_size * ids_NT.shape[1]  # tokens
        count = {"total": steps * step, "initial": run.step * step, "unit": "tok", "unit_scale": True}
        bar = progress_bar(**count, desc="align", progress=shown)
        try:
            while run.step < steps:
                ids_BT = batch(ids_NT, run.step, size=batch_size, seed=seed)
                probability = rate(window_dropout, run.step, steps=steps)
                left_out = drawn(probability, mixers=len(mixers), sequences=batch_size, seed=seed + run.step)
                with leaving_out(list(mixers.values()), left_out):
                    run.train_step(teacher, ids_BT)
                bar.update(step)
                bar.set_postfix(residual=f"{run.recent:.4f}", refresh=False)
                if checkpoint is not None and (run.step % save_every == 0 or run.step == steps):
                    run.save(checkpoint, settings)
        except KeyboardInterrupt:
            # half an update of a layer would not be the state of any step: the last saved one is kept then
            if checkpoint is not None and not run.updating:
                run.save(checkpoint, settings)
            raise
        finally:
            bar.close()
            for adam in adams.values():
                adam.zero_grad(set_to_none=True)
    wait()  # until the last step is saved
    return run.report(tokens=steps * batch_size * ids_NT.shape[1])


@dataclass
class Run:
    """What changes while aligning, and is saved."""

    mixers: dict[int, FastWeightLayer]
    optimizers: dict[int, torch.optim.Optimizer]
    steps: int
    lr_end: float
    bf16: bool
    disk: Path | None = None  # folder of the files in which weights and moments lie
    step: int = 0
    seconds: float = 0.0
    updating: bool = False
    losses: dict[int, Tensor] = field(default_factory=dict)  # of the layers that have done the step that is going on
    history: list[dict[str, Any]] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)  # residual of each layer in the first step
    last: dict[str, float] = field(default_factory=dict)  # and summed over the last tenth of the steps

    @property
    def recent(self) -> float:
        """Mean residual of the layers in the last step."""
        return self.history[-1]["residual"] if self.history else math.nan

    def train_step(self, teacher: PreTrainedModel, ids_BT: Tensor) -> None:
        """One batch: the teacher's pass, in which the hooks change one mixer after the other."""
        start = time.perf_counter()
        # entered anew in every step: it keeps the weights that it has cast until it is left
        narrow = torch.autocast(teacher.device.type, torch.bfloat16, enabled=self.bf16)
        with torch.no_grad(), narrow:
            teacher.base_model(input_ids=own_rows(ids_BT).to(teacher.device), use_cache=False)
        self.updating = True
        self.step += 1
        self.note({str(layer): float(loss) for layer, loss in self.losses.items()})
        self.losses.clear()
        self.seconds += time.perf_counter() - start
        self.updating = False

    def layer_step(self, layer: int, arguments: dict[str, Any], target_BTD: Tensor) -> None:
        """Change one mixer by what the teacher's attention was given and answered."""
        if layer in self.losses:
            return  # it had done this step when the run was interrupted
        loss, optimizer = self.layer_loss(layer, arguments, target_BTD), self.optimizers[layer]
        parameters = changed_by(optimizer)
        for part in (loss, *(parameter.grad for parameter in parameters if parameter.grad is not None)):
            summed(part)
        nn.utils.clip_grad_norm_(parameters, CLIP)
        factor = cosine(self.step, steps=self.steps, warmup=math.ceil(WARMUP * self.steps), end=self.lr_end)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.updating = True
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.losses[layer] = loss
        self.updating = False
        self.forget(layer)

    def forget(self, layer: int) -> None:
        """What lies in files leaves the memory; only inside weights_on_disk."""
        if self.disk is not None:
            for tensor in self.tensors(layer).values():
                if tensor.ndim:
                    forget(tensor)

    def layer_loss(self, layer: int, arguments: dict[str, Any], target_BTD: Tensor) -> Tensor:
        """Forward and backward of one mixer: its residual here, whose gradient is left in its parameters."""
        mixer = self.mixers[layer]
        like = mixer.o_proj.weight
        x_BTD, rotary = arguments.pop("hidden_states"), arguments.pop("position_embeddings", None)
        if rotary is not None:
            rotary = tuple(part.to(like.device) for part in rotary)
        target_BTD = target_BTD.to(like)
        with torch.enable_grad():
            y_BTD, _ = mixer(x_BTD.to(like), position_embeddings=rotary, **arguments)
            loss = (y_BTD - target_BTD).square().sum() / summed(target_BTD.square().sum())
            loss.backward()
        # bf16 copies of weights that are of no further use in this step: 0.2 of 2.45 GiB (SmolLM2-135M)
        torch.clear_autocast_cache()
        return loss.detach()

    def note(self, residuals: dict[str, float]) -> None:
        """Keep what the report needs of this step."""
        if self.step == 1:
            self.first = dict(residuals)
        if self.step > self.steps - tail(self.steps):
            self.last = {layer: self.last.get(layer, 0.0) + value for layer, value in residuals.items()}
        entry = {"step": self.step, "residual": sum(residuals.values()) / len(residuals)}
        if len(self.history) > 1 and self.history[-1]["step"] % math.ceil(self.steps / LOGGED):
            self.history[-1] = entry  # the newest is always there, for the progress bar
        else:
            self.history.append(entry)

    def report(self, *, tokens: int) -> dict[str, Any]:
        """Numbers and lists only, so that it can be written as JSON."""
        return {
            "steps": self.step,
            "tokens": tokens,
            "seconds": self.seconds,
            "residual_before": self.first,
            "residual": {layer: value / tail(self.step) for layer, value in self.last.items()},
            "history": self.history,
        }

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """Everything that a step changes of one mixer, by name."""
        found = {}
        for name, parameter in named({layer: self.mixers[layer]}).items():
            found[f"weight.{name}"] = parameter.detach()
            for moment, value in self.optimizers[layer].state.get(parameter, {}).items():
                found[f"{moment}.{name}"] = value
        return found

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of one mixer after the other."""
        for layer in self.mixers:
            yield self.tensors(layer)
            self.forget(layer)

    def save(self, folder: Path, settings: dict[str, Any]) -> None:
        """The state after so many changes of a layer."""
        if not is_first():
            return
        said = {name: getattr(self, name) for name in ("step", "seconds", "history", "first", "last")}
        said["losses"] = {str(layer): float(loss) for layer, loss in self.losses.items()}
        changes = self.step * len(self.mixers) + len(self.losses)
        save(folder, changes, self.parts(), {"settings": settings, **said})

    def restore(self, folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
        """Continue from the newest saved state in `folder`, if there is one."""
        saved = latest(folder, resume=resume)
        if saved is None:
            return
        tensors, said = load(saved)
        check_settings(said.pop("settings"), settings, folder=folder)
        losses = said.pop("losses", {})
        self.losses = {int(layer): torch.tensor(loss, dtype=torch.float64) for layer, loss in losses.items()}
        for name, value in said.items():
            setattr(self, name, value)
        own = {name: tensor for layer in self.mixers for name, tensor in self.tensors(layer).items()}
        for name, tensor in tensors:
            own[name].copy_(tensor)
        for layer in self.mixers:
            self.forget(layer)


def chosen_mixers(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: Iterable[int] | None
) -> dict[int, FastWeightLayer]:
    """The mixers to train, by layer; refuses those that are not there, are no float32, or live in the teacher."""
    mixers = layers_of(student)
    wanted = sorted(mixers if layers is None else layers)
    missing = [layer for layer in wanted if layer not in mixers]
    if missing or not wanted:
        raise ValueError(f"no mixers in layers {missing or wanted} of the student; it has them in {sorted(mixers)}")
    theirs = {parameter.untyped_storage().data_ptr() for parameter in teacher.parameters()}
    for name, parameter in named({layer: mixers[layer] for layer in wanted}).items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"mixer parameter {name} is {parameter.dtype}; train float32 weights: student.float()")
        if parameter.untyped_storage().data_ptr() in theirs:
            raise ValueError(f"mixer parameter {name} is the teacher's own; training it would change the teacher")
    return {layer: mixers[layer] for layer in wanted}


def named(mixers: dict[int, FastWeightLayer]) -> dict[str, nn.Parameter]:
    """The parameters of all mixers: `3.q_proj.weight`."""
    return {f"{layer}.{name}": p for layer, mixer in mixers.items() for name, p in mixer.named_parameters()}


def optimizer(mixer: FastWeightLayer, *, lr: float, lr_projections: float, disk: Path | None) -> torch.optim.Optimizer:
    """AdamW with the projections that were copied from the teacher at their own, lower rate; `disk`: of its moments."""
    copied = {name: p for name, p in mixer.named_parameters() if name.split(".")[0] in PROJECTIONS}
    fresh = [p for name, p in mixer.named_parameters() if name not in copied]
    groups = [{"params": list(copied.values()), "peak": lr_projections}, {"params": fresh, "peak": lr}]
    groups = [group for group in groups if group["params"] and group["peak"]]
    if not groups:
        raise ValueError(f"nothing to train: lr is {lr} and lr_projections {lr_projections}; give one that is not 0")
    # fused: one pass over the weights instead of ten
    adam = torch.optim.AdamW(groups, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
    for parameter in changed_by(adam):
        adam.state[parameter]["step"] = torch.zeros((), device=parameter.device)
        for moment in MOMENTS:
            zeros = torch.zeros_like(parameter) if disk is None else mapped(disk, parameter.shape, parameter.dtype)
            adam.state[parameter][moment] = zeros
    return adam


def changed_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that it changes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bf16 matrices."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not every torch that is supported has it
    return device.type == "cpu" and bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def cosine(step: int, *, steps: int, warmup: int, end: float) -> float:
    """The factor on the learning rate in `step`, from 0: linear up to 1, then a half cosine down to `end`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def tail(steps: int) -> int:
    """How many steps the last tenth is."""
    return max(1, steps // 10)


def batch(ids_NT: Tensor, step: int, *, size: int, seed: int) -> Tensor:
    """The blocks of one step: epoch after epoch in an order drawn from the seed and the epoch's number."""
    places = range(step * size, (step + 1) * size)
    epochs = {place // len(ids_NT) for place in places}
    orders = {epoch: _order(len(ids_NT), seed=seed, epoch=epoch) for epoch in epochs}
    return ids_NT[torch.stack([orders[place // len(ids_NT)][place % len(ids_NT)] for place in places])]


def _order(count: int, *, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


@contextmanager
def weights_on_disk(run: Run) -> Iterator[None]:
    """Inside, the mixers' weights lie where their moments do; outside in memory."""
    if run.disk is None:
        yield
        return
    parameters = named(run.mixers).values()
    try:
        for parameter in parameters:
            parameter.data = mapped(run.disk, parameter.shape, parameter.dtype).copy_(parameter.data)
            forget(parameter)
        give_back_freed_memory()
        yield
    finally:
        for parameter in parameters:
            parameter.data = parameter.data.clone()


@contextmanager
def trainable(mixers: dict[int, FastWeightLayer], optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Of the mixers' parameters those that learn ask for gradients inside; outside all do as before."""
    before = {parameter: parameter.requires_grad for parameter in named(mixers).values()}
    learned = {parameter for optimizer in optimizers for parameter in changed_by(optimizer)}
    for parameter in before:
        parameter.requires_grad_(parameter in learned)
    try:
        yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)
