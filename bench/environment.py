"""Where and with what a benchmark ran. It names the kind of processor, never the machine."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch

import dia_kernels
from dia_kernels import backends


def processor() -> str:
    """The model name of the processor, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def describe(device: str = "cpu") -> dict[str, str | int]:
    """Date, processor or card, threads, versions, and the backend that the fused step uses."""
    reason = backends.missing(device)
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "processor": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dia_kernels": dia_kernels.__version__,
        "backend": device if reason is None else f"reference, because {reason}",
    }
