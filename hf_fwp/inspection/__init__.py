"""What the fast weights of a model hold while it reads a text: as numbers, as one HTML page, as figures.

inspection = hf_fwp.inspect("smol-delta", "Ada Lovelace wrote the first program. Who wrote it?", output="page.html")
inspection.figure(layer=3, head=2).savefig("layer3.pdf")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from ..architecture import config_of, head_of
from ..estimates import duration, empty_model, seconds_per_token, size
from ..files import write_whole
from ..layer import FastWeightLayer, layers_of
from ..registration import CAUSAL
from ..telling import progress_bar, say
from .lens import Lens, finding_lens
from .measures import LayerView, measure
from .recording import Recording, recording

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS = 64


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. T tokens, R reads of a layer."""

    model: str
    tokens: list[str]
    total: int
    """Tokens of the whole text; `tokens` may be its beginning."""
    layers: dict[int, LayerView]
    reads: dict[int, list[list[list[str]]]]
    """By layer, token and read, the words that what was read speaks for; empty without an output head."""
    writes: dict[int, list[list[list[str]]]]
    """By layer, token and state, the words of what a token's write changed in what its own key recalls."""
    softmax: dict[int, Tensor]
    """The attention maps of the model compared with, [H, T, T], by layer."""
    against: str | None = None

    def summary(self) -> dict[str, Any]:
        """A few numbers per layer: what a machine reads, and a terminal shows."""
        return {
            "model": self.model,
            "tokens": len(self.tokens),
            "layers": {str(layer_idx): _summary(view) for layer_idx, view in self.layers.items()},
        }

    def html(self) -> str:
        """The whole page: it needs no other file and no network."""
        from .page import page

        return page(self)

    def save(self, path: str | Path) -> None:
        """Write the page, whole or not at all."""
        write_whole(Path(path), self.html())

    def figure(self, layer: int, head: int = 0) -> Figure:
        """One head for a notebook or a paper. Raises ValueError for a layer or a head that is not there."""
        from .figures import head_figure

        return head_figure(self, layer, head)


