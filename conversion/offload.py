"""Solve a student of a teacher that is larger than the memory: one decoder block of both is there at a time.

    for layer in visit(layers):
        read the teacher's block from its safetensors files, make the student's block of it
        yield layer                     solve.py finds both where it expects them
        write the student's block to a file of its own, save the streams, forget both blocks

Where kept layers are ranked, all layers are visited twice before: to solve all mixers, of which only they are written,
and to swap each in alone. What the student keeps of the teacher is written as the teacher stores it (bf16 stays bf16),
mixers in float32. A run that was interrupted goes on at the layer where it stopped.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fwp.estimates import peak_memory
from hf_fwp.hosts import blocks_of, converted_layers, find_host
from hf_fwp.layer import layers_of
from hf_fwp.weights import INDEX, check_finite, weights_files

from .checkpoint import latest, load, save
from .families import empty_student, fill, in_attention, in_part, materialise_rest, put, start_mixer
from .keep import most_needed, options_of, rank_layers
from .memory import give_back_freed_memory
from .run import Run
from .scores import Forward, compare
from .solve import solve
from .stream import Walk, logits
from .teacher import weights_folder

LAYERS, RANKED = "layers", "ranked"  # in the folder of unfinished work
NOT_MEASURED = (
    "Converted layer by layer, never in memory as a whole: baselines, speed and samples were not measured. "
    "`hf-fwp evaluate` measures the model where it fits."
)


class StoredWeights:
    """The weights of `model` in the safetensors files of a folder, read one at a time, as float32."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.dtypes: dict[str, torch.dtype] = {}  # as they are stored, of those that have been read
        files: dict[str, Path] = {}
        for file in weights_files(folder):
            with safe_open(folder / file, framework="pt") as stored:
                files |= dict.fromkeys(stored.keys(), folder / file)
        prefix = f"{model.base_model_prefix}."
        self.places: dict[str, tuple[Path, str]] = {}
        for name in model.state_dict():
            keys = [key for key in (name, name.removeprefix(prefix)) if key in files]
            if keys:
                self.places[name] = (files[keys[0]], keys[0])
            elif name not in model.all_tied_weights_keys:
                raise ValueError(
                    f"{folder} has no weight {name} in safetensors files, so it cannot be read layer by layer; where "
                    "there is memory for all of it, load it and save it again with "
                    "model.save_pretrained(folder, save_original_format=False)"
                )

    def read(self, name: str) -> Tensor:
        """The weight in memory of its own."""
        file, key = self.places[name]
        with safe_open(file, framework="pt") as stored:
            tensor = stored.get_tensor(key)
        self.dtypes[name] = tensor.dtype
        return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


