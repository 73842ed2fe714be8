"""Prints what a bug report needs: versions, GPUs and their links, and which backend `torch_ep.init` would choose.

python -m torch_ep.doctor            # --json for a program
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from typing import Any

import torch
import torch.distributed as dist

import torch_ep
from torch_ep.comm import _why_not_nvlink

__all__ = ["examine"]

_PACKAGES = ("nvshmem4py-cu13", "nvshmem4py-cu12", "nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12", "numpy")
_VARIABLES = ("CUDA_", "GLOO_", "MASTER_", "NCCL_", "NVSHMEM_", "OMP_NUM_THREADS", "TORCH")
# Limits within what backend nvlink takes, where the question is only whether this host has it.
_LIMITS = {"max_tokens_per_rank": 128, "hidden": 1024, "num_topk": 1}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "torch_ep": torch_ep.__version__,
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _gpus() -> list[str]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        gpus.append(
            f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} SMs, "
            f"sm_{found.major}{found.minor}"
        )
    return gpus


def _no_access(count: int) -> list[str]:
    """Pairs of GPUs of which the first cannot write into the memory of the second."""
    pairs = ((i, j) for i in range(count) for j in range(count) if i != j)
    return [f"{i} -> {j}" for i, j in pairs if not torch.cuda.can_device_access_peer(i, j)]


def _links() -> str | None:
    """What nvidia-smi says of the links between GPUs and network cards."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else None


def _backend(count: int, no_access: list[str]) -> str:
    """The backend that `torch_ep.init` chooses for the GPUs of this host, given every limit, and why."""
    why_not = _why_not_nvlink(None, 1, {**_LIMITS, "num_experts": max(1, count)})
    if why_not is None and no_access:
        why_not = f"some GPUs cannot write into others: {', '.join(no_access)}"
    return "nvlink, given every limit" if why_not is None else f"c10d: {why_not}"


def examine() -> dict[str, Any]:
    """What the command prints, as a dict that json takes."""
    gpus = _gpus()
    no_access = _no_access(len(gpus))
    return {
        "versions": _versions(),
        "CPU cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "GPUs": gpus,
        "backends built": list(torch.ops.ep._backends()),
        "backend of CUDA tensors": _backend(len(gpus), no_access),
        "backends of torch.distributed": [
            name for name in ("gloo", "nccl", "mpi", "ucc") if getattr(dist, f"is_{name}_available")()
        ],
        "links": _links(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }


def _check_exchange() -> str:
    """Runs an exchange on this rank alone."""
    x = torch.randn(4, 8, device="cuda" if torch.cuda.is_available() else "cpu")
    plan = torch_ep.plan(torch.arange(4, device=x.device)[:, None], 4)
    same = torch.equal(torch_ep.combine(torch_ep.dispatch(x, plan), plan), x)
    return f"an exchange on one rank ({x.device.type}) " + ("works" if same else "gives wrong rows: please report it")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m torch_ep.doctor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    found = {**examine(), "check": _check_exchange()}
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}:" + "".join(f"\n  {key}: {entry}" for key, entry in value.items()))
        elif isinstance(value, list):
            print(f"{name}: {', '.join(value) or 'none'}")
        elif value is not None:
            print(f"{name}: {value}" if "\n" not in str(value) else f"{name}:\n{value}")


if __name__ == "__main__":
    main()
