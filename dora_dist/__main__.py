"""`python -m dora_dist` is `dora-dist`."""

from dora_dist.cli import run

if __name__ == "__main__":
    run()
