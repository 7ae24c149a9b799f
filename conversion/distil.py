"""Stage 3, distil: the whole student learns to predict what the teacher predicts.

    minimise  1/N sum_t KL(p_t ‖ q_t)       p_t, q_t: next-token distributions of teacher and student, temperature 1

over the N valid tokens; no cross-entropy unless it is asked for. Everything but the loss is transformers' own Trainer.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_fwp.layer import layers_of
from hf_fwp.telling import current

from .align import BETAS, CLIP, fast_bf16
from .dropout import NEVER, WindowDropout, leave_out
from .memory import freed_memory_kept, recompute_activations
from .processes import meet, processes
from .scores import without_dropout
from .seeds import seeded

LOGGED = 50  # entries of the history, about


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    ids_NT: Tensor,
    *,
    labels_NT: Tensor | None = None,
    losses: Mapping[str, float] = MappingProxyType({"kl": 1.0}),
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
    lora: Mapping[str, Any] | None = None,
    window_dropout: Sequence[float] = NEVER,
    dropout: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train all of `student` (with `peft_config` what that says) on the token blocks ids_NT; returns the history.

    `losses`: the weights of "kl" and "cross_entropy"; without "kl" there is no teacher. `labels_NT`: -100 where a token
    does not count. `lora`: what peft.LoraConfig is given, for one as peft_config; it is merged in the end.
    Without `steps`, one pass over the blocks. Mixers learn at `lr`, all the rest at `lr_rest` (0: it stays as it is);
    both rise over the first `warmup` (a fraction of the steps) and end at `lr_end` times that. With `output_dir` the
    Trainer saves a checkpoint every `save_every` steps, from which `resume` continues with the same result as if it had
    never stopped. `bf16`: matrix products in bf16, weights in float32; None: where the device is made for it. Several
    processes share the `batch_size` sequences of a step. `window_dropout`: how often windows are left out, in the first
    and in the last step; `dropout`: with that of the family's config, which is off otherwise (dropout.py).
    """
    from .trainer import DistilTrainer  # 90 MB that a closed-form conversion can do without

    meet(student.device)
    check_student(student, teacher)
    peft_config = peft_config if lora is None else lora_config(lora)
    steps = len(ids_NT) // batch_size if steps is None else steps
    if steps < 1 or len(ids_NT) < batch_size:
        raise ValueError(f"{len(ids_NT)} sequences are not one step of {batch_size}; give more text or fewer a step")
    last = checkpoint_in(output_dir, resume=resume)
    with (
        tempfile.TemporaryDirectory() as scratch,
        as_before(student) as parameters,
        nullcontext() if teacher is None else without_dropout(teacher),
        freed_memory_kept(),
    ):
        args = training_arguments(
            output_dir or Path(scratch),
            student.device,
            steps=steps,
            batch_size=own_share(batch_size),
            lr=lr_rest,
            lr_end=lr_end,
            warmup=warmup,
            save_every=None if output_dir is None else save_every,
            bf16=fast_bf16(student.device) if bf16 is None else bf16,
            seed=seed,
            progress=progress,
        )
        with seeded(seed):  # an adapter is drawn before the Trainer seeds
            model = learning(student, parameters, peft_config, lr=lr, lr_rest=lr_rest)
        trainer = DistilTrainer(
            model,
            args,
            data_collator=collate,
            train_dataset=rows(ids_NT, labels_NT),  # type: ignore[arg-type]
            processing_class=tokenizer,
            teacher=teacher,
            lr_mixers=lr,
            losses=losses,
            dropout=dropout,
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "distil gives back a whole student, and FSDP and DeepSpeed leave it in pieces; launch it without them, "
                "or use DistilTrainer"
            )
        mixers = list(layers_of(student).values())
        trainer.add_callback(WindowDropout(mixers, window_dropout, sequences=batch_size, seed=seed))
        if gradient_checkpointing:
            recompute_activations(student, on=True)
        trainer.finish(last)
        if peft_config is not None:
            model.merge_and_unload()
    measure = "loss" if len(losses) > 1 else next(iter(losses))
    history = [{"step": e["step"], measure: e["loss"]} for e in trainer.state.log_history if "loss" in e]
    tokens = steps * batch_size * ids_NT.shape[1]
    return {"steps": steps, "tokens": tokens, "seconds": trainer.seconds, "history": history}


