"""Publishing: `push` uploads a folder to the Hub, checked and described; `hf-fwp push DIR REPO` is the same.

`model.push_to_hub` goes through `push_model`. Neither changes the folder or the model.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from . import __version__
from .auto_map import ENTRY, WithAutoMap, names_our_code
from .bundle import code_of, export_code
from .card import WITHOUT_PACKAGE, auto_class, bytes_shown, card_of, completed, loading, model_card
from .weights import INDEX, SINGLE, check_weights, weights_files

__all__ = ["Push", "bytes_shown", "push", "push_model"]

CARD = "README.md"
ADAPTER = "adapter_config.json"
NETWORK: Any = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever huggingface_hub speaks through
# Names of files and folders, anywhere in the folder, that belong to a training run or to this machine.
LEFT_OUT = (
    ".*",
    "__pycache__",
    "checkpoint-*",
    "checkpoints*",
    "global_step*",
    "runs",
    "step-*",
    "unfinished-*",
    "events.out.*",
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    "*.bin",
    "*.ckpt",
    "*.lock",
    "*.partial",
    "*.pickle",
    "*.pkl",
    "*.pt",
    "*.pth",
    "*.tmp",
)


@contextmanager
def told_when_unreachable() -> Iterator[None]:
    """A Hub that does not answer is a ConnectionError that names it."""
    try:
        yield
    except HfHubHTTPError:  # it answered
        raise
    except NETWORK as fault:
        raise ConnectionError(
            f"cannot reach the Hub at {HfApi().endpoint} ({fault}); check the network, nothing was changed there"
        ) from fault


@dataclass(frozen=True)
class Push:
    """What was, or in a dry run would be, uploaded: bytes by path, the text of the card, and where it is."""

    repo: str
    files: dict[str, int]
    card: str
    url: str | None = None


@told_when_unreachable()
def push(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    with_code: bool = False,
    base: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Upload the folder of a model or of an adapter to the repository `repo` of the Hub, made where there is none.

    The folder must load as it is: safetensors files that are whole, every weight there and finite, the config, the
    tokenizer if there is one; else ValueError. A card is written, or completed where the folder has one. What belongs
    to a training run stays here (LEFT_OUT). private: for a new repository. token: by default the one of
    `hf auth login`. revision: a branch other than main, made where there is none. with_code: also the code that whoever
    has no hf_fwp loads it with, as `export_code` writes it. base: of an adapter of peft, the address of its base model,
    where adapter_config.json names a folder of this machine. dry_run: check, and say what would be uploaded; only the
    config of an adapter's base model is asked for. ConnectionError where the Hub cannot be reached.
    """
    folder = Path(folder)
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        contents, card = adapter_contents(folder, repo, base=base, with_code=with_code, token=token)
    elif base is not None:
        raise ValueError(f"{folder} is a model, not an adapter: leave out base ({base})")
    else:
        contents, card = model_contents(folder, repo, with_code=with_code)
    contents[CARD] = card.encode()
    sizes = {path: len(x) if isinstance(x, bytes) else x.stat().st_size for path, x in sorted(contents.items())}
    if dry_run:
        return Push(repo, sizes, card)
    address = made_repository(repo, private=private, token=token)
    sent = upload(contents, address, token=token, revision=revision, message="Upload model")
    url = str(sent.repo_url)
    return Push(address, sizes, card, f"{url}/tree/{revision}" if revision else url)


Contents = dict[str, Path | bytes]


def model_contents(folder: Path, repo: str, *, with_code: bool) -> tuple[Contents, str]:
    """(what is uploaded of a model's folder by path, its card)."""
    model = whole_model(folder)
    contents: Contents = {path: folder / path for path in published_files(folder)}
    if with_code:
        contents |= {name: text.encode() for name, text in code_of(folder, model.config).items()}
    elif names_our_code(model.config.auto_map) and f"{ENTRY}.py" not in contents:
        raise ValueError(f"config.json of {folder} names code that is not there ({ENTRY}.py); give with_code=True")
    return contents, folder_card(folder, model, repo, with_code=f"{ENTRY}.py" in contents)


def adapter_contents(
    folder: Path, repo: str, *, base: str | None, with_code: bool, token: str | None
) -> tuple[Contents, str]:
    """(what is uploaded of an adapter's folder by path, its card)."""
    from . import adapters  # peft is slow to import

    if with_code:
        raise ValueError("an adapter has no code of its own: push its base model with its code, and this without")
    adapter = adapters.whole_adapter(folder, base, token=token)
    contents: Contents = {path: folder / path for path in published_files(folder)}
    contents[ADAPTER] = (json.dumps(adapter.settings, indent=2, sort_keys=True) + "\n").encode()
    ours = adapters.adapter_card(adapter, name=repo.rpartition("/")[2], address=repo)
    there = card_in(folder)
    if there is None:
        return contents, str(ours)
    there.data["base_model"] = adapter.base  # peft writes the folder that it was loaded from
    there.data["tags"] = [tag for tag in there.data.get("tags") or () if not tag.startswith("base_model:")]
    if adapters.TEMPLATE in there.text:
        there.text = ""
    return contents, completed(there, ours)


