"""The errors a user can meet, and the exit code of each.

A message has three parts: what is wrong with which value, where (config key or file name), and what to do about it.
Anything that is not a `LoraBoothError` is a fault of ours, of which `cli/crash.py` writes a report.
"""

from __future__ import annotations


class LoraBoothError(Exception):
    """Base of every error that is told to the user in one clear message."""

    exit_code = 1


class ConfigError(LoraBoothError):
    """A setting or command line that cannot be run: unknown key, wrong type, bad range, contradiction."""

    exit_code = 2


class DataError(LoraBoothError):
    """The user's pictures or captions: missing, unreadable, too few."""

    exit_code = 3


class ModelError(LoraBoothError):
    """A base model or adapter file: missing, unreadable, unsafe, of another family, or matching no target."""

    exit_code = 4


class DeviceMemoryError(LoraBoothError):
    """The device ran out of memory, or the plan does not fit it."""

    exit_code = 5


class DiskError(LoraBoothError):
    """A file could not be written: no space, no permission, folder vanished, folder in use."""

    exit_code = 6


class NumericError(LoraBoothError):
    """NaN or infinity in latents, loss, gradients or weights."""

    exit_code = 7


class ProcessLostError(LoraBoothError):
    """Another process of a run on several devices ended without a word."""

    exit_code = 8


class Interrupted(LoraBoothError):
    """The user or the system asked to stop; everything was saved first. Exit code 128 + signal number."""

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


_NO_MEMORY = (
    "DefaultCPUAllocator",  # of torch, for main memory
    "out of memory",  # "MPS backend …", "XPU …", "CUDA error: …", "HIP error: …"
    "Invalid buffer size",  # of Metal, for one tensor that is too large
    "_STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN, for their workspaces
    "UR_RESULT_ERROR_OUT_OF_",  # of Intel's driver: device memory, host memory or resources
)
"""In the text of the RuntimeError that libraries raise where they have no class for it."""
_SMALL_PAGE_FILE = 1455
"""Windows' number for a page file that is too small to map a file of weights."""


def lacks_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what led to it, is that a device or the machine has no memory left.

    Known by name and text, since torch need not be there.
    """
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY):
            return True
        if getattr(error, "winerror", None) == _SMALL_PAGE_FILE:
            return True
        error = error.__cause__ or error.__context__
    return False
