"""Builds the extension `torch_ep._C`; everything else about the package is in pyproject.toml.

The extension runs only with the torch that it is built with, so torch is no build requirement, which an installer would
fetch for the build alone: it is taken from the environment that torch_ep is installed into.

With a torch that has CUDA, and nvcc where torch looks for it (CUDA_HOME, then PATH, then /usr/local/cuda), the sources
that need CUDA are built too: see `needs_cuda`. They are built for TORCH_CUDA_ARCH_LIST, Hopper if that is not set;
CUDAHOSTCXX names nvcc's host compiler.
"""

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup

OLDEST_SETUPTOOLS = 77
OLDEST_TORCH = (2, 11)
CSRC = Path("torch_ep/csrc")

# Without contraction every machine sums to the same bits as the reference.
CXX_FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wno-deprecated-declarations"]
# For tools/sanitize.py: "address,undefined", or nothing. Without vptr, which needs type information that torch hides.
SANITIZE = os.environ.get("TORCH_EP_SANITIZE")
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"] if SANITIZE else []
if SANITIZE:
    CXX_FLAGS += [*SANITIZE_FLAGS, "-O1", "-g", "-fno-omit-frame-pointer"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo"]

# Of one compiler for one file, at most: g++ 12 on one core of an AMD EPYC.
SECONDS_PER_FILE = 30

NO_TORCH = """\
torch_ep: expected torch {oldest} or newer to build with, got none in {prefix}
The extension runs only with the torch that it is built with. If {prefix} is the
environment that you install torch_ep into, install torch there first. If it is not, your installer builds in an
environment of its own, which hides yours: install torch, "setuptools>={setuptools}" and ninja in yours, then pass
--no-build-isolation (pip, uv) or --no-isolation (python -m build)."""


def paths_without_isolation() -> list[str]:
    """What sys.path lacks of this Python's own. pip runs the Python that it installs for, and isolates it by these."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [sys.executable, "-c", "import sys; print(*sys.path, sep='\\n')"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [path for path in done.stdout.splitlines() if path not in ("", *sys.path)]


def check_requirements() -> None:
    """Makes torch importable. Exits with the reason and the remedy if this Python cannot build torch_ep."""
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        sys.exit(
            f"torch_ep: expected setuptools {OLDEST_SETUPTOOLS} or newer to build with, got {setuptools.__version__}: "
            f'install "setuptools>={OLDEST_SETUPTOOLS}"'
        )
    if importlib.util.find_spec("torch") is None:
        sys.path += paths_without_isolation()
    oldest = ".".join(map(str, OLDEST_TORCH))
    if importlib.util.find_spec("torch") is None:
        sys.exit(NO_TORCH.format(oldest=oldest, prefix=sys.prefix, setuptools=OLDEST_SETUPTOOLS))
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        sys.exit(f"torch_ep: expected torch {oldest} or newer to build with, got {torch.__version__}")


check_requirements()

import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def why_no_cuda() -> str | None:
    """None if this is a build with CUDA."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    home = cpp_extension.CUDA_HOME
    nvcc = None if home is None else shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None:
        return "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
    if not has_headers(home):
        # A link to nvcc, or a script that starts it: it knows where the rest of its toolkit is.
        said = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        if top is not None and has_headers(top[1]):
            cpp_extension.CUDA_HOME = os.path.realpath(top[1])
    return None


def has_headers(toolkit: str) -> bool:
    return os.path.exists(os.path.join(toolkit, "include", "cuda_runtime_api.h"))


def needs_cuda(path: Path) -> bool:
    in_nvlink = path.parent == CSRC / "nvlink" and path.stem != "limits"
    return path.suffix == ".cu" or in_nvlink or path.stem.endswith("_cuda")


def sources(cuda: bool) -> list[str]:
    paths = sorted([*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")])
    # Checked in every build, so that one without CUDA finds what would break one with it.
    taken: dict[Path, Path] = {}
    for path in paths:
        other = taken.setdefault(path.with_suffix(".o"), path)
        if other != path:
            sys.exit(f"torch_ep: {other} and {path} would be compiled to one object file: rename one of them")
    return [str(path) for path in paths if cuda or not needs_cuda(path)]


def extension() -> Extension:
    depends = sorted(str(path) for suffix in ("*.h", "*.cuh") for path in CSRC.rglob(suffix))
    if why_no_cuda() is not None:
        return CppExtension(
            "torch_ep._C",
            sources(cuda=False),
            depends=depends,
            include_dirs=[str(CSRC.resolve())],
            extra_compile_args=CXX_FLAGS,
            extra_link_args=SANITIZE_FLAGS,
        )
    # Left to itself torch builds for the GPUs that it sees: none on a build machine, and a Hopper as sm_90, not sm_90a.
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or "9.0a"
    host_compiler = os.environ.get("CUDAHOSTCXX")
    flags = {
        "cxx": [*CXX_FLAGS, "-DTORCH_EP_CUDA"],
        "nvcc": [*NVCC_FLAGS, *(["-ccbin", host_compiler] if host_compiler else [])],
    }
    return CUDAExtension(
        "torch_ep._C", sources(cuda=True), depends=depends, include_dirs=[str(CSRC.resolve())], extra_compile_args=flags
    )


class build_ext(BuildExtension):
    def build_extensions(self) -> None:
        (extension,) = self.extensions
        print(f"torch_ep: building {describe(extension.sources, self.use_ninja)}", file=sys.stderr, flush=True)
        super().build_extensions()


def describe(paths: list[str], use_ninja: bool) -> str:
    """What is built, with what, and how long it takes."""
    reason = why_no_cuda()
    what = f"with CUDA {torch.version.cuda}" if reason is None else f"without CUDA kernels ({reason})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if use_ninja:
        max_jobs = os.environ.get("MAX_JOBS", "")  # which torch heeds
        jobs = max(1, min(cores, int(max_jobs))) if max_jobs.isdigit() else cores
        where = f"on {jobs} core{'s' * (jobs > 1)}"
    else:
        jobs, where = 1, f"on 1 core of {cores}, since ninja is not installed"
    minutes = math.ceil(len(paths) * SECONDS_PER_FILE / jobs / 60)
    return (
        f"{len(paths)} files with torch {torch.__version__}, {what}: "
        f"about {minutes} minute{'s' * (minutes > 1)} {where}, less where built before"
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": build_ext})
