"""Side-by-side measurements: `python -m benchmarks.<name> [--quick]`; results land in `benchmarks/results/`."""
