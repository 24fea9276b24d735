"""The `pocketclip` command: a verb reads its arguments, calls one function, prints the result."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compress import cli_store
from compress.errors import GateFailed, PocketclipError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Any CLIP in; the smallest, fastest image and text encoders for each device out.",
    epilog="Exit codes: 0 done, 1 a gate failed, 2 bad input, 130 interrupted. "
    "--debug, anywhere, shows the traceback of an error.",
)
app.add_typer(cli_store.app, name="store")
console = Console(highlight=False)

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Such as recipes/emoji/quickstart.yaml.")
]
ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model folder, or open_clip:NAME/PRETRAINED."),
]
Out = Annotated[Path | None, typer.Option(help="The run folder [default: runs/NAME]")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PLACE=VALUE",
        help="As in stages.distill.lr=1e-3; may be repeated.",
    ),
]


@app.command()
def run(recipe: RecipeFile, out: Out = None, overrides: Overrides = None) -> None:
    """Run a recipe: stages, exports, benchmark, report. What is done already is kept."""
    from compress import recipe as recipes
    from compress import runner

    loaded = recipes.load(recipe, overrides)
    runner.run_on_all(loaded, out or Path("runs") / loaded.name, say)


@app.command()
def plan(recipe: RecipeFile, out: Out = None, overrides: Overrides = None) -> None:
    """Show what a run would do, what is there already, why, and how long it took before."""
    from compress import recipe as recipes
    from compress import runner

    loaded = recipes.load(recipe, overrides)
    rows = runner.plan(loaded, out or Path("runs") / loaded.name)
    table = Table("step", "what happens", "estimate", box=None, pad_edge=False)
    for row in rows:
        estimate = "unknown" if row.seconds is None else duration(row.seconds)
        what = "kept: up to date" if row.why is None else f"runs: {row.why}"
        table.add_row(row.folder, escape(what), "" if row.why is None else estimate)
    console.print(table)
    known = [row.seconds for row in rows if row.seconds is not None]
    more = "" if len(known) == len(rows) else " and the steps whose time is unknown"
    say(f"about {duration(sum(known))}{more}")


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check a recipe and the files that it names, without running anything."""
    from compress import recipe as recipes

    loaded = recipes.load(recipe, overrides)
    steps = [s.name for s in loaded.stages] + [s.folder_name for s in loaded.export]
    say(f"{recipe}: no mistakes; steps: {', '.join(steps)}")


@app.command()
def inspect(
    model: ModelName,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Describe a model: towers, parameters, multiply-adds, preprocessing, licence, provenance."""
    from compress import inspect as inspecting
    from compress import plugin

    facts = inspecting.describe(plugin.source(model, Path.cwd()))
    if as_json:
        console.print_json(data=facts)
    else:
        console.print(inspecting.render(facts))


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A bundle, a model folder, or open_clip:NAME."),
    ],
    data: Annotated[
        Path,
        typer.Option(metavar="RECIPE", help="Its data and evaluate sections are used."),
    ],
    overrides: Overrides = None,
) -> None:
    """Measure accuracy of an exported bundle or a model on a recipe's evaluation splits."""
    import compress.evaluate
    from compress import recipe as recipes
    from compress.artifact import open_artifact

    recipe = recipes.load(data, overrides)
    shards = recipe.shards()
    artifact = open_artifact(model)
    table = Table("split", "figure", "value", "95 % interval", box=None, pad_edge=False)
    for split in compress.embeddings.split_names(shards, recipe.evaluate):
        row = compress.evaluate.evaluate(artifact.encoder, artifact, shards, split, recipe.evaluate)
        for key in [key for key in row if f"{key}_ci95" in row]:
            low, high = row[f"{key}_ci95"]
            table.add_row(split, key, f"{row[key]:.4f}", f"{low:.4f} to {high:.4f}")
    console.print(table)


@app.command()
def export(
    model: ModelName,
    target: Annotated[str, typer.Option("--to", metavar="TARGET", help="Such as onnxruntime.")],
    out: Annotated[Path | None, typer.Option(help="[default: bundles/MODEL/TARGET]")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SETTING=VALUE", help="As in precision=int8; repeatable."),
    ] = None,
    pictures: Annotated[
        list[Path] | None,
        typer.Option(help="Your photos, to calibrate static integers on: a folder; repeatable."),
    ] = None,
) -> None:
    """Write a model as a bundle for one target, checked against the torch model."""
    from compress import export_command

    say(f"bundle: {export_command.export(model, target, overrides, out, pictures or ())}")


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A web bundle with its page.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
) -> None:
    """Open a web bundle's demo page to this machine's browser, until Ctrl-C."""
    from export._serve import Server

    if not (bundle / "index.html").is_file():
        raise PocketclipError(
            f"{bundle}: no page there; write one with `pocketclip export --to web`"
        )
    server = Server({"": bundle}, port)
    say(f"open {server.url} (Ctrl-C ends it)")
    server.run()


