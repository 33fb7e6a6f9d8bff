"""The sections about what a run writes: checkpoints, recordings of its weights' changes, and reports."""

from typing import Annotated, Literal

from pydantic import Field

from dora_dist.config.section import PathText, Patterns, Section, Steps, at_most

MOST_SAMPLES = 64
"""Of logging.samples: all of them are on the run's page."""


class CheckpointConfig(Section):
    """What is written, how often, and where a run goes on from."""

    run_dir: PathText = Field(
        default="runs/{config}",
        description="Folder of the run; {config} stands for the name of the config file without its ending",
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

    every: Annotated[int, Field(ge=0), at_most(10**9)] | None = Field(
        default=None,
        description="Optimizer steps between recordings into the run folder's analysis.jsonl, besides one after the "
        "last step; null: with each evaluation and each checkpoint, of adapted layers alone; 0: none",
    )
    modules: Patterns = Field(
        default=[],
        description="Which of the adapted layers, and of the linear layers trained in full, are recorded; patterns as "
        "in adapter.target_modules; []: all",
    )


class LoggingConfig(Section):
    """What a run reports."""

    every: Steps = Field(default=10, description="Optimizer steps between log lines")
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default=[],
        description="Experiment trackers that get the run's numbers and its whole configuration, from rank 0: "
        "tensorboard (events in the run folder), wandb, trackio, mlflow; each needs its package and takes "
        "its own environment variables; one that fails or hangs does not hold up the run",
    )
    tensorboard: bool = Field(default=False, description='The same as "tensorboard" in trackers')
    progress_bar: bool = Field(default=True, description="Show a progress bar on rank 0")
    report: bool = Field(default=True, description="Keep the run's page, report.html in the run folder, up to date")
    samples: Annotated[int, Field(ge=0, le=MOST_SAMPLES)] = Field(
        default=4,
        description="Records of the validation set, the first ones, that the model answers in its own words after each "
        "evaluation (causal_lm, image_text_to_text), for the history and the run's page; 0: none",
    )
    sample_tokens: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=48,
        description="Most tokens of each of these answers: as many forward passes on all ranks for each "
        "batch of them, which has about the tokens of one of training",
    )
    peak_flops: Annotated[float, Field(gt=0), at_most(1e24)] | None = Field(
        default=None,
        description="Peak FLOP/s of one device, for the utilisation in the log; null: known GPUs looked up",
    )

    @property
    def every_tracker(self) -> tuple[str, ...]:
        """The trackers, each once."""
        return tuple(dict.fromkeys([*self.trackers, *(["tensorboard"] if self.tensorboard else [])]))
