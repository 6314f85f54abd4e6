"""The Typer application: options and help of every command; the work is in the modules that they call."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.completion import complete_cluster, complete_run_id
from orchestrator.cli.guard import finish

app = typer.Typer(
    name="remote-eval",
    help="Evaluate a PyTorch checkpoint on a GPU machine reached by SSH, and bring back a verdict to trust.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
clusters_app = typer.Typer(help="Cluster profiles.", invoke_without_command=True)
nightly_app = typer.Typer(help="Evaluate new checkpoints every night.", no_args_is_help=True)
app.add_typer(clusters_app, name="clusters")
app.add_typer(nightly_app, name="nightly")
adapter_app = typer.Typer(help="Your code that builds the model and its samples.", no_args_is_help=True)
app.add_typer(adapter_app, name="adapter")

Cluster = Annotated[
    str | None,
    typer.Option("--cluster", "-c", help="Cluster profile: a name or a file.", autocompletion=complete_cluster),
]
Checkpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="A local path, or CLUSTER:path for one that is there already.")
]
Config = Annotated[Path | None, typer.Option("--config", help="Evaluation config (YAML), or the user's own file.")]
NumSamples = Annotated[int, typer.Option("--num-samples", help="Samples to show pictures of.")]
Jobs = Annotated[
    str | None, typer.Option("--jobs", help="Comma-separated; default: health, reconstruct, the project's.")
]
Detach = Annotated[bool, typer.Option("--detach", help="Return once the job is under way.")]
BandwidthLimit = Annotated[
    float | None, typer.Option("--bandwidth-limit", min=0.01, help="Megabits per second at most.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
RunId = Annotated[str | None, typer.Argument(help="Run id; default: the newest run.", autocompletion=complete_run_id)]
Retry = Annotated[bool, typer.Option("--retry", help="Start a new attempt where the last one did not succeed.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    cluster: Cluster = None,
    checkpoint: Checkpoint = None,
    config: Config = None,
    num_samples: NumSamples = 4,
    jobs: Jobs = None,
    detach: Detach = False,
    bandwidth_limit: BandwidthLimit = None,
    json: Json = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Evaluate a checkpoint: remote-eval --cluster C --checkpoint REF."""
    if version:
        import orchestrator

        print(f"remote-eval {orchestrator.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is not None:
        if detach or json or any(option is not None for option in (cluster, checkpoint, config, jobs, bandwidth_limit)):
            raise typer.BadParameter(
                f"write options behind the sub-command: remote-eval {context.invoked_subcommand} …"
            )
        return
    if checkpoint is None and cluster is None:
        print(context.get_help())
        raise typer.Exit
    run(cluster, checkpoint, config, num_samples, jobs, detach, bandwidth_limit, json)


@app.command()
def run(
    cluster: Cluster = None,
    checkpoint: Checkpoint = None,
    config: Config = None,
    num_samples: NumSamples = 4,
    jobs: Jobs = None,
    detach: Detach = False,
    bandwidth_limit: BandwidthLimit = None,
    json: Json = False,
) -> None:
    """Evaluate a checkpoint (what remote-eval does without a sub-command)."""
    from orchestrator.cli import runs

    finish(
        lambda: runs.run(
            cluster,
            checkpoint,
            config,
            num_samples,
            jobs,
            detach=detach,
            as_json=json,
            bandwidth_limit_mbps=bandwidth_limit,
        )
    )


@app.command()
def resume(
    run_id: RunId = None,
    retry: Retry = False,
    detach: Detach = False,
    bandwidth_limit: BandwidthLimit = None,
    json: Json = False,
) -> None:
    """Go on with a run from wherever it stands."""
    from orchestrator.cli import runs

    finish(lambda: runs.resume(run_id, retry=retry, detach=detach, as_json=json, bandwidth_limit_mbps=bandwidth_limit))


@app.command()
def status(run_id: RunId = None, json: Json = False) -> None:
    """Where a run stands: by its journal, and by the node."""
    from orchestrator.cli import runs

    finish(lambda: runs.status(run_id, as_json=json))


@app.command()
def logs(
    run_id: RunId = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    json: Json = False,
) -> None:
    """The job's output and errors, with terminal escapes made harmless."""
    from orchestrator.cli import runs

    finish(lambda: runs.logs(run_id, follow=follow, as_json=json))


@app.command()
def cancel(run_id: RunId = None, json: Json = False) -> None:
    """End a run's job on the node."""
    from orchestrator.cli import runs

    finish(lambda: runs.cancel(run_id, as_json=json))


@app.command()
def collect(run_id: RunId = None, json: Json = False) -> None:
    """Bring logs and artifacts of a run here, whatever became of it."""
    from orchestrator.cli import runs

    finish(lambda: runs.collect(run_id, as_json=json))


@app.command()
def report(run_id: RunId = None, json: Json = False) -> None:
    """Write the report of a run again from what was collected."""
    from orchestrator.cli import runs

    finish(lambda: runs.report(run_id, as_json=json))


@app.command()
def history(
    cluster: Cluster = None,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", help="Only runs of this reference.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10000, help="At most so many.")] = 20,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Rebuild from the run folders first.")] = False,
    json: Json = False,
) -> None:
    """Runs, verdicts, key metrics."""
    from orchestrator.cli import views

    finish(lambda: views.history(cluster, checkpoint, limit, rebuild=rebuild, as_json=json))


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A local path, or CLUSTER:path.")],
    json: Json = False,
) -> None:
    """Header facts of a checkpoint, without loading it."""
    from orchestrator.cli import views

    finish(lambda: views.inspect(checkpoint, as_json=json))


