"""Benchmarks of internals. Run from the repository: `PYTHONPATH=.:tests python -m benchmarks NAME [options]`."""
