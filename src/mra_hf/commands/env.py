"""What this installation can do: versions, implementations of the attention, the CPU, the GPU.

Paste the output into a bug report.

example:
  mra-hf env > environment.txt
"""

import argparse
import importlib.metadata
import os
import platform

import torch

import mra_hf
from mra_attention.implementations import FAST, INSTALL_TRITON, triton_is_installed
from mra_attention.native_impl.library import instruction_sets

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "triton", "numpy", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> int:
    """Print one fact a line."""
    facts = environment()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def environment() -> dict[str, str]:
    """Name of a fact -> what is so here."""
    facts = {"mra_hf": mra_hf.__version__, "python": platform.python_version()}
    facts |= {name: _version(name) for name in LIBRARIES}
    facts["torch"] = torch.__version__  # with the device it was built for, which its metadata lacks
    if not triton_is_installed():
        facts["triton"] = f"not installed; only for GPUs: {INSTALL_TRITON}"
    facts["system"] = platform.platform()
    facts["processor"] = (
        f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    facts["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for name, implementation in FAST.items():
        facts[f'impl="{name}"'] = _availability(name, "cuda" in implementation.auto_devices)
    return facts


def _availability(name: str, is_for_gpus: bool) -> str:
    if is_for_gpus and not torch.cuda.is_available():
        return "not available: it is for CUDA and ROCm GPUs, and there is none"
    query = torch.zeros(1, 1, 1, 64, device="cuda" if is_for_gpus else "cpu")
    reason = FAST[name].refusal(query, 32, 32)
    if reason is not None:
        return f"not available: it {reason}"
    if name != "native":
        return "available"
    sets = instruction_sets()
    return f"available, on {sets[0]} (this machine runs {', '.join(sets)})"


def processor_name() -> str:
    """The CPU's name as its system knows it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
