"""Paired, interleaved measurements; each module is run as ``python -m simulations.benchmark.NAME``."""
