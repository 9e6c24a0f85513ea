"""The command line. This module imports only Typer, so that `--help` answers at once; a verb loads what it needs.

A verb that uses Ray works in a child process of its keeper.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from jobs.keeper import keep


class Once(TyperCommand):
    """A verb that refuses an option with one value, and a setting, when it is given twice. Click itself would drop the first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as Click does, after a look at the options in their order. Raises BadParameter for a repeated one."""
        values, _, given = self.make_parser(ctx).parse_args(list(args))
        options = [option for option in given if option.param_type_name == "option" and not getattr(option, "is_flag", False)]
        twice = _first_twice([option.opts[0] for option in options if not option.multiple])
        twice = twice or _first_twice([f"--set {text.partition('=')[0].strip()}" for text in values.get("set") or []])
        if twice:
            raise typer.BadParameter(f"{twice} is given twice; leave one of them", ctx=ctx)
        return super().parse_args(ctx, args)


def _first_twice(names: list[str]) -> str | None:
    """The first name that stood before, or that lies in a section that stood before."""
    for i, name in enumerate(names):
        if any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in names[:i]):
            return name
    return None


app = typer.Typer(
    name="egrsd",
    help="Entropy-guided self-distillation of reasoning models (EGRSD, CL-EGRSD) on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

RunUri = Annotated[str, typer.Option("--run", help="Run directory: a local path or a URI.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="One setting, a.b=value; may be repeated.")]
Config = Annotated[str | None, typer.Option("--config", help="YAML file with settings, laid over the recipe.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else one on this machine.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the noise of Ray and vLLM.")]


@app.command(cls=Once)
def distill(
    run: RunUri,
    recipe: Annotated[str | None, typer.Option(help="Recipe to start from; a started run needs none.")] = None,
    set: Sets = None,
    config: Config = None,
    accept_changes: Annotated[bool, typer.Option(help="Go on with settings that differ from the run's own.")] = False,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Run or resume rounds: roll out, grade, score, label, train. Nothing happens when all is done."""
    keep()
    from jobs.distill import distill as job
    from jobs.settle import Choices

    job(run, Choices(recipe, set or [], config, accept_changes), address, debug)


