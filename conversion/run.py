"""A conversion under way, and the folder of its unfinished work: OUTPUT.partial, until OUTPUT is renamed into place."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_fwp.files import write_whole

from .plan import Plan
from .processes import first_says, is_first, wait
from .report import write_report
from .seeds import seeded

PLAN = "plan.json"  # in the folder of unfinished work


@dataclass
class Run:
    """A conversion under way: its models, its text, what it has found so far, and where it saves."""

    plan: Plan
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    blocks: dict[str, Tensor]
    work: Path | None
    share: bool
    report: dict[str, Any]
    progress: bool = True

    @property
    def rank_blocks(self) -> Tensor:
        """What layers are ranked on, [N, T]: of each block as much as makes up the recipe's number of tokens."""
        blocks = self.blocks["rank"]
        return blocks[:, : self.plan.recipe.rank_tokens // len(blocks)]

    def stage(self, name: str, student: PreTrainedModel | None, do: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Run a stage, or load what it gave when it was finished before."""
        saved = None if self.work is None else self.work / name
        if saved is not None and first_says((saved / "stage.json").is_file()):
            self.report = json.loads((saved / "stage.json").read_text())
            loaded: Any = AutoModelForCausalLM.from_pretrained(saved, dtype=self.teacher.dtype)
            return loaded.to(self.teacher.device)
        del student
        started = time.perf_counter()
        with seeded(self.plan.seed):
            result = do()
        self.report["stages"].setdefault(name, {})["seconds"] = time.perf_counter() - started
        if saved is not None and is_first():
            _save_whole(saved, result, {"stage.json": json.dumps(self.report, default=str)})
        wait()
        return result

    def note_choices(self, choices: dict[int, dict[str, Any]]) -> None:
        """What was chosen in every converted layer, and how much of its attention it misses."""
        self.report["choices"] = choices
        self.report["residuals"] = {layer: choice["residual"] for layer, choice in choices.items()}

    def publish(self, unfinished: Path, output: Path) -> None:
        """Complete the finished model's folder with tokenizer and report, and rename it into place."""
        assert self.tokenizer is not None
        assert self.work is not None
        self.tokenizer.save_pretrained(unfinished)
        self.report = write_report(unfinished, {**self.report, "name": output.name})
        if output.is_dir():
            output.rmdir()
        unfinished.rename(output)
        shutil.rmtree(self.work)


def check_output(output: Path | None, *, resume: bool) -> None:
    """Refuse a folder that is in use."""
    if output is None:
        if resume:
            raise ValueError("resume needs the output folder of the run to continue; give output=")
        return
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"the output folder {output} is in use; give a new folder, or delete this one")


def as_begun(work: Path, plan: Plan) -> Plan | None:
    """The plan with the tokens that an interrupted run was begun with: a budget of time would be measured anew."""
    file = work / PLAN
    if not file.is_file():
        return None
    saved = json.loads(file.read_text())
    if plan.budget is None or saved.get("budget") != plan.budget or saved["recipe"]["name"] != plan.recipe.name:
        return None
    tokens = {name: saved["recipe"][name] for name in ("align_tokens", "distil_tokens", "extend_tokens")}
    return replace(plan, recipe=replace(plan.recipe, **tokens))


def begun(work: Path, *, resume: bool) -> bool:
    """Whether there is a run to continue; without `resume` there must be none."""
    found = (work / PLAN).is_file()
    if found and not resume:
        raise ValueError(f"{work} holds an interrupted run; continue it with resume=True, or delete the folder")
    return found


def begin(work: Path, plan: Plan, *, resume: bool) -> None:
    """Make the folder of unfinished work, or check that the one there belongs to this plan."""
    file = work / PLAN
    if begun(work, resume=resume):
        saved, given = json.loads(file.read_text()), plan.as_json()
        # an older plan says less
        changed = [each for name in given for each in _changed(saved.get(name, given[name]), given[name], name)]
        if changed:
            raise ValueError(
                f"{work} holds a run with other arguments ({', '.join(changed)}); give the same ones, or delete the "
                "folder"
            )
        return
    wait()  # until all have looked
    if is_first():
        write_whole(file, json.dumps(plan.as_json(), indent=2))


def _changed(saved: Any, given: Any, name: str) -> list[str]:
    """What was and is another argument, in words; of a recipe its settings: "recipe.align.lr"."""
    if not (isinstance(saved, dict) and isinstance(given, dict)):
        return [] if saved == given else [f"{name} was {saved!r}, is {given!r}"]
    names = dict.fromkeys([*saved, *given])
    return [told for each in names for told in _changed(saved.get(each), given.get(each), f"{name}.{each}")]


def _save_whole(folder: Path, model: PreTrainedModel, files: dict[str, str]) -> None:
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    for name, text in files.items():
        (unfinished / name).write_text(text)
    unfinished.rename(folder)
