"""Where an artifact is timed: one file a host.

A host has `Worker(artifact, cores, timeout_seconds)` (see `timing.Worker`), `describe(place)`,
which says what the device is or raises Unavailable with the reason why it isn't there, and
`pick_cores(threads)`; it may have `meter()`. `place` is what follows the colon in `bench.hosts`.
"""
