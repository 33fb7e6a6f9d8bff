"""The sections of a run's JSON file: every field with its unit, range, default and meaning.

With the engine's section, in engine.py, this is the only description of a run. Command-line options and their help, the
JSON schema for editors, error messages and the reference in the documents are all derived from it.
"""

import math
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from dora_dist.config.section import (
    Count,
    PathsByTask,
    PathText,
    PathTexts,
    Patterns,
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
        "classification",
        "squad",
        "summarisation",
        "llava",
        "vision_text",
    ),
]
Metric = Annotated[
    Text,
    known("loss", "accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "rouge1", "rouge2", "rougeL"),
]


USUAL_R = 16
"""Of LoRA, DoRA and dynamic rank."""


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
        default="plain", min_length=1, description="How the frozen weights are held; plugins may add further ways"
    )
    trust_remote_code: bool = Field(default=False, description="Let the hub repository's own Python code run here")


class AdapterConfig(Section):
    """What is trained: the low-rank update, its components' gates, and the magnitudes."""

    method: str | None = Field(
        default=None,
        min_length=1,
        description="Adapter method by name: vera (with weight_decomposed DVoRA), mora, full (no adapter: the model "
        "itself is trained), or a plugin's; null: LoRA, DoRA or dynamic rank, by weight_decomposed and dynamic_rank",
    )
    settings: dict[str, Any] = Field(
        default={},
        description="Settings of the method that it has besides these fields (mora: type; vera: projection_prng_key, "
        "d_initial; or a plugin's)",
    )
    weight_decomposed: bool = Field(
        default=True, description="true: DoRA; false: plain LoRA, the same layer with no magnitude"
    )
    r: Annotated[int, Field(ge=1), at_most(2**16)] | None = Field(
        default=None,
        description="Adapter rank: components of the update of one layer; null: 16, or what the method named in "
        "adapter.method usually has (vera 256, mora 8)",
    )
    lora_alpha: Annotated[float, Field(gt=0), at_most(10**6)] = Field(
        default=32.0, description="The update is scaled by lora_alpha / r"
    )
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
        "null: the model family's default. With full: any modules to train, null: the whole model",
    )
    magnitude_only_modules: Patterns = Field(
        default=[],
        description="Linear layers that train a magnitude and no low-rank update; patterns as above",
    )
    trained_modules: Patterns | None = Field(
        default=None,
        description="Modules trained in full, besides the adapters (PEFT's modules_to_save); patterns as above; "
        "null: the task's head, a LLaVA's projector or a VL-BART's visual embedding. One of two tied weights gets a "
        "copy of its own, as in PEFT",
    )
    trained_parameters: Patterns = Field(
        default=[],
        description="Single parameters trained as they are, besides the adapters: whole names, endings at a dot "
        '("bias", "layer_norm.weight"), or expressions for whole names. An adapted layer\'s bias may be one, its '
        "weight may not; a tied parameter stays tied",
    )
    init_from: PathText | None = Field(
        default=None,
        description="Adapter folder to start from (PEFT's LoRA, DoRA or VeRA, or our own); null: a new adapter",
    )
    dynamic_rank: bool = Field(
        default=False,
        description="Start with more components than r in each layer, and prune the least important ones over all "
        "layers while training (Mao et al.); r is then the average rank at the end",
    )
    start_rank_factor: Annotated[float, Field(ge=1), at_most(1000)] = Field(
        default=1.5, description="Dynamic rank: layers start with this times r components, rounded up"
    )
    component_init: Literal["paper", "lora"] = Field(
        default="paper",
        description="Dynamic rank: how components start. paper: gates 0 between two random factors; lora: gates 1 and "
        "B 0, as LoRA starts",
    )
    component_scale: Literal["paper", "budget"] = Field(
        default="paper",
        description="Dynamic rank: what lora_alpha is divided by. paper: the components of a layer when training "
        "starts; budget: r, which are left on average. Pruning does not change it",
    )
    prune_start: float = Field(
        default=0.15, ge=0, lt=1, description="Dynamic rank: pruning begins at this share of all optimizer steps"
    )
    prune_stop: float = Field(
        default=0.5, gt=0, le=1, description="Dynamic rank: the mask is final from this share of all steps on"
    )
    prune_every: Steps = Field(default=10, description="Dynamic rank: optimizer steps between prunings")
    prune_schedule: Literal["dora", "adalora"] = Field(
        default="dora", description="Dynamic rank: dora prunes slowly first and fast last, adalora the other way round"
    )
    importance_beta: float = Field(
        default=0.9, ge=0, lt=1, description="Dynamic rank: share of the old score in the smoothed importance"
    )
    dem_weight: Annotated[float, Field(ge=0), at_most(1e60)] = Field(
        default=0.3, description="Dynamic rank: weight of the penalty on the variance of components; 0: none"
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

    @model_validator(mode="before")
    @classmethod
    def _usual_rank(cls, given: Any) -> Any:
        """r where no method is named; one that is named knows its own."""
        unsaid = isinstance(given, dict) and given.get("r") is None and given.get("method") is None
        return {**given, "r": USUAL_R} if unsaid else given

    @property
    def start_rank(self) -> int | None:
        """Components of a layer when training starts: r, or ceil(start_rank_factor · r) with dynamic rank."""
        return self.r and (math.ceil(self.start_rank_factor * self.r) if self.dynamic_rank else self.r)


class DataConfig(Section):
    """What the model learns from."""

    train: PathText | PathTexts | PathsByTask = Field(
        description="Training data: .json, .jsonl or .parquet file, or a data set on the hub or in a folder (name, "
        "name:config, name:config:split or name:file), or a list of these; vision_text: such a value for each of its "
        'tasks, {"vqa": ..., "gqa": ..., "nlvr2": ..., "caption": ..., "tvqa": ..., "how2qa": ..., '
        '"tvc": ..., "yc2c": ...}'
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
        "are), messages (the chat template), classification (one or two texts and a label), squad (question, "
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
    cutoff_len: Annotated[int, Field(ge=8), at_most(2**30)] = Field(
        default=256,
        description="Longest record in tokens, those of its pictures included (vision_text: of its text alone); longer "
        "ones are cut and counted",
    )
    target_len: Annotated[int, Field(ge=2), at_most(2**30)] = Field(
        default=64,
        description="Longest summary or answer in tokens, in training and when one is generated (summarisation, "
        "vision_text)",
    )
    doc_stride: Annotated[int, Field(ge=0), at_most(2**30)] = Field(
        default=128,
        description="Tokens that windows of a text share where it is too long to be read at once (squad)",
    )
    cache: Text | None = Field(
        default="~/.cache/dora_dist",
        description="Folder for tokenized data: one rank of a node makes it for the others and for later runs; null: "
        "every rank tokenizes for itself",
    )
    features: PathText | PathTexts | PathsByTask | None = Field(
        default=None,
        description="Visual features of vision_text records: an HDF5 file (pictures) or a folder of .npz files "
        "(videos), a list of these, or such a value for each task",
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


class BatchPlan(NamedTuple):
    """How one rank takes its part of every global batch: `accumulation_steps` passes of `micro_batch_size` records.

    `empty` places over all ranks hold no record, and count in no loss: the ranks do not divide the batch.
    """

    micro_batch_size: int
    accumulation_steps: int
    empty: int


class TrainingConfig(Section):
    """Optimisation: AdamW over the trainable parameters."""

    learning_rate: Rate = Field(default=2e-4, description="Peak learning rate")
    learning_rates: dict[str, Rate] = Field(
        default={},
        description="Peak learning rates that are others: of modules and parameters, by pattern as in "
        'adapter.trained_modules ({"multi_modal_projector": 2e-5}), or of one kind of adapter parameters in all layers '
        '({"lora_B": 4e-3, "lora_gates": 1e-2, "magnitude_offset": 1e-3}); of several that name one parameter, the '
        "last",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear",
        description="Learning rate after the warm-up: linear or cosine decay to 0, or constant",
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
        default=4, description="Most records per forward pass on one rank; the rest is accumulated"
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
    activation_checkpointing: bool = Field(
        default=True,
        description="Keep one activation per decoder layer, recompute the rest in backward: slower, smaller",
    )
    recompute_all: bool = Field(
        default=False,
        description="With activation checkpointing: recompute the outputs of DoRA layers with at least twice as many "
        "inputs (down_proj), too, which are kept otherwise: slower by a twentieth, smaller by one activation a layer",
    )
    eval_every: Steps | None = Field(
        default=None, description="Optimizer steps between evaluations; null: none in training"
    )
    metric: Metric = Field(
        default="loss",
        description="What makes a checkpoint the best in evaluation: the lowest loss, or the highest of the others",
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


class CheckpointConfig(Section):
    """What is written, how often, and where a run goes on from."""

    run_dir: PathText = Field(
        default="runs/{config}",
        description="Folder of the run; {config} stands for the name of the config file without .json",
    )
    save_every: Steps | None = Field(
        default=None, description="Optimizer steps between checkpoints; null: only at the end"
    )
    keep_last: Steps = Field(default=2, description="Newest checkpoints to keep")
    on_failure: Literal["stop", "continue"] = Field(
        default="stop", description="When a checkpoint cannot be written: stop the run, or warn and go on without it"
    )
    keep_best: bool = Field(default=True, description="Also keep the checkpoint that is best by training.metric")
    resume: PathText | None = Field(
        default=None,
        description="auto: go on from the run folder's newest checkpoint, if any; or a checkpoint folder",
    )


class AnalysisConfig(Section):
    """How far the weights' magnitudes and directions move while a run trains (Liu et al., section 3)."""

    every: Annotated[int, Field(ge=0), at_most(10**9)] = Field(
        default=0,
        description="Optimizer steps between recordings into the run folder's analysis.jsonl, besides one after the "
        "last step; 0: none",
    )
    modules: Patterns = Field(
        default=[],
        description="Which of the adapted layers, and of the linear layers trained in full, are recorded; patterns as "
        "in adapter.target_modules; []: all",
    )


class LoggingConfig(Section):
    """What a run reports."""

    every: Steps = Field(default=10, description="Optimizer steps between log lines")
    tensorboard: bool = Field(default=False, description="Write TensorBoard events into the run folder")
    progress_bar: bool = Field(default=True, description="Show a progress bar on rank 0")
    peak_flops: Annotated[float, Field(gt=0), at_most(1e24)] | None = Field(
        default=None,
        description="Peak FLOP/s of one device, for the utilisation in the log; null: known GPUs looked up",
    )
