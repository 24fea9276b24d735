"""A bar for long work whose steps are known beforehand."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def tracked(steps: Iterable[T], what: str, total: int | None = None, least: int = 2) -> Iterable[T]:
    """The steps, with a bar on standard error while they last.

    total: how many, where `steps` cannot tell. Fewer than `least` and output that is no terminal
    show none.
    """
    steps = steps if total is not None else list(steps)
    number = len(steps) if total is None else total  # type: ignore[arg-type]
    console = Console(stderr=True)
    hidden = number < least or not console.is_terminal
    return track(steps, what, total=number, console=console, transient=True, disable=hidden)
