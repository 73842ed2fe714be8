"""Makes the working tree ready to run and prints the Python to run it with.

    python3 tools/setup_env.py [--no-extension] [extra ...]        extras: those of pyproject.toml

Uses the Python that runs this script if it has torch, and a virtual environment in .venv otherwise. Installs what is
missing and builds the extension in place if its sources, the Python, torch or nvcc changed; with nothing to do it takes
a moment. The path alone goes to stdout, news to stderr. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = "2.11"
# Where torch has to be installed: a build without CUDA if pip can find one and there is no GPU, for it is far smaller.
TORCH = "2.13.0"
BUILD_TOOLS = ["setuptools>=77", "ninja"]
SECONDS_BETWEEN_NEWS = 10  # where stderr is no terminal, on which one line counts the seconds

# Runs in the chosen Python, which may be another version than this one.
PROBE = """
import importlib.metadata, importlib.util, json, sys, sysconfig
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = None
if importlib.util.find_spec("torch") is None:
    versions["torch"] = None
print(json.dumps([versions, sysconfig.get_config_var("EXT_SUFFIX"), sysconfig.get_path("purelib")]))
"""


def say(message: str) -> None:
    print(f"set-up: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> None:
    sys.exit(f"set-up failed: {message}")


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0]))


def satisfied(requirement: str, version: str | None) -> bool:
    """Knows the forms that pyproject.toml uses: a name alone, name>=version, name==version."""
    if version is None:
        return False
    _, operator, wanted = re.fullmatch(r"([\w.-]+)(>=|==)?(.*)", requirement).groups()
    if operator == ">=":
        return numbers(version) >= numbers(wanted)
    return operator is None or version == wanted


def extra_requirements(extra: str) -> list[str]:
    """Read without tomllib, which Python 3.10 does not have."""
    found = re.search(rf"^{re.escape(extra)} = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    if found is None:
        fail(f"pyproject.toml has no extra named {extra!r}")
    return ast.literal_eval(found[1])


def name_of(requirement: str) -> str:
    return re.split(r"[<>=;]", requirement)[0]


def probe(python: str, requirements: list[str]) -> tuple[dict[str, str | None], str, str]:
    names = ["torch", *map(name_of, requirements)]
    # Outside the tree: its folders must not be taken for installed packages.
    answer = subprocess.run([python, "-c", PROBE, *names], capture_output=True, text=True, cwd=os.sep)
    if answer.returncode:
        fail(f"{python} does not run:\n{answer.stderr.strip()}")
    versions, suffix, purelib = json.loads(answer.stdout)
    return versions, suffix, purelib


def compiled_files(output: str) -> str:
    """How far the build with this output is, by ninja's counts of finished commands; "" before the first."""
    counts = re.findall(r"^\[(\d+)/(\d+)\] ", output, re.MULTILINE)
    return "{} of {} files compiled".format(*counts[-1]) if counts else ""


