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

from ..seeds import seeded
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
    seed: int = 0,
) -> PreTrainedModel:
    """The student: the teacher with fast weights in `layers`, started from the teacher's own projections.

    The teacher is not modified. With `share`, weights that are reused stay in the teacher's memory, so that training
    them would change the teacher: use it only where nothing but mixers is written to. seed: of what is drawn where
    some options of the mixers ask for weights that the teacher does not have.
    """
    student = empty_student(teacher, layers=layers, fwp=fwp)
    fill(student, teacher, share=share)
    materialise_rest(student, device=teacher.device)
    for layer in layers_of(student):
        start_mixer(student, layer, seed=seed)
    return student.train(teacher.training)


def empty_student(
    teacher: PreTrainedModel, *, layers: Iterable[int], fwp: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The student without memory for its weights, all of which the teacher's are known to account for."""
    host = find_host(teacher.config)
    config = student_config(teacher.config, layers=layers, fwp=fwp)
    classes = {host.class_name(head): made for head, made in host_classes(host.name).items()}
    name = type(teacher).__name__
    if name not in classes:
        raise ValueError(f"cannot convert a {name}; the heads of the family {host.name!r} are {', '.join(classes)}")
    account(teacher.state_dict(), host=host, layers=converted_layers(config))
    with torch.device("meta"):
        student = classes[name](config)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    student.name_or_path = teacher.name_or_path
    return student


def fill(student: PreTrainedModel, teacher: PreTrainedModel, *, share: bool = False, part: str | None = None) -> None:
    """Give an empty student its weights: the teacher's, and memory for what mixers have beyond them.

    part: only what lies in the block whose names begin so; "" for what lies outside of all blocks.
    """
    config, host = student.config, find_host(teacher.config)
    expected, tied, mixers = student.state_dict(), student.all_tied_weights_keys, _mixers(student)
    weights: dict[str, Tensor] = {}
    for key, tensor in teacher.state_dict().items():
        for place, piece in _placed(key, tensor, config, host).items() if in_part(key, host, part) else ():
            if place in tied:
                continue
            if place not in expected:
                raise ValueError(f"the teacher's {key} has no place in the student (it would be {place})")
            weights[place] = _fitted(key, piece, expected[place].shape, place=place, config=config)
            if weights[place] is tensor and (not share or place.startswith(mixers)):
                weights[place] = tensor.clone()
    fresh = {}
    for name, empty in expected.items():
        if name in weights or name in tied or not in_part(name, host, part):
            continue
        if not name.startswith(mixers):
            raise ValueError(f"the teacher has no weights for the student's {name}")
        dtype = torch.float32 if name.rpartition(".")[2] in FLOAT32 else teacher.dtype
        fresh[name] = torch.empty(empty.shape, dtype=dtype, device=teacher.device)
    for name, tensor in {**weights, **fresh}.items():
        put(student, name, tensor, loaded=name in weights)


def in_part(key: str, host: Host, part: str | None) -> bool:
    """Whether a weight lies in a part of the model, as `fill` names parts."""
    if part:
        return key.startswith(part)
    return part is None or re.search(rf"\b{re.escape(host.blocks)}\.\d+\.", key) is None


def materialise_rest(model: PreTrainedModel, *, device: torch.device) -> None:
    """What a model built without memory has beside the weights it was given: tied weights, and buffers."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    model.tie_weights()
    model.initialize_weights()


def start_mixer(student: PreTrainedModel, layer: int, *, seed: int) -> None:
    """What the teacher has no weights for: neutral where it can be, else drawn, whatever else has been drawn before."""
    mixer = layers_of(student)[layer]
    with seeded(seed + layer):  # a student that is made layer by layer draws the same
        mixer.apply(student._init_weights)
    start_neutral(mixer)


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
        if layer.window is not None:
            # o_proj was copied as the mean of all that it reads; the window's part and the mean read are a sum
            layer.window.outside.weight.zero_()
            reads = layer.options.num_reads * layer.options.value_head_dim
            layer.o_proj.weight.mul_(layer.options.time_scales + 1)
            layer.o_proj.weight[:, :reads].div_(layer.options.time_scales)


def _placed(key: str, tensor: Tensor, config: Any, host: Host) -> dict[str, Tensor]:
    """The student's weights that are made of one of the teacher's."""
    block, layer, name = in_attention(key, host)
    if layer not in converted_layers(config):
        return {key: tensor}
    parts = moved(weight_map(host)[name], tensor, mixer_options(config, layer))
    return {block + place: part for place, part in parts.items()}


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


def put(model: nn.Module, name: str, tensor: Tensor, *, loaded: bool) -> None:
    """Set a parameter or buffer of any device and size; one that is not `loaded` has still to be initialised."""
    owner, _, name = name.rpartition(".")
    module = model.get_submodule(owner)
    if name in module._buffers:
        module._buffers[name] = tensor
        return
    # in one piece, as a saved model is loaded: products of transposed weights round otherwise on some processors
    parameter = nn.Parameter(tensor.detach().contiguous(), requires_grad=tensor.is_floating_point())
    # transformers' initialisation leaves a parameter with this mark alone
    parameter._is_hf_initialized = loaded  # type: ignore[attr-defined]
    setattr(module, name, parameter)


__all__ = [
    "WEIGHT_MAPS",
    "account",
    "attention_modules",
    "copy_teacher",
    "empty_student",
    "fill",
    "materialise_rest",
    "output_projection_name",
    "put",
    "start_mixer",
]
