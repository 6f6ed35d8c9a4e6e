"""What is here: versions, processor, backends, the native library. ``python -m dia_kernels info`` prints it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import backends, operators
from .version import __version__

#: One section a key, each a mapping from a name to what is printed behind it.
Info = dict[str, dict[str, Any]]


def gather() -> Info:
    """Everything that ``info`` says; JSON can hold it."""
    return {
        "versions": versions(),
        "processor": _processor(),
        "backends": {name: _availability(name) for name in backends.names()},
        "native_library": _native_library(),
    }


def as_text(info: Info) -> str:
    """``info`` for a reader: a headline a section, a line an entry."""
    width = max(len(name) for section in info.values() for name in section)
    lines = []
    for headline, section in info.items():
        lines.append(headline.replace("_", " "))
        lines += [f"  {name:<{width}}  {_shown(value)}" for name, value in section.items()]
    return "\n".join(lines)


def as_json(info: Info) -> str:
    """``info`` for a program."""
    return json.dumps(info, indent=2)


def _shown(value: object) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or None
    return "none" if value is None else str(value)


def versions() -> dict[str, str | None]:
    """Of this package, of what it stands on, and of Python."""
    return {
        "dia_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": _triton_version(),
    }


def _triton_version() -> str | None:
    """Version of the installed Triton, without importing it: that would look for drivers and compilers."""
    # Builds for other vendors bring the same module under other names of the distribution.
    distributions = metadata.packages_distributions().get("triton", [])
    return metadata.version(distributions[0]) if distributions else None


def _processor() -> dict[str, str | int | None]:
    return {
        "model": processor_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
    }


def processor_model() -> str:
    """What the CPU calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _availability(backend: str) -> str:
    reason = backends.missing(backend)
    return "available" if reason is None else f"missing: {reason}"


def _native_library() -> dict[str, Any]:
    """What the native library says about its build."""
    if operators.library_error is not None:
        return {"loaded": "no"}
    library = ctypes.CDLL(str(operators.LIBRARY_PATH))
    if not hasattr(library, "dia_kernels_build_info"):
        return {"loaded": "yes", "build": "unknown: the library is older than this package, build it again"}
    build_info = library.dia_kernels_build_info
    build_info.restype = ctypes.c_char_p
    return {"loaded": "yes", **json.loads(build_info())}
