"""Adapter folders of either format: PEFT's, and our own for what PEFT cannot express."""

from pathlib import Path

from dora_dist.adapters import native_format, peft_config
from dora_dist.adapters.adapter_folder import AdapterFolder, SavedAdapter
from dora_dist.adapters.native_format import NativeFolder
from dora_dist.adapters.peft_format import open_peft_folder, read_peft_folder

CONFIG_NAMES = (peft_config.CONFIG_NAME, native_format.CONFIG_NAME)


def holds_adapter(path: Path) -> bool:
    """Whether `path` is an adapter folder, by what it holds."""
    return any((path / name).is_file() for name in CONFIG_NAMES)


def is_native(path: Path) -> bool:
    """Whether an adapter folder has our own format. With both configurations, PEFT's says what it is."""
    return (path / native_format.CONFIG_NAME).is_file() and not (path / peft_config.CONFIG_NAME).is_file()


def open_adapter(path: Path) -> AdapterFolder:
    """Check an adapter folder without reading it. Raises UserError, naming file and field, where it is not one."""
    return NativeFolder.open(path) if is_native(Path(path)) else open_peft_folder(path)


def read_adapter(path: Path) -> SavedAdapter:
    """Read an adapter folder whole. Raises UserError as `open_adapter` does, and for numbers that are not finite."""
    return NativeFolder.open(path).read_whole() if is_native(Path(path)) else read_peft_folder(path)
