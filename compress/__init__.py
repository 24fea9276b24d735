"""From a command to a run folder: recipes, stages, training, evaluation."""
