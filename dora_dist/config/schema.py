"""The sections of a run's file: every field with its unit, range, default and meaning.

With the sections in adapter.py, engine.py and outputs.py this is the only description of a run. Command-line options
and their help, the JSON schema for editors, error messages and the reference in the documents are all derived from it.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from dora_dist.config.mixture import Mixture, checked
from dora_dist.config.names import largest
from dora_dist.config.schedules import ScheduleName
from dora_dist.config.section import (
    Count,
    PathsByTask,
    PathText,
    PathTexts,
    Rate,
    Section,
    Steps,
    Text,
    at_most,
    known,
)
from dora_dist.runtime.errors import UserError

Task = Annotated[
    Text,
    known(
        "causal_lm",
        "sequence_classification",
        "question_answering",
        "seq2seq_lm",
        "image_text_to_text",
        "vision_seq2seq_lm",
    ),
]
Format = Annotated[
    Text,
    known(
        "instruction",
        "alpaca",
        "completion",
        "messages",
        "sharegpt",
        "template",
        "classification",
        "squad",
        "summarisation",
        "llava",
        "vision_text",
    ),
]
TextLength = Annotated[int, Field(ge=8)]
TargetLength = Annotated[int, Field(ge=2)]
Metric = Annotated[
    Text,
    known("loss", "accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "rouge1", "rouge2", "rougeL"),
]


class ModelConfig(Section):
    """The frozen base model and its tokenizer."""

    path: PathText = Field(description="Hugging Face model folder (with safetensors), or a hub name")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of the hub name; null: its default branch"
    )
    tokenizer: PathText | None = Field(
        default=None,
        description="Folder, hub name or sentencepiece tokenizer.model file; null: the model's own",
    )
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Number format of the base weights and the arithmetic"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="Attention code that transformers uses; eager for models without sdpa"
    )
    task: Task = Field(
        default="causal_lm",
        description="What the model is for: causal_lm predicts the next token; sequence_classification labels a text, "
        "or rates it; question_answering finds the answer in a text; seq2seq_lm reads a text and writes another; "
        "image_text_to_text predicts the next token of texts with pictures (LLaVA); vision_seq2seq_lm reads a text and "
        "visual features and writes a text, for several tasks at once (VL-BART)",
    )
    num_labels: Count = Field(
        default=2, description="Labels of sequence_classification: 0 up to this number; 1: a rating (regression)"
    )
    feature_dim: Count | None = Field(
        default=None,
        description="Width of the visual features of vision_seq2seq_lm; null: as the base has it, 2048 with a BART",
    )
    storage: str = Field(
        default="plain",
        min_length=1,
        description="How the frozen weights of the layers are held, gathered and multiplied: plain, in model.dtype; "
        "int8, in 8 bits; nf4, in 4 (QLoRA's NormalFloat); plugins may add further ways",
    )
    storage_settings: dict[str, Any] = Field(
        default={},
        description="Of the storage: block_size, numbers that share a scale (64, 128, 256 or 512); nf4 also "
        "double_quant, the scales in 8 bits",
    )
    trust_remote_code: bool = Field(default=False, description="Let the hub repository's own Python code run here")


class DataConfig(Section):
    """What the model learns from."""

    train: PathText | PathTexts | Mixture | PathsByTask = Field(
        description="Training data: a file (.json, .jsonl, .csv, .tsv, also with .gz, or .parquet), or a data set on "
        "the hub or in a folder (name, name:config, name:config:split or name:file), or a list of these, or a list of "
        'sources that are mixed, {"path": ..., "weight": 1, "name": ..., "format": ...}; '
        'vision_text: such a value for each of its tasks, {"vqa": ..., "gqa": ..., "nlvr2": ..., "caption": ..., '
        '"tvqa": ..., "how2qa": ..., "tvc": ..., "yc2c": ...}'
    )
    validation: PathText | PathTexts | PathsByTask | None = Field(
        default=None, description="Validation data, as train (split validation); null: see validation_samples"
    )
    validation_samples: Annotated[int, Field(ge=0), at_most(10**12)] = Field(
        default=0,
        description="Records held out from the training data for validation, where data.validation is null",
    )
    format: Format = Field(
        default="instruction",
        description="Records: instruction (the paper's prompt), alpaca, completion (prompt and completion as they "
        "are), messages and sharegpt (conversations, through the chat template), "
        "template (a prompt of one's own, see prompt_template), "
        "classification (one or two texts and a label), squad (question, "
        "context, answers), summarisation (a document and its summary), llava (conversations with pictures), or "
        "vision_text (VL-BART's tasks on pictures and videos)",
    )
    text_fields: Annotated[list[Text], Field(min_length=1, max_length=2)] = Field(
        default=["text"],
        description="Where a classification record has its text, or its two texts, and a summarisation record its "
        "document",
    )
    label_field: str = Field(
        default="label",
        min_length=1,
        description="Where a classification record has its label, or its rating, and a summarisation record its "
        "summary",
    )
    loss_on: Literal["all", "answer"] = Field(
        default="all",
        description="Tokens that count in the loss: all (prompt and answer, as in the paper), or answer (llava: this "
        "alone)",
    )
    prompt_template: str | None = Field(
        default=None,
        min_length=1,
        description='Text in front of the answer of a template record, with fields of the record by name: "Question: '
        '{question}\\nAnswer: "; a brace itself is written twice',
    )
    answer_field: Text = Field(default="output", description="Where a template record has its answer")
    train_on: Annotated[list[Text], Field(min_length=1)] = Field(
        default=["assistant"],
        description='Roles whose turns are learnt with loss_on "answer" (messages, sharegpt); "weight" or "train" in a '
        "turn says it for that turn alone",
    )
    cutoff_len: Annotated[TextLength | Annotated[dict[Text, TextLength], Field(min_length=1)], at_most(2**30)] = Field(
        default=256,
        description="Longest record in tokens, those of its pictures included (vision_text: of its text alone, a "
        "number or one for each task); longer ones are cut and counted",
    )
    target_len: Annotated[TargetLength | Annotated[dict[Text, TargetLength], Field(min_length=1)], at_most(2**30)] = (
        Field(
            default=64,
            description="Longest summary or answer in tokens, in training and when one is generated (summarisation; "
            "vision_text: a number or one for each task, the largest of which bounds what is generated)",
        )
    )
    doc_stride: Annotated[int, Field(ge=0), at_most(2**30)] = Field(
        default=128,
        description="Tokens that windows of a text share where it is too long to be read at once (squad)",
    )
    packing: bool = Field(
        default=False,
        description="Put several records into one row, kept apart by attention and positions: the same steps, records "
        "and losses with less padding and fewer passes; training.micro_batch_size then counts rows",
    )
    packing_length: Annotated[TextLength, at_most(2**30)] | None = Field(
        default=None,
        description="Most tokens in a row of several records, at least cutoff_len (2048 or more suits a GPU); null: "
        "cutoff_len",
    )
    cache: Text | None = Field(
        default="~/.cache/dora_dist",
        description="Folder for tokenized data: one rank of a node makes it for the others and for later runs; null: "
        "every rank tokenizes for itself",
    )
    features: PathText | PathTexts | PathsByTask | None = Field(
        default=None,
        description="Visual features of vision_text records: an HDF5 file or a folder of ID.h5 (pictures), or a folder "
        "of ID.npz (videos), a list of these, or such a value for each task",
    )
    prompts: dict[Text, str] = Field(
        default={},
        description='Prompts of vision_text tasks where they are others than the authors\' runs have: {"gqa": "gqa: "}',
    )
    image_folder: PathText | None = Field(default=None, description="Where the pictures of llava records are")
    image_aspect_ratio: Literal["pad", "processor"] = Field(
        default="pad",
        description="pad: fill pictures to squares with the processor's mean colour first, as LLaVA-1.5 is trained; "
        "processor: leave their shape to the model's processor",
    )
    max_image_pixels: int = Field(
        default=50_000_000,
        ge=1,
        le=178_956_970,  # where Pillow's own bound is, which is not ours to lift
        description="Largest picture that is decoded, width times height after padding; one that is not padded is at "
        "most 100 times as long as wide",
    )
    streaming: bool = Field(
        default=False,
        description="Read and tokenize training records while the run trains, never all of them at once; "
        "training.max_steps then says how long the run is, and a set that ends begins again",
    )
    shuffle_buffer: Annotated[int, Field(ge=1), at_most(10**8)] = Field(
        default=10_000,
        description="Records that are shuffled at a time with streaming, kept undecoded in memory on each rank, and so "
        "are the files; 1: records come in the order of the files",
    )
    bad_records: Literal["error", "skip"] = Field(
        default="error",
        description="A record that cannot be read (a line that is not JSON) or used (a field that is missing, or of "
        "another type): ends the run, or is left out, counted and warned of; more than 1 in 10 are an error always",
    )
    bad_images: Literal["error", "skip"] = Field(
        default="error",
        description="A picture, or its features, that is missing or cannot be read: ends the run, or its record is "
        "left out and counted",
    )
    chat_template: Literal["vicuna_v1", "plain", "model"] = Field(
        default="vicuna_v1",
        description="Text of llava records: vicuna_v1, plain (pictures and caption), or the model's chat template",
    )
    group_by_modality_length: bool = Field(
        default=True,
        description="Batches of llava records are all with pictures or all without, and go from long records to short",
    )
    num_workers: Annotated[int, Field(ge=0), at_most(1024)] = Field(
        default=0, description="Loader processes per rank; 0: load in the rank itself"
    )

    _sources = field_validator("train", mode="before")(checked)

    @property
    def longest_text(self) -> int:
        """The largest cutoff_len of all tasks, in tokens."""
        return largest(self.cutoff_len)

    @property
    def longest_row(self) -> int:
        """The most tokens of a row with several records."""
        return self.packing_length or self.longest_text

    @property
    def longest_target(self) -> int:
        """The largest target_len of all tasks, in tokens."""
        return largest(self.target_len)


class BatchPlan(NamedTuple):
    """How one rank takes its part of every global batch: `accumulation_steps` passes of `micro_batch_size` records.

    `empty` places over all ranks hold no record, and count in no loss: the ranks do not divide the batch. With
    data.packing, `micro_batch_size` counts rows, and `empty` is 0.
    """

    micro_batch_size: int
    accumulation_steps: int
    empty: int


class TrainingConfig(Section):
    """Optimisation: AdamW over the trainable parameters."""

    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw",
        description='"adamw": torch\'s, with moments in fp32; "adamw_8bit": bitsandbytes\', with moments in 8 bits: 6 '
        "bytes less for each trained number. Checkpoints hold fp32 either way, and a resumed run may have the other",
    )

    learning_rate: Rate = Field(default=2e-4, description="Peak learning rate")
    learning_rates: dict[str, Rate] = Field(
        default={},
        description="Peak learning rates that are others: of modules and parameters, by pattern as in "
        'adapter.trained_modules ({"multi_modal_projector": 2e-5}), or of one kind of adapter parameters in all layers '
        '({"lora_B": 4e-3, "lora_gates": 1e-2, "magnitude_offset": 1e-3}); of several that name one parameter, the '
        "last",
    )
    schedule: ScheduleName = Field(
        default="linear",
        description="Learning rate after the warm-up: linear or cosine decay to 0, constant, or another one of "
        "transformers by its name there (docs/how-to/schedules.md draws them)",
    )
    schedule_settings: dict[Text, int | float | str] = Field(
        default={},
        description='What the schedule is told besides, as transformers has it: {"min_lr_rate": 0.1} of '
        'cosine_with_min_lr, {"num_decay_steps": 200} of warmup_stable_decay',
    )
    warmup_steps: Annotated[int, Field(ge=0), at_most(10**9)] | None = Field(
        default=None, description="Optimizer steps of linear warm-up; null: see warmup_ratio"
    )
    warmup_ratio: float | None = Field(
        default=None, ge=0, lt=1, description="Warm-up as a share of all optimizer steps"
    )
    epochs: Annotated[float, Field(gt=0), at_most(10**6)] = Field(
        default=3.0, description="Passes over the training data"
    )
    max_steps: Steps | None = Field(default=None, description="Optimizer steps to stop after; null: as epochs says")
    global_batch_size: Count = Field(default=16, description="Records per optimizer step, over all ranks")
    micro_batch_size: Count = Field(
        default=4,
        description="Most records (with data.packing: rows of records) per forward pass on one rank; the rest is "
        "accumulated",
    )
    weight_decay: Annotated[float, Field(ge=0), at_most(1000)] = Field(
        default=0.0, description="AdamW's decoupled weight decay"
    )
    max_grad_norm: Annotated[float, Field(ge=0), at_most(1e30)] = Field(
        default=1.0, description="Global gradient norm to clip at; 0: no clipping"
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the second moment")
    adam_epsilon: Annotated[float, Field(gt=0), at_most(1)] = Field(default=1e-8, description="AdamW's epsilon")
    neftune_alpha: Annotated[float, Field(gt=0), at_most(10**6)] | None = Field(
        default=None,
        description="Noise on the input embeddings while training (NEFTune): uniform, up to this over the root of "
        "length times width; 5 is usual, null: none",
    )
    activation_checkpointing: bool | Literal["selective"] = Field(
        default=True,
        description="true: keep one activation per decoder layer, recompute the rest in backward (slower, smaller); "
        '"selective": keep the outputs of linear layers with a frozen weight, too, so that none of these is gathered '
        "and multiplied a second time (faster by a quarter, larger by those outputs); false: keep everything",
    )
    recompute_all: bool = Field(
        default=False,
        description="With activation_checkpointing = true: recompute the outputs of adapted layers with at least twice "
        "as many inputs (down_proj), too, which are kept otherwise: slower by a twentieth, smaller by one activation a "
        "layer",
    )
    loss_chunk: Literal["auto"] | Annotated[int, Field(ge=0), at_most(10**9)] = Field(
        default="auto",
        description="Tokens whose logits are computed at a time for the loss, so that the logits of a batch are never "
        'all in memory (tasks that predict tokens); "auto": as many as fit into 128 MiB where all logits of a batch '
        "would take more than 512 MiB (in fp32); 0: all at once",
    )
    eval_every: Steps | None = Field(
        default=None, description="Optimizer steps between evaluations; null: none in training"
    )
    metric: Metric = Field(
        default="loss",
        description="What makes a checkpoint the best in evaluation: the lowest loss, or the highest of the others",
    )
    early_stopping: Steps | None = Field(
        default=None,
        description="Evaluations in a row without a better metric after which the run ends, as one that is finished; "
        "with dynamic rank they count once pruning is over; null: the run takes all its steps",
    )
    early_stopping_min_delta: Annotated[float, Field(ge=0), at_most(1e6)] = Field(
        default=0.0, description="By more than this a metric has to be better to count for early_stopping"
    )
    num_beams: Annotated[int, Field(ge=1), at_most(1024)] = Field(
        default=4, description="Beams that evaluation generates with (seq2seq_lm, vision_seq2seq_lm)"
    )
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="Seed of initial values, data order and dropout")

    def batch_plan(self, world_size: int) -> BatchPlan:
        """The fewest passes of at most micro_batch_size records. Raises UserError for more ranks than records."""
        batch = self.global_batch_size
        if world_size > batch:
            raise UserError(
                f"training.global_batch_size = {batch}: gives no record for each of {world_size} ranks; raise it, or "
                f"start at most {batch} {'rank' if batch == 1 else 'ranks'}"
            )
        each = -(-batch // world_size)
        steps = -(-each // self.micro_batch_size)
        micro = -(-each // steps)
        return BatchPlan(micro, steps, micro * steps * world_size - batch)
