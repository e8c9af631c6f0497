"""Benchmarks: what vllmd promises, measured beside what one would otherwise use. `python -m bench` prints one table."""
