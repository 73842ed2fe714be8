"""The CUDA sources without a GPU: builds take the right ones, and they compile."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from support.builds import CSRC, ROOT, Build
from torch.utils import cpp_extension

NVLINK = CSRC / "nvlink"
NVCC = shutil.which("nvcc")

KERNELS = sorted(CSRC.rglob("*.cu"))
# Programs of tests, no part of the package.
PROGRAMS = sorted((ROOT / "test" / "kernels" / "sanitizer").glob("*.cu"))
# What kernels and the host share.
KERNEL_HEADERS = [NVLINK / "params.h", CSRC / "local" / "permute_kernels.h"]
DEVICE_HEADERS = sorted(CSRC.rglob("*.cuh"))
# Host files that a build without CUDA leaves out.
CUDA_HOST_FILES = [
    p for p in CSRC.rglob("*.cpp") if (p.parent == NVLINK and p.stem != "limits") or p.stem.endswith("_cuda")
]
HOST_FILES = sorted({*CUDA_HOST_FILES, *(p for p in CSRC.rglob("*.cpp") if "TORCH_EP_CUDA" in p.read_text())})

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


def relative(path: Path) -> str:
    return path.relative_to(CSRC if CSRC in path.parents else ROOT).as_posix()


def errors_of(command: list[str]) -> str:
    """Returns the compiler's output if it fails, else ""."""
    done = subprocess.run(command, capture_output=True, text=True)
    complaint = (done.stdout + done.stderr).strip()
    return "" if done.returncode == 0 else complaint or f"{command[0]} exited with {done.returncode}"


def compile_kernel(path: Path) -> str:
    """Compiles without torch's include folders, with the macros that torch's builds define for nvcc."""
    host_compiler = ["-ccbin", os.environ["CUDAHOSTCXX"]] if os.environ.get("CUDAHOSTCXX") else []
    if path in PROGRAMS:  # they hold the same kernels again: syntax and types suffice
        steps = ["-gencode=arch=compute_90a,code=compute_90a", "-fdevice-syntax-only", "-Xcompiler", "-fsyntax-only"]
    else:
        steps = ["-gencode=arch=compute_90a,code=sm_90a", "-G"]  # not optimized, which halves the time
    flags = [f"-I{CSRC}", *steps, "-std=c++20", "-Werror", "all-warnings", *cpp_extension.COMMON_NVCC_FLAGS]
    flags += host_compiler
    with tempfile.TemporaryDirectory() as folder:
        return errors_of([str(NVCC), *flags, "-c", str(path), "-o", f"{folder}/kernel.o"])


