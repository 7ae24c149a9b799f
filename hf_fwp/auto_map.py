"""The `auto_map` of a config: which classes of which files a checkpoint brings along, for whoever has no hf_fwp.

Written by hf_fwp/bundle.py, read by transformers under `trust_remote_code=True`; here it stays true when a model that
was loaded with it is saved again: the code goes along. Registered classes win over those that a checkpoint brings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as Config
else:
    Config = object

ENTRY = "modeling_hf_fwp"  # the file that an auto_map names; it brings all others, hf_fwp_*


class WithAutoMap(Config):
    """A config that always has an `auto_map`; an empty one is not saved.

    trl reads it, without asking whether it is there, when it loads a reference whose class is not in transformers (no
    public issue found).
    """

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.auto_map: dict[str, str] = kwargs.get("auto_map") or {}

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it."""
        return {key: value for key, value in super().to_dict().items() if key != "auto_map" or value}

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers. Code of ours that the config was loaded with is written beside it; an `auto_map` that
        names code of others is left out, since their code is not saved."""
        given, self.auto_map = self.auto_map, {}
        try:
            if names_our_code(given) and not os.path.isfile(save_directory):
                files, self.auto_map = travelling_code(self, given)
                write_files(files, Path(save_directory))
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            self.auto_map = given

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: transformers would copy the file of the class, whose imports it cannot follow, on every save."""


def names_our_code(auto_map: Mapping[str, Any]) -> bool:
    """Whether an `auto_map`, as it stands in a file or as transformers completed it with a repository, is ours."""
    return str(auto_map.get("AutoConfig", "")).rpartition("--")[2].startswith(f"{ENTRY}.")


def travelling_code(config: Any, given: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(files by name, auto_map) of a config that has an auto_map of ours already."""
    try:
        from .bundle import auto_map_of, code_files
    except ImportError:  # this is exported code, which copies itself
        folder = Path(__file__).parent
        paths = [folder / f"{ENTRY}.py", *folder.glob("hf_fwp_*.py")]
        files = {path.name: path.read_text(encoding="utf-8") for path in paths}
        here = {auto: str(name).rpartition("--")[2] for auto, name in given.items()}
        return files, {auto: name for auto, name in here.items() if name.startswith(f"{ENTRY}.")}
    return code_files(config), auto_map_of(config)


def write_files(files: Mapping[str, str], folder: Path) -> None:
    """Text files in a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
