"""The command `hf-fwp`: every subcommand is one public Python function with the same argument names.

Exit codes: 0 done, 1 something became slower (bench --compare), 2 the request was wrong (one line on stderr says why),
130 interrupted.
"""

import dataclasses
import importlib
import importlib.metadata
import json as json_format
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hf_fwp.bench.commands import bench
from hf_fwp.catalogue import STATE, preset_table, rule_table
from hf_fwp.hosts import HOSTS
from hf_fwp.telling import tell
from hf_fwp.terminal import (
    DryRun,
    StudentRule,
    conversion,
    flat,
    parse_data,
    parse_dtype,
    parse_keep,
    parse_layers,
    parse_mixer,
    show,
    show_rows,
    well_mannered,
)

DATA = "a .txt or .jsonl file (either with .gz), a folder with a dataset, or a dataset of the Hub, NAME or NAME:SPLIT."
VERSIONS_SHOWN = ("hf_fwp", "torch", "transformers", "peft", "accelerate", "datasets", "triton")

app = typer.Typer(
    help="Fast weight programmers for Hugging Face Transformers: convert a pretrained model, measure it, run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def main() -> None:
    app()


@app.command()
@well_mannered
def convert(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A folder, a Hub id or a GGUF file.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer, if not the teacher's.")
    ] = None,
    rule: StudentRule = "gated_delta_net",
    keep: Annotated[
        str,
        typer.Option(help="Softmax layers: a fraction (0.25), a count (7), recall:0.25, a list (0,3,5), uniform:0.25."),
    ] = "0.25",
    recipe: Annotated[str, typer.Option(help="Stages and their settings; hf-fwp info lists the recipes.")] = "quick",
    mixer: Annotated[
        str | None, typer.Option(help="Options of the mixers that differ from the recipe's: window=64,sinks=4.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Limit in tokens (200k) or time (5m) instead of the recipe's.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"Training text: {DATA}")] = None,
    output: Annotated[Path | None, typer.Option(help="New folder for the model, its report and its card.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --output.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; by default cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, the default: solving and training need it.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Most memory to use, as 8GiB; a larger teacher is converted layer by layer.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json: AsJson = False,
) -> None:
    """Turn a pretrained softmax model into a fast-weight model."""
    if output is None and not dry_run:
        raise ValueError("convert needs --output DIR, a new folder for the model, or --dry-run to see the plan")
    model = conversion("convert")(
        teacher,
        tokenizer=tokenizer,
        rule=rule,
        keep=parse_keep(keep),
        recipe=recipe,
        mixer=parse_mixer(mixer),
        budget=budget,
        data=parse_data(data),
        output=output,
        resume=resume,
        seed=seed,
        device=device,
        dtype=parse_dtype(dtype),
        max_memory=max_memory,
        dry_run=dry_run,
    )
    if output is not None and not dry_run:
        show_report(model.conversion_report, output, as_json=json)


@app.command()
@well_mannered
def ablate(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A folder, a Hub id or a GGUF file.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer, if not the teacher's.")
    ] = None,
    rule: StudentRule = "gated_delta_net",
    keep: Annotated[str, typer.Option(help="Layers that stay softmax, as in convert.")] = "0",
    recipe: Annotated[str, typer.Option(help="One recipe, or several with commas between.")] = "closed-form",
    budget: Annotated[str | None, typer.Option(help="Tokens (200k) that every run reads.")] = None,
    choices: Annotated[
        str | None, typer.Option(help="Choices, or how they begin, with commas between; all if it is left out.")
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="lr: every run at several learning rates.")] = None,
    data: Annotated[str | None, typer.Option(help=f"Training text: {DATA}")] = None,
    tokens: Annotated[int, typer.Option(help="How many held-out tokens to measure on.")] = 16384,
    needles: Annotated[int, typer.Option(help="Texts of each kind to recall from; 0: none.")] = 0,
    output: Annotated[Path, typer.Option(help="Results; what is there is not run again.")] = Path("out/ablation"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; by default cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, the default: solving and training need it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs with an estimate and stop.")] = False,
    json: AsJson = False,
) -> None:
    """Convert with one choice changed at a time, and print what each is worth."""
    rows = conversion("ablate")(
        teacher,
        tokenizer=tokenizer,
        rule=rule,
        keep=parse_keep(keep),
        recipe=recipe.split(","),
        budget=budget,
        choices=None if choices is None else choices.split(","),
        sweep=sweep,
        data=parse_data(data),
        tokens=tokens,
        needles=needles,
        output=output,
        seed=seed,
        device=device,
        dtype=parse_dtype(dtype),
        dry_run=dry_run,
    )
    if not dry_run:
        if json:
            sys.stdout.write(json_format.dumps(rows, indent=2) + "\n")
        else:
            tell(conversion("ablate", "as_table")(rows).rstrip())


@app.command()
@well_mannered
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hub id or a GGUF file.")],
    against: Annotated[str | None, typer.Option(help="The teacher to compare with.")] = None,
    data: Annotated[str | None, typer.Option(help=f"Held-out text: {DATA}")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to measure on.")] = 16384,
    parts: Annotated[bool, typer.Option("--parts", help="Also without its fast weights, and its windows.")] = False,
    needles: Annotated[int, typer.Option(help="Texts of each kind to recall from; 0: none.")] = 4,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Measure a model on held-out text, alone or against its teacher."""
    measured = conversion("evaluate")(
        model, against=against, data=parse_data(data), tokens=tokens, parts=parts, needles=needles, dry_run=dry_run
    )
    if not dry_run:
        show(measured, as_json=json, title=model)


@app.command(name="write-text")
@well_mannered
def write_text(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hub id or a GGUF file.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New .jsonl file, for --data of convert.")],
    tokens: Annotated[str, typer.Option(help="How many tokens: 200k, 40M.")] = "1M",
    data: Annotated[str | None, typer.Option(help=f"What its texts begin with: {DATA}")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Let a model write text, to convert it with where there is no other."""
    given = {"tokens": tokens, "data": parse_data(data), "resume": resume, "seed": seed, "dry_run": dry_run}
    written = conversion("write_text")(model, output, dtype=parse_dtype(dtype) or torch.float32, **given)
    if not dry_run:
        tell(str(written))


@app.command()
@well_mannered
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.")],
    text: Annotated[str, typer.Option(help="What the model reads.")],
    against: Annotated[
        str | None, typer.Option(help="Softmax model whose attention maps are shown beside: a folder, id or GGUF file.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers: 0,3,5.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Read at most this many tokens.")] = 64,
    output: Annotated[Path, typer.Option(help="The page.")] = Path("page.html"),
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Show what the fast weights hold while the model reads a text, as one HTML page."""
    found = importlib.import_module("hf_fwp.inspection").inspect(
        model,
        text,
        against=None if against is None else conversion("teacher", "load_teacher")(against, weights=not dry_run)[0],
        layers=None if layers is None else parse_layers(layers),
        max_tokens=max_tokens,
        output=output,
        progress=not json,
        dry_run=dry_run,
    )
    if not dry_run:
        show_layers(found.summary(), output, as_json=json)


def show_layers(summary: dict[str, Any], output: Path, *, as_json: bool) -> None:
    """A line for each layer that was looked into."""
    if as_json:
        show(summary, as_json=True)
        return
    layers = {layer: dict(flat(row)) for layer, row in summary["layers"].items()}
    rows = {f"{layer} {row.pop('rule')}": row for layer, row in layers.items()}
    columns = tuple(dict.fromkeys(name for row in rows.values() for name in row))
    show_rows(rows, title=f"{summary['model']}, {summary['tokens']} tokens: saved in {output}", columns=columns)


@app.command(name="info")
@well_mannered
def info_command(json: AsJson = False) -> None:
    """Show the rules, presets, families, recipes, backends and devices found on this machine."""
    told = info()
    if json:
        show(told, as_json=True)
        return
    show_rows(told.pop("rules"), title="rules", columns=("source", STATE, "a sequence", "backends"))
    show_rows(told.pop("presets"), title="presets", columns=("rule", "what"))
    show(told, as_json=False, title="hf-fwp on this machine")


def info() -> dict[str, Any]:
    """The rules, presets, families, recipes, backends and devices found on this machine, and the versions that
    matter."""
    from hf_fwp.rules.base import BACKENDS

    return {
        "rules": rule_table(),
        "presets": preset_table(),
        "hosts": list(HOSTS),
        "recipes": list(conversion("recipes", "RECIPES")),
        "backends": list(BACKENDS),
        "devices": devices(),
        "versions": {"python": platform.python_version(), **installed_versions()},
    }


def devices() -> list[str]:
    """The devices PyTorch can use here, the processor last."""
    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    apple = ["mps"] if torch.backends.mps.is_available() else []
    return [*gpus, *apple, f"cpu ({torch.get_num_threads()} threads)"]


def installed_versions() -> dict[str, str]:
    """Versions of what is installed; a checkout that is not installed has none of its own."""
    found = {}
    for name in VERSIONS_SHOWN:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@app.command()
@well_mannered
def demo(
    teacher: Annotated[str | None, typer.Argument(help="Default: SmolLM2-135M-Instruct from its package.")] = None,
    rule: StudentRule = "gated_delta_net",
    keep: Annotated[str, typer.Option(help="Layers that stay softmax, as in convert.")] = "0.5",
    recipe: Annotated[
        str, typer.Option(help="Stages and their settings; hf-fwp info lists the recipes.")
    ] = "closed-form",
    output: Annotated[Path, typer.Option(help="New folder for the model and its report.")] = Path("out/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """The main job, start to end, on a real small checkpoint."""
    asked = {"rule": rule, "keep": parse_keep(keep), "recipe": recipe, "output": output, "seed": seed}
    report = conversion("demo")(teacher, **asked, dry_run=dry_run)
    if dry_run:
        return
    show_report(report, output, as_json=json)


def show_report(report: dict[str, Any], output: Path, *, as_json: bool) -> None:
    """One screen: what was converted, how good it is, what both models say; the rest is in the folder's report."""
    if as_json:
        show(report, as_json=True)
        return
    measured = report["evaluation"]
    rows = {
        "text": report["data"],
        "layers that stay softmax": f"{len(report['kept_layers'])} of {report['num_layers']}",
        "perplexity": f"{measured['perplexity']:.1f}, the teacher's is {measured['teacher_perplexity']:.1f}",
        "ratio of the two": f"{measured['ratio']:.2f} on {measured['tokens']} held-out tokens",
        "same next token": f"{measured['agreement']:.0%}",
    }
    if "total_s" in report:  # of the demo
        rows["reloaded bit for bit"] = report["reloaded_bitwise"]
        rows["time"] = f"{report['conversion_s']:.0f} s to convert, {report['total_s']:.0f} s in all"
    rows["report"] = output / "report.html"
    show(rows, as_json=False, title=f"{output}: {report['rule']}, {report['recipe']}")
    for sample in report.get("samples", []):
        show(sample, as_json=False)


@app.command()
@well_mannered
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What save_pretrained or convert wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where it goes: you/name-of-the-model.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    token: Annotated[str | None, typer.Option(help="Default: the one that `hf auth login` keeps.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch instead of main.")] = None,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Also the code, for those who load it without hf_fwp.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Of an adapter: where its base model is, if it names a folder of this machine.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the folder, list the files and stop.")] = False,
    json: AsJson = False,
) -> None:
    """Check a folder of a model or an adapter, complete its card and upload it to the Hub."""
    module = importlib.import_module("hf_fwp.hub")
    given = {"private": private, "token": token, "revision": revision, "with_code": with_code, "base": base}
    pushed = module.push(folder, repo, **given, dry_run=dry_run)
    if json:
        show(dataclasses.asdict(pushed), as_json=True)
    elif dry_run:
        sizes = {path: module.bytes_shown(size) for path, size in pushed.files.items()}
        show(sizes, as_json=False, title=f"would go to {repo}")
    else:
        tell(pushed.url)


@app.command(name="export-code")
@well_mannered
def export_code(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What save_pretrained or convert wrote.")],
) -> None:
    """Write a model's code into its folder, for those who load it without hf_fwp (trust_remote_code=True)."""
    written = importlib.import_module("hf_fwp.bundle").export_code(folder)
    tell(f"{len(written)} files in {folder}")


@app.command()
@well_mannered
def export(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="What save_pretrained or convert wrote.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    format: Annotated[str, typer.Option(help="fla: a checkpoint of flash-linear-attention; onnx: the decode step.")],
    dry_run: DryRun = False,
) -> None:
    """Write a model in a form that others run."""
    written = importlib.import_module("hf_fwp.exporting").export(model, output, format=format, dry_run=dry_run)
    if not dry_run:
        tell(str(written))


@app.command()
@well_mannered
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.")],
    host: Annotated[str, typer.Option(help="Where to listen.")] = "localhost",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, mps; by default the fastest there is.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; by default the checkpoint's.")] = "auto",
) -> None:
    """Run transformers' OpenAI-compatible server with a model of this package."""
    importlib.import_module("hf_fwp.serving").serve(model, host=host, port=port, device=device, dtype=dtype)


if __name__ == "__main__":
    main()
