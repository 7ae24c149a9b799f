"""Loads folders where hf_fwp is not installed: a process that sees a copy of this environment's packages without it.

As a script: python -I -S without_package.py PACKAGES JOBS. A job is a folder with the code of its model, and what the
package computed of it (expected.pt); what differs is printed.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

# What makes hf_fwp visible, and what only hf_fwp needs.
HIDDEN = ("hf_fwp", "__editable__", "peft", "datasets", "torchdiffeq")


def packages_without_ours(folder: Path) -> Path:
    """Links to everything that can be imported here but hf_fwp and what makes an editable install of it visible."""
    folder.mkdir()
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    for place in map(Path, sys.path):
        of_checkout = place.is_relative_to(Path(__file__).parent.parent) and "site-packages" not in place.parts
        if not place.is_dir() or str(place) in standard or place.name == "lib-dynload" or of_checkout:
            continue
        for entry in place.iterdir():
            hidden = entry.name.startswith(HIDDEN) or entry.suffix == ".pth"
            if not hidden and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def loaded_without_package(jobs: list[dict], scratch: Path, *, timeout: int = 600) -> list[dict]:
    """What the process found of each job: {"folder": ..., "wrong": [...]}."""
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    surroundings |= {"HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    packages = packages_without_ours(scratch / "packages")
    command = [sys.executable, "-I", "-S", __file__, str(packages), str(scratch / "jobs.json")]
    done = subprocess.run(command, env=surroundings, cwd=scratch, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def expect(model, folder: Path, ids, **given) -> dict:
    """Save the model with its code and what it computes; the job for the other process."""
    import torch

    import hf_fwp

    model.save_pretrained(folder)
    written = hf_fwp.export_code(folder)
    told = {"given": {"input_ids": ids, **given}, "written": written}
    with torch.no_grad():
        told["outputs"] = [x for x in model(**told["given"]).to_tuple() if isinstance(x, torch.Tensor)]
        told["tokens"] = model.generate(ids, **GREEDY) if model.can_generate() else None
    torch.save(told, folder.parent / f"{folder.name}.pt")
    auto = f"Auto{type(model).__name__.partition('For')[1] and 'ModelFor' + type(model).__name__.partition('For')[2]}"
    return {"folder": str(folder), "auto": HEADS.get(type(model).__name__, auto)}


HEADS = {"FwpModel": "AutoModel", "FwpGPT2LMHeadModel": "AutoModelForCausalLM"}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def differences(folder: Path, auto: str) -> list[str]:
    """What is not as the package computed it, in a process without the package."""
    import torch
    import transformers

    expected = torch.load(folder.parent / f"{folder.name}.pt", weights_only=False)
    wrong = [] if is_refused(folder, auto) else ["refused without trust"]
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)

    def check(what: str, right: bool) -> None:
        if not right:
            wrong.append(what)

    check("classes of the folder", type(model).__module__.startswith("transformers_modules."))
    with torch.no_grad():
        found = [x for x in model(**expected["given"]).to_tuple() if isinstance(x, torch.Tensor)]
        same = [torch.equal(a, b) for a, b in zip(found, expected["outputs"], strict=True)]
        check("outputs bit for bit", bool(same) and all(same))
        if expected["tokens"] is not None:
            ids = expected["given"]["input_ids"]
            for cached in (True, False):
                made = model.generate(ids, use_cache=cached, **GREEDY)
                check(f"generate, use_cache={cached}", torch.equal(made, expected["tokens"]))
    again = folder.parent / f"{folder.name} again"
    model.save_pretrained(again)
    config, saved = (json.loads((place / "config.json").read_text()) for place in (folder, again))
    check("auto_map of the saved copy", config["auto_map"] == saved["auto_map"])
    texts = [{path.name: path.read_text() for path in place.glob("*.py")} for place in (folder, again)]
    check("code of the saved copy", texts[0] == texts[1] and sorted(texts[0]) == expected["written"])
    return wrong


def is_refused(folder: Path, auto: str) -> bool:
    """Whether the folder does not load, and none of its code runs, unless it is trusted."""
    import transformers

    before = set(sys.modules)
    for loader in (transformers.AutoConfig, getattr(transformers, auto)):
        try:
            loader.from_pretrained(folder, trust_remote_code=False)
        except ValueError as fault:
            told = "trust_remote_code=True" in str(fault)
        else:
            return False
        if not told or [name for name in set(sys.modules) - before if name.startswith("transformers_modules")]:
            return False
    return True


def piped(task: str, model: Any, **settings: Any) -> Any:
    """What a pipeline says of a text."""
    import transformers

    run = transformers.pipeline(task, model=model, **settings)
    return run("Fast weights", **(GREEDY if task == "text-generation" else {}))


def pipeline_differences(folder: Path, task: str, expected: Any) -> list[str]:
    """A pipeline by the folder's name alone says what it says with the package."""
    return [] if piped(task, str(folder), trust_remote_code=True) == expected else [f"pipeline {task}"]


def main() -> None:
    packages, jobs = sys.argv[1:]
    sys.path.append(packages)
    import importlib.util

    assert importlib.util.find_spec("hf_fwp") is None
    found = []
    for job in json.loads(Path(jobs).read_text()):
        folder = Path(job["folder"])
        wrong = differences(folder, job["auto"])
        if "task" in job:
            wrong += pipeline_differences(folder, job["task"], job["said"])
        found.append({"folder": folder.name, "wrong": wrong})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
