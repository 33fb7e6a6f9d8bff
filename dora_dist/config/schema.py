"""The sections of a run's JSON file: every field with its unit, range, default and meaning.

This is the only description of a run. Command-line options and their help, the JSON schema for editors, error
messages and the DeepSpeed JSON are all derived from it.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dora_dist.config import conflicts, deepspeed_options, engine, files, limits, options, problems, source
from dora_dist.config.engine import BatchPlan

PathText = Annotated[
    str, Field(min_length=1, max_length=4095, pattern=r"^[^\x00]+$"), AfterValidator(os.path.expanduser)
]
PathTexts = Annotated[list[PathText], Field(min_length=1)]
Patterns = list[Annotated[str, Field(min_length=1)]]
Task = Literal["causal_lm", "sequence_classification", "question_answering", "seq2seq_lm", "image_text_to_text"]
Format = Literal["instruction", "alpaca", "completion", "messages", "classification", "squad", "summarisation", "llava"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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
        default="sdpa", description="Attention code that transformers uses; eager where a model has no sdpa"
    )
    task: Task = Field(
        default="causal_lm",
        description="What the model is for: causal_lm predicts the next token; sequence_classification labels a text, "
        "or rates it; question_answering finds the answer in a text; seq2seq_lm reads a text and writes another; "
        "image_text_to_text predicts the next token of texts with pictures (LLaVA)",
    )
    num_labels: int = Field(
        default=2, ge=1, description="Labels of sequence_classification: 0 up to this number; 1: a rating (regression)"
    )
    storage: str = Field(
        default="plain", min_length=1, description="How the frozen weights are held; plugins may add further ways"
    )
    trust_remote_code: bool = Field(default=False, description="Let the hub repository's own Python code run here")


class AdapterConfig(Section):
    """What is trained: the low-rank update, its components' gates, and the magnitudes."""

    method: str | None = Field(
        default=None,
        min_length=1,
        description="Adapter method by name; null: the one that weight_decomposed and dynamic_rank say",
    )
    settings: dict[str, Any] = Field(default={}, description="Settings of a method that a plugin brings")
    weight_decomposed: bool = Field(
        default=True, description="true: DoRA; false: plain LoRA, the same layer with no magnitude"
    )
    r: int = Field(default=16, ge=1, description="Adapter rank: components of the low-rank update of one layer")
    lora_alpha: float = Field(default=32.0, gt=0, description="The update is scaled by lora_alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Probability of dropping an input of the adapter")
    dropout_mode: Literal["exact", "adapter"] = Field(
        default="exact",
        description="exact: as in the paper; adapter: in the low-rank branch only (one base product fewer)",
    )
    norm_gradient: Literal["detached", "full"] = Field(
        default="detached",
        description="detached: the norm is a constant in backward (paper, section 4.3); full: it is not",
    )
    target_modules: Patterns | None = Field(
        default=None,
        description="Linear layers to adapt: endings of module names, or expressions for whole names; "
        "null: the model family's default",
    )
    magnitude_only_modules: Patterns = Field(
        default=[],
        description="Linear layers that train a magnitude and no low-rank update; patterns as above",
    )
    trained_modules: Patterns | None = Field(
        default=None,
        description="Modules trained in full beside the adapters (PEFT's modules_to_save); patterns as above; "
        "null: the task's head, or a LLaVA's projector. One of two tied weights gets a copy of its own, as in PEFT",
    )
    init_from: PathText | None = Field(
        default=None, description="PEFT LoRA or DoRA folder to start from; null: a new adapter"
    )
    dynamic_rank: bool = Field(
        default=False,
        description="Start with more components than r in each layer, and prune the least important ones over all "
        "layers while training (Mao et al.); r is then the average rank at the end",
    )
    start_rank_factor: float = Field(
        default=1.5, ge=1, description="Dynamic rank: layers start with this times r components, rounded up"
    )
    prune_start: float = Field(
        default=0.15, ge=0, lt=1, description="Dynamic rank: pruning begins at this share of all optimizer steps"
    )
    prune_stop: float = Field(
        default=0.5, gt=0, le=1, description="Dynamic rank: the mask is final from this share of all steps on"
    )
    prune_every: int = Field(default=10, ge=1, description="Dynamic rank: optimizer steps between prunings")
    prune_schedule: Literal["dora", "adalora"] = Field(
        default="dora", description="Dynamic rank: dora prunes slowly first and fast last, adalora the other way round"
    )
    importance_beta: float = Field(
        default=0.9, ge=0, lt=1, description="Dynamic rank: share of the old score in the smoothed importance"
    )
    dem_weight: float = Field(
        default=0.3, ge=0, description="Dynamic rank: weight of the penalty on the variance of components; 0: none"
    )
    dem_form: Literal["paper", "code"] = Field(
        default="paper", description="Dynamic rank: the penalty as the paper has it, or half of it, as its code does"
    )
    pruned_moments: Literal["keep", "clear"] = Field(
        default="keep", description="Dynamic rank: what pruning does to Adam's moments of the gates"
    )

    compact: bool = Field(
        default=True, description="Dynamic rank: once the mask is final, train on without the pruned components"
    )

    @property
    def start_rank(self) -> int:
        """Components of a layer when training starts: r, or ceil(start_rank_factor · r) with dynamic rank."""
        return math.ceil(self.start_rank_factor * self.r) if self.dynamic_rank else self.r


