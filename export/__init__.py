"""Where a model goes: one file a target, `Config`, `write(clip, cfg, out)` and `load(folder)`."""


class Unavailable(Exception):
    """A runtime that cannot run here, with the reason: a row in every report, never a skip."""