@dataclass
class Offload:
    """A teacher and its student without memory for the weights of their blocks, but for the block that is visited.

    folder: of the student's files. judged_NT: token blocks [N, T] that no stage has read, on which both are compared.
    solved: the folder of another student whose mixers this one is given. writes: which of its weights the student's
    files get: "all", those of "mixers", or "none". seed: of what mixers need and the teacher does not have.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    stored: StoredWeights
    folder: Path
    judged_NT: Tensor | None = None
    solved: Path | None = None
    writes: str = "all"
    seed: int = 0
    judges: list[Walk] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = self.folder.with_name(self.folder.name + ".steps")
        for folder in (self.folder, self.steps):
            folder.mkdir(parents=True, exist_ok=True)
        self.host = find_host(self.teacher.config)
        for name in self.stored.places:
            if in_part(name, self.host, ""):
                put(self.teacher, name, self.stored.read(name), loaded=True)
        materialise_rest(self.teacher, device=torch.device("cpu"))
        fill(self.student, self.teacher, share=True, part="")
        materialise_rest(self.student, device=torch.device("cpu"))
        self.layers = self.teacher.config.num_hidden_layers
        if self.writes == "all" and not self._file(0).is_file():
            self._write("", self._file(0))

    def visit(self, layers: Iterable[int], walks: list[Walk], found: dict[int, dict[str, Any]]) -> Iterator[int]:
        """The layers that are still to be done, each with its blocks in memory; `walks` and `found` are restored."""
        if self.judged_NT is not None:
            self.judges = [Walk(model, self.judged_NT) for model in (self.teacher, self.student)]
        streams = [*walks, *self.judges]
        for walk in streams:
            walk.keep_in(self.steps)
        done = self._restore(streams, found)
        for layer in layers:
            if layer < done:
                continue
            part = self._bring(layer)
            yield layer
            for walk in self.judges:
                walk.move(layer)
            if self.writes != "none":
                self._write(part, self._file(layer + 1))
            self._forget(part)
            hidden = {str(place): walk.hidden_NTD for place, walk in enumerate(streams)}
            save(self.steps, layer + 1, [hidden], {"found": found, "fwp": self.student_fwp})

    def blocks(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """The decoder blocks of the teacher and of the student."""
        return blocks_of(self.teacher.base_model, self.host), blocks_of(self.student.base_model, self.host)

    @property
    def student_fwp(self) -> dict[str, Any]:
        """The mixer options of the student; calibration writes into them."""
        config: Any = self.student.config
        return config.fwp

    def comparison(self, *, progress: bool) -> dict[str, Any]:
        """Perplexities, KL and agreement on the judged blocks, when all layers have been visited."""
        assert self.judged_NT is not None, "there is something to judge on"
        teacher, student = (
            self._answers(*each) for each in zip((self.teacher, self.student), self.judges, strict=True)
        )
        return compare({"model": student}, teacher, self.judged_NT, progress=progress)["model"]

    def complete(self) -> None:
        """Make of `folder` what `save_pretrained` of the whole student would write, weights in a file per layer."""
        with tempfile.TemporaryDirectory(dir=self.steps) as scratch:
            self.student.save_pretrained(scratch, state_dict={})
            for file in Path(scratch).glob("*.json"):
                file.replace(self.folder / file.name)
        places: dict[str, str] = {}
        for file in (self._file(number) for number in range(self.layers + 1)):
            with safe_open(file, framework="pt") as stored:
                places |= dict.fromkeys(stored.keys(), file.name)
        total = sum((self.folder / name).stat().st_size for name in set(places.values()))
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _answers(self, model: PreTrainedModel, walk: Walk) -> Forward:
        """Logits of the judged blocks, asked for in their order."""
        rows = iter(walk.hidden_NTD.split(1))
        return lambda _: logits(model, walk.finish(self.layers, next(rows))[0])[None]

    def _file(self, number: int) -> Path:
        """0: what lies outside of all blocks; then a file for each."""
        return self.folder / f"model-{number + 1:05d}-of-{self.layers + 1:05d}.safetensors"

    def _bring(self, layer: int) -> str:
        """Read the teacher's block and make the student's of it; returns how the names of both begin."""
        part = f"{self.teacher.base_model_prefix}.{self.host.blocks}.{layer}."
        for name in self.stored.places:
            if name.startswith(part):
                put(self.teacher, name, self.stored.read(name), loaded=True)
        theirs, ours = (blocks[layer] for blocks in self.blocks())
        check_finite(theirs, f"layer {layer} of {self.teacher.name_or_path}")
        fill(self.student, self.teacher, share=True, part=part)
        ours.apply(self.student._init_weights)
        if layer in converted_layers(self.student.config):
            start_mixer(self.student, layer, seed=self.seed)
            if self.solved is not None:
                layers_of(self.student)[layer].load_state_dict(self._mixer(self.solved / self._file(layer + 1).name))
        return part

    def _mixer(self, file: Path) -> dict[str, Tensor]:
        """The weights of a mixer in the file of its layer."""
        return {in_attention(name, self.host)[2]: weight for name, weight in load_file(file).items()}

    def _write(self, part: str, file: Path) -> None:
        """The student's weights of a part, complete or not there at all."""
        tied, converted, weights = self.student.all_tied_weights_keys, converted_layers(self.student.config), {}
        for name, tensor in self.student.state_dict().items():
            kept = in_attention(name, self.host)[1] not in converted
            if in_part(name, self.host, part) and name not in tied and not (kept and self.writes == "mixers"):
                dtype = self.stored.dtypes.get(name, tensor.dtype) if kept else tensor.dtype
                weights[name] = tensor.to(dtype).contiguous()
        unfinished = self.steps / file.name  # where what a kill leaves of it is thrown away
        save_file(weights, unfinished, metadata={"format": "pt"})
        unfinished.rename(file)

    def _forget(self, part: str) -> None:
        for model in (self.teacher, self.student):
            for name, tensor in model.state_dict().items():
                if name.startswith(part):
                    put(model, name, torch.empty_like(tensor, device="meta"), loaded=False)
        give_back_freed_memory()

    def _restore(self, streams: list[Walk], found: dict[int, dict[str, Any]]) -> int:
        """How many layers were done before; the streams stand behind the last of them."""
        saved = latest(self.steps, resume=True)
        if saved is None:
            return 0
        tensors, said = load(saved)
        for place, hidden_NTD in tensors:
            streams[int(place)].hidden_NTD.copy_(hidden_NTD)
        found |= {int(layer): choice for layer, choice in said["found"].items()}
        self.student_fwp.update(said["fwp"])
        return int(saved.name.rpartition("-")[2])


