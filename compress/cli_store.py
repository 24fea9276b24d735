"""`pocketclip store`: plan, check and complete reinforced data sets."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from compress.errors import PocketclipError

app = typer.Typer(no_args_is_help=True, help="Reinforced data sets: plan, doctor, join.")
console = Console(highlight=False)

Shards = Annotated[
    list[Path], typer.Argument(metavar="STORE...", help="A store folder, or tars and their folders")
]

Rate = Annotated[float, typer.Option(min=1e-9, help="Of all teachers together, on one device.")]


@app.command()
def plan(
    images: Annotated[int, typer.Argument(min=1, help="Images of the data set.")],
    views: Annotated[int, typer.Option(min=1, help="Stored augmentations of each image.")] = 5,
    synthetic: Annotated[int, typer.Option(min=0, help="Synthetic captions of each image.")] = 2,
    widths: Annotated[str, typer.Option(help="The teachers' embedding widths.")] = "768,768",
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    images_per_second: Annotated[
        float, typer.Option(min=1e-9, help="All teachers, one device.")
    ] = 500,
    texts_per_second: Annotated[
        float, typer.Option(min=1e-9, help="All teachers, one device.")
    ] = 2000,
    epochs: Annotated[float, typer.Option(min=0, help="Epochs of training, to compare.")] = 30,
) -> None:
    """Size and time of a reinforced data set, before anything is computed."""
    from compress import store_tools

    if dtype not in ("bf16", "fp32"):
        raise PocketclipError(f"--dtype {dtype}: bf16 or fp32")
    each = [int(width) for width in widths.split(",")]
    value_bytes = 2 if dtype == "bf16" else 4
    cost = store_tools.plan(
        images, views, synthetic, each, value_bytes, images_per_second, texts_per_second, epochs
    )
    say(f"{cost.terabytes:.3f} TB ({cost.bytes_per_sample / 1e3:.1f} kB a sample, without pixels)")
    online = f"{cost.online_hours:.1f} for {epochs:g} epochs with the teachers online"
    say(f"{cost.teacher_hours:.1f} device hours to make; {online}")
    say(f"the store is the cheaper way from {cost.pays_after_epochs:.1f} epochs on")


@app.command()
def doctor(
    store: Shards,
    widths: Annotated[str, typer.Option(help="Teachers' widths in Apple's layout.")] = "",
) -> None:
    """Check every sample of a store: counts, decoding, lengths, NaN, layout."""
    from compress import store_tools

    each = [int(width) for width in widths.split(",")] if widths else []
    health = store_tools.doctor(store, each)
    numbers = lambda found: ", ".join(map(str, sorted(found))) or "-"  # noqa: E731
    say(
        f"layout {health.layout}; {health.num_shards} shards, {health.num_samples} samples, "
        f"{health.num_with_image} with an image; views {numbers(health.views)}; "
        f"width {numbers(health.widths)}"
    )
    if health.digest:
        say(f"digest {health.digest}")
    if health.problems:
        shown = "\n  ".join(health.problems[:20])
        raise PocketclipError(f"{len(health.problems)} problem(s):\n  {shown}")
    say("no problems")


@app.command()
def join(
    store: Shards,
    images: Annotated[list[Path], typer.Option(help="Folders or tars of downloaded images.")],
    out: Annotated[Path, typer.Option(help="Where the joined shards go.")],
) -> None:
    """Join DataCompDR's published shards, which hold no images, with downloaded ones."""
    from compress import store_tools

    written, left = store_tools.join(store, images, out)
    for line in left[:20]:
        say(f"left out: {line}")
    say(f"{written} samples joined into {out}, {len(left)} left out")


def say(line: str) -> None:
    """Print one line as it is."""
    console.print(line, markup=False, soft_wrap=True)
