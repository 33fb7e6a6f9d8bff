"""Texts with visual features of several tasks: samples, epochs of batches of one task each, loss, what is refused."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import pytest
import torch
import torch.nn.functional as F

from dora_dist.checkpoint.resuming import located
from dora_dist.config import DataConfig, RunConfig, TrainingConfig
from dora_dist.data import (
    FILLER,
    EpochBatches,
    RaggedDataset,
    TokenizedData,
    VisionCollator,
    VisionReader,
    read,
    text_filler,
    warn_of_the_whole,
)
from dora_dist.data.collate import Collator
from dora_dist.data.features import FRAMES, REGIONS
from dora_dist.data.sampler import batches_of, subtask_order
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import TASKS, problems
from dora_dist.tasks.objectives.vision import VisionWriting
from dora_dist.training.loaders import on_device
from tests import subtasks, summaries, vl_bart
from tests.conftest import ROOT

TEXT = summaries.tokenizer(subtasks.texts(), size=500)
ALL = (*subtasks.PICTURES, *subtasks.VIDEOS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return subtasks.features(tmp_path_factory.mktemp("vision"), 14)


def load(folder: Path, tasks: tuple[str, ...] = ALL, count: int = 12, **fields: Any) -> TokenizedData:
    data = DataConfig(**subtasks.section(folder, subtasks.write(folder, count, tasks), **fields))
    return read(VisionReader(data, TEXT), data, seed=0, progress=False)


def decoded(ids: list[int]) -> str:
    return TEXT.decode(ids, skip_special_tokens=True)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_texts_targets_and_features(folder: Path) -> None:
    train = load(folder).train
    assert len(train) == 12 * len(ALL)
    first = {task: train[i * 12 + 1] for i, task in enumerate(ALL)}
    assert decoded(first["vqa"]["input_ids"]) == "vqa: what colour is it?"
    assert first["vqa"]["input_ids"] == TEXT("vqa: what colour is it?").input_ids
    assert (decoded(first["vqa"]["labels"]), first["vqa"]["score"]) == ("green", 1.0)
    assert decoded(first["gqa"]["input_ids"]) == "gpa: is it green?"
    asked = "[Subs] look here [Q] what was it? [TS] ([1, 3.5]) [Choices] a0: a red one. a1"
    assert decoded(first["tvqa"]["input_ids"]).startswith(asked)
    assert decoded(first["tvqa"]["input_ids"]).endswith(" tvqa: ") and decoded(first["tvqa"]["labels"]) == "a1"
    assert [len(visual.features) for visual in first["nlvr2"]["visual"]] == [REGIONS, REGIONS]
    [frames] = first["tvc"]["visual"]
    assert frames.features.shape == (FRAMES, subtasks.WIDTH) and not frames.features[4:].any()
    other = train[1 + len(train)]  # its second target
    assert (decoded(other["labels"]), other["score"]) == ("blue", 0.3)
    with pytest.raises(IndexError):
        train[1 + 2 * len(train)]


def test_a_long_text_loses_its_subtitles_first_and_its_prompt_never(folder: Path) -> None:
    record = subtasks.record("tvqa", 1) | {"subtitles": "look here " * 30}
    file = folder / "long.json"
    file.write_text(json.dumps([record]))
    whole = TEXT("[Subs]" + " look here" * 30 + " [Q] what was it?", verbose=False).input_ids
    data = DataConfig(**subtasks.section(folder, {"tvqa": str(file)}))
    found = read(VisionReader(data, TEXT), data, seed=0, progress=False)
    ids = found.train[0]["input_ids"]
    assert len(ids) == 64 and ids[0] == TEXT.bos_token_id and ids[-1] == TEXT.eos_token_id
    assert decoded(ids).startswith("[Subs] look here") and ids[:8] == whole[:8]
    assert decoded(ids).endswith(
        " [Q] what was it? [TS] ([1, 3.5]) "
        "[Choices] a0: a red one. a1: a green one. a2: a blue one. a3: a white one. tvqa: "
    )
    assert found.train_stats.truncated == 1 and "cut" in found.train.preview(0).facts
    cut = DataConfig(**subtasks.section(folder, {"tvqa": str(file)}, cutoff_len=12))
    short = read(VisionReader(cut, TEXT), cut, seed=0, progress=False).train[0]["input_ids"]
    assert len(short) == 12 and decoded(short).strip().startswith("[Q] what") and short[-1] == TEXT.eos_token_id
    assert decoded(short).endswith("tvqa: ")
    small = DataConfig(
        **subtasks.section(folder, {"tvqa": str(file)}, cutoff_len=8, prompts={"tvqa": "so it goes " * 4})
    )
    with pytest.raises(UserError, match=r"data.cutoff_len = 8: the prompt of tvqa alone is \d+ tokens; raise it"):
        read(VisionReader(small, TEXT), small, seed=0, progress=False)


def test_each_task_is_cut_at_its_own_lengths_and_warned_of_by_itself(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"cutoff_len": {"vqa": 64, "nlvr2": 8, "caption": 20}, "target_len": {"vqa": 12, "nlvr2": 2, "caption": 4}}
    file = folder / "sentences.json"
    rows = [subtasks.record("nlvr2", i) | {"sent": "both have one colour" + " indeed" * (i < 2)} for i in range(12)]
    file.write_text(json.dumps(rows))
    sources = {**subtasks.write(folder, 12, ("vqa", "caption")), "nlvr2": str(file)}
    data = DataConfig(**subtasks.section(folder, sources, **limits))
    assert (data.longest_text, data.longest_target) == (64, 12)
    found = read(VisionReader(data, TEXT), data, seed=0, progress=False)
    texts = {len(found.train[i]["input_ids"]) for i in range(24, 36)}
    assert texts == {8} and decoded(found.train[24]["input_ids"]) == "nlvr: both have one colour"
    caption = TEXT("a red thing").input_ids
    assert len(caption) == 5 and found.train[12]["labels"] == [*caption[:3], TEXT.eos_token_id]
    cuts = {cut.what: (cut.cut, cut.of, cut.limit) for cut in found.train_stats.cuts}
    assert cuts["texts of vqa"] == (0, 12, "data.cutoff_len = 64 tokens") and cuts["targets of vqa"][0] == 0
    assert cuts["texts of nlvr2"] == (2, 12, "data.cutoff_len = 8 tokens")
    assert cuts["targets of caption"] == (24, 24, "data.target_len = 4 tokens")
    assert found.train_stats.truncated == 2 < 0.1 * len(found.train) and "vqa cut" not in str(found.train_stats)
    assert ", 2 texts of nlvr2 cut at cutoff_len = 8 tokens" in str(found.train_stats)
    assert found.train_stats.figures()["  texts of nlvr2 cut at cutoff_len = 8 tokens"] == "2"
    warn_of_the_whole(data, found)
    said = capsys.readouterr().err
    assert "data.train: 2 of 12 texts of nlvr2 (17%) are longer than data.cutoff_len = 8 tokens and lose" in said
    assert "24 of 24 targets of caption (100%) are longer than data.target_len = 4 tokens" in said and "vqa" not in said


def test_records_are_held_out_cached_and_known_by_all_their_columns(folder: Path, tmp_path: Path) -> None:
    data = load(folder, ("vqa", "tvc"), validation_samples=5)
    assert (len(data.train), len(data.validation)) == (19, 5)
    assert not {*data.train.index.tolist()} & {*data.validation.index.tolist()}
    cached = [load(folder, ("vqa", "tvc"), cache=str(tmp_path)) for _ in range(2)]
    assert (
        cached[0].train.fingerprint()
        == cached[1].train.fingerprint()
        == load(folder, ("vqa", "tvc")).train.fingerprint()
    )
    assert load(folder, ("gqa", "tvc")).train.fingerprint() != cached[0].train.fingerprint()
    assert load(folder, ("gqa",), prompts={"gqa": "gqa: "}).train[0]["input_ids"] == TEXT("gqa: is it red?").input_ids
    # The same file as another task.
    file = subtasks.write(folder, 12, ("vqa",))["vqa"]
    other = DataConfig(**subtasks.section(folder, {"gqa": file}, cache=str(tmp_path)))
    assert (
        read(VisionReader(other, TEXT), other, seed=0, progress=False).train[0]["input_ids"][:3]
        != cached[0].train[0]["input_ids"][:3]
    )


def test_previews_show_a_sample_of_each_task(folder: Path) -> None:
    train = load(folder).train
    assert list(train.shown()) == [f"first {task}" for task in ALL]
    found = train.preview(train.shown()["first vqa"])
    assert found.facts == {"task": "vqa", "features 1": "p0 (36, 7)"}
    assert [part.name for part in found.parts] == ["text", "target, score 1", "target, score 0.3"]
    stats = load(folder).train_stats
    assert {name: subset.samples for name, subset in stats.each.items()} == dict.fromkeys(ALL, 12)
    assert stats.targets == 12 * (2 + 1 + 1 + 2 + 1 + 1 + 2 + 1)
    assert stats.figures()["  vqa"] == "12" and "96 samples (12 vqa, 12 gqa" in str(stats)


def test_batches_are_padded_with_masks(folder: Path) -> None:
    train = load(folder, ("nlvr2", "tvc")).train
    collate = VisionCollator(Collator(1), subtasks.WIDTH)
    batch = collate([train[4], train[13], text_filler(1)])
    assert batch["visual_features"].shape == (3, 72, 7) and batch["visual_boxes"].shape == (3, 72, 4)
    assert torch.equal(batch["visual_images"][0], torch.tensor([0] * 36 + [1] * 36))
    assert torch.equal(batch["visual_objects"][0], torch.arange(36).repeat(2))
    assert torch.equal(batch["visual_features"][0, 36:], train[4]["visual"][1].features)
    # The zeros behind a short video's 4 frames are read as frames are.
    assert batch["visual_mask"].sum(1).tolist() == [72, FRAMES, 0] and not batch["visual_features"][1, 4:].any()
    assert batch["scores"].tolist() == [1, 1, 0] and batch["labels"][2].unique().tolist() == [-100]
    assert collate([text_filler(1)])["visual_mask"].tolist() == [[0]]


def test_features_that_cannot_be_read_later_are_a_problem_of_their_sample(folder: Path, tmp_path: Path) -> None:
    place = subtasks.features(tmp_path / "features", 3)
    data = DataConfig(**subtasks.section(place, subtasks.write(tmp_path, 3, ("vqa",))))
    train = read(VisionReader(data, TEXT), data, seed=0, progress=False).train
    with h5py.File(place / "pictures.h5", "a") as file:
        file["p1/features"][:] = float("nan")
    assert train[0]["score"] == 1.0
    batch = VisionCollator(Collator(1), subtasks.WIDTH)([train[0], train[1]])
    assert batch["labels"][1].unique().tolist() == [-100] and batch["scores"][1] == 0
    [problem] = batch["problems"]
    assert "vqa-0.json, record 2: " in problem and "the features of 'p1' hold NaN" in problem


@pytest.mark.parametrize("width", [1, 9])
def test_features_of_another_width_are_a_problem_of_their_sample(width: int, tmp_path: Path) -> None:
    place = subtasks.features(tmp_path / "features", 3)
    with h5py.File(place / "pictures.h5", "a") as file:
        del file["p1/features"]
        file["p1/features"] = torch.ones(36, width).numpy()
    train = load(place, ("vqa",), count=3).train
    batch = VisionCollator(Collator(1), subtasks.WIDTH)([train[0], train[1]])
    [problem] = batch["problems"]
    assert f"record 2: {place}/pictures.h5: the features of 'p1' are of width {width}, and those of" in problem
    assert batch["labels"][1].unique().tolist() == [-100] and not batch["visual_mask"][1].any()


def test_validation_files_have_the_width_of_the_training_files(folder: Path, tmp_path: Path) -> None:
    wide = subtasks.features(tmp_path, 4, width=9)
    held_out = subtasks.write(tmp_path, 4, ("tvc",))
    places = {"vqa": str(folder / "pictures.h5"), "tvc": str(wide / "videos")}
    with pytest.raises(UserError, match=r'data.features, "tvc": .*videos has features of width 9, and those of .* 7'):
        load(folder, ("vqa",), features=places, validation=held_out, validation_samples=0)


@pytest.mark.parametrize("layout", ["pictures.h5", "pictures"])
def test_data_are_others_where_features_were_extracted_in_another_way(layout: str, tmp_path: Path) -> None:
    place = subtasks.features(tmp_path / "features", 40)

    def fingerprint() -> str:
        return load(place, ("vqa",), count=40, features=str(place / layout)).train.fingerprint()

    found = [fingerprint()]
    if layout == "pictures":
        (place / layout / "extraction.json").write_text('{"layer": -2}')
    else:
        with h5py.File(place / layout, "a") as file:
            file.attrs["extraction"] = '{"layer": -2}'
    found.append(fingerprint())
    for id in ("p0", "p20"):  # of 16 that are looked at
        with h5py.File(place / layout / f"{id}.h5" if layout == "pictures" else place / layout, "a") as file:
            file[f"{id}/features"][0, 0] += 1
        found.append(fingerprint())
    assert len({*found}) == 4 and fingerprint() == found[-1]


def test_first_features_that_cannot_be_read_can_be_left_out(tmp_path: Path) -> None:
    place = subtasks.features(tmp_path / "features", 3)
    with h5py.File(place / "pictures.h5", "a") as file:
        file["p0/features"][:] = float("nan")
    with pytest.raises(UserError, match="the features of 'p0' hold NaN"):
        load(place, ("vqa",), count=3)
    train = load(place, ("vqa",), count=3, bad_images="skip").train
    assert "problem" in train[0] and train[1]["visual"][0].features.shape == (36, 7)


# --- an epoch ---------------------------------------------------------------------------------------------------------


def epoch(train: Any, batch: int, seed: int = 7) -> list[list[int]]:
    order = train.epoch_order(seed, batch)
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def test_every_batch_is_of_one_task_and_an_epoch_has_every_sample(folder: Path) -> None:
    train = load(folder).train
    batches = epoch(train, 5)
    kinds = train.table["subtasks"]
    visited = Counter(place for part in batches for place in part if place != FILLER)
    for part in batches:
        assert len({int(kinds[place % len(train)]) for place in part if place != FILLER}) == 1
    targets = train.table["sample targets"].diff()
    for i in range(len(train)):
        variants = sorted(place // len(train) for place in visited.elements() if place % len(train) == i)
        task = ALL[int(kinds[i])]
        assert len(variants) == 1 if task in ("vqa", "gqa") else variants == list(range(int(targets[i])))
    assert train.parts == {
        "vqa": 12,
        "gqa": 12,
        "nlvr2": 12,
        "caption": 24,
        "tvqa": 12,
        "how2qa": 12,
        "tvc": 24,
        "yc2c": 12,
    }
    assert len(batches) == batches_of(train.parts.values(), 5) == 6 * 3 + 2 * 5
    order = [int(kinds[part[0] % len(train)]) for part in batches]
    assert order != sorted(order) and epoch(train, 5) == batches and epoch(train, 5, seed=8) != batches


@pytest.mark.parametrize(("world", "micro"), [(2, 3), (3, 2), (4, 1)])
def test_ranks_share_an_epoch_whatever_their_number(world: int, micro: int, folder: Path) -> None:
    train = load(folder, ("vqa", "nlvr2", "tvc")).train
    expected = [sorted(part) for part in epoch(train, 5, seed=3 * 1_000_003)]
    steps: list[list[int]] = [[] for _ in expected]
    for rank in range(world):
        sampler = EpochBatches(
            len(train),
            global_batch_size=5,
            micro_batch_size=micro,
            world_size=world,
            rank=rank,
            seed=3,
            order=train.epoch_order,
            parts=train.parts.values(),
        )
        mine = list(sampler)
        assert len(mine) == len(sampler)
        each = len(mine) // len(expected)
        for i, places in enumerate(mine):
            steps[i // each] += places
    found = [[place for place in sorted(step) if place != FILLER] for step in steps]
    assert found == [[place for place in step if place != FILLER] for step in expected]


def test_answers_are_drawn_by_their_scores() -> None:
    count = 3
    scores = torch.tensor([1.0, 0.3, 0.7, 0.0, 0.0, 0.5, 0.5])  # of samples with 3, 2 and 2 answers
    starts = torch.tensor([0, 3, 5, 7])
    drawn = torch.ones(count, dtype=torch.bool)
    zeros = torch.zeros(count, dtype=torch.int64)
    chosen = [Counter[int]() for _ in range(count)]
    for seed in range(4000):
        for place in subtask_order(zeros, zeros, scores, starts, drawn, seed, 3):
            chosen[place % count][place // count] += 1
    for answer, share in enumerate((0.5, 0.15, 0.35)):
        assert chosen[0][answer] / 4000 == pytest.approx(share, abs=0.03)
    assert chosen[1] == {0: 4000} and chosen[2][0] / 4000 == pytest.approx(0.5, abs=0.03)


# --- the loss ---------------------------------------------------------------------------------------------------------


class Written:
    """What `VisionWriting` asks of a model before it runs one."""

    def __init__(self) -> None:
        from transformers import GenerationConfig

        self.config = SimpleNamespace(feature_dim=subtasks.WIDTH)
        self.generation_config = GenerationConfig()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return labels.clamp(min=0).roll(1, 1)


def test_the_loss_is_the_mean_of_scores_times_mean_token_losses(folder: Path) -> None:
    train = load(folder, ("vqa", "caption")).train
    aim = VisionWriting(TEXT, Written(), 12, 1)
    places = [0, 1 + len(train), 12, 13 + len(train)]
    batch = aim.collator([*(train[place] for place in places), aim.filler])
    labels = batch["labels"]
    logits = torch.randn(*labels.shape, len(TEXT), generator=torch.Generator().manual_seed(0))
    counted = aim.counted(batch)["labels"]
    assert int((counted != -100).sum()) == 4
    batch = aim.prepared(batch)
    assert "scores" not in batch
    expected = 0.0
    for row, score in enumerate((1.0, 0.3, 1.0, 1.0)):
        tokens = labels[row][labels[row] != -100]
        rows = logits[row, : len(tokens)].double().log_softmax(-1)
        expected += score * -sum(float(rows[i, token]) for i, token in enumerate(tokens)) / len(tokens)
    found = aim.loss(SimpleNamespace(logits=logits), labels, torch.tensor(4))
    assert float(found) == pytest.approx(expected / 4, rel=1e-6)
    assert float(found) != pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), labels.flatten())), rel=1e-3)


def test_scores_and_boxes_are_not_rounded_in_bf16(folder: Path) -> None:
    aim = VisionWriting(TEXT, Written(), 12, 1)
    batch = aim.collator([load(folder, ("vqa",)).train[1 + 12]])
    batch["visual_boxes"][:] = torch.tensor([0.001, 0.0, 0.301, 0.7])
    moved = on_device({**batch, "problems": ["x"]}, torch.device("cpu"), torch.bfloat16, exact=aim.exact)
    assert moved["visual_features"].dtype == torch.bfloat16 and moved["input_ids"].dtype == torch.int64
    assert torch.equal(moved["visual_boxes"], batch["visual_boxes"]) and moved["problems"] == ["x"]
    assert moved["scores"].dtype == torch.float32 and float(moved["scores"]) == pytest.approx(0.3, abs=1e-7)


def test_samples_that_cannot_be_read_do_not_count(folder: Path, tmp_path: Path) -> None:
    place = subtasks.features(tmp_path / "features", 6)
    with h5py.File(place / "pictures.h5", "a") as file:
        file["p4/features"][:] = float("nan")
    model = vl_bart.model(vocab_size=len(TEXT))
    aim = VisionWriting(TEXT, model, 12, 1)

    def measured(dataset: Any) -> dict[str, float]:
        samples = [*dataset, aim.filler]
        batches = [aim.collator(samples[i : i + 2]) for i in range(0, len(samples) - 1, 2)]
        with torch.no_grad():
            return aim.evaluate(model, batches, dataset, torch.device("cpu"))

    data = load(place, ("vqa", "caption"), count=6).train
    found = measured(data)
    assert len(aim.problems) == 2 and all("'p4' hold NaN" in problem for problem in aim.problems)
    kept = RaggedDataset(data.reader, data.table, torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 11]))
    assert measured(kept) == pytest.approx(found, rel=1e-5)
    with pytest.raises(UserError, match=r"those of all samples of caption to evaluate on cannot be read \(.*'p4' hold"):
        measured(RaggedDataset(data.reader, data.table, torch.tensor([0, 1, 2, 10])))


# --- what is refused --------------------------------------------------------------------------------------------------

RUN = {"model": {"path": "org/model", "task": "vision_seq2seq_lm"}}
VQA = {"format": "vision_text", "features": "a.h5"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no task": (
        {**VQA, "train": "a.json"},
        {},
        'data.train = "a.json": say which task each file is of, such as {"vqa": "a.json"}',
    ),
    "unknown task": (
        {**VQA, "train": {"okvqa": "a.json"}},
        {},
        'data.train: "okvqa" is not a task of vision_text records',
    ),
    "no features": ({"format": "vision_text", "train": {"vqa": "a.json"}}, {}, "data.features is not set"),
    "features of others": (
        {**VQA, "features": {"gqa": "a.h5"}, "train": {"vqa": "a.json"}},
        {},
        "data.features has none for vqa",
    ),
    "lengths of others": (
        {**VQA, "cutoff_len": {"gqa": 20}, "target_len": {"vqa": 20, "okvqa": 3}, "train": {"vqa": "a.json"}},
        {},
        "data.cutoff_len has none for vqa; give one for each task, or a number for all",
    ),
    "lengths by task of texts": (
        {"format": "alpaca", "train": "a.json", "cutoff_len": {"vqa": 20}},
        {},
        'data.cutoff_len = {"vqa": 20}: records of data.format = "alpaca" are of one kind; give a number',
    ),
    "prompt of none": (
        {**VQA, "train": {"vqa": "a.json"}, "prompts": {"x": "y"}},
        {},
        'data.prompts: "x" is not a task',
    ),
    "metric of another": (
        {**VQA, "train": {"vqa": "a.json"}, "validation_samples": 2},
        {"metric": "gqa_accuracy"},
        'training.metric = "gqa_accuracy": the run is not validated on that task; use vqa_accuracy',
    ),
    "unknown metric": ({**VQA, "train": {"vqa": "a.json"}}, {"metric": "rouge1"}, "use loss, average, vqa_accuracy"),
    "tasks of others": ({"format": "summarisation", "train": {"vqa": "a.json"}}, {}, "are of one kind; give a file"),
    "features of texts": ({"format": "alpaca", "train": "a.json", "features": "a.h5"}, {}, "only for vision_text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_go_together_are_refused(case: str) -> None:
    data, training, message = REFUSED[case]
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict({**RUN, "data": data, "training": training}, rules=problems)
    assert message in str(caught.value)


def test_missing_features_and_widths_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"record 15: there are no features of 'p14' in .*pictures.h5 \(2 are missing"):
        load(folder, ("vqa",), count=16)
    left = load(folder, ("vqa",), count=16, bad_images="skip")
    assert len(left.train) == 14 and left.train_stats.without_features == 2
    wide = subtasks.features(tmp_path, 12, width=9)
    places = {"vqa": str(folder / "pictures.h5"), "tvc": str(wide / "videos")}
    with pytest.raises(
        UserError, match=r'data.features, "tvc": .*videos has features of width 9, and those of .*h5 are of 7'
    ):
        load(folder, ("vqa", "tvc"), features=places)
    train = load(folder, ("vqa",)).train
    train.check_model(model_of())
    with pytest.raises(UserError, match=r"of width 7, and the model reads 2048 .*; set model.feature_dim to 7"):
        train.check_model(model_of(feature_dim=2048))
    pairs = load(folder, ("vqa", "nlvr2")).train
    with pytest.raises(UserError, match=r"nlvr2-0.json, record 1: has 2 pictures, and the model tells 1 apart"):
        pairs.check_model(model_of(images=1))
    train.check_model(model_of(vocab_size=REGIONS))
    with pytest.raises(UserError, match=r"data.features: .* up to 36 features, .* its token table, which has 35"):
        train.check_model(model_of(vocab_size=REGIONS - 1))


def model_of(**changes: int) -> Any:
    return SimpleNamespace(config=vl_bart.config(**changes))


def test_what_is_measured_must_have_validation_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = TASKS["vision_seq2seq_lm"]
    both = load(
        folder, ("vqa", "nlvr2"), validation=subtasks.write(folder, 2, ("vqa",), first=12), validation_samples=0
    )
    message = r"training.metric = \"nlvr2_accuracy\": no validation sample is of that task; .* or use vqa_accuracy"
    with pytest.raises(UserError, match=message):
        task.check_sets(both, TrainingConfig(eval_every=2, metric="nlvr2_accuracy"))
    task.check_sets(both, TrainingConfig(metric="nlvr2_accuracy"))  # nothing is evaluated
    assert not capsys.readouterr().err
    task.check_sets(both, TrainingConfig(eval_every=2, metric="vqa_accuracy"))
    assert "warning: no validation sample is of nlvr2, so nothing is measured of it" in capsys.readouterr().err


def test_sources_by_task_come_from_the_command_line_and_are_written_down_with_their_places() -> None:
    recipe = ROOT / "configs/vlbart_image_lora.json"
    words = ["--data.train", '{"vqa": ["a.json", "b.json"], "nlvr2": "c.json"}', "--data.features=d.h5"]
    config = RunConfig.load(recipe, words, rules=problems)
    assert config.data.train == {"vqa": ["a.json", "b.json"], "nlvr2": "c.json"} and config.data.features == "d.h5"
    written = located(config).data
    assert written.train == {
        "vqa": [str(Path.cwd() / f"{name}.json") for name in "ab"],
        "nlvr2": str(Path.cwd() / "c.json"),
    }
    assert written.features == str(Path.cwd() / "d.h5")
    with pytest.raises(UserError) as caught:
        config.check_files()
    for field, name in (("train", "b.json"), ("features", "d.h5")):
        assert f'data.{field} = "{name}": no such file' in str(caught.value)
