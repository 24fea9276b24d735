"""What is installed here against what this version supports, by the package's own metadata."""

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from compress.errors import PocketclipError

NOT_RUNTIMES = ("data", "dev", "all")


@dataclass(frozen=True)
class Row:
    """One package."""

    package: str
    extra: str
    """The extra that installs it; empty for the core."""
    installed: str | None
    window: str
    """Versions that this version of pocketclip supports, such as `<2.15,>=2.10`."""
    verdict: str
    """`ok`, or what to do."""


def machine() -> str:
    """This machine in one line."""
    parts = [f"Python {platform.python_version()}", platform.platform(terse=True)]
    parts += [platform.machine(), f"{os.cpu_count()} CPUs"]
    return ", ".join(parts)


def integers() -> str | None:
    """What to expect of 8-bit files on this machine, where it is less than elsewhere."""
    from export import _saturation

    if not _saturation.here():
        return None
    return (
        "This CPU has no VNNI: 8-bit files gain less here, in OpenVINO nothing (docs/reduction.md, "
        "docs/results.md), and 8-bit weights can overflow: `quantize: {weight_bits: 7}` cannot."
    )


def installed_requirements() -> list[str]:
    """The requirement lines of the installed pocketclip, extras included."""
    try:
        return metadata.requires("pocketclip") or []
    except metadata.PackageNotFoundError as error:
        raise PocketclipError(
            "pocketclip is not installed, only imported: run `pip install -e .` in its folder"
        ) from error


def check(requirements: Iterable[str]) -> list[Row]:
    """Look up each required package; those for developers are left out."""
    rows = []
    for requirement in map(Requirement, requirements):
        extra = _extra(requirement)
        if extra not in NOT_RUNTIMES and _applies(requirement, extra):
            rows.append(_row(requirement, extra))
    return rows


def _row(requirement: Requirement, extra: str) -> Row:
    window = str(requirement.specifier) or "any"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        wanted = f"pip install 'pocketclip[{extra}]'" if extra else "pip install pocketclip"
        return Row(requirement.name, extra, None, window, wanted)
    supported = requirement.specifier.contains(Version(version), prereleases=True)
    verdict = "ok" if supported else f"pip install '{requirement.name}{requirement.specifier}'"
    return Row(requirement.name, extra, version, window, verdict)


def _extra(requirement: Requirement) -> str:
    """The extra in a marker like `extra == "openvino"`; empty for the core."""
    _, found, rest = str(requirement.marker or "").partition("extra == ")
    return rest.split('"')[1] if found else ""


def _applies(requirement: Requirement, extra: str) -> bool:
    """Whether the requirement is meant for this system and Python."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