class DataConfig(Section):
    """What the model learns from."""

    train: PathText | PathTexts = Field(
        description="Training data: .json, .jsonl or .parquet file, or a data set on the hub or in a folder (name, "
        "name:config, name:config:split or name:file), or a list of these"
    )
    validation: PathText | PathTexts | None = Field(
        default=None, description="Validation data, as train (split validation); null: see validation_samples"
    )
    validation_samples: int = Field(
        default=0,
        ge=0,
        description="Records held out from the training data for validation when there is no validation file",
    )
    format: Format = Field(
        default="instruction",
        description="Records: instruction (the paper's prompt), alpaca, completion (prompt and completion as they "
        "are), messages (the chat template), classification (one or two texts and a label), squad (question, "
        "context, answers), summarisation (a document and its summary), or llava (conversations with pictures)",
    )
    text_fields: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=2)] = Field(
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
    cutoff_len: int = Field(
        default=256,
        ge=8,
        description="Longest record in tokens, those of its pictures included; longer ones are cut and counted",
    )
    target_len: int = Field(
        default=64, ge=2, description="Longest summary in tokens, in training and when one is generated (summarisation)"
    )
    doc_stride: int = Field(
        default=128,
        ge=0,
        description="Tokens that windows of a text share where it is too long to be read at once (squad)",
    )
    cache: Annotated[str, Field(min_length=1)] | None = Field(
        default="~/.cache/dora_dist",
        description="Folder for tokenized data of language models and LLaVAs: one rank of a node makes it for the "
        "others and for later runs; null: every rank tokenizes for itself",
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
    bad_images: Literal["error", "skip"] = Field(
        default="error",
        description="A picture that is missing or cannot be read: ends the run, or its record is left out and counted",
    )
    chat_template: Literal["vicuna_v1", "plain", "model"] = Field(
        default="vicuna_v1",
        description="Text of llava records: vicuna_v1, plain (pictures and caption), or the model's chat template",
    )
    group_by_modality_length: bool = Field(
        default=True,
        description="Batches of llava records are all with pictures or all without, and go from long records to short",
    )
    num_workers: int = Field(default=0, ge=0, description="Loader processes per rank; 0: load in the rank itself")


class TrainingConfig(Section):
    """Optimisation: AdamW over the trainable parameters."""

    learning_rate: float = Field(default=2e-4, gt=0, description="Peak learning rate")
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Peak learning rates of single modules where they are others, by pattern as in "
        'adapter.trained_modules: {"multi_modal_projector": 2e-5}',
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear",
        description="Learning rate after the warm-up: linear or cosine decay to 0, or constant",
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="Optimizer steps of linear warm-up; null: see warmup_ratio"
    )
    warmup_ratio: float | None = Field(
        default=None, ge=0, lt=1, description="Warm-up as a share of all optimizer steps"
    )
    epochs: float = Field(default=3.0, gt=0, description="Passes over the training data")
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps to stop after; null: as epochs says")
    global_batch_size: int = Field(default=16, ge=1, description="Records per optimizer step, over all ranks")
    micro_batch_size: int = Field(
        default=4, ge=1, description="Most records per forward pass on one rank; the rest is accumulated"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Global gradient norm to clip at; 0: no clipping")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the second moment")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    activation_checkpointing: bool = Field(
        default=True,
        description="Keep one activation per decoder layer, recompute the rest in backward: slower, smaller",
    )
    recompute_all: bool = Field(
        default=False,
        description="With activation checkpointing: recompute the outputs of DoRA layers with at least twice as many "
        "inputs (down_proj), too, which are kept otherwise: slower by a twentieth, smaller by one activation a layer",
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="Optimizer steps between evaluations; null: none in training"
    )
    metric: Literal[
        "loss", "accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "rouge1", "rouge2", "rougeL"
    ] = Field(
        default="loss",
        description="What makes a checkpoint the best in evaluation: the lowest loss, or the highest of the others",
    )
    num_beams: int = Field(default=4, ge=1, description="Beams that evaluation generates with (seq2seq_lm)")
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="Seed of initial values, data order and dropout")


class CheckpointConfig(Section):
    """What is written, how often, and where a run goes on from."""

    run_dir: PathText = Field(
        default="runs/{config}",
        description="Folder of the run; {config} stands for the name of the config file without .json",
    )
    save_every: int | None = Field(
        default=None, ge=1, description="Optimizer steps between checkpoints; null: only at the end"
    )
    keep_last: int = Field(default=2, ge=1, description="Newest checkpoints to keep")
    on_failure: Literal["stop", "continue"] = Field(
        default="stop", description="When a checkpoint cannot be written: stop the run, or warn and go on without it"
    )
    keep_best: bool = Field(default=True, description="Also keep the checkpoint that is best by training.metric")
    resume: PathText | None = Field(
        default=None,
        description="auto: go on from the run folder's newest checkpoint, if any; or a checkpoint folder",
    )


