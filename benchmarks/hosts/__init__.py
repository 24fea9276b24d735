"""Where an artifact is timed: one file a host."""
