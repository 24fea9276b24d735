"""Each experiment a script that writes `benchmarks/results/NAME.json`."""
