"""Two processes of one machine that train together over gloo; what they train is compared with one process alone."""

import multiprocessing
import os
from pathlib import Path

import torch

PRELOADED = ["hf_fwp", "transformers.trainer", "peft"]  # once for all pairs of processes: it takes seconds


def together(work, folder: Path, *args, sharded: bool = False):
    """What `work(folder, *args)` returned in the first of two processes."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    folder.mkdir()
    torch.multiprocessing.start_processes(_begin, (folder, work, args, sharded), nprocs=2, start_method="forkserver")
    return torch.load(folder / "found", weights_only=False)


def _begin(rank: int, folder: Path, work, args: tuple, sharded: bool) -> None:
    printed = os.open(folder / f"printed-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    if sharded:
        shard_on_processors()
    found = work(folder, *args)
    if rank == 0:
        torch.save(found, folder / "found")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def shard_on_processors() -> None:
    """accelerate takes processes without an accelerator for DDP, whatever they ask for (no public issue found); make it
    take them for GPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))


def training(folder: Path, name: str, dtype: torch.dtype, settings: dict, *resumed: str):
    """[(losses, weights, how they are spread)] of a run, and of runs that go on from its checkpoints."""
    from every_model import every_model
    from runs import logged, trainer

    found = []
    for checkpoint in (None, *resumed):
        model = every_model(name, dtype=dtype).train()
        run = trainer(model, folder / "run", **{"per_device_train_batch_size": 2, **settings})
        run.train(resume_from_checkpoint=checkpoint and str(folder / "run" / checkpoint))
        found.append((logged(run), run.accelerator.get_state_dict(run.model_wrapped), kind_of(run)))
    return found


def kind_of(run) -> str:
    """How the model is spread: DDP, or the class of a parameter's storage."""
    return f"{type(run.model_wrapped).__name__} {type(next(run.model_wrapped.parameters())).__name__}"


def distilling(folder: Path, dtype: torch.dtype, teacher_changes: dict, settings: dict):
    """(losses, weights, how they are spread, how many of the teacher's are spread too) of a distillation."""
    from runs import arguments, logged
    from teachers import tiny_teacher
    from tiny_fwp import tokens

    from hf_fwp.conversion.families import copy_teacher
    from hf_fwp.conversion.trainer import DistilTrainer

    teacher = tiny_teacher("llama", num_hidden_layers=2, **teacher_changes).to(dtype)
    student = copy_teacher(teacher, layers=[0], share=False).to(dtype)
    data = [{"input_ids": row} for row in tokens(16, 10)]
    args = arguments(folder / "run", **{"per_device_train_batch_size": 2, "remove_unused_columns": False, **settings})
    run = DistilTrainer(student, args, train_dataset=data, teacher=teacher)
    run.train()
    spread = sum(hasattr(weight, "placements") or hasattr(weight, "ds_id") for weight in teacher.parameters())
    return logged(run), run.accelerator.get_state_dict(run.model_wrapped), kind_of(run), spread


def aligning(folder: Path, batch_size: int, steps: int = 4):
    """(what align reports, the student's weights, and both again of a run that goes on from its saved step)."""
    from teachers import tiny_teacher
    from tiny_fwp import tokens

    from hf_fwp.conversion.align import align
    from hf_fwp.conversion.families import copy_teacher

    teacher = tiny_teacher("llama", num_hidden_layers=2).double()
    found = []
    for _ in range(2):
        fwp = {"rule": "gated_delta_net", "beta_bias": True, "window": 4, "sinks": 1}
        student = copy_teacher(teacher, layers=[0, 1], fwp=fwp).double()
        settings = {"steps": steps, "batch_size": batch_size, "lr": 1e-2, "save_every": steps, "progress": False}
        settings["window_dropout"] = (0.5, 0.5)
        log = align(student, teacher, tokens(10, 12), checkpoint=folder / "steps", resume=True, **settings)
        found += [log, student.state_dict()]
    return found


def converting(folder: Path, batch_size: int = 4):
    """(weights, report, files) of a conversion through all stages; the second process would keep another layer."""
    import importlib

    from tiny import TEXTS, byte_tokenizer, tiny_llama

    from hf_fwp.conversion.recipes import Recipe

    verb = importlib.import_module("hf_fwp.conversion.convert")
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        verb.most_needed = lambda ranking, count: sorted(sorted(ranking, key=ranking.get)[:count])
    small = {"sequence_length": 16, "solve_tokens": 112, "rank_solve_tokens": 80, "rank_tokens": 16}
    training = {"bf16": False, "window_dropout": (0.5, 0.5), "batch_size": batch_size}
    small |= {"align_tokens": 128, "align": training, "distil_tokens": 128, "distil": training}
    small["fwp"] = {"window": 4, "sinks": 1}
    measures = {"tokens": 32, "baseline_tokens": 0, "residual_tokens": 0, "lengths": (), "prompts": (), "needles": 0}
    recipe = Recipe("few", "few tokens", **small, report=measures)
    said = {"tokenizer": byte_tokenizer(), "keep": 1, "recipe": recipe, "data": TEXTS, "output": folder / "made"}
    made = verb.convert(tiny_llama(layers=3).double(), **said)
    return made.state_dict(), made.conversion_report, sorted(file.name for file in folder.rglob("made*/*"))
