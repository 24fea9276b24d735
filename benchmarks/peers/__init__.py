"""What users would reach for instead, each in an environment of its own: one file a peer."""
