"""From a teacher's weights to a student's: every key is moved, reused or knowingly dropped, otherwise an error."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fwp.hosts import Host, blocks_of, converted_layers, find_host, mixer_options, student_config
from hf_fwp.hosts.graft import FLOAT32, host_classes
from hf_fwp.layer import FastWeightLayer, layers_of

from . import cohere, conv1d, gemma3, gpt_oss, olmo, opt, phi3, query_key_value, separate
from .moves import Place, moved, places_of

# A key of Host.projections -> {teacher's attention parameter: where it goes (moves.py)}
WEIGHT_MAPS: dict[str, Mapping[str, Place]] = {
    "separate": separate.WEIGHTS,
    "gemma3": gemma3.WEIGHTS,
    "olmo": olmo.WEIGHTS,
    "cohere": cohere.WEIGHTS,
    "gpt_oss": gpt_oss.WEIGHTS,
    "opt": opt.WEIGHTS,
    "phi3": phi3.WEIGHTS,
    "conv1d": conv1d.WEIGHTS,
    "query_key_value": query_key_value.WEIGHTS,
}


def account(keys: Iterable[str], *, host: Host, layers: Iterable[int]) -> dict[str, tuple[str, ...]]:
    """Where each teacher key goes in the student: its own name when reused, nowhere when the weight map drops it.

    Raises for a key of a converted attention that the family's weight map does not name.
    """
    weights, layers = weight_map(host), set(layers)
    places: dict[str, tuple[str, ...]] = {}
    unknown = []
    for key in keys:
        block, layer, name = in_attention(key, host)
        if layer not in layers:
            places[key] = (key,)
        elif name in weights:
            places[key] = tuple(block + place for place in places_of(weights[name]))
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"the weight map {host.projections!r} of the family {host.name!r} does not say what to do with "
            f"{', '.join(unknown)}; add these parameters to it in conversion/families/, or mark them as dropped (None)"
        )
    return places


def weight_map(host: Host) -> Mapping[str, Place]:
    """Where the parameters of the family's attention go."""
    if host.projections not in WEIGHT_MAPS:
        raise ValueError(
            f"the family {host.name!r} names the weight map {host.projections!r}, which is not there; give "
            f"hf_fwp.conversion.families.WEIGHT_MAPS[{host.projections!r}], or one of {', '.join(WEIGHT_MAPS)}"
        )
    return WEIGHT_MAPS[host.projections]


def in_attention(key: str, host: Host) -> tuple[str, int | None, str]:
    """('model.layers.3.self_attn.', 3, 'q_proj.weight'); the layer is None outside the attention of blocks."""
    found = re.match(rf"^(.*\b{re.escape(host.blocks)}\.(\d+)\.{host.attention}\.)(.+)$", key)
    return ("", None, key) if found is None else (found[1], int(found[2]), found[3])


def output_projection_name(host: Host) -> str:
    """What the teacher's attention calls the projection that becomes the mixer's o_proj."""
    weights = weight_map(host)
    return next(name for name in weights if "o_proj.weight" in places_of(weights[name])).removesuffix(".weight")


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention (in a converted layer the mixer) of every layer, in order."""
    host = find_host(model.config)
    return [getattr(block, host.attention) for block in blocks_of(model.base_model, host)]


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
    account(teacher.state_dict(), host=host, layers=converted_layers(config))
    expected = student.state_dict()
    tied, mixers = student.all_tied_weights_keys, _mixers(student)
    weights: dict[str, Tensor] = {}
    for key, tensor in teacher.state_dict().items():
        for place, part in _placed(key, tensor, config, host).items():
            if place in tied:
                continue
            if place not in expected:
                raise ValueError(f"the teacher's {key} has no place in the student (it would be {place})")
            weights[place] = _fitted(key, part, expected[place].shape, place=place, config=config)
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
            gate: Any = layer.g_proj  # a Linear
            gate.weight.zero_()
        if layer.options.value_skip:
            layer.skip_proj.weight.zero_()


def _placed(key: str, tensor: Tensor, config: Any, host: Host) -> dict[str, Tensor]:
    """The student's weights that are made of one of the teacher's."""
    block, layer, name = in_attention(key, host)
    if layer not in converted_layers(config):
        return {key: tensor}
    parts = moved(weight_map(host)[name], tensor, mixer_options(config, layer))
    return {block + place: part for place, part in parts.items()}


def _empty_student(teacher: PreTrainedModel, config: Any, host: Host) -> PreTrainedModel:
    classes = {host.class_name(head): made for head, made in host_classes(host.name).items()}
    name = type(teacher).__name__
    if name not in classes:
        raise ValueError(f"cannot convert a {name}; the heads of the family {host.name!r} are {', '.join(classes)}")
    with torch.device("meta"):
        return classes[name](config)


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


__all__ = [
    "WEIGHT_MAPS",
    "account",
    "attention_modules",
    "copy_teacher",
    "output_projection_name",
    "start_neutral",
]
