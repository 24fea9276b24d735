"""Where a model comes from: one file a source, `load(name) -> Clip`."""
