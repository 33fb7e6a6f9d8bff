"""Records of VL-BART's tasks about pictures and videos of one colour each, and their features."""

import itertools
import json
from pathlib import Path
from typing import Any

import h5py
import numpy

from dora_dist.data.subtasks import SUBTASKS

WIDTH = 7
COLOURS = ("red", "green", "blue", "white")
OPTIONS = ("a red one", "a green one", "a blue one", "a white one")
PICTURES = ("vqa", "gqa", "nlvr2", "caption")
VIDEOS = ("tvqa", "how2qa", "tvc", "yc2c")


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def record(task: str, i: int) -> dict[str, Any]:
    """The i-th record of a task, with the fields that the authors' files have."""
    seen, other = colour(i), colour(i + 1)
    second = i if i % 8 < 4 else i + 1
    answers = {f"a{number}": text for number, text in enumerate(OPTIONS)}
    asked = {"vid_name": f"v{i}", "ts": [i, i + 2.5], "q": "what was it?", "answer_idx": i % 4, **answers}
    described = {"vid_name": f"v{i}", "ts": f"{i}-{i + 2}", "sub": [{"text": "look here"}]}
    question = {"img_id": f"p{i}", "question_id": i, "sent": "what colour is it?", "label": {other: 0.3, seen: 1.0}}
    pair = {"img0": f"p{i}", "img1": f"p{second}", "sent": "both have one colour", "label": int(second == i)}
    made: dict[str, dict[str, Any]] = {
        "vqa": question,
        "gqa": {
            **question,
            "sent": f"is it {seen if i % 8 < 4 else other}?",
            "label": {"yes" if i % 8 < 4 else "no": 1},
        },
        "nlvr2": pair,
        "caption": {"filename": f"p{i}.jpg", "sentences": [{"raw": f"a {seen} thing"}, {"raw": f"it is {seen}"}]},
        "tvqa": {**asked, "subtitles": "look here"},
        "how2qa": asked,
        "tvc": {**described, "descs": [{"desc": f"it is {seen}"}, {"desc": f"a {seen} thing"}]},
        "yc2c": {**described, "descs": [{"desc": f"it is {seen}"}]},
    }
    return made[task]


def write(folder: Path, count: int, tasks: tuple[str, ...] = PICTURES, *, first: int = 0) -> dict[str, str]:
    """Files `{task}-{first}.json` of `count` records for each task; returns them by task, as data.train names them."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for task in tasks:
        file = folder / f"{task}-{first}.json"
        file.write_text(json.dumps([record(task, i) for i in range(first, first + count)]))
        found[task] = str(file)
    return found


def features(folder: Path, count: int, *, regions: int = 49, width: int = WIDTH) -> Path:
    """Features of `count` pictures and videos; returns the folder.

    pictures.h5: one file; pictures: a folder of ID.h5, and videos: of ID.npz, as VL-BART's authors have them.
    """
    generator = numpy.random.default_rng(0)
    prototypes = 3 * generator.normal(size=(len(COLOURS), width))

    def some(i: int, length: int) -> Any:
        return (prototypes[i % len(COLOURS)] + generator.normal(size=(length, width)) / 4).astype(numpy.float16)

    for kind in ("pictures", "videos"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "pictures.h5", "w") as file:
        for i in range(count):
            file[f"p{i}/features"] = some(i, regions)
            with h5py.File(folder / "pictures" / f"p{i}.h5", "w") as own:
                own[f"p{i}/features"] = file[f"p{i}/features"][()]
    for i in range(count):
        numpy.savez(folder / "videos" / f"v{i}.npz", features=some(i, 3 + i % 5))
    return folder


def section(folder: Path, train: dict[str, str], **fields: Any) -> dict[str, Any]:
    """A data section over what `write` and `features` have made."""
    places = {task: str(folder / ("pictures.h5" if task in PICTURES else "videos")) for task in train}
    data = {"train": train, "format": "vision_text", "features": places, "cutoff_len": 64, "target_len": 12}
    return {**data, "cache": None, **fields}


def texts() -> list[str]:
    """All that a tokenizer should know."""
    said = []
    for task, i in itertools.product((*PICTURES, *VIDEOS), range(8)):
        asked = SUBTASKS[task].read(record(task, i))
        said += [SUBTASKS[task].prompted(asked, None).text, *(text for text, _ in asked.targets)]
    return [*said, "gqa: [Subs] look here", "true false yes no", *OPTIONS]