class EngineConfig(Section):
    """How DeepSpeed ZeRO-3 holds and moves the parameters."""

    accelerator: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device; auto: a GPU where there is one"
    )
    offload_param: Literal["none", "cpu"] = Field(
        default="none", description="cpu: parameter shards rest in host memory"
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        default="none", description="cpu: AdamW's state and step on the host"
    )
    hpz_partition_size: int = Field(
        default=1,
        ge=1,
        description="Ranks (of one node) that share a second copy of the shards for backward; 1: off",
    )
    param_persistence_threshold: int = Field(
        default=100_000, ge=0, description="Parameters with fewer elements stay whole on every rank"
    )
    prefetch_bucket_size: int = Field(default=50_000_000, ge=0, description="Elements to gather ahead of their use")
    # Not DeepSpeed's 5e8: the bucket is allocated whole (1 to 2 GB), and only adapter gradients use it.
    reduce_bucket_size: int = Field(default=50_000_000, ge=1, description="Gradient elements to reduce at a time")
    max_live_parameters: int = Field(
        default=1_000_000_000, ge=0, description="Most elements that stay gathered at a time"
    )
    max_reuse_distance: int = Field(
        default=1_000_000_000,
        ge=0,
        description="Keep a parameter gathered if it is used again within this many elements",
    )
    allgather_sequential: bool = Field(
        default=False,
        description="Gather parameter by parameter, without a bucket: fewer copies, lower peak memory",
    )
    start_timeout_s: float = Field(
        default=1800.0, gt=0, description="Longest wait for other ranks up to the first step, seconds"
    )
    step_timeout_s: float = Field(
        default=600.0, gt=0, description="Longest wait for other ranks after the first step, seconds"
    )
    deepspeed: dict[str, Any] = Field(
        default={}, description="Further DeepSpeed options, merged into the derived DeepSpeed JSON"
    )


class LoggingConfig(Section):
    """What a run reports."""

    every: int = Field(default=10, ge=1, description="Optimizer steps between log lines")
    tensorboard: bool = Field(default=False, description="Write TensorBoard events into the run folder")
    progress_bar: bool = Field(default=True, description="Show a progress bar on rank 0")
    peak_flops: float | None = Field(
        default=None,
        gt=0,
        description="Peak FLOP/s of one device, for the utilisation in the log; null: known GPUs looked up",
    )


class RunConfig(Section):
    """One fine-tuning run. Relative paths in it are relative to the current directory."""

    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    engine: EngineConfig = EngineConfig()
    logging: LoggingConfig = LoggingConfig()
    plugins: Patterns = Field(
        default=[],
        description="Python modules to import first, which register further adapter methods, storages, tasks or model "
        "families",
    )

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = False) -> "RunConfig":
        """The run that a JSON file describes, with dotted `overrides`: `["--adapter.r", "8", "--a.b=1"]`.

        `check_files` also checks that every file and folder it names is there. Raises UserError.
        """
        raw = source.read_json(Path(path))
        options.apply(raw, overrides, cls)
        config = cls.from_dict(raw, name=Path(path).stem, origin=str(path))
        if check_files:
            config.check_files()
        return config

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, name: str = "run", origin: str = "configuration") -> "RunConfig":
        """The run that a dict describes; `name` fills {config} in checkpoint.run_dir. Raises UserError."""
        try:
            config = cls.model_validate(raw)
        except ValidationError as error:
            raise problems.explain(error, cls, origin) from None
        run_dir = config.checkpoint.run_dir.replace("{config}", name)
        return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"run_dir": run_dir})})

    @model_validator(mode="after")
    def _possible_together(self) -> "RunConfig":
        found = list(limits.absurd(self)) or [
            *conflicts.between_fields(self),
            *engine.conflicts(self.engine.deepspeed),
        ]
        if found:
            raise ValueError("\n".join(found))
        return self

    def check_files(self) -> None:
        """Raise UserError unless every file and folder of the run is there (hub names are not looked up)."""
        files.check(self)

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How the ranks share every global batch. Raises UserError where there are more ranks than records."""
        return engine.batch_plan(self, world_size)

    def deepspeed_config(self, world_size: int) -> dict[str, Any]:
        """A new dict: the DeepSpeed JSON of this run on `world_size` ranks. Raises UserError."""
        return engine.deepspeed_config(self, world_size)

    def check_engine_options(self) -> None:
        """Raise UserError for options in engine.deepspeed that DeepSpeed would refuse, or not look at.

        Imports deepspeed, which settles on an accelerator then: choose it (DS_ACCELERATOR) before.
        """
        deepspeed_options.check(self.engine.deepspeed)

    def to_json(self) -> str:
        """The whole configuration as JSON text, defaults included; `load` gives an equal one back."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of a config file, for editors."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}
