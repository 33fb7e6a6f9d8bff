"""`dora-dist env`."""

import argparse
import json
import sys
from contextlib import redirect_stdout

from dora_dist.cli.options import Commands, declare, positive


def declare_env(commands: Commands) -> None:
    command = declare(
        commands,
        "env",
        _env,
        summary="print what each rank finds: launcher, device, memory, versions, and the speed of collectives",
        example="dora-dist env\n"
        "          srun dora-dist env\n"
        "          mpirun -n 2 dora-dist env\n"
        "          torchrun --nproc_per_node 2 --no-python dora-dist env\n"
        "          deepspeed --num_accelerators 2 --no_python dora-dist env",
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")
    command.add_argument(
        "--timeout",
        type=positive,
        default=120,
        metavar="SECONDS",
        help="longest wait for other ranks (default: %(default)s)",
    )


def _env(options: argparse.Namespace) -> None:
    from dora_dist.runtime.environment import as_table, survey

    with redirect_stdout(sys.stderr):  # what libraries print while they start is not part of the answer
        found = survey(options.timeout)
    if found is not None:
        print(json.dumps(found, indent=2) if options.json else as_table(found))
