"""`dora-dist generate` and `dora-dist chat`: a model's own words, in one process and without an engine."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dora_dist.checkpoint import run_folder
from dora_dist.cli.endings import ended_by_signals
from dora_dist.cli.options import DTYPES, Commands, add_plugins, declare, positive
from dora_dist.runtime import plugins
from dora_dist.runtime.console import note, visible
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import disk_errors

_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_FORMATS = ("instruction", "alpaca", "completion", "messages")


def declare_generate(commands: Commands) -> None:
    command = declare(
        commands,
        "generate",
        _generate,
        summary="let a model answer prompts, rendered as in its training",
        example='dora-dist generate runs/mine --prompt "Is water wet?"\n'
        "          dora-dist generate runs/mine --file prompts.jsonl --output answers.jsonl",
    )
    _add_model(command)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt", metavar="TEXT", help="one prompt, whose answer is written as it comes; - reads it from stdin"
    )
    what.add_argument(
        "--file",
        metavar="FILE",
        help="prompts: any file of records as in training, their answers not needed, or with "
        '{"prompt": TEXT}; or a .txt with one prompt a line',
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="JSONL with an answer a line (default: stdout)")
    command.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="prompts of a file at a time (%(default)s)"
    )
    command.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts of the file")
    _add_asking(command)


def declare_chat(commands: Commands) -> None:
    command = declare(
        commands,
        "chat",
        _chat,
        summary="talk with a model in the terminal, each turn rendered as in its training",
        example="dora-dist chat runs/mine",
    )
    _add_model(command)
    _add_asking(command)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="MODEL", help="run folder, checkpoint, adapter folder, model folder or hub name"
    )


def _add_asking(command: argparse.ArgumentParser) -> None:
    command.add_argument("--system", metavar="TEXT", help="the system turn of a chat")
    command.add_argument("--image", nargs="+", default=[], metavar="FILE", help="pictures that a LLaVA is asked about")
    command.add_argument(
        "--format",
        choices=_FORMATS,
        help="how prompts are rendered, as data.format (default: the run's, else messages if the tokenizer has a chat "
        "template, else completion)",
    )
    command.add_argument(
        "--chat-template",
        choices=("vicuna_v1", "plain", "model"),
        help="the same for a LLaVA, as data.chat_template (default: the run's)",
    )
    command.add_argument(
        "--base", metavar="MODEL", help="base model folder or hub name of an adapter (default: the run's own)"
    )
    command.add_argument("--dtype", choices=DTYPES, help="number format (default: bf16; a LLaVA's run's)")
    add = command.add_argument
    add("--max-new-tokens", type=positive, default=512, metavar="N", help="longest answer (%(default)s tokens)")
    add("--temperature", type=float, metavar="T", help="draw tokens: below 1 likelier ones (default: the likeliest, 0)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this probability together")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--repetition-penalty", type=float, metavar="F", help="above 1: what was said becomes less likely")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn (%(default)s)")
    add_plugins(command)


def _speaker(options: argparse.Namespace, command: str) -> tuple[Any, Any]:
    """The model, not loaded yet, and how tokens are chosen."""
    plugins.load(options.plugins, "--plugins")
    from dora_dist.evaluation.speaking import Sampling, Speaker

    sampling = Sampling(**{name: getattr(options, name) for name in _SAMPLING})
    if (choice := run_folder.chosen(Path(options.model))) is not None:
        note(f"the model is {choice.told(command)}")
    how = {name: getattr(options, name) for name in ("base", "format", "chat_template", "dtype")}
    return Speaker(options.model, **how), sampling


def _generate(options: argparse.Namespace) -> None:
    prompts = _read(options)  # first: what is wrong with them is found before torch is loaded
    speaker, sampling = _speaker(options, "generate {} ...")
    from dora_dist.evaluation.generate import answered, as_record, made_prompts

    if options.file is None:
        _answer_one(options, speaker, sampling, prompts[0][1])
        return
    if options.image:
        raise UserError('--image: is for --prompt; give each record of --file its own "image"')
    made = made_prompts(speaker, prompts, options.system)
    with _lines_into(options.output) as write, ended_by_signals("the model has not answered all prompts"):
        speaker.load()
        answers = answered(speaker, made, sampling, batch_size=options.batch_size, progress=True)
        for (_, given), prompt, answer in zip(prompts, made, answers, strict=True):
            write({**(given if isinstance(given, dict) else {}), **as_record(prompt, answer)})


def _answer_one(options: argparse.Namespace, speaker: Any, sampling: Any, said: Any) -> None:
    from dora_dist.evaluation.generate import as_record
    from dora_dist.tasks.prompting.base import Picture

    pictures = [Picture(path) for path in options.image]
    prompting = speaker.prompting
    prompt = prompting.of_turns(prompting.opened(said, options.system, len(pictures)), pictures)
    prompting.room(prompt, sampling.max_new_tokens)
    if options.output is None:
        with ended_by_signals():
            speaker.load()
            speaker.answers([prompt], sampling, write=_as_it_comes)
        _shown("\n")
        return
    with _lines_into(options.output) as write, ended_by_signals():
        speaker.load()
        [answer] = speaker.answers([prompt], sampling)
        write(as_record(prompt, answer))


def _as_it_comes(text: str) -> None:
    _shown(visible(text) if sys.stdout.isatty() else text)


def _shown(text: str) -> None:
    print(text, end="", flush=True)


def _read(options: argparse.Namespace) -> Sequence[tuple[str, str | Mapping[str, Any]]]:
    """The prompts with their places. Raises UserError."""
    from dora_dist.data.records import read_records

    if options.prompt is not None:
        said = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
        if not said.strip():
            raise UserError("--prompt: is empty; give what to ask")
        return [("--prompt", said)]
    if not options.file.endswith(".txt"):
        return list(read_records([options.file], {}))[: options.limit]
    try:
        lines = Path(options.file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--file {options.file}: cannot be read as text ({error}); give another file") from error
    found = [(f"{options.file}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"--file {options.file}: holds no prompts; write one on each line")
    return found[: options.limit]


@contextmanager
def _lines_into(output: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield what writes a record as a line of JSON to stdout, or to a file that becomes `output` at the end.

    What was written before an interruption or an error is kept beside `output`, and its place said. Raises UserError
    at once for a file that cannot be written.
    """
    if output is None:
        yield lambda record: _shown(_as_line(record))
        return
    partial, count = output.with_name(f"{output.name}.partial"), 0

    def write(record: Mapping[str, Any]) -> None:
        nonlocal count
        with disk_errors(output):
            file.write(_as_line(record))
            file.flush()
        count += 1

    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; name a file")
    with disk_errors(output):
        file = partial.open("w", encoding="utf-8")
    try:
        with file:
            yield write
        with disk_errors(output):
            partial.replace(output)
    except BaseException:
        if count:
            note(f"the first {count:,} answers are in {partial}")
        else:
            partial.unlink(missing_ok=True)
        raise


def _as_line(record: Mapping[str, Any]) -> str:
    """JSON; of what it has no form for, such as a date of a Parquet file, the text. Half a character is escaped."""
    line = json.dumps(record, ensure_ascii=False, default=str) + "\n"
    return line.encode(errors="backslashreplace").decode()


def _chat(options: argparse.Namespace) -> None:
    speaker, sampling = _speaker(options, "chat {}")
    from dora_dist.cli.chat import Chat

    chat = Chat(speaker, sampling, options.system, options.image)
    with ended_by_signals("the conversation is not kept"):
        speaker.load()
        chat.run()
