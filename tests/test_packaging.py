"""Every way to install ends in the same two import names, and none leaves a top-level `conversion` behind."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import hf_fwp

ROOT = Path(__file__).parent.parent
SHIPPED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "hf_fwp", "conversion")

EDITABLE = {"editable": [], "compat": ["editable_mode=compat"], "strict": ["editable_mode=strict"]}

LOOK = """
import importlib.util, json
import hf_fwp.conversion.data, hf_fwp.conversion.families, hf_fwp.rules
print(json.dumps({
    "hf_fwp": hf_fwp.__file__,
    "conversion": hf_fwp.conversion.data.__file__,
    "top_level": importlib.util.find_spec("conversion") is not None,
}))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy to build in, so that no build leaves its traces in the working tree."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture
def environment(tmp_path) -> Path:
    """An empty environment that finds everything but hf_fwp where this one has it."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    return tmp_path / "venv" / "bin" / "python"


def run(*command: object, cwd: Path, python_path: Path | None = None) -> str:
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python_path is not None:
        surroundings["PYTHONPATH"] = str(python_path)
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def seen(python: Path, *, cwd: Path, python_path: Path | None = None) -> dict:
    return json.loads(run(python, "-c", LOOK, cwd=cwd, python_path=python_path).splitlines()[-1])


def declared_packages() -> set[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return set(setup["options"]["packages"].split())


def test_the_list_of_packages_is_complete():
    folders = {
        path.parent.relative_to(ROOT) for name in ("hf_fwp", "conversion") for path in (ROOT / name).rglob("*.py")
    }
    names = {".".join(folder.parts) for folder in folders}
    assert declared_packages() == {name if name.startswith("hf_fwp") else f"hf_fwp.{name}" for name in names}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_the_wheel_holds_both_packages_and_no_other(checkout, tmp_path):
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, checkout)
    run(*pip, cwd=tmp_path)
    (wheel,) = tmp_path.glob("hf_fwp-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"hf_fwp", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_fwp").rglob("*.py")}
    sources |= {f"hf_fwp/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conversion").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert any(name.endswith("LICENSE") for name in names)
    assert "hf_fwp/inspection/page.html" in names
    assert not [name for name in names if "results/" in name], "they are of a checkout, as docs/results.md says"
    assert "hf_fwp/py.typed" in names


def test_the_sdist_holds_the_whole_checkout(tmp_path):
    folders = ("hf_fwp", "conversion", "tests", "docs", "examples", ".ci", ".github")
    rest = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "Makefile")
    for name in folders:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*rest, "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    held = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')", cwd=tmp_path)
    (sdist,) = (tmp_path / "dist").glob("hf_fwp-*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert held <= {name.partition("/")[2] for name in archive.getnames()}


def test_a_release_is_built_checked_attached_and_published_without_a_token():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    commands = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    assert "python -m build" in commands
    assert "python -m twine check --strict dist/*" in commands
    version = next(command for command in commands if "GITHUB_REF_NAME" in command)
    written = configparser.ConfigParser()
    written.read(ROOT / "setup.cfg")
    assert written["metadata"]["version"] == hf_fwp.__version__
    for tag, right in ((f"v{written['metadata']['version']}", True), ("v9", False)):
        surroundings = {**os.environ, "GITHUB_REF_NAME": tag}
        done = subprocess.run(["bash", "-c", version], cwd=ROOT, env=surroundings, check=False)
        assert (done.returncode == 0) == right
    assert any("gh release create" in step.get("run", "") for step in jobs["attach"]["steps"])
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_installed_from_the_wheel(checkout, environment, tmp_path):
    run(environment, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", checkout, cwd=tmp_path)
    found = seen(environment, cwd=tmp_path)
    assert Path(found["hf_fwp"]).is_relative_to(tmp_path / "venv")
    assert Path(found["conversion"]).parent == Path(found["hf_fwp"]).parent / "conversion"
    assert not found["top_level"]
    assert "convert" in run(environment.parent / "hf-fwp", "--help", cwd=tmp_path)
    inside = seen(environment, cwd=checkout)
    assert Path(inside["conversion"]).samefile(checkout / "conversion" / "data.py")


MODES = ["editable", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("compat", "strict"))]


@pytest.mark.parametrize("mode", MODES)
def test_installed_editable(mode, checkout, environment, tmp_path):
    settings = [word for setting in EDITABLE[mode] for word in ("--config-settings", setting)]
    install = (
        environment,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        *settings,
        "-e",
        checkout,
    )
    run(*install, cwd=tmp_path)
    for folder in (tmp_path, checkout):
        found = seen(environment, cwd=folder)
        assert Path(found["conversion"]).samefile(checkout / "conversion" / "data.py")
        assert Path(found["hf_fwp"]).samefile(checkout / "hf_fwp" / "__init__.py")


def test_not_installed_at_all(checkout, environment, tmp_path):
    found = seen(environment, cwd=tmp_path, python_path=checkout)
    assert Path(found["conversion"]) == checkout / "conversion" / "data.py"
