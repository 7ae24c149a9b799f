"""Stage 3, distil: the whole student learns to predict what the teacher predicts.

    minimise  1/N sum_t KL(p_t ‖ q_t)       p_t, q_t: next-token distributions of teacher and student, temperature 1

over the N valid tokens; no cross-entropy. Everything but the loss is transformers' own Trainer.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_fwp.layer import FastWeightLayer

from .align import BETAS, CLIP, evaluating, fast_bf16
from .kl import kl_of_heads
from .memory import freed_memory_kept

LOGGED = 50  # entries of the history, about


class DistilTrainer(Trainer):
    """A Trainer whose loss is the forward KL from `teacher`, per valid token.

    Valid are the tokens that neither attention_mask (0) nor labels (-100) exclude. The teacher stands beside the model,
    is never trained or saved, and has to share the student's vocabulary. Mixers learn at `lr_mixers` where that is
    given, all the rest at args.learning_rate.
    """

    loss_is_scaled_for_ga = True  # by num_items_in_batch

    def __init__(self, *args: Any, teacher: PreTrainedModel, lr_mixers: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(f"{self.args.n_gpu} GPUs in one process; start one process each: accelerate launch")
        self.model_accepts_loss_kwargs = True
        self.lr_mixers = lr_mixers
        self.seconds = 0.0
        self.teacher = teacher.eval()
        self.student_head, self.teacher_head = (output_head(m) for m in (bare(self.model), teacher))
        if len(self.student_head.weight) != len(self.teacher_head.weight):
            sizes = len(self.student_head.weight), len(self.teacher_head.weight)
            raise ValueError(f"the student has {sizes[0]} tokens, the teacher {sizes[1]}; they must share a vocabulary")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.teacher = self.accelerator.prepare_model(self.teacher, evaluation_mode=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The KL of all valid tokens over their number, in the accumulated batch when that is known."""
        valid_BT = valid_positions(inputs)
        kept = {name: value for name, value in inputs.items() if name != "labels"}
        student_BTD = last_hidden_state(model, bare(self.accelerator.unwrap_model(model)), kept)
        with torch.no_grad():
            teacher_BTD = self.teacher.base_model(**kept, use_cache=False).last_hidden_state
        hidden = (x[valid_BT.to(x.device)] for x in (student_BTD, teacher_BTD))
        loss = kl_of_heads(*hidden, self.student_head, self.teacher_head)
        if num_items_in_batch is None:
            loss = loss / valid_BT.sum().clamp_min(1)
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {"loss": loss}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """The valid tokens: transformers would count labels after a shift, which a KL does not have."""
        if not batch_samples:
            return None
        count = torch.stack([valid_positions(inputs).sum() for inputs in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp_min(1)

    def finish(self, checkpoint: str | None) -> None:
        """Train from a checkpoint, or from the start, to args.max_steps."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            if state.global_step >= self.args.max_steps:
                # train() would go on to one step too many
                self._load_from_checkpoint(checkpoint)
                self.state = state
                return
        self.seconds = self.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Mixers at their rate, the rest at args.learning_rate; weight decay as in args."""
        model = self.model if model is None else model
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, lr=self.lr_mixers or options["lr"], lr_rest=options["lr"])
            self.optimizer = kind(groups, **{**options, "weight_decay": self.args.weight_decay})
        return self.optimizer


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids_NT: Tensor,
    *,
    tokenizer: Any = None,
    steps: int | None = None,
    batch_size: int = 4,
    lr: float = 5e-4,
    lr_rest: float = 2e-4,
    lr_end: float = 0.01,
    warmup: float = 0.05,
    output_dir: Path | None = None,
    resume: bool = False,
    save_every: int = 50,
    bf16: bool | None = None,
    gradient_checkpointing: bool = False,
    peft_config: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train all of `student` (with `peft_config` what that says) on the token blocks ids_NT; returns the history.

    Without `steps`, one pass over the blocks. Mixers learn at `lr`, all the rest at `lr_rest`; both rise over the first
    `warmup` (a fraction of the steps) and end at `lr_end` times that. With `output_dir` the Trainer saves a checkpoint
    every `save_every` steps, from which `resume` continues with the same result as if it had never stopped.
    `bf16`: matrix products in bf16, weights in float32; None: where the device is made for it.
    """
    check_student(student, teacher)
    steps = len(ids_NT) // batch_size if steps is None else steps
    if steps < 1 or len(ids_NT) < batch_size:
        raise ValueError(f"{len(ids_NT)} sequences are not one step of {batch_size}; give more text or fewer a step")
    last = checkpoint_in(output_dir, resume=resume)
    with (
        tempfile.TemporaryDirectory() as scratch,
        as_before(student) as parameters,
        evaluating(teacher),
        freed_memory_kept(),
    ):
        args = training_arguments(
            output_dir or Path(scratch),
            student.device,
            steps=steps,
            batch_size=batch_size,
            lr=lr_rest,
            lr_end=lr_end,
            warmup=warmup,
            save_every=None if output_dir is None else save_every,
            bf16=fast_bf16(student.device) if bf16 is None else bf16,
            seed=seed,
            progress=progress,
        )
        model: Any = student
        if peft_config is None:
            for parameter in parameters:
                parameter.requires_grad_(True)
        else:
            from peft import get_peft_model  # 2 s: only for those who ask for it

            model = get_peft_model(student, peft_config)
        trainer = DistilTrainer(
            model,
            args,
            data_collator=collate,
            train_dataset=list(ids_NT),  # type: ignore[arg-type]
            processing_class=tokenizer,
            teacher=teacher,
            lr_mixers=lr,
        )
        trainer.remove_callback(PrinterCallback)
        if gradient_checkpointing:
            student.gradient_checkpointing_enable()
        trainer.finish(last)
        if peft_config is not None:
            model.merge_and_unload()
    history = [{"step": e["step"], "kl": e["loss"]} for e in trainer.state.log_history if "loss" in e]
    tokens = steps * batch_size * ids_NT.shape[1]
    return {"steps": steps, "tokens": tokens, "seconds": trainer.seconds, "history": history}


def training_arguments(
    output_dir: Path,
    device: torch.device,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    lr_end: float,
    warmup: float,
    save_every: int | None,
    bf16: bool,
    seed: int,
    progress: bool,
) -> TrainingArguments:
    """What the Trainer is told: Adam, a cosine that ends at `lr_end` of `lr`, checkpoints, no reports to anybody."""
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": lr_end},
        warmup_steps=math.ceil(warmup * steps),
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        max_grad_norm=CLIP,
        save_strategy="no" if save_every is None else "steps",
        save_steps=save_every or steps,
        save_total_limit=1,
        logging_steps=max(1, steps // LOGGED),
        bf16=bf16,
        use_cpu=device.type == "cpu",
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=not progress,
        report_to=[],
        seed=seed,
    )


def valid_positions(inputs: dict[str, Any]) -> Tensor:
    """[B, T], True for the tokens whose prediction counts."""
    valid_BT = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if inputs.get("attention_mask") is not None:
        valid_BT &= inputs["attention_mask"] > 0
    return valid_BT if inputs.get("labels") is None else valid_BT & (inputs["labels"] != -100)


def last_hidden_state(model: nn.Module, bare_model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """What the output head would read. `model` itself is called, since it may be wrapped for several processes."""
    seen: list[Tensor] = []
    hook = bare_model.base_model.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state))
    try:
        nothing = torch.zeros(0, dtype=torch.long, device=inputs["input_ids"].device)
        model(**inputs, use_cache=False, logits_to_keep=nothing)  # logits of no position
    finally:
        hook.remove()
    return seen[-1]


def parameter_groups(model: nn.Module, *, lr: float, lr_rest: float) -> list[dict[str, Any]]:
    """The parameters that are trained: those of mixers, and the rest."""
    mixers = {id(p) for m in model.modules() if isinstance(m, FastWeightLayer) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = {"params": [p for p in trained if id(p) in mixers], "lr": lr}
    rest = {"params": [p for p in trained if id(p) not in mixers], "lr": lr_rest}
    return [group for group in (ours, rest) if group["params"]]


def collate(blocks: list[Tensor]) -> dict[str, Tensor]:
    """Full blocks need no mask and no labels: every token counts."""
    return {"input_ids": torch.stack(blocks)}


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


def check_student(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a student that is not float32 or shares weights with its teacher."""
    theirs = {parameter.untyped_storage().data_ptr() for parameter in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {parameter.dtype}; train float32 weights: student.float(), with bf16=True")
        if parameter.untyped_storage().data_ptr() in theirs:
            raise ValueError(f"{name} is the teacher's own and would change with it; copy_teacher(share=False)")


def checkpoint_in(output_dir: Path | None, *, resume: bool) -> str | None:
    """The Trainer's newest checkpoint; without `resume` there must be none."""
    last = get_last_checkpoint(str(output_dir)) if output_dir is not None and output_dir.is_dir() else None
    if last is not None and not resume:
        raise ValueError(f"{output_dir} holds an earlier run; give resume=True to continue it, or another folder")
    return last


@contextmanager
def as_before(student: PreTrainedModel) -> Iterator[list[nn.Parameter]]:
    """The student's parameters; outside it is in evaluation mode, and they ask for gradients as they did before."""
    before = {parameter: parameter.requires_grad for parameter in student.parameters()}
    use_cache = student.config.use_cache
    try:
        yield list(before)
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)
            parameter.grad = None
        for wrapped in ("forward", "_original_forward"):  # accelerate leaves autocast around the model's forward
            student.__dict__.pop(wrapped, None)
        student.config.use_cache = use_cache
        student.gradient_checkpointing_disable()
        student.eval()
