"""What changes a model: one file a stage, `Config` and `run(work, cfg, out) -> Work`."""
