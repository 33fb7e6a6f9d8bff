"""A run as its JSON or YAML file describes it: the sections together, and what holds between them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from dora_dist.config import conflicts, engine, files, options, problems, source
from dora_dist.config.adapter import AdapterConfig
from dora_dist.config.engine import EngineConfig
from dora_dist.config.outputs import AnalysisConfig, CheckpointConfig, LoggingConfig
from dora_dist.config.schema import BatchPlan, DataConfig, ModelConfig, TrainingConfig
from dora_dist.config.section import Patterns, Section

Rules = Callable[["RunConfig"], Iterable[str]]
"""What is wrong with a run besides what this package knows, one line each, as `dora_dist.tasks.problems` says it."""


class RunConfig(Section):
    """One fine-tuning run. Relative paths in it are relative to the current directory."""

    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    engine: EngineConfig = EngineConfig()
    logging: LoggingConfig = LoggingConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    plugins: Patterns = Field(
        default=[],
        description="Python modules to import first, which register further adapter methods, storages, tasks or model "
        "families",
    )

    @classmethod
    def load(
        cls, path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = False, rules: Rules | None = None
    ) -> "RunConfig":
        """The run of a file (JSON or YAML), with dotted `overrides`: `["--adapter.r", "8", "--logging.every=1"]`.

        `check_files` also checks that every file and folder it names is there. `rules`: further checks, whose
        problems are reported together with all others. Raises UserError.
        """
        found = source.read(Path(path))
        options.apply(found, overrides, cls)
        config = cls._of_source(found, name=Path(path).stem, origin=str(path), rules=rules)
        if check_files:
            config.check_files()
        return config

    @classmethod
    def from_dict(
        cls, raw: dict[str, Any], *, name: str = "run", origin: str = "configuration", rules: Rules | None = None
    ) -> "RunConfig":
        """The run that a dict describes; `name` fills {config} in checkpoint.run_dir. `rules` as of `load`.

        Raises UserError.
        """
        return cls._of_source(source.Source(raw), name=name, origin=origin, rules=rules)

    @classmethod
    def _of_source(cls, found: source.Source, *, name: str, origin: str, rules: Rules | None) -> "RunConfig":
        try:
            config = cls.model_validate(found.raw, context=rules)
        except ValidationError as error:
            raise problems.explain(error, cls, origin, file_of=found.file_of) from None
        run_dir = config.checkpoint.run_dir.replace("{config}", name)
        return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"run_dir": run_dir})})

    @model_validator(mode="after")
    def _possible_together(self, info: ValidationInfo) -> "RunConfig":
        between = conflicts.between_fields(
            self.model, self.adapter, self.data, training=self.training, engine=self.engine, analysis=self.analysis
        )
        further = info.context(self) if info.context else ()
        if found := [*between, *further, *engine.conflicts(self.engine.deepspeed)]:
            raise ValueError("\n".join(found))
        return self

    def check_files(self) -> None:
        """Raise UserError unless every file and folder of the run is there (hub names are not looked up)."""
        files.check(self.model, self.adapter, self.data, checkpoint=self.checkpoint)

    def deepspeed_config(self, world_size: int, plan: BatchPlan | None = None) -> dict[str, Any]:
        """A new dict: the DeepSpeed JSON of this run on `world_size` ranks. Raises UserError.

        plan: how batches are taken, where the data says that (data.packing); None: as without packing.
        """
        return engine.deepspeed_config(
            self.engine, self.training, dtype=self.model.dtype, world_size=world_size, plan=plan
        )

    def to_json(self) -> str:
        """The whole configuration as JSON text, defaults included; `load` gives an equal one back."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of a config file, for editors."""
        document = cls.model_json_schema()
        file: dict[str, Any] = {"type": "string", "minLength": 1}
        document["properties"][source.EXTENDS] = {
            "description": "Config files whose values this one starts from, relative to it; of several, later ones win",
            "anyOf": [file, {"type": "array", "items": file}],
        }
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}
