"""What the tables of data share: runs over records, refused in training or warned of when they are looked at."""

import json
from collections.abc import Callable
from typing import Any

from dora_dist.runtime.exit_codes import DONE, USERS_MISTAKE
from tests import encoders, llava, summaries
from tests.bad_inputs.case import Case, Folder, Table, Words

BOTH = (1, 2)
Fields = dict[str, Any]
Says = str | tuple[str, ...]


def validated(folder: Folder, **sections: Fields) -> Words:
    """The data of a run looked at, without the run."""
    folder.run(**sections)
    return ["validate", "config.json", "--data"]


def lines(*rows: Any) -> str:
    """A JSONL file of rows, those that are text as they are."""
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def add(table: Table, name: str, make: Callable[[Folder], Words], says: Says, code: int) -> None:
    """A row: on 1 and 2 ranks if it is refused, else where it is looked at."""
    table.append(Case(name, make, (says,) if isinstance(says, str) else says, code, (1,) if code == DONE else BOTH))


def refused(table: Table, name: str, file: str, content: str | bytes, says: Says, **fields: Any) -> None:
    """A file that training on 1 and 2 ranks must refuse."""

    def make(folder: Folder) -> Words:
        folder.text(file, content)
        return folder.run(data={"train": file, "validation_samples": 0, "loss_on": "answer", **fields})

    add(table, name, make, says, USERS_MISTAKE)


def add_of_task(
    table: Table, name: str, rows: list[Any], says: Says, *, model: Fields, code: int = USERS_MISTAKE, **data: Any
) -> None:
    """Records for another task: refused in training, or warned of when they are looked at."""

    def make(folder: Folder) -> Words:
        task = model["task"]
        base = {
            "seq2seq_lm": lambda: folder.made("bart", summaries.base_model),
            "image_text_to_text": lambda: folder.made("llava", llava.model),
        }.get(task, lambda: folder.made("bert", encoders.plain_encoder))()
        if task == "image_text_to_text":
            llava.pictures(folder / "pictures", 2)
        folder.text("a.jsonl", lines(*rows))
        sections: dict[str, Fields] = {
            "model": {"path": base.name, **model},
            "adapter": {"target_modules": None},
            "data": {"train": "a.jsonl", "validation_samples": 0, "cutoff_len": 48, **data},
            "training": {"global_batch_size": 2},
        }
        return validated(folder, **sections) if code == DONE else folder.run(**sections)

    add(table, name, make, says, code)
