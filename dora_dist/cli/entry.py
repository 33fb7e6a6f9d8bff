"""From words on a command line to one command, and from its end to an exit status."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dora_dist import __version__
from dora_dist.cli import analyze, env, evaluate, export, extract, models, push, report, speak, train, validate
from dora_dist.config import RunConfig, check_names
from dora_dist.runtime.console import Lasting, complain, is_first
from dora_dist.runtime.errors import LostRank, Stopped, UserError
from dora_dist.runtime.exit_codes import DONE, FAILED, INTERRUPTED, STOPPED, USERS_MISTAKE
from dora_dist.runtime.launchers import rank_among_several


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status, one of `exit_codes`; an error of the program is raised."""
    tokens = sys.argv[1:] if arguments is None else list(arguments)
    if tokens and re.match(r"--local[_-]rank=", tokens[0]):  # from `deepspeed --no_python`; the environment says it too
        tokens = tokens[1:]
    try:
        if tokens[:1] in (["train"], ["validate"]):
            check_names(tokens, RunConfig)
        options = build_parser().parse_args(tokens)
        options.handler(options)
    except UserError as error:
        # Every rank says it: the first that ends makes the launcher end the others, maybe unheard.
        rank = rank_among_several(os.environ)
        complain(f"error{'' if rank is None else f' on rank {rank}'}: {error}")
        return USERS_MISTAKE
    except LostRank as error:
        complain(f"error on rank {rank_among_several(os.environ)}: {error}")
        return error.code
    except Stopped as stopped:
        if is_first():
            complain(f"stopped: {stopped}")
        return STOPPED
    except KeyboardInterrupt:
        if is_first():
            complain("interrupted")
        return INTERRUPTED
    return DONE


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """What a shell or a launcher starts: `main`, then the end of the process with its exit status.

    The process ends by os._exit, without the interpreter's teardown, in which threads of libraries can abort or hang.
    """
    _open_standard_streams()
    if not Lasting(sys.stderr).isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars: carriage returns do not belong in files
    # torch reads this when it is imported, which is later. Its warnings about broken connections hold a page of C++
    # stack each, from every rank; `Watch` says the same in words.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        status = main(arguments)
    except Exception as error:
        traceback.print_exception(error)
        status = FAILED
    for stream in (sys.stdout, sys.stderr):
        Lasting(stream).flush()
    os._exit(status)


def _open_standard_streams() -> None:
    """Open those that the shell closed (`>&-`): the next file to be opened would take their place."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; parsed options carry the `handler` of their command."""
    parser = argparse.ArgumentParser(
        prog="dora-dist",
        description="DoRA fine-tuning on DeepSpeed ZeRO-3: one JSON file is a run, one command starts it",
        epilog="dora-dist COMMAND --help describes a command and gives an example.",
    )
    parser.add_argument("--version", action="version", version=f"dora-dist {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    train.declare_train(commands)
    validate.declare_validate(commands)
    train.declare_schema(commands)
    models.declare_consolidate(commands)
    models.declare_export_peft(commands)
    export.declare_export(commands)
    models.declare_import_gguf(commands)
    models.declare_assemble_llava(commands)
    extract.declare_extract_features(commands)
    evaluate.declare_evaluate(commands)
    speak.declare_generate(commands)
    speak.declare_chat(commands)
    analyze.declare_analyze(commands)
    report.declare_report(commands)
    push.declare_push(commands)
    env.declare_env(commands)
    return parser
