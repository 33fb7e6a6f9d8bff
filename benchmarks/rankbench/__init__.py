"""The parts of benchmarks/dynamic_rank.py."""