def own_share(batch_size: int) -> int:
    """The sequences of a step for each of the processes that share it."""
    if batch_size % processes():
        raise ValueError(
            f"{processes()} processes cannot share a step of {batch_size} sequences evenly; give a batch_size that is "
            "a multiple of their number"
        )
    return batch_size // processes()


def lora_config(settings: Mapping[str, Any]) -> Any:
    from peft import LoraConfig  # 2 s: only for those who ask for it

    return LoraConfig(**settings)


def learning(
    student: PreTrainedModel, parameters: Iterable[Tensor], peft_config: Any, *, lr: float, lr_rest: float
) -> Any:
    """The student with all that learns marked, or inside of its adapter."""
    if peft_config is not None:
        from peft import get_peft_model  # 2 s: only for those who ask for it

        return get_peft_model(student, peft_config)
    mixers = {id(p) for mixer in layers_of(student).values() for p in mixer.parameters()}
    for parameter in parameters:
        parameter.requires_grad_(bool(lr if id(parameter) in mixers else lr_rest))
    return student


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
        disable_tqdm=not (progress and current().bars),
        report_to=[],
        seed=seed,
    )


def rows(ids_NT: Tensor, labels_NT: Tensor | None) -> list[dict[str, Tensor]]:
    """Full blocks need no mask, and no labels where every token counts."""
    if labels_NT is None:
        return [{"input_ids": ids_T} for ids_T in ids_NT]
    if labels_NT.shape != ids_NT.shape:
        raise ValueError(
            f"labels are {tuple(labels_NT.shape)} for tokens {tuple(ids_NT.shape)}; give one for each token"
        )
    return [{"input_ids": ids_T, "labels": labels_T} for ids_T, labels_T in zip(ids_NT, labels_NT, strict=True)]


def collate(blocks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Blocks of one length, side by side."""
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}


def check_student(student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Refuse a student that is not float32 or shares weights with its teacher."""
    theirs = {p.untyped_storage().data_ptr() for p in (() if teacher is None else teacher.parameters())}
    for name, parameter in student.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {parameter.dtype}; train float32 weights: student.float(), with bf16=True")
        if parameter.untyped_storage().data_ptr() in theirs:
            raise ValueError(f"{name} is the teacher's own and would change with it; copy_teacher(share=False)")


def checkpoint_in(output_dir: Path | None, *, resume: bool) -> str | None:
    """The Trainer's newest checkpoint; without `resume` there must be none."""
    last = None if output_dir is None else newest_checkpoint(output_dir)
    if last is not None and not resume:
        raise ValueError(f"{output_dir} holds an earlier run; give resume=True to continue it, or another folder")
    return last


def newest_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a Trainer: one that was being written when the process died has no state yet."""
    from transformers.trainer import TRAINER_STATE_NAME

    whole = [place for place in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_json(place / TRAINER_STATE_NAME)]
    return str(max(whole, key=lambda place: int(place.name.rpartition("-")[2]))) if whole else None


def _is_json(file: Path) -> bool:
    """Whether the file, the last one that a checkpoint gets, was written to its end."""
    try:
        return bool(json.loads(file.read_text()))
    except (OSError, ValueError):
        return False


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
        # accelerate leaves autocast around the model's forward (huggingface/accelerate#858)
        for wrapped in ("forward", "_original_forward"):
            student.__dict__.pop(wrapped, None)
        leave_out(list(layers_of(student).values()), None)
        student.config.use_cache = use_cache
        recompute_activations(student, on=False)
        student.eval()
