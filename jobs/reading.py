"""The verbs of the command line that read, and start nothing. Only Typer is imported: a verb loads what it needs."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.options import Config, Csv, Debug, Json, RunUri, Sets, UsageError, Verb, app, recipes_like, settings_like


@app.command(cls=Verb)
def init(
    file: Annotated[str, typer.Argument(help="Settings file to write, such as my_run.yaml.")],
    model: Annotated[str, typer.Option(help="Your model: a local folder in Hugging Face format, or a hub id.")],
    source: Annotated[str, typer.Option(help="Your problems: a JSONL or Parquet file, a folder, datasets:NAME or a task.")],
    set: Sets = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the file that is there.")] = False,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a settings file for your model, source and machine."""
    from jobs.init import write_settings

    write_settings(file, (model, source), set or [], replace, debug)


@app.command(cls=Verb)
def explain(
    setting: Annotated[
        str | None, typer.Argument(autocompletion=settings_like, help="A setting or a section; none: all.")
    ] = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain a setting: its type, default, and what it makes stale."""
    from jobs.explain import explain_settings

    explain_settings(setting or "", debug)


@app.command(cls=Verb)
def recipes(
    show: Annotated[
        str | None, typer.Option("--show", autocompletion=recipes_like, help="Print this recipe's resolved YAML.")
    ] = None,
    set: Sets = None,
    config: Config = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or print one."""
    from jobs.recipes import show_recipes

    show_recipes(show, set or [], config, debug)


@app.command(cls=Verb)
def status(
    run: RunUri,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again whenever it changes, until the run is done.")] = False,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what was learned by round, then work, then what is stale."""
    from jobs.status import show

    show(run, debug, watch)


@app.command(cls=Verb)
def ls(
    folder: Annotated[str, typer.Argument(help="Folder or URI; the runs below it are listed.")] = ".",
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs under a folder: accuracy, length, when, state."""
    from jobs.ls import list_runs

    list_runs(folder, debug)


@app.command(cls=Verb)
def report(
    run: Annotated[list[str], typer.Option(help="Run directory: path or URI. Repeat it to compare runs in one page.")],
    compare: Annotated[str | None, typer.Option(help="Folder with compare.json, for the frontier.")] = None,
    out: Annotated[str | None, typer.Option(help="File to write; default: report.html in the first run.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the file of --out.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page on this machine, and follow the run.")] = False,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port of --serve; default: a free one.")] = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML file: story, groups, traces by token, evidence."""
    from jobs.report import report_run, serve_run

    if serve and (out is not None or replace):
        raise UsageError("--out and --replace do not go with --serve, which writes no file.")
    if port is not None and not serve:
        raise UsageError("--port belongs to --serve.")
    if serve:
        serve_run(run, compare, port or 0, debug)
    else:
        report_run(run, compare, out, debug, replace)


@app.command(cls=Verb)
def verify(run: RunUri, _json: Json = False, debug: Debug = False) -> None:
    """Read every file of a run and prove it. The exit code is 1 when something is found."""
    from jobs.verify import verify_run

    verify_run(run, debug)


@app.command(cls=Verb)
def export(
    run: RunUri,
    out: Annotated[str | None, typer.Option(help="Folder or URI for the Parquet dataset of all traces.")] = None,
    model: Annotated[str | None, typer.Option(help="Local folder for a policy that other programs open.")] = None,
    policy: Annotated[str | None, typer.Option(help="With --model: the policy, a number or `last`; default: last.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="With --model: whole weights instead of the adapter.")] = False,
    push: Annotated[str | None, typer.Option(help="With --model: a repository of a hub that gets the folder; HF_TOKEN.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what an export has written there before.")] = False,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Write all traces as Parquet, or a policy as a model folder."""
    if (out is None) == (model is None):
        raise UsageError("give --out for the traces, or --model for a policy")
    if out is not None and (policy is not None or merge or push is not None):
        raise UsageError("--policy, --merge and --push belong to --model.")
    from jobs.export import ModelFolder, export_model, export_run

    if out is not None:
        export_run(run, out, debug, replace)
    elif model is not None:
        export_model(run, ModelFolder(model, policy or "last", merge, push, replace), debug)


@app.command(cls=Verb)
def sweep(
    run: RunUri,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="Axis: label.gamma=0,.1 or objective.name=grpo,opd; repeatable.")
    ] = None,
    round: Annotated[list[int] | None, typer.Option("--round", help="Only this round; may be repeated.")] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            min=0, help="Traces for gradient cosines; default: 96, with --choose a minibatch a block; 0 leaves them out."
        ),
    ] = None,
    choose: Annotated[
        bool, typer.Option("--choose", help="Propose label.gamma and label.window by an audit of one round, with the evidence.")
    ] = False,
    csv: Csv = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Label stored traces with a grid of settings, without engines."""
    from jobs.sweep import SAMPLE, choose_gate, sweep_run

    if not choose:
        sweep_run(run, set or [], round, SAMPLE if sample is None else sample, debug, csv)
        return
    if sample == 0:
        raise UsageError("--sample 0 leaves gradients out, and --choose is made of them.")
    choose_gate(run, set or [], round, sample or 0, debug, csv)


@app.command(cls=Verb)
def audit(
    run: RunUri,
    round: Annotated[int, typer.Option("--round", min=0, help="The round whose traces are audited.")] = 0,
    objectives: Annotated[
        str,
        typer.Option(
            help="As `compare` names them, comma-separated, or linear, clipped, uncertain, certain; the first is compared with."
        ),
    ] = "rlsd,grpo,egrsd,cl_egrsd,position,opd,cl_egrsd+cl_entropy+inverted,cl_egrsd+cl_entropy+shuffled",
    set: Sets = None,
    blocks: Annotated[
        int, typer.Option(min=6, help="Blocks of problems at most; cosines come from a minibatch's traces of each.")
    ] = 16,
    problems: Annotated[int, typer.Option(min=0, help="Problems at most, drawn by the run's seed; 0: all.")] = 0,
    parameters: Annotated[
        str, typer.Option(help="weights: all weights of the model; adapter: those that training moves.")
    ] = "weights",
    verdict: Annotated[
        bool, typer.Option("--verdict", help="Say in a sentence whether the gate helps here; --problems 64 makes it cheap.")
    ] = False,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure which objective's gradient points where accuracy rises."""
    from jobs.audit import audit_run

    audit_run(run, round, (objectives, set or [], (blocks, problems, parameters)), debug, verdict)
