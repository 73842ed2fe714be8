"""Runs parts of setup.py and tools/setup_env.py: what a build would do."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "torch_ep" / "csrc"


class Build:
    """Runs setup.py up to its call of setuptools.setup, with a torch and a toolkit of the test's choice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.monkeypatch = monkeypatch
        self.toolkit = tmp_path / "toolkit"
        self.namespace: dict[str, Any] = {}
        (self.toolkit / "bin").mkdir(parents=True)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")  # setup.py sets it; this takes it back after the test
        monkeypatch.delenv("CUDAHOSTCXX", raising=False)

    def add_nvcc(self, version: str = "13.0") -> None:
        nvcc = self.toolkit / "bin" / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho {version}\n")
        nvcc.chmod(0o755)

    def extension(self, root: Path = ROOT, cuda: str | None = "13.0") -> setuptools.Extension:
        calls: list[dict[str, list[setuptools.Extension]]] = []
        self.monkeypatch.chdir(root)
        self.monkeypatch.setattr(torch.version, "cuda", cuda)
        self.monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(self.toolkit))
        self.monkeypatch.setattr(setuptools, "setup", lambda **arguments: calls.append(arguments))
        self.namespace = runpy.run_path(str(ROOT / "setup.py"))
        (extension,) = calls[0]["ext_modules"]
        return extension


def load_setup_env() -> ModuleType:
    """tools/setup_env.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
