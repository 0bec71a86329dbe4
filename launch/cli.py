"""The command `sequencematch`.

Every command imports what it runs inside its function, so that `--help` imports neither torch, ray nor vLLM.
Exit codes: 0 done, 1 a run failed, 2 something the user can mend, 130 stopped by Ctrl-C, 75 by another signal. Anything
else that is raised is a defect and keeps its traceback.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from launch import commands as options
from launch.commands import reported_errors, stdout_kept_clean
from launch.compare.command import compare
from launch.errors import UserError, setting_up
from launch.queries.audit import audit
from launch.queries.query import query
from launch.report.command import report
from launch.surroundings import tolerate_terminal, use_utf8

app = typer.Typer(
    name="sequencematch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune causal language models with SequenceMatch: models that can take tokens back.",
)


def main() -> None:
    """Entry point of the `sequencematch` script."""
    use_utf8()
    app()


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        version = importlib.metadata.version("sequencematch")
    except importlib.metadata.PackageNotFoundError:  # as under `ray job submit --working-dir .`
        version = "(run from its source tree, not installed)"
    typer.echo(f"sequencematch {version}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of the program as a whole."""
    tolerate_terminal()


@app.command()
def train(
    recipe: options.Recipe = None,
    overrides: options.Overrides = None,
    name: options.NewName = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan of its processes, and leave.")
    ] = False,
    resume: options.Resume = None,
    resume_if_exists: options.ResumeIfExists = False,
    evaluate_after: options.EvaluateAfter = True,
) -> None:
    """Train a model, show how it goes, and evaluate it at the end.

    [dim]Example:[/dim] sequencematch train launch/recipes/arithmetic_cpu.yaml actors.count=2 stages.pretrain.steps=500

    Ctrl-C ends the run after the current step, with a checkpoint.
    """
    with reported_errors():
        from launch import api

        recipe, changed = options.recipe_or_resume(recipe, overrides or [], resume, name, resume_if_exists)
        if resume is not None:
            if dry_run:
                raise UserError(f"--dry-run resolves a recipe; the resolved one of a run is in {resume}/config.yaml")
            api.resume(resume, changed, evaluate=evaluate_after, console=Console())
            return
        assert recipe is not None
        if not dry_run:
            api.train(
                options.path(recipe),
                changed,
                name=name,
                resume_if_exists=resume_if_exists,
                evaluate=evaluate_after,
                console=Console(),
            )
            return
        from launch.cluster.capacity import plan_lines
        from launch.cluster.memory import memory_lines
        from launch.settings.recipe import read_recipe, to_yaml

        with setting_up():
            settings = read_recipe(options.path(recipe), changed)
        plan = ["What Ray sets aside for the processes of the run:", *plan_lines(settings)]
        plan += ["", "Memory in GiB, by formula (docs/guide.md); M: 10^6, B: bytes", *memory_lines(settings)]
        typer.echo("\n# ".join([to_yaml(settings), *plan]))


