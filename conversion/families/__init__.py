"""From a teacher's weights to a student's: every key is moved, reused or knowingly dropped, otherwise an error."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fwp.hosts import Host, converted_layers, find_host, student_config
from hf_fwp.hosts.graft import FLOAT32, host_classes
from hf_fwp.layer import FastWeightLayer, layers_of

from . import separate

# A key of Host.projections -> {teacher's attention parameter: mixer's parameter, or None when it is dropped}
WEIGHT_MAPS: dict[str, Mapping[str, str | None]] = {
    "separate": separate.WEIGHTS,
}


def account(keys: Iterable[str], *, host: Host, layers: Iterable[int]) -> dict[str, str | None]:
    """Where each teacher key goes in the student: its own name when reused, None when the weight map drops it.

    Raises for a key of a converted attention that the family's weight map does not name.
    """
    weights, layers = WEIGHT_MAPS[host.projections], set(layers)
    attention = re.compile(rf"^(.*\b{host.blocks}\.(\d+)\.{host.attention}\.)(.+)$")
    places: dict[str, str | None] = {}
    unknown = []
    for key in keys:
        found = attention.match(key)
        if found is None or int(found[2]) not in layers:
            places[key] = key
        elif found[3] in weights:
            name = weights[found[3]]
            places[key] = None if name is None else found[1] + name
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"the weight map {host.projections!r} of the family {host.name!r} does not say what to do with "
            f"{', '.join(unknown)}; add these parameters to it in conversion/families/, or mark them as dropped (None)"
        )
    return places


def copy_teacher(
    teacher: PreTrainedModel,
    *,
    layers: Iterable[int],
    fwp: Mapping[str, Any] | None = None,
    share: bool = False,
) -> PreTrainedModel:
    """The student: the teacher with fast weights in `layers`, started from the teacher's own projections.

    The teacher is not modified. With `share`, weights that are reused stay in the teacher's memory, so that training
    them would change the teacher: use it only where nothing but mixers is written to.
    """
    host = find_host(teacher.config)
    config = student_config(teacher.config, layers=layers, fwp=fwp)
    student = _empty_student(teacher, config, host)
    places = account(teacher.state_dict(), host=host, layers=converted_layers(config))
    expected = student.state_dict()
    tied, mixers = student.all_tied_weights_keys, _mixers(student)
    weights: dict[str, Tensor] = {}
    for key, tensor in teacher.state_dict().items():
        place = places[key]
        if place is None or place in tied:
            continue
        if place not in expected:
            raise ValueError(f"the teacher's {key} has no place in the student (it would be {place})")
        weights[place] = _fitted(key, tensor, expected[place].shape, place=place, config=config)
        if weights[place] is tensor and (not share or place.startswith(mixers)):
            weights[place] = tensor.clone()
    _fill(student, weights, teacher)
    for layer in layers_of(student).values():
        start_neutral(layer)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    student.name_or_path = teacher.name_or_path
    return student.train(teacher.training)


def start_neutral(layer: FastWeightLayer) -> None:
    """What the teacher has no weights for starts as the identity, so that it disturbs nothing that was copied."""
    with torch.no_grad():
        for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
            if hasattr(layer, name):
                weight = getattr(layer, name).weight
                weight.zero_()
                weight[..., -1] = 1
        if layer.options.output_gate == "sigmoid2":  # 2 sigmoid(0) = 1
            layer.g_proj.weight.zero_()
        if layer.options.value_skip:
            layer.skip_proj.weight.zero_()


def _empty_student(teacher: PreTrainedModel, config: Any, host: Host) -> PreTrainedModel:
    head = type(teacher).__name__.removeprefix(host.title)
    classes = host_classes(host.name)
    if head not in classes:
        raise ValueError(
            f"cannot convert a {type(teacher).__name__}; the heads of the family {host.name!r} are "
            f"{', '.join(host.title + name for name in classes)}"
        )
    with torch.device("meta"):
        return classes[head](config)


def _mixers(student: PreTrainedModel) -> tuple[str, ...]:
    """How the names of the mixers' parameters begin."""
    return tuple(f"{name}." for name, module in student.named_modules() if isinstance(module, FastWeightLayer))


def _fitted(key: str, tensor: Tensor, shape: torch.Size, *, place: str, config: Any) -> Tensor:
    """`tensor` in the student's shape. With several time scales o_proj reads all of them: it starts as their mean."""
    if tensor.shape == shape:
        return tensor
    scales, rest = divmod(shape[-1], tensor.shape[-1])
    if place.endswith("o_proj.weight") and not rest and tensor.shape[0] == shape[0]:
        return tensor.repeat(1, scales) / scales
    raise ValueError(
        f"the teacher's {key} is {tuple(tensor.shape)}, but the student's {place} is {tuple(shape)}; change the "
        f"options of the mixer so that its heads match the teacher's (fwp = {config.fwp})"
    )


def _fill(student: PreTrainedModel, weights: Mapping[str, Tensor], teacher: PreTrainedModel) -> None:
    """Give the student, built without memory, the given weights; what mixers have beyond them is initialised."""
    tied, mixers = student.all_tied_weights_keys, _mixers(student)
    fresh = {}
    for name, empty in student.state_dict().items():
        if name in weights or name in tied:
            continue
        if not name.startswith(mixers):
            raise ValueError(f"the teacher has no weights for the student's {name}")
        dtype = torch.float32 if name.rpartition(".")[2] in FLOAT32 else teacher.dtype
        fresh[name] = torch.empty(empty.shape, dtype=dtype, device=teacher.device)
    for name, tensor in {**weights, **fresh}.items():
        owner, _, last = name.rpartition(".")
        _put(student.get_submodule(owner), last, tensor, loaded=name in weights)
    for module in student.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=teacher.device)
    student.tie_weights()
    student.initialize_weights()


def _put(module: nn.Module, name: str, tensor: Tensor, *, loaded: bool) -> None:
    if name in module._buffers:
        module._buffers[name] = tensor
        return
    parameter = nn.Parameter(tensor.detach(), requires_grad=tensor.is_floating_point())
    # transformers' initialisation leaves a parameter with this mark alone
    parameter._is_hf_initialized = loaded  # type: ignore[attr-defined]
    setattr(module, name, parameter)


__all__ = ["WEIGHT_MAPS", "account", "copy_teacher", "start_neutral"]
