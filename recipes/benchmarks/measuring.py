"""What the benchmarks share: their command lines, the machine, memory of a process, processes of their own."""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import multiprocessing
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hf_dskd.errors import UserError, check_name


if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")


# ---- The command line


class Parser(argparse.ArgumentParser):
    """Refuses in one line, without the usage."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def positive(text: str) -> int:
    """Read a whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def names_of(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Read names separated by commas; `all` is all of them."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(known) if text == "all" else tuple(dict.fromkeys(text.split(",")))
        for name in names:
            try:
                check_name("", name, known)
            except UserError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        return names

    return read


def choose_device(name: str | None) -> str:
    """Return the device asked for, by default a GPU where there is one."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device 'cuda': torch sees no GPU here; use cpu")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: str) -> str:
    """Name the GPU or the processor, as far as the system tells."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---- Processes


def quiet() -> None:
    """Leave the terminal to the benchmark: only what goes wrong is said."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("hf_dskd").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a new process; `None` if the system ends it, for want of memory probably."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return None


# ---- Memory


class PeakMemory:
    """
    The most memory that was in use at once inside a `with` block, over what was in use at its start: `peak`, in bytes.

    On a CPU that is memory of the process, as the operating system counts it; nothing else sees what matrix products
    and backward passes allocate for a moment. Linux keeps a high-water mark that can be reset; elsewhere, and where
    a container doesn't allow that, a thread looks every few milliseconds, and may miss the top.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        return_freed_memory()
        self.marked = reset_high_water()
        if self.marked:
            self.start = high_water()
        else:
            self.start = self.top = resident()
            self.done = threading.Event()
            self.watcher = threading.Thread(target=self._watch, daemon=True)
            self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.003):
            self.top = max(self.top, resident())

    def __exit__(self, *exception: object) -> None:
        import torch

        if self.cuda:
            top = torch.cuda.max_memory_allocated()
        elif self.marked:
            top = high_water()
        else:
            self.done.set()
            self.watcher.join()
            top = max(self.top, resident())
        # What fits into memory that Python holds anyway adds nothing; a page is the least that can be told.
        self.peak = max(top - self.start, 4096)


def return_freed_memory() -> None:
    """
    Give freed memory back to the operating system, where that can be asked for.

    Blocks above some 32 MB are mapped one by one and go back at once. Smaller ones stay in the C library's heap: the
    pass that comes second would find them there, and seem to need that much less.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def reset_high_water() -> bool:
    """Set the mark to what is in use now, and tell whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM" in Path("/proc/self/status").read_text()
    except OSError:
        return False


def high_water() -> int:
    """Return the most memory, in bytes, that the process had since the last reset, or ever."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    # Bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident() -> int:
    """Return the memory, in bytes, that the process has now."""
    import psutil  # comes with accelerate

    return psutil.Process().memory_info().rss


def available() -> int:
    """Return the memory, in bytes, that programs can still have."""
    import psutil

    return psutil.virtual_memory().available
