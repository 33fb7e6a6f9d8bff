"""What `deepspeed`, `mpirun`, `torchrun` and `srun` start on every rank: `launch/train.py --config FILE`.

The same as `dora-dist train`; `launch/train.py --help` lists the options.
"""

import importlib.util
import sys

if __name__ == "__main__":
    if importlib.util.find_spec("dora_dist") is None:
        sys.exit("error: dora_dist is not installed here; run `pip install -e .` in the repository, or `make demo`")
    from dora_dist.cli import run

    run(["train", *sys.argv[1:]])
