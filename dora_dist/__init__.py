"""DoRA fine-tuning of large language models on DeepSpeed ZeRO-3: what a program imports.

    from dora_dist import RunConfig, train

    checkpoint = train(RunConfig.load("configs/quickstart.json", ["--training.max_steps=10"]))

Each name below is imported when it is first used, so that `import dora_dist` does not wait for torch. The modules
that define them hold everything else, such as the sections of a configuration (`dora_dist.config`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_dist.adapters.switch import adapters_off as adapters_off
    from dora_dist.checkpoint.adapter_of_model import save_adapter as save_adapter
    from dora_dist.checkpoint.consolidate import consolidate as consolidate
    from dora_dist.checkpoint.export_gguf import export_gguf as export_gguf
    from dora_dist.config import RunConfig as RunConfig
    from dora_dist.evaluation.export_lora import export_lora as export_lora
    from dora_dist.evaluation.generate import generate as generate
    from dora_dist.evaluation.run import evaluate as evaluate
    from dora_dist.training.model import build_model as build_model
    from dora_dist.training.run import train as train

__version__ = "0.1.0"
__all__ = [
    "RunConfig",
    "__version__",
    "adapters_off",
    "build_model",
    "consolidate",
    "evaluate",
    "export_gguf",
    "export_lora",
    "generate",
    "save_adapter",
    "train",
]

_DEFINED_IN = {
    "RunConfig": "dora_dist.config",
    "train": "dora_dist.training.run",
    "build_model": "dora_dist.training.model",
    "save_adapter": "dora_dist.checkpoint.adapter_of_model",
    "adapters_off": "dora_dist.adapters.switch",
    "consolidate": "dora_dist.checkpoint.consolidate",
    "export_gguf": "dora_dist.checkpoint.export_gguf",
    "evaluate": "dora_dist.evaluation.run",
    "export_lora": "dora_dist.evaluation.export_lora",
    "generate": "dora_dist.evaluation.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"dora_dist does not define {name!r}; it defines {', '.join(__all__)}")
    found = globals()[name] = getattr(import_module(_DEFINED_IN[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
