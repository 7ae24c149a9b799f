"""The Trainer of stages 3 and 4: transformers' own, with the teacher beside the model and losses without logits.

loss = sum of w_kl KL(teacher ‖ student) + w_ce (-log q(next token)),  over the tokens that count
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from hf_fwp.cross_entropy import summed_loss
from hf_fwp.layer import FastWeightLayer
from hf_fwp.options import refuse_unknown

from .dropout import without_own_dropout
from .kl import kl_of_heads, readout_of
from .tokens import IGNORED

LOSSES = ("kl", "cross_entropy")


class DistilTrainer(Trainer):
    """A Trainer whose loss is the forward KL from `teacher`, or cross-entropy, or both, per token that counts.

    `losses`: the weight of "kl" and of "cross_entropy". For the KL alone those tokens count that neither attention_mask
    (0) nor labels (-100) exclude; with cross-entropy those whose next token is such a one. The teacher (None without
    KL) stands beside the model, is never trained or saved, and has to share the student's vocabulary. Mixers learn at
    `lr_mixers` where that is given, all the rest at args.learning_rate. `dropout`: with that of the family's config.
    """

    loss_is_scaled_for_ga = True  # by num_items_in_batch

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None,
        lr_mixers: float | None = None,
        losses: Mapping[str, float] = MappingProxyType({"kl": 1.0}),
        dropout: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        refuse_unknown("loss", losses, LOSSES)
        self.losses = {name: weight for name, weight in losses.items() if weight}
        if not self.losses or (teacher is None and "kl" in self.losses):
            raise ValueError(f"the losses are {dict(losses)}; give one a weight, and for 'kl' also the teacher")
        if self.args.n_gpu > 1:
            raise ValueError(f"{self.args.n_gpu} GPUs in one process; start one process each: accelerate launch")
        self.model_accepts_loss_kwargs = True
        self.lr_mixers = lr_mixers
        self.dropout = dropout
        self.seconds = 0.0
        self.student_head = output_head(bare(self.model))
        self.student_readout = readout_of(bare(self.model).config)
        if "cross_entropy" in self.losses and self.student_head.bias is not None:
            raise ValueError("the output head has a bias, which the cross-entropy does not read; use the loss 'kl'")
        self.teacher: Any = None
        if teacher is None or "kl" not in self.losses:
            return
        self.teacher_head, self.teacher_readout = output_head(teacher.eval()), readout_of(teacher.config)
        if len(self.student_head.weight) != len(self.teacher_head.weight):
            sizes = len(self.student_head.weight), len(self.teacher_head.weight)
            raise ValueError(f"the student has {sizes[0]} tokens, the teacher {sizes[1]}; they must share a vocabulary")
        self.teacher = self._spread(teacher)

    def _spread(self, teacher: PreTrainedModel) -> Any:
        """The teacher in pieces over the processes, in place, where FSDP or ZeRO-3 spreads the student."""
        if self.accelerator.is_fsdp2:
            # `prepare` takes no model without its optimizer (huggingface/transformers#39961)
            return fsdp2_prepare_model(self.accelerator, teacher)
        plugin: Any = self.accelerator.state.deepspeed_plugin
        if self.is_deepspeed_enabled and plugin.zero_stage == 3:
            import deepspeed  # pyright: ignore[reportMissingImports] no dependency: who asked for ZeRO has it

            config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
            return deepspeed.initialize(model=teacher, config=config)[0]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return self.accelerator.prepare_model(teacher, evaluation_mode=True)
        return teacher

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The losses of all tokens that count over their number, in the accumulated batch when that is known."""
        counted_BT = self.counted(inputs)
        kept = {name: value for name, value in inputs.items() if name != "labels"}
        teacher_BTD: Tensor | None = None

        def total(student_BTD: Tensor) -> Tensor:
            student_ND = student_BTD[counted_BT.to(student_BTD.device)]
            loss = student_ND.new_zeros(())
            if teacher_BTD is not None:
                teacher_ND = teacher_BTD[counted_BT.to(teacher_BTD.device)]
                with gathered(self.teacher_head):
                    kl = kl_of_heads(
                        student_ND,
                        teacher_ND,
                        self.student_head,
                        self.teacher_head,
                        student_readout=self.student_readout,
                        teacher_readout=self.teacher_readout,
                    )
                loss = loss + self.losses["kl"] * kl
            if "cross_entropy" in self.losses:
                next_N = nn.functional.pad(inputs["input_ids"], (0, 1))[:, 1:][counted_BT]
                labels_N = next_N.to(student_ND.device)
                entropy = summed_loss(student_ND, self.student_head, labels_N, readout=self.student_readout)
                loss = loss + self.losses["cross_entropy"] * entropy
            return loss.view(1, 1, 1)

        with self.accelerator.autocast():  # accelerate puts it around the student alone
            if self.teacher is not None:
                with torch.no_grad():
                    # the whole model is called: one that is spread over processes gathers its weights only then
                    teacher = partial(self.teacher, **kept, use_cache=False)
                    teacher_BTD = output_of(self.teacher_head, lambda h_BTD: h_BTD, teacher)
            loss = output_of(self.student_head, total, lambda: model(**kept, use_cache=False)).sum()
        if num_items_in_batch is None:
            loss = loss / counted_BT.sum().clamp_min(1)
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {"loss": loss}) if return_outputs else loss

    def counted(self, inputs: dict[str, Any]) -> Tensor:
        """[B, T], True for the tokens whose prediction counts."""
        valid_BT = valid_positions(inputs)
        if "cross_entropy" not in self.losses:
            return valid_BT
        attended_BT = valid_positions({**inputs, "labels": None})
        return nn.functional.pad(valid_BT[:, 1:], (0, 1)) & attended_BT

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """The tokens that count: transformers would count labels after a shift, which a KL does not have."""
        if not batch_samples:
            return None
        count = torch.stack([self.counted(inputs).sum() for inputs in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts: Any = self.accelerator.gather(count)
            count = counts.sum()
        return count.clamp_min(1)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, without the family's own dropout unless that is asked for."""
        with nullcontext() if self.dropout else without_own_dropout(bare(self.model)):
            return super().train(*args, **kwargs)

    def finish(self, checkpoint: str | None) -> None:
        """Train from a checkpoint, or from the start, to args.max_steps."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            if state.global_step >= self.args.max_steps:
                # train() would go on to one step too many (no public issue found)
                self._load_from_checkpoint(checkpoint)
                self.state = state
                return
        self.seconds = self.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Mixers at their rate, the rest at args.learning_rate; weight decay as in args."""
        model = self.model if model is None else model
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            lr = options["lr"] if self.lr_mixers is None else self.lr_mixers
            groups = parameter_groups(model, lr=lr, lr_rest=options["lr"])
            self.optimizer = kind(groups, **{**options, "weight_decay": self.args.weight_decay})
        return self.optimizer


def valid_positions(inputs: dict[str, Any]) -> Tensor:
    """[B, T], True for the tokens that neither the mask nor the labels exclude."""
    valid_BT = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if inputs.get("attention_mask") is not None:
        valid_BT &= inputs["attention_mask"] > 0
    return valid_BT if inputs.get("labels") is None else valid_BT & (inputs["labels"] != IGNORED)


def output_of(module: nn.Module, function: Callable[[Tensor], Tensor], run: Callable[[], Any]) -> Tensor:
    """What `module` gives during `run` when it computes `function`. Its weights are whole there, and again in backward,
    however they are spread over processes."""
    seen: list[Any] = []
    before = module.__dict__.get("forward")
    module.forward = function
    hook = module.register_forward_hook(lambda _, args, out: seen.append(out))
    try:
        run()
    finally:
        hook.remove()
        del module.forward
        if before is not None:
            module.forward = before
    return seen[-1]


def gathered(head: nn.Linear) -> AbstractContextManager[Any]:
    """While its weights are whole: ZeRO-3 keeps them in pieces outside of the module's own forward."""
    pieces = [p for p in head.parameters() if hasattr(p, "ds_id")]
    if not pieces:
        return nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports] as above

    return deepspeed.zero.GatheredParameters(pieces)


def parameter_groups(model: nn.Module, *, lr: float, lr_rest: float) -> list[dict[str, Any]]:
    """The parameters that are trained: those of mixers, and the rest."""
    mixers = {id(p) for m in model.modules() if isinstance(m, FastWeightLayer) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = {"params": [p for p in trained if id(p) in mixers], "lr": lr}
    rest = {"params": [p for p in trained if id(p) not in mixers], "lr": lr_rest}
    return [group for group in (ours, rest) if group["params"]]


def bare(model: Any) -> Any:
    """The transformers model inside a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_head(model: Any) -> nn.Linear:
    """The last linear map, whose weight the loss reads."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the output head of {type(model).__name__} is {type(head).__name__}; distillation needs a causal language "
            "model whose head is a plain Linear (leave lm_head out of peft's target_modules)"
        )
    return head