@app.command()
def fetch(
    reference: Annotated[str, typer.Argument(help="CLUSTER:path of a file or folder there.", metavar="CLUSTER:PATH")],
    local: Annotated[Path | None, typer.Argument(help="Folder or new name here; OTHER: for another node.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite another file that is there.")] = False,
    streams: Annotated[
        int | None, typer.Option("--streams", min=1, max=16, help="Connections; default: as many as pay.")
    ] = None,
    bandwidth_limit: BandwidthLimit = None,
    json: Json = False,
) -> None:
    """Bring a checkpoint or an artifact from a node, verified; goes on where it was cut."""
    from orchestrator.cli import fetch as fetching

    finish(
        lambda: fetching.fetch(
            reference, local, force=force, streams=streams, limit_mbps=bandwidth_limit, as_json=json
        ),
        if_interrupted="what has arrived is kept: the same command goes on with it",
    )


@app.command()
def doctor(cluster: Cluster = None, json: Json = False) -> None:
    """Check this machine and a cluster, and say what to mend."""
    from orchestrator.cli import views

    finish(lambda: views.doctor(cluster, as_json=json))


@app.command()
def demo(json: Json = False) -> None:
    """The whole job on this machine: an SSH node on loopback, a small model, real film and sound."""
    from orchestrator.cli import demonstration

    finish(lambda: demonstration.demo(as_json=json))


@app.command()
def gc(
    cluster: Cluster = None,
    keep_days: Annotated[float | None, typer.Option("--keep-days", min=0, help="Keep what is younger; 30.")] = None,
    keep_gib: Annotated[float | None, typer.Option("--keep-gib", min=0, help="Bound for the store.")] = None,
    delete: Annotated[bool, typer.Option("--delete/--dry-run", help="Do it, or say what would go.")] = False,
    json: Json = False,
) -> None:
    """Free space in our folder on a node."""
    from orchestrator.cli import views

    finish(lambda: views.gc(cluster, keep_days, keep_gib, delete=delete, as_json=json))


@adapter_app.command("new")
def adapter_new(
    path: Annotated[Path, typer.Argument(help="The file to make.")] = Path("evaluation/adapter.py"),
    kind: Annotated[str, typer.Option("--kind", help="image, video, audio, mel, codes, text or voxels.")] = "image",
    class_name: Annotated[str, typer.Option("--class", help="The class's name.")] = "MyAdapter",
    json: Json = False,
) -> None:
    """Make a first adapter; a file that is there is never touched."""
    from orchestrator.cli import adapters

    finish(lambda: adapters.new(path, kind, class_name, as_json=json))


@adapter_app.command("check")
def adapter_check(
    cluster: Cluster = None, checkpoint: Checkpoint = None, config: Config = None, json: Json = False
) -> None:
    """Check the adapter's source here, and with --checkpoint on a node: build, shapes, one sample, a dry run."""
    from orchestrator.cli import adapters

    finish(lambda: adapters.check(cluster, checkpoint, config, as_json=json))


@clusters_app.callback()
def clusters(context: typer.Context, json: Json = False) -> None:
    """List cluster profiles."""
    if context.invoked_subcommand is None:
        from orchestrator.cli import views

        finish(lambda: views.clusters(as_json=json))


@clusters_app.command()
def schema(json: Json = False) -> None:  # noqa: ARG001 - it is JSON either way
    """JSON Schema of a profile, for editors."""
    from orchestrator.profiles import dump_schema

    sys.stdout.write(dump_schema())


@clusters_app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name or file.", autocompletion=complete_cluster)], json: Json = False
) -> None:
    """One profile with `extends` and defaults filled in."""
    from orchestrator.cli import views

    finish(lambda: views.show_cluster(name, as_json=json))


@nightly_app.command()
def tick(
    file: Annotated[
        Path | None, typer.Option("--file", help="Default: nightly.yaml of the user's config folder.")
    ] = None,
    json: Json = False,
) -> None:
    """Evaluate the targets whose checkpoint is new since their last evaluation."""
    from orchestrator.cli import nightly

    finish(lambda: nightly.tick(file, as_json=json))


Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@nightly_app.command()
def install(
    at: Annotated[str, typer.Option("--at", help="Local time, HH:MM.")] = "02:30", yes: Yes = False, json: Json = False
) -> None:
    """Schedule `nightly tick`: shown first, then written."""
    from orchestrator.cli import nightly

    finish(lambda: nightly.install(at, yes=yes, as_json=json))


@nightly_app.command()
def uninstall(yes: Yes = False, json: Json = False) -> None:
    """Take the schedule away again."""
    from orchestrator.cli import nightly

    finish(lambda: nightly.uninstall(yes=yes, as_json=json))
