"""Builds the extension `torch_ep._C`; everything else about the package is in pyproject.toml.

With a torch that has CUDA, and nvcc where torch looks for it (CUDA_HOME, then PATH, then /usr/local/cuda), what is in
torch_ep/csrc/cuda is built too: the nvlink transport. It is built for TORCH_CUDA_ARCH_LIST, Hopper if that is not set;
CUDAHOSTCXX names nvcc's host compiler.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
except ModuleNotFoundError:
    # In pip's isolated build environment: the extension has to be built with the torch that it will run with, which is
    # that of the environment it is installed into, not one that pip would fetch for the build.
    sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    try:
        import torch
    except ModuleNotFoundError:
        sys.exit("torch_ep is built with the torch that it will run with: install torch (2.11 or newer) first")

from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

CSRC = Path("torch_ep/csrc")
CUDA = CSRC / "cuda"

# Without contraction every machine sums to the same bits as the reference.
CXX_FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wno-deprecated-declarations"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo"]


def has_cuda() -> bool:
    if torch.version.cuda is None:
        return False
    home = cpp_extension.CUDA_HOME
    nvcc = None if home is None else shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None:
        print("torch_ep: no nvcc: building without the nvlink transport", file=sys.stderr)
        return False
    if not has_headers(home):
        # A link to nvcc, or a script that starts it: it knows where the rest of its toolkit is.
        said = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        if top is not None and has_headers(top[1]):
            cpp_extension.CUDA_HOME = os.path.realpath(top[1])
    return True


def has_headers(toolkit: str) -> bool:
    return os.path.exists(os.path.join(toolkit, "include", "cuda_runtime_api.h"))


def sources(cuda: bool) -> list[str]:
    paths = sorted([*CSRC.rglob("*.cpp"), *CUDA.rglob("*.cu")])
    # Checked in every build, so that one without CUDA finds what would break one with it.
    taken: dict[Path, Path] = {}
    for path in paths:
        other = taken.setdefault(path.with_suffix(".o"), path)
        if other != path:
            sys.exit(f"torch_ep: {other} and {path} would be compiled to one object file: rename one of them")
    return [str(path) for path in paths if cuda or CUDA not in path.parents]


def extension() -> Extension:
    depends = sorted(str(path) for suffix in ("*.h", "*.cuh") for path in CSRC.rglob(suffix))
    if not has_cuda():
        return CppExtension("torch_ep._C", sources(cuda=False), depends=depends, extra_compile_args=CXX_FLAGS)
    # Left to itself torch builds for the GPUs that it sees: none on a build machine, and a Hopper as sm_90, not sm_90a.
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or "9.0a"
    host_compiler = os.environ.get("CUDAHOSTCXX")
    flags = {
        "cxx": [*CXX_FLAGS, "-DTORCH_EP_CUDA"],
        "nvcc": [*NVCC_FLAGS, *(["-ccbin", host_compiler] if host_compiler else [])],
    }
    return CUDAExtension("torch_ep._C", sources(cuda=True), depends=depends, extra_compile_args=flags)


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