@app.command()
def generate(
    source: options.RunOrCheckpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    stage: options.StageOfRun = None,
    count: Annotated[int, typer.Option("--n", min=1, help="Rollouts.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens that remain; the model's context bounds it too.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Continue a prompt, and show what the model wrote and took back.

    [dim]Example:[/dim] sequencematch generate runs/RUN --prompt "What is 12 + 9?"
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from launch import api
        from launch.generation import rollout_text, rollout_to_json

        console = Console(stderr=as_json)
        rollouts = api.generate(
            source,
            prompt,
            stage=stage,
            count=count,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            console=console,
        )
        if not as_json:
            for rollout in rollouts:
                console.print(rollout_text(rollout, console), soft_wrap=True)
    if as_json:
        typer.echo(
            json.dumps({"prompt": prompt, "seed": seed, "rollouts": [rollout_to_json(each) for each in rollouts]})
        )


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(parser=options.path, metavar="RUN_OR_CHECKPOINT", help="Of one model; of a run its result."),
    ],
    against: Annotated[
        Path | None,
        typer.Option(parser=options.path, metavar="RUN_OR_CHECKPOINT", help="Baseline; by default the first."),
    ] = None,
    task_from: Annotated[
        Path | None,
        typer.Option(parser=options.path, metavar="RUN|RECIPE", help="By default the run above a checkpoint."),
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Held-out examples, at most.")] = None,
    decoding: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Further ways to decode, with commas: greedy, top_p=P, temperature=T, contrastive[=K:ALPHA], "
            "recovery=K.",
        ),
    ] = None,
    ban_deleted: Annotated[
        Literal["usual", "both"] | None,
        typer.Option(help="Ban tokens that were taken back: in greedy decoding only, or each with and without."),
    ] = None,
    mauve: Annotated[
        Literal["encoder", "model"] | None, typer.Option(help="MAUVE, with these features (needs the extra `mauve`).")
    ] = None,
    mauve_clusters: Annotated[int | None, typer.Option(min=2, help="Ten texts are needed for each.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=options.path, metavar="FOLDER", help="For results and rollouts; by default in the run folder."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure checkpoints on the held-out examples of their task, side by side.

    An evaluation that was interrupted goes on where it was when it is repeated.

    [dim]Examples:[/dim]

    sequencematch evaluate runs/RUN/checkpoints/*/step-000400 --examples 200

    sequencematch evaluate A B --against MLE --decoding greedy,top_p=0.95,temperature=0.7 --mauve encoder
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from launch import api
        from launch.evaluation.report import show_evaluation

        if mauve_clusters is not None and mauve is None:
            raise UserError("--mauve-clusters goes with --mauve encoder or --mauve model")
        mauve_settings = {"mauve.features": mauve, "mauve.clusters": mauve_clusters}
        decodings = None if decoding is None else f"[{decoding}]"
        given = {"examples": examples, "ban_deleted": ban_deleted, "decoding": decodings, **mauve_settings}
        overrides = [f"evaluation.{key}={value}" for key, value in given.items() if value is not None]
        console = Console(stderr=as_json)
        evaluation = api.evaluate(
            checkpoints, overrides, against=against, task_from=task_from, output=output, console=console
        )
        if not as_json:
            show_evaluation(evaluation, Console())
    if as_json:
        typer.echo(json.dumps(evaluation.to_json()))


@app.command()
def export(
    source: options.RunOrCheckpoint,
    out: Annotated[Path, typer.Argument(parser=options.path, help="Folder to make; it must not exist.")],
    stage: options.StageOfRun = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Adapters alone, for peft; by default they are merged.")
    ] = False,
    license_id: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="License for the card; by default that of the base model."),
    ] = None,
) -> None:
    """Write a trained model where others can use it: Hugging Face format, tokenizer and model card.

    [dim]Example:[/dim] sequencematch export runs/RUN exported/my-model
    """
    with reported_errors(), setting_up():
        from launch.export import export as export_model

        exported = export_model(source, out, stage=stage, adapter_only=adapter_only, license_id=license_id)
    typer.echo(f"exported {exported.checkpoint} to {exported.out}")
    if exported.license is None:
        typer.echo(
            f"no license is known: write it into {exported.out}/README.md, or export with --license ID", err=True
        )


@app.command()
def status(run: options.Run, as_json: options.AsJson = False) -> None:
    """Show how a live run is doing, from another shell.

    [dim]Example:[/dim] sequencematch status runs/arithmetic-20260101-120000
    """
    with reported_errors(), stdout_kept_clean(as_json):
        from launch.monitoring.live_view import render
        from launch.run.control import run_status, status_to_json

        view = run_status(run)
        found = status_to_json(run, view)
        if not as_json:
            Console().print(render(view))
    if as_json:
        typer.echo(json.dumps(found))


@app.command()
def scale(run: options.Run, actors: Annotated[int, typer.Option(min=0, help="Rollout actors from now on.")]) -> None:
    """Change the number of rollout actors of a live run; the learner goes on undisturbed.

    [dim]Example:[/dim] sequencematch scale runs/arithmetic-20260101-120000 --actors 3
    """
    with reported_errors():
        from launch.run.control import scale_run

        pool = scale_run(run, actors)
        states = ", ".join(f"{member.name} {member.state}" for member in pool.members) or "none"
        typer.echo(f"{actors} actors wanted; now: {states}. `sequencematch status {run}` shows them come and go")


@app.command()
def submit(
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS",
            metavar="http://HEAD:8265",
            help="Job server of the cluster: the dashboard of its head node.",
        ),
    ],
    recipe: options.Recipe = None,
    overrides: options.Overrides = None,
    name: options.NewName = None,
    resume: options.Resume = None,
    resume_if_exists: options.ResumeIfExists = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY[=VALUE]", help="Variable for the run's processes; without value, the one set here."),
    ] = None,
    evaluate_after: options.EvaluateAfter = True,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log, and end as the run ends.")] = True,
) -> None:
    """Run a recipe as a job of a Ray cluster: train, somewhere else.

    The recipe is checked here; this version of the program and the resolved recipe are sent. Paths in the recipe, and
    that of --resume, are those of the cluster's nodes, and runs_folder has to be one that they share.

    [dim]Example:[/dim] sequencematch submit --address http://HEAD:8265 launch/recipes/arithmetic_cpu.yaml
    runs_folder=/shared/runs actors.count=4

    Ctrl-C ends the following only; the run goes on. Exit code: that of the run, as from train. `ray job
    list|status|logs|stop` look after the runs that were submitted.
    """
    with reported_errors():
        recipe, changed = options.recipe_or_resume(recipe, overrides or [], resume, name, resume_if_exists)
        from launch.submit import submit_run

        exit_code = submit_run(
            address,
            recipe,
            changed,
            name=name,
            resume=resume,
            resume_if_exists=resume_if_exists,
            variables=env or [],
            evaluate_after=evaluate_after,
            wait=wait,
        )
    raise typer.Exit(exit_code)


app.command()(audit)
app.command()(compare)
app.command()(query)
app.command()(report)


if __name__ == "__main__":
    main()
