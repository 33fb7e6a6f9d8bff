"""A run's configuration, one JSON or YAML file: `RunConfig.load("configs/x.json", ["--adapter.r=8"])`."""

from dora_dist.config.adapter import AdapterConfig
from dora_dist.config.engine import EngineConfig
from dora_dist.config.names import is_local
from dora_dist.config.options import add_arguments, check_names
from dora_dist.config.outputs import AnalysisConfig, CheckpointConfig, LoggingConfig
from dora_dist.config.run_config import RunConfig
from dora_dist.config.schema import (
    BatchPlan,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "AnalysisConfig",
    "BatchPlan",
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
    "LoggingConfig",
    "ModelConfig",
    "RunConfig",
    "TrainingConfig",
    "add_arguments",
    "check_names",
    "is_local",
]
