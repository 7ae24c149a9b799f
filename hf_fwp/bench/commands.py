"""The commands `hf-fwp bench ...`: each is one public Python function with the same argument names."""

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..telling import tell
from ..terminal import DryRun, parse_keep, well_mannered

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the table to this file, as JSON.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Draw the table into this file (.png, .svg, .pdf).")]
Commit = Annotated[str | None, typer.Option(help="Name of this version, for a checkout without its history.")]

bench = typer.Typer(help="Time operators on this machine, see what rules can learn.", invoke_without_command=True)


@bench.callback()
@well_mannered
def bench_group(
    context: typer.Context,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two files written by --json: flags what is worse in the second.")
    ] = None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    if compare is None:
        sys.stdout.write(context.get_help() + "\n")
        raise typer.Exit
    comparing = importlib.import_module("hf_fwp.bench.compare")
    if comparing.regressions(comparing.compare(*compare)):
        raise typer.Exit(1)


@bench.command(name="page")
@well_mannered
def bench_page(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="What hf-fwp bench ... --json wrote.")],
    output: Annotated[Path, typer.Option(help="The page.")] = Path("results.html"),
) -> None:
    """Show results of benches as one HTML page, with what they were measured on."""
    tell(f"saved in {importlib.import_module('hf_fwp.bench.page').bench_page(files, output=output)}")


@bench.command(name="tasks")
@well_mannered
def bench_tasks(
    rules: Annotated[str | None, typer.Option(help="Names of rules, with commas between; full_attention too.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each training.")] = 1000,
    seeds: Annotated[int, typer.Option(help="Trainings of each, for mean and spread.")] = 1,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write every score to this file; a run that finds it goes on from it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the scores into this file (.png, .svg).")] = None,
    dry_run: DryRun = False,
) -> None:
    """Train small models on parity, recall and retrieval, and ask them beyond what they were trained on."""
    bench = importlib.import_module("hf_fwp.bench.scores").bench_tasks
    named = {} if rules is None else {"rules": [rule for rule in rules.split(",") if rule]}
    bench(**named, steps=steps, seeds=seeds, json=json, plot=plot, dry_run=dry_run)


@bench.command(name="convert")
@well_mannered
def bench_convert(
    teacher: Annotated[str | None, typer.Argument(help="Folder, Hub id or GGUF; SmolLM2-135M if left out.")] = None,
    rule: Annotated[str, typer.Option(help="Update rule.")] = "gated_delta_net",
    keep: Annotated[str, typer.Option(help="Layers that stay softmax, as in convert.")] = "0.5",
    recipe: Annotated[str, typer.Option(help="Stages and their settings.")] = "closed-form",
    data: Annotated[Path | None, typer.Option(help="Training text; the demo's if left out.")] = None,
    json: JsonFile = None,
    dry_run: DryRun = False,
) -> None:
    """Time one conversion stage by stage, with its peak memory."""
    timing = importlib.import_module("hf_fwp.conversion.timing")
    timing.bench_convert(
        teacher, rule=rule, keep=parse_keep(keep), recipe=recipe, data=data, json=json, dry_run=dry_run
    )


@bench.command(name="cpu")
@well_mannered
def bench_cpu(
    json: Annotated[Path | None, typer.Option("--json", help="Also write the table to this file, as JSON.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Runs of each; the median counts.")] = 11,
    threads: Annotated[int, typer.Option("--threads", help="Threads of PyTorch.")] = 2,
    dry_run: DryRun = False,
) -> None:
    """Time the operators on this processor beside transformers' own, in one process."""
    importlib.import_module("hf_fwp.bench.cpu").bench_cpu(json=json, repeats=repeats, threads=threads, dry_run=dry_run)


@bench.command(name="hybrids")
@well_mannered
def bench_hybrids(
    json: JsonFile = None,
    tokens: Annotated[int, typer.Option(help="Length of the sequence.")] = 1024,
    repeats: Annotated[int, typer.Option("--repeats", help="Runs of each; the median counts.")] = 3,
    threads: Annotated[int, typer.Option("--threads", help="Threads of PyTorch.")] = 2,
    dry_run: DryRun = False,
) -> None:
    """Time transformers' own hybrids on this processor, as they are and patched, in one process."""
    module = importlib.import_module("hf_fwp.bench.hybrids")
    module.bench_hybrids(json=json, tokens=tokens, repeats=repeats, threads=threads, dry_run=dry_run)


@bench.command(name="serve")
@well_mannered
def bench_serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.")],
    against: Annotated[str, typer.Option(help="The teacher: a folder, a Hub id or a GGUF file.")],
    contexts: Annotated[str, typer.Option(help="Lengths in tokens.")] = "512,2048,8192,32768",
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each context.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="Runs of each; the median counts.")] = 3,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; by default a GPU where there is one.")] = None,
    json: JsonFile = None,
    dry_run: DryRun = False,
) -> None:
    """Time prefill and decode of a model beside its teacher after contexts of many lengths."""
    lengths = [int(length) for length in contexts.split(",")]
    settings = {"batch": batch, "new_tokens": new_tokens, "repeats": repeats, "device": device, "json": json}
    settings["dry_run"] = dry_run
    importlib.import_module("hf_fwp.bench.serve").bench_serve(model, against=against, contexts=lengths, **settings)


@bench.command(name="kernels")
@well_mannered
def bench_kernels(
    json: JsonFile = None,
    plot: PlotFile = None,
    tune: Annotated[bool, typer.Option("--tune", help="First look for better block sizes, for minutes.")] = False,
    commit: Commit = None,
    dry_run: DryRun = False,
) -> None:
    """Time the chunked operators on this GPU beside flash-linear-attention, transformers and softmax attention."""
    importlib.import_module("hf_fwp.bench.kernels").bench_kernels(
        json=json, plot=plot, tune=tune, commit=commit, dry_run=dry_run
    )


@bench.command(name="sequential")
@well_mannered
def bench_sequential(
    json: JsonFile = None, plot: PlotFile = None, commit: Commit = None, dry_run: DryRun = False
) -> None:
    """Time the kernels of the sequential rules on this GPU beside the same rules in PyTorch."""
    importlib.import_module("hf_fwp.bench.sequential").bench_sequential(
        json=json, plot=plot, commit=commit, dry_run=dry_run
    )


@bench.command(name="decode")
@well_mannered
def bench_decode(json: JsonFile = None, plot: PlotFile = None, commit: Commit = None, dry_run: DryRun = False) -> None:
    """Time one decode step on this GPU beside flash-linear-attention, transformers and softmax attention."""
    importlib.import_module("hf_fwp.bench.decode").bench_decode(json=json, plot=plot, commit=commit, dry_run=dry_run)