@told_when_unreachable()
def push_model(
    model: PreTrainedModel,
    repo: str,
    *,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    with_code: bool = False,
) -> CommitInfo:
    """Upload a model with its card: the one in the repository completed, else one from the report of its conversion,
    else one from its config. The arguments are those of `push_to_hub` of transformers, and `with_code`, as in `push`;
    code that the model was loaded with goes along anyway."""
    address = made_repository(repo, private=private, token=token)
    report = getattr(model, "conversion_report", None)
    with_code = with_code or names_our_code(model.config.auto_map)
    ours = ModelCard(new_card(model, report, address, with_code=with_code))
    ours.data["tags"] = list(dict.fromkeys([*ours.data["tags"], *(model.model_tags or ()), *(tags or ())]))
    there = remote_card(address, token)
    card = str(ours) if there is None else completed(there, ours)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if with_code:
            export_code(folder)
        contents: dict[str, Path | bytes] = {path: folder / path for path in published_files(folder)}
        return upload(
            {**contents, CARD: card.encode()},
            address,
            token=token,
            revision=revision,
            message=commit_message,
            description=commit_description,
            create_pr=create_pr,
        )


def new_card(model: PreTrainedModel, report: Mapping[str, Any] | None, address: str, *, with_code: bool) -> str:
    """The card of a model that has none: from the report of its conversion, else from its config."""
    name = address.rpartition("/")[2]
    if report:
        return model_card({**report, "name": name}, address=address, with_code=with_code)
    return card_of(model, name=name, address=address, with_code=with_code)


def whole_model(folder: Path) -> PreTrainedModel:
    """The model in `folder`, after everything about the folder was checked."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder that save_pretrained or convert wrote")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json; give one that save_pretrained wrote")
    if not weights_files(folder):
        raise ValueError(f"{folder} has no weights as safetensors files; save the model again with save_pretrained")
    check_weights(folder)
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, WithAutoMap):
        raise ValueError(
            f"{folder} has a {config.model_type!r}, no model of this package; `hf upload` uploads any folder"
        )
    auto = getattr(transformers, auto_class(config, (config.architectures or [None])[0]))
    model, found = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys"):
        if found[what]:
            raise ValueError(
                f"the weights of {folder} are not those of its config: {what.replace('_', ' ')} "
                f"{', '.join(sorted(found[what])[:3])}; save the model again with save_pretrained"
            )
    check_tokenizer(folder)
    return model


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer that does not load; there need be none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    try:
        AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, LookupError, TypeError) as fault:
        raise ValueError(f"the tokenizer in {folder} does not load ({fault}); save it again, or remove it") from fault


def published_files(folder: Path) -> list[str]:
    """The files of `folder` that belong to the model, by their paths in it; of the weights those that are read."""
    weights = weights_files(folder)
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    stale = {INDEX} if weights == [SINGLE] else set()
    return sorted(
        path.as_posix()
        for path in paths
        if not any(fnmatch(part, pattern) for part in path.parts for pattern in LEFT_OUT)
        and (path.as_posix() in weights or not fnmatch(path.name, "model*.safetensors"))
        and path.name not in stale
    )


def folder_card(folder: Path, model: PreTrainedModel, repo: str, *, with_code: bool) -> str:
    """The card of a folder: the one in it, completed, else a new one; the code in it loads the model from `repo`."""
    report = json.loads((folder / "report.json").read_text()) if (folder / "report.json").is_file() else None
    ours = new_card(model, report, repo, with_code=with_code)
    there = card_in(folder)
    if there is None:
        return ours
    for written in {(report or {}).get("name"), folder.resolve().name} - {None}:
        there.text = there.text.replace(f'from_pretrained("{written}")', f'from_pretrained("{repo}")')
    auto = auto_class(model.config, type(model).__name__)
    if with_code and WITHOUT_PACKAGE not in there.text:
        there.text = there.text.replace(loading(repo, auto), loading(repo, auto, with_code=True))
    return completed(there, ModelCard(ours))


def card_in(folder: Path) -> ModelCard | None:
    """The card of a folder, if it has one."""
    if not (folder / CARD).is_file():
        return None
    from yaml import YAMLError  # what huggingface_hub reads cards with

    try:
        return ModelCard.load(folder / CARD)
    except (ValueError, YAMLError) as fault:
        raise ValueError(f"{folder / CARD} does not begin with a valid block of metadata ({fault})") from fault


def remote_card(repo: str, token: bool | str | None) -> ModelCard | None:
    """The card in the repository, if there are both."""
    try:
        return ModelCard.load(repo, token=token)  # pyright: ignore[reportArgumentType] a bool is allowed
    except EntryNotFoundError:
        return None


def made_repository(repo: str, *, private: bool | None, token: bool | str | None) -> str:
    """The full name of the repository, made if it is not there."""
    return HfApi(token=token).create_repo(repo, private=private, exist_ok=True).repo_id


def upload(
    contents: Mapping[str, Path | bytes],
    repo: str,
    *,
    message: str,
    description: str | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """One commit with `contents`, on a branch that is made where there is none."""
    api = HfApi(token=token, library_name="hf_fwp", library_version=__version__)
    if revision is not None and not create_pr:
        api.create_branch(repo, branch=revision, exist_ok=True)
    return api.create_commit(
        repo,
        [CommitOperationAdd(path, content) for path, content in sorted(contents.items())],
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
    )