@app.command()
def bench(
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE...", help="Bundles, or folders that hold some."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write the raw samples and all figures to this JSON file.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Time bundles side by side; --set threads=2, scopes=[model,search], hosts=[local,android]."""
    from benchmarks import run as benchmarking
    from compress import atomic

    found = benchmarking.bench_bundles(bundles, benchmarking.settings(overrides))
    console.print(benchmarking.render(found["timings"]))
    for name, host in found["hosts"].items():
        say(f"{name}: {host.get('unavailable') or 'energy ' + host['energy']}")
    if out:
        atomic.write_json(out, found)
        say(f"raw samples: {out}")


@app.command()
def compare(
    words: Annotated[
        list[str], typer.Argument(metavar="A B", help="Run folders, or their summary.json files.")
    ],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit with 1 where it holds: p50>+5%, top1<-0.3 (points), size>+20kB, p90>12ms. "
            "More may follow, separated by blanks.",
        ),
    ] = None,
) -> None:
    """Show what changed from run A to run B, and refuse B where a condition holds."""
    from benchmarks import compare as comparing

    paths, more = comparing.split_arguments(words)
    if len(paths) != 2:
        raise PocketclipError(
            f"compare needs two runs, not {len(paths)}: {', '.join(map(str, paths))}"
        )
    before, after = (comparing.read(path) for path in paths)
    columns = {key for row in after["rows"] for key in row}
    conditions = [comparing.parse(text, columns) for text in [*(fail_if or []), *more]]
    found = comparing.lines(before, after, conditions)
    console.print(comparing.render(found))
    for difference in comparing.differences(before, after):
        say(f"note: {difference}")
    for name in comparing.missing(before, after):
        say(f"note: {name}: only in {paths[0]}")
    refused = comparing.failures(found, conditions)
    if refused:
        raise GateFailed(f"{paths[1]} is refused:\n  " + "\n  ".join(refused))


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Such as runs/quickstart.")],
) -> None:
    """Write report.html and report.md of a run folder again from its figures."""
    import benchmarks.report

    if not (run_folder / "summary.json").exists():
        raise PocketclipError(f"{run_folder}/summary.json: no such file; run the recipe first")
    benchmarks.report.write(run_folder)
    say(f"report: {run_folder / 'report.html'}")


@app.command()
def verify(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Folders that hold a bundle.json.")
    ],
) -> None:
    """Check the hashes of exported bundles and replay their goldens in their own runtimes."""
    from export import _verify

    for bundle in bundles:
        met = _verify.verify(bundle)
        figures = ", ".join(f"{tower} {cosine:.5f}" for tower, cosine in met.items())
        say(f"{bundle}: every hash fits, goldens met at cosine {figures}")


@app.command()
def doctor() -> None:
    """Show which runtimes are installed, their versions, and which versions are supported."""
    from compress import doctor as checks

    rows = checks.check(checks.installed_requirements())
    for line in filter(None, (checks.machine(), checks.integers())):
        say(line)
    table = Table("package", "for", "installed", "supported", "", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row.package, row.extra or "core", row.installed or "-", row.window, escape(row.verdict)
        )
    console.print(table)
    broken = [row.package for row in rows if not row.extra and row.verdict != "ok"]
    if broken:
        raise PocketclipError(f"outside the supported versions: {', '.join(broken)}")


def say(line: str) -> None:
    """Print one line as it is: brackets are not markup, long paths do not wrap."""
    console.print(line, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """1.4 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def main() -> None:
    """Run the command; a known error becomes one message on stderr and its exit code."""
    from export import Unavailable

    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except (PocketclipError, Unavailable) as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True, highlight=False).print(
            f"error: {error}", markup=False, soft_wrap=True, style="red"
        )
        sys.exit(getattr(error, "exit_code", 2))
