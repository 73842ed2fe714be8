"""Builds the extension `torch_ep._C`; everything else about the package is in pyproject.toml."""

import site
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
except ModuleNotFoundError:
    # In pip's isolated build environment: the extension has to be built with the torch that it will run with, which is
    # that of the environment it is installed into, not one that pip would fetch for the build.
    sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        sys.exit("torch_ep is built with the torch that it will run with: install torch (2.11 or newer) first")

from torch.utils.cpp_extension import BuildExtension, CppExtension

sources = sorted(str(p) for p in Path("torch_ep/csrc").rglob("*.cpp"))

setup(
    ext_modules=[
        CppExtension(
            "torch_ep._C",
            sources,
            depends=sorted(str(p) for p in Path("torch_ep/csrc").rglob("*.h")),
            # Without contraction every machine sums to the same bits as the reference.
            extra_compile_args=["-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wno-deprecated-declarations"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
