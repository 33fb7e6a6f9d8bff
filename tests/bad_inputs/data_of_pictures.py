"""Records about pictures, and features of them, that cannot be meant, or probably are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py

from dora_dist.runtime.exit_codes import DONE, USERS_MISTAKE
from tests import subtasks, summaries
from tests.bad_inputs.case import Folder, Table, Words
from tests.bad_inputs.records import Fields, Says, add, add_of_task, lines

CASES = Table()

# ---------------------------------------------------------------------------------------- talk about pictures

PICTURED = {
    "image": "a/0-red.jpg",
    "conversations": [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "true"}],
}
LLAVA: Fields = {"format": "llava", "image_folder": "pictures", "loss_on": "answer", "cutoff_len": 256}


def pictured(name: str, says: str, *turns: Any, code: int = USERS_MISTAKE, **fields: Any) -> None:
    """A good conversation about a picture and one with these turns and fields."""
    talk = {"conversations": [{"from": who, "value": text} for who, text in turns]} if turns else {}
    row = {"id": 2, **PICTURED, **talk, **fields}
    add_of_task(CASES, name, [PICTURED, row], says, model={"task": "image_text_to_text"}, code=code, **LLAVA)


pictured(
    "missing_picture",
    "a.jsonl, line 2 (id 2): picture pictures/a/9.png does not exist (1 pictures are missing in all)",
    image="a/9.png",
)
pictured(
    "picture_elsewhere", "a.jsonl, line 2 (id 2): \"image\": '../a.png' leaves data.image_folder", image="../a.png"
)
pictured(
    "picture_of_no_name", 'a.jsonl, line 2 (id 2): "image" must be the path of a picture, or a list of paths', image=3
)
pictured(
    "mark_without_picture",
    'a.jsonl, line 2 (id 2): has 1 <image> in its text and 0 pictures in "image"; give one for each',
    image=None,
)
pictured(
    "picture_without_mark",
    'a.jsonl, line 2 (id 2): has 0 <image> in its text and 1 pictures in "image"',
    ("human", "red?"),
    ("gpt", "true"),
)
pictured(
    "unknown_speaker",
    "a.jsonl, line 2 (id 2): turn 2 is from 'assistant'; known speakers are human, gpt",
    ("human", "<image>"),
    ("assistant", "true"),
)
pictured(
    "twice_in_a_row",
    'a.jsonl, line 2 (id 2): "conversations" has two turns of the user in a row',
    ("human", "<image>"),
    ("human", "red?"),
    ("gpt", "true"),
)
pictured(
    "number_said",
    'a.jsonl, line 2 (id 2): turn 2 must be an object with the strings "from" and "value"',
    ("human", "<image>"),
    ("gpt", 3),
)
pictured("no_question", "a.jsonl, line 2 (id 2): has no question with an answer", ("human", "<image>"))
pictured(
    "nothing_said",
    "data.train: what gpt says of 1 of 2 records is empty (first: a.jsonl, line 2 (id 2))",
    ("human", "<image>"),
    ("gpt", ""),
    code=DONE,
)
pictured(
    "control_tokens_said",
    "the text of 1 of 2 records holds special tokens (</s>; first: a.jsonl, line 2 (id 2))",
    ("human", "<image>"),
    ("gpt", "a </s>"),
    code=DONE,
)


# ----------------------------------------------------------------------------------------------- visual features


def visual(
    name: str,
    says: Says,
    *,
    change: Fields | None = None,
    pictures: int = 4,
    spoil: Callable[[Path], Any] = lambda file: None,
    model: Fields | None = None,
    **data: Any,
) -> None:
    """Four questions about pictures, the third changed, with features of some pictures whose file is spoilt."""

    def make(folder: Folder) -> Words:
        base = folder.made("bart", summaries.base_model)
        subtasks.features(folder.path, pictures)
        spoil(folder / "pictures.h5")
        rows = [subtasks.record("vqa", i) for i in range(4)]
        rows[2] |= change or {}
        folder.text("a.jsonl", lines(*rows))
        fields = {"train": {"vqa": "a.jsonl"}, "format": "vision_text", "features": "pictures.h5"}
        return folder.run(
            model={"path": base.name, "task": "vision_seq2seq_lm", "feature_dim": subtasks.WIDTH, **(model or {})},
            adapter={"target_modules": None},
            data={**fields, "validation_samples": 0, "cutoff_len": 40, "target_len": 12, **data},
            training={"global_batch_size": 2},
        )

    add(CASES, name, make, says, USERS_MISTAKE)


def _with_nan(file: Path) -> None:
    with h5py.File(file, "a") as opened:
        for picture in opened.values():
            picture["features"][:] = float("nan")


visual("features_missing", ("a.jsonl, line 4: there are no features of 'p3' in", "1 are missing in all"), pictures=3)
visual(
    "features_of_another_width",
    "pictures.h5 has features of width 7, and model.feature_dim is 9",
    model={"feature_dim": 9},
)
visual("features_damaged", "pictures.h5 cannot be read as HDF5", spoil=lambda file: file.write_bytes(b"nothing"))
visual("features_nan", "pictures.h5: the features of 'p0' hold NaN or infinity; extract them again", spoil=_with_nan)
visual("features_nowhere", 'data.features = "other.h5": no such file or folder', features="other.h5")
visual("question_without_picture", 'a.jsonl, line 3: as a record of vqa, has no "img_id"', change={"img_id": None})
visual("task_unknown", 'data.train: "okvqa" is not a task of vision_text records', train={"okvqa": "a.jsonl"})