def inspect(
    model: PreTrainedModel | str | Path,
    text: str | None = None,
    *,
    tokenizer: Any = None,
    input_ids: Tensor | Sequence[int] | None = None,
    against: PreTrainedModel | str | Path | None = None,
    layers: Sequence[int] | None = None,
    max_tokens: int = MAX_TOKENS,
    output: str | Path | None = None,
    progress: bool = True,
    dry_run: bool = False,
) -> Inspection:
    """Look into the fast weights of `model` (a model, a folder or a Hub id) while it reads `text` or `input_ids` [T].

    `against` is a softmax model with the same tokens, its teacher for instance, whose attention maps are shown beside
    the effective attention of the same layer. `layers` limits what is looked at. Memory: T x states of one layer.
    dry_run: print what it takes, without loading weights, and return an inspection that holds nothing.
    Raises ValueError for a model without fast-weight layers or with a rule that reads ahead, a text without a
    tokenizer, an empty text, an unknown layer, a teacher that reads other tokens.
    """
    name = _name(model)
    if tokenizer is None and text is not None and not isinstance(model, PreTrainedModel):
        tokenizer = AutoTokenizer.from_pretrained(model)
    model = _shape(model) if dry_run else _load(model)
    ids, words = _tokens(text, input_ids, tokenizer)
    chosen = _layers(model, layers)
    total = len(ids)
    ids, words = ids[:max_tokens], words[:max_tokens]
    if dry_run:
        models = [model, *(() if against is None else [_shape(against)])]
        part = f"{len(chosen)} of {model.config.num_hidden_layers} layers"
        say(f"inspect {name}: {part} while it reads {len(ids)} tokens, {_takes(models, len(ids))}")
        return Inspection(model=name, tokens=words, total=total, layers={}, reads={}, writes={}, softmax={})
    recorded, lens = _record(model, ids)
    views, reads, writes = {}, {}, {}
    for layer_idx in progress_bar(chosen, desc="fast weights", unit="layer", progress=progress):
        views[layer_idx] = measure(recorded[layer_idx])
        if lens is not None and tokenizer is not None:
            weight = _projections(chosen[layer_idx])
            reads[layer_idx] = _words(lens, tokenizer, weight, recorded[layer_idx].mixed_TRV)
            changes = views[layer_idx].recalled_TSV
            if changes is not None:
                writes[layer_idx] = _words(lens, tokenizer, weight[:: len(weight) // changes.shape[1]], changes)
    inspection = Inspection(
        model=name,
        tokens=words,
        total=total,
        layers=views,
        reads=reads,
        writes=writes,
        softmax={} if against is None else _softmax_maps(against, ids, list(chosen)),
        against=None if against is None else _name(against),
    )
    if output is not None:
        inspection.save(output)
    return inspection


def _name(model: PreTrainedModel | str | Path) -> str:
    """How a reader calls the model: a Hub id as it is, a folder by its last part."""
    name = model.name_or_path or type(model).__name__ if isinstance(model, PreTrainedModel) else str(model)
    return Path(name).resolve().name if Path(name).exists() else name


def _load(model: PreTrainedModel | str | Path, **how: Any) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        return model
    return _named(config_of(model)).from_pretrained(model, **how)


def _named(config: Any) -> Any:
    """The Auto class of the model that a config names: another one would add an output head of random weights."""
    return getattr(transformers, head_of(config, config.architectures or []) or CAUSAL)


def _shape(model: PreTrainedModel | str | Path) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        return model
    config = config_of(model)
    return empty_model(config, auto=_named(config))


def _takes(models: Sequence[PreTrainedModel], tokens: int) -> str:
    """Time of the forward passes and memory of the weights, in words."""
    held = sum(each.num_parameters() * each.dtype.itemsize for each in models)
    return f"{duration(tokens * sum(map(seconds_per_token, models)))} to read and {size(held)} of weights"


def _tokens(text: str | None, input_ids: Tensor | Sequence[int] | None, tokenizer: Any) -> tuple[Tensor, list[str]]:
    """The text as ids [T], and as the words to be shown."""
    if (text is None) == (input_ids is None):
        raise ValueError("inspect needs a text or input_ids, and one of them only")
    if text is not None:
        if tokenizer is None:
            raise ValueError("a model object comes without its tokenizer; give tokenizer=..., or input_ids")
        input_ids = tokenizer(text)["input_ids"]
    ids = torch.as_tensor(input_ids, dtype=torch.long).flatten()
    if not len(ids):
        raise ValueError("the text is empty; give at least one token")
    return ids, [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids.tolist()]


def _layers(model: PreTrainedModel, wanted: Sequence[int] | None) -> dict[int, FastWeightLayer]:
    """The layers to look at, by index."""
    found = layers_of(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no fast-weight layer; convert it first: hf_fwp.convert(...)")
    for layer_idx, layer in found.items():
        ahead = layer.rule.looks_ahead
        if ahead is not None and ahead(layer.options.rule_options):
            raise ValueError(
                f"layer {layer_idx} ({layer.rule.name}) reads tokens that come later; only causal layers are inspected"
            )
    unknown = sorted(set(wanted or ()) - set(found))
    if unknown:
        raise ValueError(f"layer {unknown[0]} has no fast weights; those with fast weights are {sorted(found)}")
    return {layer_idx: layer for layer_idx, layer in found.items() if wanted is None or layer_idx in wanted}


def _record(model: PreTrainedModel, ids: Tensor) -> tuple[dict[int, Recording], Lens | None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), recording(model) as recorded, finding_lens(model) as lens:
            model(input_ids=ids[None].to(model.device), use_cache=False)
    finally:
        model.train(training)
    return recorded, lens


def _projections(layer: FastWeightLayer) -> Tensor:
    """W_o, head by head: [R, D, V], without what it makes of a window."""
    R, V = layer.options.num_reads, layer.options.value_head_dim
    return layer.o_proj.weight.detach()[:, : R * V].unflatten(1, (R, V)).transpose(0, 1)


def _words(lens: Lens, tokenizer: Any, weight_HDV: Tensor, vectors_THV: Tensor) -> list[list[list[str]]]:
    """The words of every token's vectors, head by head."""
    by_head = [lens.words(weight, vectors_THV[:, head]) for head, weight in enumerate(weight_HDV)]
    found = torch.stack(by_head, dim=1).tolist()
    return [[tokenizer.batch_decode([[i] for i in best]) for best in heads] for heads in found]


def _softmax_maps(against: PreTrainedModel | str | Path, ids: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """The attention maps of a softmax model for these layers."""
    teacher = _load(against, attn_implementation="eager")
    if int(ids.max()) >= teacher.config.get_text_config().vocab_size:
        raise ValueError(
            f"{_name(against)} reads {teacher.config.get_text_config().vocab_size} different tokens, and this text has "
            f"the token {int(ids.max())}; compare with the model that this one was made from"
        )
    before = teacher.config._attn_implementation or "eager"
    try:
        teacher.set_attn_implementation("eager")
        with torch.no_grad():
            maps = teacher.eval()(input_ids=ids[None].to(teacher.device), use_cache=False, output_attentions=True)
    finally:
        teacher.set_attn_implementation(before)
    count = teacher.config.get_text_config().num_hidden_layers
    given = [weights for weights in maps.attentions if weights is not None]
    if len(given) != count:
        raise ValueError(
            f"{_name(against)} gives {len(given)} attention maps for {count} layers; compare with a model of softmax "
            "layers only"
        )
    return {layer_idx: given[layer_idx][0].float().cpu() for layer_idx in layers if layer_idx < count}


def _summary(view: LayerView) -> dict[str, Any]:
    """The means over heads at the last token, and over tokens where that says more."""
    found: dict[str, Any] = {"rule": view.rule}
    for name, state in view.states.items():
        prefix = "" if name == "state" else f"{name} "
        found[f"{prefix}norm"] = float(state.norm_TS[-1].mean())
        found[f"{prefix}effective rank"] = float(state.rank_PS[-1].mean())
    if view.beta_TS is not None:
        found["mean beta"] = float(view.beta_TS.mean())
    if view.decay_TS is not None:
        found["mean decay"] = float(view.decay_TS.mean())
    return found
