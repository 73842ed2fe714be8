"""Ranks that may die: each is a fork of one process that has imported torch already, so a new world takes no time."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support.harness import LIMIT_S, PATIENCE, free_port, process_context, short_timeout

# How long a rank waits for another. Computed once, in the process that all ranks are forks of.
TIMEOUT = short_timeout()


class Rank:
    """The argument of a scenario on each rank: the rank's number, and marks that other ranks see."""

    def __init__(self, rank: int, world_size: int, folder: str) -> None:
        self.rank, self.world_size, self.folder = rank, world_size, Path(folder)

    def mark(self, name: str) -> None:
        (self.folder / name).touch()

    def await_mark(self, name: str) -> None:
        while not (self.folder / name).exists():
            time.sleep(0.01)

    def await_marks(self, name: str, ranks: range | list[int]) -> None:
        for rank in ranks:
            self.await_mark(f"{name} {rank}")

    def stop_until_marks(self, name: str, ranks: range | list[int]) -> None:
        """Stops this process, as SIGSTOP does, until these ranks have set their marks."""
        files = " ".join(f"'{self.folder / f'{name} {rank}'}'" for rank in ranks)
        waker = f"for f in {files}; do while [ ! -e $f ]; do sleep 0.05; done; done; kill -CONT {os.getpid()}"
        if os.fork() == 0:
            os.execvp("sh", ["sh", "-c", waker.replace("$f", '"$f"')])
        os.kill(os.getpid(), signal.SIGSTOP)


def signal_within(number: int) -> None:
    """Sends this process a signal once its main thread waits in a call of torch_ep."""
    import torch_ep

    main, package = threading.main_thread().ident or 0, os.path.dirname(torch_ep.__file__)

    def send() -> None:
        before = None
        while True:
            stack = [(f.f_code.co_filename, f.f_lasti) for f, _ in traceback.walk_stack(sys._current_frames()[main])]
            if stack == before and any(os.path.dirname(name) == package for name, _ in stack):
                break
            before = stack
            time.sleep(0.5)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def attempt(call: Callable[[], Any]) -> tuple[str, str]:
    """("", "") or the type and the first line of what it raised."""
    try:
        call()
    except BaseException as error:
        return type(error).__name__, (str(error).splitlines() or [""])[0]
    return "", ""


def _run_rank(fn: Callable[..., Any], rank: int, world_size: int, port: int, folder: str, args: tuple) -> None:
    import torch_ep

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=PATIENCE,
        )
        torch_ep.init(timeout=TIMEOUT)
        this = Rank(rank, world_size, folder)
        this.mark(f"ready {rank}")
        this.await_marks("ready", range(world_size))  # on a busy machine, ranks may be made seconds apart
        answer = (True, fn(this, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    path = Path(folder) / f"answer {rank}"
    path.with_suffix(".part").write_bytes(pickle.dumps(answer))
    path.with_suffix(".part").rename(path)


def _launch(pipe: Connection) -> None:
    """Answers each job with what its ranks returned; None for a rank that died."""
    import torch_ep  # noqa: F401 - the forks have it then

    while True:
        try:
            fn, world_size, args = pipe.recv()
        except EOFError:
            os._exit(0)
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            pids = []
            for rank in range(world_size):
                pid = os.fork()
                if pid == 0:
                    os.setpgid(0, 0)
                    _run_rank(fn, rank, world_size, port, folder, args)
                    sys.stdout.flush()
                    os._exit(0)
                pids.append(pid)
            left, end = set(pids), time.monotonic() + LIMIT_S
            while left and time.monotonic() < end:
                for pid in [*left]:
                    if os.waitpid(pid, os.WNOHANG)[0]:
                        left.discard(pid)
                time.sleep(0.01)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            answers: list[Any] = []
            for rank in range(world_size):
                path = Path(folder) / f"answer {rank}"
                answers.append(pickle.loads(path.read_bytes()) if path.exists() else None)
        pipe.send((answers, [pids.index(pid) for pid in left]))


class Launcher:
    """One process that forks the ranks of every scenario."""

    def __init__(self) -> None:
        context = process_context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_launch, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        """`fn(Rank, *args)` on every rank: its results, None for a rank that died. `fn`: a module's function."""
        self._pipe.send((fn, world_size, args))
        answers, hung = self._pipe.recv()
        assert not hung, f"{fn.__name__}: ranks {hung} were still there after {LIMIT_S} s"
        failed = [f"--- rank {rank}:\n{answer[1]}" for rank, answer in enumerate(answers) if answer and not answer[0]]
        assert not failed, "\n".join(failed)
        return [answer and answer[1] for answer in answers]

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
