"""What each stage and exporter can do with a model, asked before anything is computed.

A stage or exporter that refuses some models says so in an optional function of its file:
`refuses(clip) -> str | None`, the reason or None. Without it, it takes every model.
"""

from collections.abc import Callable
from typing import Any

from compress import plugin
from compress.clip import Clip
from compress.errors import PocketclipError


def support(clip: Clip) -> dict[str, dict[str, str]]:
    """Name of each stage and exporter -> "yes", or the reason why not."""
    packages = {"stages": plugin.STAGES, "exports": plugin.EXPORTERS}
    return {
        title: {name: _answer(package, name, clip) for name in plugin.names(package)}
        for title, package in packages.items()
    }


def reason(check: Callable[[], Any]) -> str | None:
    """The message of the PocketclipError that a check raises; None where it passes."""
    try:
        check()
    except PocketclipError as error:
        return str(error)
    return None


def _answer(package: str, name: str, clip: Clip) -> str:
    refuses = getattr(plugin.find(package, name), "refuses", None)
    return (refuses(clip) if refuses else None) or "yes"
