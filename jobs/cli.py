"""The command line. Only Typer is imported, so that `--help` answers at once; a verb loads what it needs.

A verb that uses Ray works in a child process of its keeper. The verbs that only read stand in reading.py.
"""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.options import (
    Address,
    Config,
    Csv,
    Debug,
    Json,
    Recipe,
    RunUri,
    Sets,
    UsageError,
    Verb,
    call,
    note_address,
    recipes_like,
    stages_like,
)
from jobs.reading import app
from jobs.screen.keeper import keep


@app.command(cls=Verb)
def distill(
    run: RunUri,
    recipe: Recipe = None,
    set: Sets = None,
    config: Config = None,
    accept_changes: Annotated[bool, typer.Option(help="Go on with settings that differ from the run's own.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and start and write nothing.")] = False,
    address: Address = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Run or resume rounds: roll out, grade, score, label, train. Nothing happens when all is done."""
    keep(f"distill {run}")
    from jobs import distill as job

    job.distill(run, job.Choices(recipe, set or [], config, accept_changes, dry_run), address, debug)


@app.command(cls=Verb)
def stage(
    stage: Annotated[str, typer.Argument(autocompletion=stages_like, help="prompts, rollout, grade, ...; several with commas.")],
    run: RunUri,
    round: Annotated[
        str | None, typer.Option("--round", help="Rounds from 0: 3, 0,2 or 0..15. With --diff: default all.")
    ] = None,
    set: Sets = None,
    force: Annotated[bool, typer.Option("--force", help="Also compute fresh shards again.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Grade: show which verdicts would change; write nothing.")] = False,
    shard: Annotated[list[str] | None, typer.Option(help="Only this shard; may be repeated.")] = None,
    address: Address = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Bring stages of rounds up to date, also with new settings."""
    if round is None and not diff:
        raise UsageError("'--round' is missing: 3, 0,2 or 0..15.")
    if diff and (force or shard or address is not None):
        raise UsageError("--force, --shard and --address do not go with --diff, which grades all stored shards in this process.")
    if not diff:
        keep(f"stage {stage} of {run}")
    from jobs.regrade import show_changes
    from jobs.stage import Redo, run_stage

    if diff:
        show_changes(run, stage, round, set or [], debug)
    else:
        run_stage(run, Redo(stage, round or "", set or [], force, shard or []), address, debug)


@app.command(cls=Verb)
def train(
    run: RunUri,
    from_round: Annotated[int | None, typer.Option(help="Train this round and the later ones again.")] = None,
    set: Sets = None,
    out: Annotated[str | None, typer.Option(help="New run for the policies; the rounds are copied there.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace this run's later policies.")] = False,
    address: Address = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Train on committed rounds, without engines."""
    if out is not None and replace:
        raise UsageError("--replace is about policies of this run. It does not go with --out.")
    keep(f"train {run}")
    from jobs import train as job

    job.train_committed(run, from_round, set or [], address, debug, job.Target(replace, out))


@app.command(cls=Verb)
def evaluate(
    run: RunUri,
    policy: Annotated[str, typer.Option(help="Policies to evaluate: numbers, ranges (0..4) and `last`.")] = "0,last",
    source: Annotated[list[str] | None, typer.Option(help="Benchmark, NAME=/copy, file or task; may be repeated.")] = None,
    k: Annotated[int | None, typer.Option("-k", help="Samples per problem, and the k of pass@k.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe of a new run, whose base is measured; none with --config.")] = None,
    config: Config = None,
    set: Sets = None,
    address: Address = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Accuracy and length of policies, on benchmarks or any problems. Only missing traces are generated."""
    keep(f"evaluate {run}")
    from jobs import evaluate as job

    job.evaluate(run, job.Options(policy, source or [], k, set or [], recipe, config), address, debug)


@app.command(cls=Verb)
def compare(
    out: Annotated[str, typer.Option(help="Folder or URI; one run directory per objective and seed below it.")],
    recipe: Annotated[str | None, typer.Option(help="Recipe that all runs start from; none with --config, else demo.")] = None,
    objectives: Annotated[
        str, typer.Option(help="Objectives, and controls: shuffled, uniform, inverted, no_reference, student_entropy.")
    ] = "grpo,rlsd,egrsd,cl_egrsd,position",
    seeds: Annotated[str, typer.Option(help="Seeds: 0..4 or 0,3,7.")] = "0..4",
    baseline: Annotated[str | None, typer.Option(help="Objective to pair with; default: the first.")] = None,
    set: Sets = None,
    config: Config = None,
    address: Address = None,
    csv: Csv = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Train objectives x seeds; say which differences are no noise."""
    keep(f"compare {out}")
    from jobs import compare as job

    job.compare(out, job.Options(recipe, objectives, seeds, baseline, set or [], config, csv), address, debug)


@app.command(cls=Verb)
def doctor(
    recipe: Annotated[
        str | None, typer.Option(autocompletion=recipes_like, help="Recipe to check; default: that of --run, else demo.")
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="Run directory to check as well: a local path or a URI.")] = None,
    source: Annotated[str | None, typer.Option(help="File, folder or data set to look at instead, without Ray.")] = None,
    set: Sets = None,
    config: Config = None,
    address: Annotated[str | None, typer.Option(callback=note_address, help="Ray cluster whose nodes to check.")] = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Check machine, settings, model and source before a run. The exit code is 1 when a check fails."""
    if source is None:
        keep("doctor")
    from jobs import doctor as job

    choices = job.Choices(recipe, set or [], config)
    if source is None:
        job.doctor(choices, run, address, debug)
    else:
        job.look_at_source(source, choices, run, debug)


@app.command(cls=Verb)
def scale(
    run: RunUri,
    sizes: Annotated[list[str] | None, typer.Argument(help="POOL=N or POOL=LEAST..MOST: rollout=4; none: only look.")] = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Show or change the engines of a live run."""
    from jobs.scale import scale as job

    job(run, sizes or [], debug)


@app.command(cls=Verb)
def ask(
    question: Annotated[str, typer.Argument(help="Your question, as one word of the command: put it in quotes.")],
    run: RunUri,
    policy: Annotated[
        str, typer.Option(help="Policies that answer, side by side: numbers, ranges (0..4) and `last`.")
    ] = "0,last",
    reference: Annotated[str | None, typer.Option(help="A correct solution: the teacher's view of each answer is shown.")] = None,
    set: Sets = None,
    address: Address = None,
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Have policies of a run answer your own question, side by side."""
    keep(f"ask {run}")
    from jobs import ask as job

    job.ask(run, job.Question(question, policy, reference, set or []), address, debug)


@app.command(cls=Verb, context_settings={"allow_interspersed_args": False})
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
    _json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a verb as a job on a Ray cluster, or follow it again."""
    from jobs import submit as job

    if (stop is None) == (not verb):
        raise UsageError("give a verb to run, or --stop ID")
    if stop is not None:
        job.stop(stop, address, not no_wait, debug)
    elif verb and context.parent is not None:
        placement = job.JobPlacement(entrypoint_cpus, entrypoint_resources or [], entrypoint_label or [])
        asked = job.Job(verb, submission_id, placement, working_dir, include or [], not no_wait)
        job.submit(context.parent, asked, address, debug)


def main() -> None:
    """Entry point of `egrsd` and `python -m jobs`."""
    call(app)


if __name__ == "__main__":
    main()
