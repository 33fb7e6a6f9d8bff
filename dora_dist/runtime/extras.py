"""Packages that only some users need: which extra brings each, and what to say where one is missing."""

import importlib.util
import logging
import sys
from types import ModuleType
from typing import cast

from dora_dist.runtime.errors import UserError

BROUGHT_BY = {
    "PIL": ("pillow", "images"),
    "av": ("av", "video"),
    "bitsandbytes": ("bitsandbytes", "quantised"),
    "gguf": ("gguf", "gguf"),
    "h5py": ("h5py", "features"),
    "mlflow": ("mlflow-skinny", "mlflow"),
    "matplotlib": ("matplotlib", "plots"),
    "nltk": ("nltk", "captions"),
    "pycocoevalcap": ("pycocoevalcap", "captions"),
    "rouge_score": ("rouge-score", "metrics"),
    "scipy": ("scipy", "metrics"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "sklearn": ("scikit-learn", "metrics"),
}
"""Names of modules, with the package that has each and the extra that brings it."""


def missing(*modules: str) -> str | None:
    """What to install so that all of `modules` can be imported, for a message; None where they can. Imports none."""
    absent = [BROUGHT_BY.get(module, (module, None)) for module in modules if importlib.util.find_spec(module) is None]
    if not absent:
        return None
    extras = ",".join(sorted({extra for _, extra in absent if extra}))
    others = [package for package, extra in absent if not extra]  # what a plugin needs
    what = " ".join([*([f"'dora-dist[{extras}]'"] if extras else []), *others])
    return f"needs the package {' and '.join(package for package, _ in absent)}; pip install {what}"


def need(*modules: str, purpose: str) -> None:
    """Raise UserError, `purpose` being its beginning, unless all of `modules` can be imported."""
    if (remedy := missing(*modules)) is not None:
        raise UserError(f"{purpose} {remedy}")


def import_bitsandbytes() -> None:
    """Its operators, and nothing that it would fetch: where `kernels` is installed, it downloads code from the hub."""
    log = logging.getLogger("bitsandbytes")
    level, absent = log.level, "kernels" not in sys.modules
    log.setLevel(logging.ERROR)  # it warns that it could not
    if absent:
        sys.modules["kernels"] = cast(ModuleType, None)  # how Python is told that there is no such module
    try:
        import bitsandbytes  # noqa: F401  here: it takes seconds
    finally:
        log.setLevel(level)
        if absent:
            del sys.modules["kernels"]