def run(command: list[str], what: str, log: Path, **kwargs: Any) -> int:
    """The command's exit status. Its output goes to `log`; its lines for the user, and that it goes on, to stderr."""
    on_terminal = sys.stderr.isatty()
    begun = time.monotonic()
    said, news_s = 0, SECONDS_BETWEEN_NEWS
    with open(log, "w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **kwargs) as process:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                output = log.read_text(errors="replace")
                if on_terminal:
                    print("\r\033[K", end="", file=sys.stderr, flush=True)  # back, and clear the line
                lines = [line for line in output.splitlines() if line.startswith("torch_ep: ")]  # see setup.py
                for line in lines[said:]:
                    say(line)
                said = len(lines)
                if process.returncode is not None:
                    return process.returncode
                seconds = int(time.monotonic() - begun)
                news = ", ".join(filter(None, [f"{what}: {seconds // 60}:{seconds % 60:02}", compiled_files(output)]))
                if on_terminal:
                    print(f"set-up: {news}", end="", file=sys.stderr, flush=True)
                elif seconds >= news_s:
                    say(news)
                    news_s = seconds + SECONDS_BETWEEN_NEWS
        except BaseException:
            process.kill()
            raise


def pip_install(python: str, requirements: list[str]) -> str | None:
    """None, or why it failed."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    command = [python, "-m", "pip", "install", "--quiet", "--no-input", *requirements]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        status = run(command, "pip install", log, env=environment, cwd=ROOT)
        return None if status == 0 else (log.read_text(errors="replace").strip() or f"pip exited with {status}")


def choose_python() -> str:
    versions, _, _ = probe(sys.executable, [])
    version = versions["torch"]
    if version is not None and satisfied(f"torch>={OLDEST_TORCH}", version):
        return sys.executable
    if version is not None:
        say(f"{sys.executable} has torch {version}, this needs {OLDEST_TORCH}: using .venv instead")
    python = VENV / "bin" / "python"
    if not python.exists():
        say("making a virtual environment in .venv")
        done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(VENV, ignore_errors=True)
            fail(
                "python3 -m venv could not make .venv (some systems have it in a package of its own, such as "
                f"python3-venv):\n{(done.stdout + done.stderr).strip()}"
            )
    return str(python)


def install_torch(python: str) -> None:
    say(f"installing torch {TORCH} (minutes, if it has to be downloaded)")
    wanted = [f"torch=={TORCH}"]
    if sys.platform == "linux" and shutil.which("nvidia-smi") is None:
        wanted.insert(0, f"torch=={TORCH}+cpu")
    for requirement in wanted:
        reason = pip_install(python, [requirement])
        if reason is None:
            return
    fail(f"pip could not install torch {TORCH}; install torch >= {OLDEST_TORCH} yourself and try again:\n{reason}")


def install_missing(python: str, requirements: list[str], versions: dict[str, str | None]) -> None:
    missing = [r for r in requirements if not satisfied(r, versions[name_of(r)])]
    if missing:
        say(f"installing {', '.join(missing)}")
        reason = pip_install(python, missing)
        if reason is not None:
            fail(f"pip could not install {' '.join(missing)} for {python}:\n{reason}")


def nvcc_version() -> str:
    """What nvcc says of itself and where it is, "" if there is none; looks where torch does, without importing it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return ""
    return nvcc + subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout


def build_digest(python: str, torch_version: str, suffix: str) -> str:
    """Changes with everything that the extension is made from and with."""
    sources = [ROOT / "setup.py", *sorted(p for p in (ROOT / "torch_ep" / "csrc").rglob("*") if p.is_file())]
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    digest = hashlib.sha256(f"{python} {torch_version} {suffix} {nvcc_version()} {architectures}".encode())
    for path in sources:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build_extension(python: str, torch_version: str, suffix: str) -> None:
    digest = build_digest(python, torch_version, suffix)
    stamp = ROOT / "build" / "extension.stamp"
    library = ROOT / "torch_ep" / f"_C{suffix}"
    if library.exists() and stamp.exists() and stamp.read_text() == digest:
        return
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        fail(f"no C++ compiler: {compiler} is not on PATH (set CXX, or install g++)")
    say("building the extension, minutes the first time")
    stamp.parent.mkdir(exist_ok=True)
    stamp.unlink(missing_ok=True)
    log = ROOT / "build" / "extension.log"
    status = run([python, "setup.py", "build_ext", "--inplace"], "building", log, cwd=ROOT)
    output = log.read_text(errors="replace")
    if status:
        errors = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()[-20:]
        hint = "\nPython's headers are missing (some systems: python3-dev)" if "Python.h" in output else ""
        if "cuda_runtime_api.h: No such file" in output:
            hint += "\nCUDA's headers are not beside nvcc: set CUDA_HOME to the folder that has bin/nvcc and include/"
        fail("the extension does not build; all of the output is in build/extension.log:\n" + "\n".join(errors) + hint)
    imported = subprocess.run([python, "-c", "import torch_ep"], capture_output=True, text=True, cwd=ROOT)
    if imported.returncode:
        fail(f"the extension was built but does not load:\n{imported.stderr.strip()}")
    stamp.write_text(digest)


def main() -> None:
    if sys.version_info < OLDEST_PYTHON:
        fail(f"needs Python {'.'.join(map(str, OLDEST_PYTHON))} or newer, this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--no-extension", action="store_true")
    args = parser.parse_args()

    requirements = sorted({r for extra in args.extras for r in extra_requirements(extra)} | {*BUILD_TOOLS})
    python = choose_python()
    versions, suffix, purelib = probe(python, requirements)
    if versions["torch"] is None:
        install_torch(python)
        versions, suffix, purelib = probe(python, requirements)
    install_missing(python, requirements, versions)
    if VENV in Path(python).parents:
        link = Path(purelib) / "torch_ep_in_place.pth"
        if not link.exists():
            link.write_text(f"{ROOT}\n")  # .venv/bin/python and torchrun find torch_ep from any folder
    if not args.no_extension:
        build_extension(python, str(versions["torch"]), suffix)
    print(python)


if __name__ == "__main__":
    main()
