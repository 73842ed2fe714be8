"""Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests that show most with it.

    python tools/sanitize.py [--cases N] [--tests ...]

The build has a folder of its own, build/sanitize, beside the extension in the working tree. On Linux, with a C++
compiler that has both sanitizers (GCC and Clang do); leaks are not looked for, since Python leaves many.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
PACKAGE = BUILD / "lib"
TESTS = ["api/test_reference.py", "api/test_low_latency.py", "api/test_errors.py"]
# What is left out compiles, which takes longer than all the rest and runs nothing of the extension.
NOT_COMPILED = "not compil and not inductor and not cuda"


def runtimes(compiler: str) -> str:
    """AddressSanitizer, which has to be the first library of a process, and the C++ library that it looks into then."""

    def find(name: str) -> str | None:
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        return found if os.path.isabs(found) else None

    for name in ("libasan.so", "libclang_rt.asan-x86_64.so"):
        if (sanitizer := find(name)) is not None:
            return " ".join(filter(None, [sanitizer, find("libstdc++.so.6")]))
    sys.exit(f"sanitize: expected {compiler} to come with AddressSanitizer: set CXX to a compiler that does")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="cases of each fuzzer, on 1, 2 and 3 ranks each")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files in test/, or none")
    args = parser.parse_args()

    build = [sys.executable, "setup.py", "build", "--build-base", str(BUILD), "--build-lib", str(PACKAGE)]
    subprocess.run(build, cwd=ROOT, env={**os.environ, "TORCH_EP_SANITIZE": "address,undefined"}, check=True)

    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(ROOT / "test")]),
        "LD_PRELOAD": runtimes(os.environ.get("CXX", "c++")),
        # An allocation that is too large fails as it does without the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    checked = f"import torch_ep; assert torch_ep.__file__.startswith({str(PACKAGE)!r}), torch_ep.__file__"
    commands = [[sys.executable, "-c", checked]]
    if args.tests:
        files = [str(ROOT / "test" / name) for name in args.tests]
        commands.append(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=3600", "-k", NOT_COMPILED, *files]
        )
    commands.append([sys.executable, str(ROOT / "test" / "fuzz.py"), "--cases", str(args.cases)])
    # Elsewhere than in the root, where Python would find the other extension first.
    return max(subprocess.run(command, cwd=BUILD, env=env).returncode != 0 for command in commands)


if __name__ == "__main__":
    sys.exit(main())
