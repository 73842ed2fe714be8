"""Builds the extension `torch_ep._C`; everything else about the package is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

sources = sorted(str(p) for p in Path("torch_ep/csrc").rglob("*.cpp"))

setup(
    ext_modules=[
        CppExtension(
            "torch_ep._C",
            sources,
            depends=sorted(str(p) for p in Path("torch_ep/csrc").rglob("*.h")),
            extra_compile_args=["-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wno-deprecated-declarations"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