@app.command(cls=Once)
def stage(
    stage: Annotated[str, typer.Argument(help="prompts, rollout, grade, score, profile or label.")],
    run: RunUri,
    round: Annotated[int | None, typer.Option("--round", help="Round number, from 0; with --diff all rounds without it.")] = None,
    set: Sets = None,
    force: Annotated[bool, typer.Option("--force", help="Also compute fresh shards again.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Grade: show which verdicts would change; write nothing.")] = False,
    shard: Annotated[list[str] | None, typer.Option(help="Only this shard; may be repeated.")] = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Bring one stage of one round up to date; --set changes the settings of that stage."""
    if not diff:
        keep()
    from jobs.regrade import show_changes
    from jobs.stage import Redo, run_stage

    if diff:
        show_changes(run, stage, round, set or [], debug)
    elif round is None:
        raise typer.BadParameter("Missing option '--round'.")
    else:
        run_stage(run, Redo(stage, round, set or [], force, shard or []), address, debug)


@app.command(cls=Once)
def train(
    run: RunUri,
    from_round: Annotated[int | None, typer.Option(help="Train this round and the later ones again.")] = None,
    set: Sets = None,
    out: Annotated[str | None, typer.Option(help="New run for the policies; the rounds are copied there.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace this run's later policies.")] = False,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Train on committed rounds, without engines."""
    keep()
    from jobs.train import Target, train_committed

    train_committed(run, from_round, set or [], address, debug, Target(replace, out))


@app.command(cls=Once)
def evaluate(
    run: RunUri,
    policy: Annotated[str, typer.Option(help="Policies to evaluate: numbers, ranges (0..4) and `last`.")] = "0,last",
    source: Annotated[list[str] | None, typer.Option(help="Benchmark, NAME=/copy, file or task; may be repeated.")] = None,
    k: Annotated[int | None, typer.Option("-k", help="Samples per problem, and the k of pass@k.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe of a run without rounds, whose base is evaluated first.")] = None,
    config: Config = None,
    set: Sets = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Accuracy and length of policies with intervals, on benchmarks or any problems. Only missing traces are generated."""
    keep()
    from jobs.evaluate import Options
    from jobs.evaluate import evaluate as job

    job(run, Options(policy, source or [], k, set or [], recipe, config), address, debug)


@app.command(cls=Once)
def compare(
    out: Annotated[str, typer.Option(help="Folder or URI; one run directory per objective and seed below it.")],
    recipe: Annotated[str, typer.Option(help="Recipe that all runs start from.")] = "demo",
    objectives: Annotated[
        str, typer.Option(help="Objectives, and controls: shuffled, uniform, inverted, no_reference, student_entropy.")
    ] = "grpo,rlsd,egrsd,cl_egrsd,position",
    seeds: Annotated[str, typer.Option(help="Seeds: 0..4 or 0,3,7.")] = "0..4",
    baseline: Annotated[str | None, typer.Option(help="Objective to pair with; default: the first.")] = None,
    set: Sets = None,
    config: Config = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Train objectives x seeds from one base, and say which differences in accuracy and length are beyond noise."""
    keep()
    from jobs.compare import Options
    from jobs.compare import compare as job

    job(out, Options(recipe, objectives, seeds, baseline, set or [], config), address, debug)


@app.command(cls=Once)
def status(run: RunUri, debug: Debug = False) -> None:
    """Rounds x stages: rows, rejected by reason, stale, seconds."""
    from jobs.status import show

    show(run, debug)


@app.command(cls=Once)
def verify(run: RunUri, debug: Debug = False) -> None:
    """Read every file of a run and prove it: hashes, counts, values, rows. The exit code is 1 when something is found."""
    from jobs.verify import verify_run

    verify_run(run, debug)


@app.command(cls=Once)
def doctor(
    recipe: Annotated[str | None, typer.Option(help="Recipe to check; default: that of --run, else demo.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Run directory to check as well: a local path or a URI.")] = None,
    source: Annotated[str | None, typer.Option(help="File, folder or data set to look at instead, without Ray.")] = None,
    set: Sets = None,
    config: Config = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster whose nodes to check.")] = None,
    debug: Debug = False,
) -> None:
    """Check machine, versions, model, memory and store before a run, or what a source holds. Code 1 when a check fails."""
    from jobs.settle import Choices

    choices = Choices(recipe, set or [], config)
    if source is not None:
        from jobs.doctor import look_at_source

        look_at_source(source, choices, run, debug)
        return
    keep()
    from jobs.doctor import doctor as job

    job(choices, run, address, debug)


@app.command(cls=Once)
def scale(
    run: RunUri,
    sizes: Annotated[list[str] | None, typer.Argument(help="POOL=N or POOL=LEAST..MOST: rollout=4; none: only look.")] = None,
    debug: Debug = False,
) -> None:
    """Show the engines of a live run, or change their number, from another terminal."""
    from jobs.scale import scale as job

    job(run, sizes or [], debug)


@app.command(cls=Once)
def export(
    run: RunUri,
    out: Annotated[str | None, typer.Option(help="Folder or URI for the Parquet dataset of all traces.")] = None,
    model: Annotated[str | None, typer.Option(help="Local folder for a policy that other programs open.")] = None,
    policy: Annotated[str | None, typer.Option(help="With --model: the policy, a number or `last`; default: last.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="With --model: whole weights instead of the adapter.")] = False,
    push: Annotated[str | None, typer.Option(help="With --model: a repository of a hub that gets the folder; HF_TOKEN.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace what an export has written there before.")] = False,
    debug: Debug = False,
) -> None:
    """Write all traces as one Parquet dataset (--out), or a policy as a standard model folder (--model)."""
    if (out is None) == (model is None):
        raise typer.BadParameter("give --out for the traces, or --model for a policy")
    if out is not None and (policy is not None or merge or push is not None):
        raise typer.BadParameter("--policy, --merge and --push belong to --model.")
    from jobs.export import ModelFolder, export_model, export_run

    if out is not None:
        export_run(run, out, debug, replace)
    elif model is not None:
        export_model(run, ModelFolder(model, policy or "last", merge, push, replace), debug)


@app.command(cls=Once)
def sweep(
    run: RunUri,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="Axis: label.gamma=0,.1 or objective.name=grpo,opd; repeatable.")
    ] = None,
    round: Annotated[list[int] | None, typer.Option("--round", help="Only this round; may be repeated.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Traces for the gradient cosine; 0 leaves it out.")] = 96,
    debug: Debug = False,
) -> None:
    """Label stored traces with a grid of settings, without engines, and compare the token weights."""
    from jobs.sweep import sweep_run

    sweep_run(run, set or [], round, sample, debug)


@app.command(cls=Once)
def report(
    run: RunUri,
    compare: Annotated[str | None, typer.Option(help="Folder with compare.json, for the frontier.")] = None,
    out: Annotated[str | None, typer.Option(help="File to write; default: report.html in the run.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the file of --out.")] = False,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML file: traces token by token, the run by round, the evidence."""
    from jobs.report import report_run

    report_run(run, compare, out, debug, replace)


@app.command(cls=Once)
def recipes(
    show: Annotated[str | None, typer.Option("--show", help="Print this recipe's resolved YAML.")] = None,
    debug: Debug = False,
) -> None:
    """List the recipes, or print one."""
    from jobs.recipes import show_recipes

    show_recipes(show, debug)


@app.command(cls=Once, context_settings={"allow_interspersed_args": False})
def submit(
    context: typer.Context,
    verb: Annotated[list[str] | None, typer.Argument(help="The verb with its arguments, as without `submit`.")] = None,
    address: Annotated[str | None, typer.Option(help="http://HEAD:8265; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS.")] = None,
    submission_id: Annotated[str | None, typer.Option(help="Id of the job; default: made of the verb and its arguments.")] = None,
    entrypoint_cpus: Annotated[float | None, typer.Option(help="CPUs that the verb's own process takes.")] = None,
    entrypoint_resources: Annotated[list[str] | None, typer.Option(help="NAME=AMOUNT that it takes; may be repeated.")] = None,
    entrypoint_label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of its node; may be repeated.")] = None,
    working_dir: Annotated[str, typer.Option(help="Folder of the project. Its packages go, and what the settings name.")] = ".",
    include: Annotated[list[str] | None, typer.Option(help="File or folder to send as well; may be repeated.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return at once instead of following the job.")] = False,
    stop: Annotated[str | None, typer.Option("--stop", help="End the job with this id instead.")] = None,
    debug: Debug = False,
) -> None:
    """Run a verb as a job on a Ray cluster; the same command again follows the job that runs."""
    from jobs import submit as job

    if (stop is None) == (not verb):
        raise typer.BadParameter("give a verb to run, or --stop ID")
    if stop is not None:
        job.stop(stop, address, not no_wait, debug)
    elif verb and context.parent is not None:
        placement = job.JobPlacement(entrypoint_cpus, entrypoint_resources or [], entrypoint_label or [])
        asked = job.Job(verb, submission_id, placement, working_dir, include or [], not no_wait)
        job.submit(context.parent, asked, address, debug)


def main() -> None:
    """Entry point of `egrsd` and `python -m jobs`. Output that cannot be written, such as that of --help, ends with code 1."""
    try:
        sys.exit(app())
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python has not written yet
        with contextlib.suppress(OSError):
            os.write(2, f"error: cannot write standard output ({error.strerror})\n".encode())
        sys.exit(1)


if __name__ == "__main__":
    main()
