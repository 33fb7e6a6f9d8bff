"""The command line `dora-dist`: each command parses its options and calls one function of the library."""

from dora_dist.cli.entry import build_parser, main, run
from dora_dist.cli.train import load_config

__all__ = ["build_parser", "load_config", "main", "run"]
