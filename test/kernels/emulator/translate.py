"""Makes C++ for the emulator out of the CUDA sources: copies them, and changes them where C++ differs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
KERNELS = Path("torch_ep/csrc")
PROGRAMS = Path("test/kernels/sanitizer")

# CUDA's own syntax. Everything else is macros and functions in emulator.h.
CHANGES = [
    # kernel<<<grid, threads, shared[, stream]>>>(arguments);
    (r"(\w+)<<<((?:[^<>]|<[^<>]*>|->)*?)>>>\(((?:[^()]|\([^()]*\))*)\);", r"emulator::launch([=] { \1(\3); }, \2);"),
    (r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
     r"\1* \2 = reinterpret_cast<\1*>(emulator::shared_memory());"),
    (r"(?<!extern )__shared__ (\w+) (\w+)(\[\w+\])?;",
     r"static char key_of_\2; auto& \2 = emulator::shared_variable<\1\3>(&key_of_\2);"),
    (r'asm volatile\("bar\.sync %0, %1;" ::"r"\(([^"]*)\), "n"\((\w+)\) : "memory"\);',
     r"emulator::named_barrier(\1, \2);"),
]  # fmt: skip


def translate(program: str, destination: Path, change: Callable[[str, str], str] = lambda name, text: text) -> Path:
    """Translates a program below `destination`. `change(file name, text)` returns the text to translate."""
    folders = (ROOT / KERNELS, ROOT / PROGRAMS)
    sources = [p.relative_to(ROOT) for f in folders for p in f.rglob("*") if p.suffix in (".cu", ".cuh", ".h")]
    for path in sources:
        text = change(path.as_posix(), (ROOT / path).read_text())
        for pattern, replacement in CHANGES:
            text = re.sub(pattern, replacement, text)
        target = destination / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    here = Path(__file__).parent
    for name in ("nvlink/device/memory.cuh", "core/device/launch.cuh"):
        shutil.copy(here / Path(name).name, destination / KERNELS / name)
    shutil.copy(here / "emulator.h", destination / "emulator.h")
    return destination / PROGRAMS / f"{program}.cu"