def finish_offloaded(run: Run, output: Path) -> PreTrainedModel:
    """The closed form layer by layer; what needs the whole student at once is not measured."""
    assert run.work is not None, "it is where the layers go"
    started, plan, recipe = time.perf_counter(), run.plan, run.plan.recipe
    stored = StoredWeights(weights_folder(str(run.teacher.name_or_path)), run.teacher)
    kept, fwp, solved = plan.named(), recipe.options(plan.rule), None
    found: dict[int, dict[str, Any]] = {}
    if plan.ranked:
        kept, fwp, found, solved = _ranked(run, stored, run.work)
    layers = [layer for layer in range(plan.num_layers) if layer not in kept]
    pair = _pair(run, stored, layers, fwp, run.work / LAYERS, judged_NT=run.blocks["report"], solved=solved)
    given = {"calibrated": plan.ranked, "stream": recipe.stream, **recipe.solve}
    made = solve(pair.student, run.teacher, run.blocks["solve"], progress=run.progress, visit=pair.visit, **given)
    run.note_choices({layer: {**found.get(layer, {}), **made[layer]} for layer in made})
    run.report["stages"]["solve"] = {"seconds": time.perf_counter() - started}
    run.report |= {"kept_layers": kept, "evaluation": pair.comparison(progress=run.progress)}
    run.report |= {"peak_memory_bytes": peak_memory(), "notes": [NOT_MEASURED]}
    pair.complete()
    run.publish(pair.folder, output)
    return pair.student


def _pair(
    run: Run, stored: StoredWeights, layers: Iterable[int], fwp: Mapping[str, Any], folder: Path, **settings: Any
) -> Offload:
    student = empty_student(run.teacher, layers=layers, fwp=fwp).eval()
    return Offload(run.teacher, student, stored, folder, seed=run.plan.seed, **settings)


def _ranked(
    run: Run, stored: StoredWeights, work: Path
) -> tuple[list[int], dict[str, Any], dict[int, dict[str, Any]], Path]:
    """The layers to keep, the options of the other mixers, what was found for all, and the folder they are in."""
    plan, recipe, layers = run.plan, run.plan.recipe, range(run.plan.num_layers)
    pair = _pair(run, stored, layers, recipe.options(plan.rule), work / RANKED, writes="mixers")
    given = {**recipe.solve, "heldout": 2, "stream": "teacher"}
    found = solve(pair.student, run.teacher, run.blocks["rank_solve"], progress=run.progress, visit=pair.visit, **given)
    fwp = options_of(pair.student, layers)
    swaps = _pair(run, stored, layers, fwp, work / f"{RANKED}.swapped", solved=pair.folder, writes="none")
    asked = {"seed": plan.seed, "progress": run.progress, "visit": swaps.visit, **recipe.rank}
    ranking = rank_layers(swaps.student, run.teacher, run.rank_blocks, **asked)
    run.report["ranking"] = ranking
    assert plan.kept is not None, "it says how many"
    kept = most_needed(ranking, plan.kept)
    return kept, options_of(swaps.student, set(layers) - set(kept)), found, pair.folder
