"""A device that this machine does not have: `install` makes torch, DeepSpeed and accelerate believe in "pretend"."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

NAME, DEVICE, BACKEND = "pretend", "pretend:0", "pretend_ccl"


def build(folder: Path) -> Path:
    """Compile pretend.cpp into `folder`; ten seconds. Not into a shared cache, where a build cut short blocks all."""
    from torch.utils.cpp_extension import load

    source = Path(__file__).with_suffix(".cpp")
    load(NAME, [str(source)], extra_cflags=["-O0"], build_directory=str(folder), is_python_module=False)
    return folder / f"{NAME}.so"


def install(library: Path) -> None:
    """Register the device for the whole process: it cannot be taken back, so a process of its own should call this."""
    from torch.utils.backend_registration import _DummyDeviceGuard

    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._register_device_module(NAME, _module())
    torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())
    dist.Backend.register_backend(BACKEND, _group, devices=["cpu", NAME])
    set_accelerator(PretendAccelerator())
    _tell_hugging_face()
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign] # its memory is the host's
    torch.nn.modules.module.register_module_forward_pre_hook(_check_module)


def _check_module(module: torch.nn.Module, inputs: Any) -> None:
    """Raise if a module's own tensors are on the host: one that its forward pass moves would be moved every time."""
    own = {**dict(module.named_buffers(recurse=False)), **vars(module)}
    for name, value in own.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim():
            raise RuntimeError(f"{type(module).__name__}.{name} {list(value.shape)} was left on the CPU")


@contextmanager
def ranks(library: Path, store: Path) -> Iterator[None]:
    """On a rank of `run_ranks`: the device, and in the place of its process group one that is the device's."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # a rank that leaves early would break the other's connection
    dist.destroy_process_group()
    install(library)
    dist.init_process_group(BACKEND, init_method=f"file://{store}", rank=rank, world_size=world_size)
    yield


def _group(store: Any, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """gloo under another name: what the code does over gloo alone, it does on CPUs alone."""
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def _module() -> Any:
    from torch.utils.backend_registration import _DummyBackendModule

    class Module(_DummyBackendModule, ModuleType):
        Stream, Event = _Stream, _Event
        device = staticmethod(lambda device: nullcontext())
        set_device = staticmethod(lambda device: None)
        get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
        set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
        get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float32])

    return Module(f"torch.{NAME}")


def _tell_hugging_face() -> None:
    """accelerate and the Trainer have lists of devices; this one is not in them."""
    from accelerate.state import DistributedType, PartialState
    from transformers import training_args

    os.environ["ACCELERATE_TORCH_DEVICE"] = DEVICE
    PartialState._prepare_backend = lambda *_: (BACKEND, DistributedType.MULTI_GPU)
    training_args.is_torch_bf16_gpu_available = lambda: True


class _Done:
    """Work is done when it is asked for: there is nothing to wait for."""

    def wait(self, *_: Any) -> None: ...

    wait_stream = wait_event = record = record_event = synchronize = wait

    def query(self) -> bool:
        return True


class _Stream(_Done, torch.Stream):  # type: ignore[misc]
    """Of torch's own class, which `Tensor.record_stream` takes alone."""

    def __new__(cls, *_: Any, **__: Any) -> "_Stream":
        kind = torch._C._autograd.DeviceType.PrivateUse1
        return super().__new__(cls, stream_id=0, device_index=0, device_type=int(kind))  # type: ignore[call-overload]


class _Event(_Done):
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def elapsed_time(self, end: "_Event") -> float:
        return 0.0


class PretendAccelerator(CPU_Accelerator):
    """What DeepSpeed asks a device: its name, and streams and events, which a CPU does not have."""

    Stream, Event = _Stream, _Event

    def __init__(self) -> None:
        super().__init__()
        self._name, self._communication_backend_name = NAME, BACKEND

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return True

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def device(self, device_index: int | None = None) -> Any:
        return nullcontext()

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return DEVICE

    def device_count(self) -> int:
        return 1

    def create_op_builder(self, op_name: str) -> None:
        """No kernels of DeepSpeed's own: they would be compiled for a CPU."""

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def current_stream(self, device_index: int | None = None) -> Any:
        return _Stream()

    def default_stream(self, device_index: int | None = None) -> Any:
        return _Stream()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == NAME