def cuda_include_folders() -> list[str]:
    """Asks nvcc itself, which may be a script that calls an nvcc elsewhere."""
    answer = subprocess.run([str(NVCC), "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    lines = re.findall(r"^#\$ (?:SYSTEM_)?INCLUDES=(.*)", answer.stderr, re.M)
    return [word.removeprefix("-I") for word in shlex.split(" ".join(lines)) if word != "-isystem"]


def check_host_file(path: Path) -> str:
    """Checks syntax and types against torch's headers."""
    headers = [*cpp_extension.include_paths(), *cuda_include_folders(), sysconfig.get_path("include")]
    flags = ["-fsyntax-only", "-std=c++20", "-DTORCH_EP_CUDA", "-DTORCH_EXTENSION_NAME=_C", "-Wall", "-Werror"]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    with tempfile.TemporaryDirectory() as stand_ins:
        # The one CUDA header that a torch without CUDA lacks, for it is generated; empty will do.
        generated = Path(stand_ins, "c10", "cuda", "impl", "cuda_cmake_macros.h")
        generated.parent.mkdir(parents=True)
        generated.touch()
        includes = [word for folder in (*headers, stand_ins) for word in ("-isystem", folder)]
        return errors_of([*compiler, *flags, "-Wno-deprecated-declarations", f"-I{CSRC}", *includes, str(path)])


def torch_includes(path: Path, seen: set[Path] | None = None) -> list[str]:
    """`file: header` for each header of torch that the file includes, itself or through others of ours."""
    seen = {path} if seen is None else seen
    found = []
    for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M):
        if re.match(r"(torch|ATen|c10|caffe2|pybind11)/|Python\.h", header):
            found.append(f"{path.name}: {header}")
        ours = next((p for p in ((path.parent / header).resolve(), CSRC / header) if p.is_file()), None)
        if ours is not None and ours not in seen:
            seen.add(ours)
            found += torch_includes(ours, seen)
    return found


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[[Path], str]]:
    """Returns the errors of one of our files. The compilers work on all files side by side."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        # The slowest first.
        jobs: dict[Path, Future[str]] = {p: pool.submit(check_host_file, p) for p in HOST_FILES}
        jobs |= {p: pool.submit(compile_kernel, p) for p in (*PROGRAMS, *KERNELS)}
        yield lambda path: jobs[path].result()
        pool.shutdown(cancel_futures=True)


@needs_nvcc
@pytest.mark.parametrize("path", [*KERNELS, *PROGRAMS], ids=relative)
def test_kernel_compiles_for_hopper_without_a_warning(compiled: Callable[[Path], str], path: Path) -> None:
    assert compiled(path) == ""


@needs_nvcc
@pytest.mark.parametrize("path", HOST_FILES, ids=relative)
def test_host_file_of_a_cuda_build_is_valid(compiled: Callable[[Path], str], path: Path) -> None:
    assert compiled(path) == ""


@pytest.mark.parametrize("path", [*KERNELS, *DEVICE_HEADERS, *KERNEL_HEADERS, *PROGRAMS], ids=relative)
def test_device_code_includes_no_torch_header(path: Path) -> None:
    assert torch_includes(path) == []


def test_there_are_files_of_each_kind_to_check() -> None:
    assert KERNELS and PROGRAMS and DEVICE_HEADERS and CUDA_HOST_FILES


SOUND_KERNEL = """
#include <cuda_runtime_api.h>
__global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }
void launch(float* x, cudaStream_t stream) { twice<<<1, 32, 0, stream>>>(x); }
"""


@needs_nvcc
@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (SOUND_KERNEL, ""),
        (SOUND_KERNEL.replace("threadIdx", "thread"), "undefined"),
        (SOUND_KERNEL.replace("{ x[", "{ int unused; x["), "never referenced"),
        (SOUND_KERNEL.replace("{ x[", '{ asm("nonsense;"); x['), "'nonsense'"),
        ("#include <ATen/core/Tensor.h>\n" + SOUND_KERNEL, "ATen/core/Tensor.h"),
    ],
    ids=["sound", "error", "warning", "ptx", "torch-header"],
)
def test_compiling_a_kernel_finds_its_errors(tmp_path: Path, code: str, complaint: str) -> None:
    (tmp_path / "kernel.cu").write_text(code)
    answer = compile_kernel(tmp_path / "kernel.cu")
    assert complaint in answer and bool(answer) == bool(complaint)


SOUND_HOST_FILE = """
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#ifdef TORCH_EP_CUDA
void wait() { C10_CUDA_CHECK(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream())); }
#endif
"""


@needs_nvcc
@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (SOUND_HOST_FILE, ""),
        (SOUND_HOST_FILE.replace("cudaStreamSynchronize", "cudaStreamSynchronise"), "cudaStreamSynchronise"),
        (SOUND_HOST_FILE.replace("wait() {", "wait() { int unused;"), "unused"),
    ],
    ids=["sound", "error", "warning"],
)
def test_checking_a_host_file_finds_its_errors(tmp_path: Path, code: str, complaint: str) -> None:
    (tmp_path / "host.cpp").write_text(code)
    answer = check_host_file(tmp_path / "host.cpp")
    assert complaint in answer and bool(answer) == bool(complaint)


@pytest.mark.parametrize("include", ["<torch/library.h>", '"ATen/ATen.h"', "<c10/util/Half.h>"])
def test_a_torch_header_is_found_through_other_headers(tmp_path: Path, include: str) -> None:
    (tmp_path / "device").mkdir()
    (tmp_path / "kernel.cu").write_text('#include "device/a.cuh"\n#include <cstdint>\n')
    (tmp_path / "device" / "a.cuh").write_text('#include "../launch.h"\n')
    (tmp_path / "launch.h").write_text(f'#include "device/a.cuh"\n#  include {include}\n')
    assert torch_includes(tmp_path / "kernel.cu") == [f"launch.h: {include[1:-1]}"]


def in_tree(paths: list[Path]) -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in paths)


def test_build_with_cuda_takes_every_source(build: Build) -> None:
    build.add_nvcc()
    assert sorted(build.extension().sources) == in_tree([*CSRC.rglob("*.cpp"), *KERNELS])


def test_build_with_cuda_defines_its_macro_for_the_host_files(build: Build) -> None:
    build.add_nvcc()
    assert "-DTORCH_EP_CUDA" in build.extension().extra_compile_args["cxx"]


@pytest.mark.parametrize(("given", "taken"), [("", "9.0a"), ("10.0a", "10.0a")], ids=["hopper-if-not-set", "as-set"])
def test_build_with_cuda_is_for(build: Build, monkeypatch: pytest.MonkeyPatch, given: str, taken: str) -> None:
    build.add_nvcc()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    build.extension()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == taken


def test_every_header_makes_a_build_stale(build: Build) -> None:
    assert sorted(build.extension().depends) == in_tree([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])


@pytest.mark.parametrize("cuda", [None, "13.0"], ids=["torch-without-cuda", "no-nvcc"])
def test_build_without_cuda_takes_nothing_of_cuda(build: Build, cuda: str | None) -> None:
    if cuda is None:
        build.add_nvcc()
    extension = build.extension(cuda=cuda)
    assert sorted(extension.sources) == in_tree([p for p in CSRC.rglob("*.cpp") if p not in CUDA_HOST_FILES])
    assert "-DTORCH_EP_CUDA" not in extension.extra_compile_args


def test_build_finds_the_toolkit_of_an_nvcc_elsewhere(build: Build, tmp_path: Path) -> None:
    headers = tmp_path / "real" / "include"
    headers.mkdir(parents=True)
    (headers / "cuda_runtime_api.h").touch()
    (tmp_path / "real" / "bin").mkdir()
    build.add_nvcc()
    nvcc = build.toolkit / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ _SPACE_= ' >&2\necho '#$ TOP={tmp_path}/real/bin/..' >&2\n")
    include_dirs = build.extension().include_dirs
    assert str(headers) in include_dirs and str(build.toolkit / "include") not in include_dirs


def test_build_says_when_only_nvcc_is_missing(build: Build) -> None:
    build.extension()
    news = "without CUDA kernels (no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda)"
    assert news in build.namespace["describe"]([], use_ninja=True)


def test_two_sources_with_one_object_file_are_refused(build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "tree" / "torch_ep" / "csrc" / "nvlink"
    folder.mkdir(parents=True)
    (folder / "plan.cpp").touch()
    (folder / "plan.cu").touch()
    with pytest.raises(
        SystemExit, match=r"nvlink/plan\.cpp and torch_ep/csrc/nvlink/plan\.cu would be compiled to one"
    ):
        build.extension(root=tmp_path / "tree", cuda=None)


def test_another_nvcc_makes_the_extension_stale(
    build: Build, monkeypatch: pytest.MonkeyPatch, setup_env: ModuleType
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(build.toolkit))
    digests = {setup_env.build_digest("python", "2.11", ".so")}
    for version in ("13.0", "13.1"):
        build.add_nvcc(version)
        digests.add(setup_env.build_digest("python", "2.11", ".so"))
    assert len(digests) == 3
