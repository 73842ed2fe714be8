"""`python -m torch_ep.doctor` prints what a bug report needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import torch_ep
from torch_ep import doctor


def _doctor(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch_ep.doctor", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_as_json() -> None:
    found = json.loads(_doctor("--json"))
    assert found["versions"]["torch_ep"] == torch_ep.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["GPUs"]) == torch.cuda.device_count()
    assert found["backends built"] == list(torch.ops.ep._backends())
    assert found["check"].endswith("works")


def test_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    lines = _doctor().splitlines()
    assert f"  torch: {torch.__version__}" in lines
    assert "  GLOO_SOCKET_IFNAME: eth7" in lines
    assert any(line.startswith("backend of CUDA tensors: ") for line in lines)


@pytest.mark.parametrize(
    ("why_not", "no_access", "expected"),
    [
        (None, [], "nvlink, given every limit"),
        (None, ["0 -> 1"], "c10d: some GPUs cannot write into others: 0 -> 1"),
        ("there is no CUDA device", [], "c10d: there is no CUDA device"),
    ],
    ids=["nvlink", "no access", "no GPU"],
)
def test_backend_that_init_would_choose(
    monkeypatch: pytest.MonkeyPatch, why_not: str | None, no_access: list[str], expected: str
) -> None:
    monkeypatch.setattr(doctor, "_why_not_nvlink", lambda *arguments: why_not)
    assert doctor._backend(2, no_access) == expected


def test_pairs_of_gpus_without_access(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: (i, j) != (2, 0))
    assert doctor._no_access(3) == ["2 -> 0"]
