"""A rank dies, stalls, fails or runs something else: all others raise an error that names it, and never hang."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.forked import TIMEOUT, Launcher, Rank, attempt, signal_within
from support.harness import LIMIT_S, process_context
from torch import Tensor

import torch_ep

EXPERTS = 6
WORLD_SIZE = 3
LAST = WORLD_SIZE - 1
NOT_HEARD = "not heard of since: dead, stalled, or running something else"
RESET = "To go on with all ranks, call torch_ep.reset(group) on each of them"


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    own = Launcher()
    yield own
    own.close()


def topk_of(world_size: int, num_tokens: int = 4) -> Tensor:
    """Every token visits the first expert of every rank."""
    return torch.arange(0, EXPERTS, EXPERTS // world_size).repeat(num_tokens, 1)


def exchange(group: Any = None, num_tokens: int = 4, hidden: int = 16) -> None:
    world_size = dist.get_world_size(group)
    plan = torch_ep.plan(topk_of(world_size, num_tokens), EXPERTS, group)
    x = torch.full((num_tokens, hidden), dist.get_rank() + 1.0)
    assert torch.equal(torch_ep.combine(torch_ep.dispatch(x, plan), plan), world_size * x)


def exchange_until_error(**sizes: int) -> None:
    while True:
        exchange(**sizes)


def names(message: str, ranks: str) -> bool:
    return f" ms) for {ranks}, {NOT_HEARD}" in message and message.endswith(RESET)


# --- a rank that disappears ----------------------------------------------------------------------------------------


def _leave(r: Rank, culprit: int, how: str) -> list[tuple[str, str]]:
    if r.rank == culprit:
        if how == "exits":
            os._exit(1)
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "is killed amid rows":
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if how == "is stopped":
            r.stop_until_marks("told", [rank for rank in range(r.world_size) if rank != culprit])
            return [attempt(exchange)]
        if how == "does something else":
            r.await_marks("told", [rank for rank in range(r.world_size) if rank != culprit])
            return []
    sizes = {"num_tokens": 2048, "hidden": 1024} if how == "is killed amid rows" else {}
    answers = [attempt(lambda: exchange_until_error(**sizes)), attempt(exchange)]
    r.mark(f"told {r.rank}")
    return answers


@pytest.mark.parametrize("culprit", [0, LAST], ids=["the rank that keeps the store", "the last rank"])
@pytest.mark.parametrize("how", ["exits", "is killed", "is killed amid rows", "is stopped", "does something else"])
def test_the_error_names_a_rank_that_disappears(launcher: Launcher, how: str, culprit: int) -> None:
    answers = launcher.run(_leave, WORLD_SIZE, culprit, how)
    for rank, answer in enumerate(answers):
        if rank == culprit:
            continue
        (kind, message), (again, closed) = answer
        assert (kind, again) == ("DistError", "DistError")
        assert names(message, f"rank {culprit}"), message
        assert f"group '0' is closed since an exchange on it failed on rank {rank}: call torch_ep.reset" in closed
    if how == "is stopped":
        ((kind, message),) = answers[culprit]
        assert kind == "DistError"
        assert f"rank {culprit} came too late to exchange" in message and "have given up waiting for it" in message


def _dies_in_flight(r: Rank) -> list[tuple[str, str]] | None:
    """The last rank dies once it has sent: what it has not handed to the network never arrives."""
    num_tokens, hidden = 2048, 4096
    plan = torch_ep.plan(topk_of(WORLD_SIZE, num_tokens), EXPERTS)
    in_flight = torch_ep.dispatch_send(torch.ones(num_tokens, hidden), plan)
    if r.rank == LAST:
        os.kill(os.getpid(), signal.SIGKILL)
    answers = [attempt(lambda: torch_ep.dispatch_recv(in_flight, plan)), attempt(exchange)]
    r.mark(f"told {r.rank}")
    return answers


def test_a_rank_that_dies_with_rows_in_flight_is_named(launcher: Launcher) -> None:
    for received, again in launcher.run(_dies_in_flight, WORLD_SIZE)[:LAST]:
        # 33 MB leave it, more than a socket holds.
        assert received[0] == "DistError" and names(received[1], f"rank {LAST}"), received
        assert again[0] == "DistError" and "is closed since an exchange on it failed" in again[1], again


def _leaves_in_flight(r: Rank, how: str) -> str:
    """Rows are in flight when the ranks leave: nothing hangs or crashes."""
    plan = torch_ep.plan(topk_of(WORLD_SIZE, 2048), EXPERTS)
    in_flight = torch_ep.dispatch_send(torch.ones(2048, 1024), plan)
    if how == "destroy":
        torch_ep.destroy()
    if how == "destroy_process_group":
        dist.destroy_process_group()
        torch_ep.destroy()
    return "" if how == "exit" else attempt(lambda: torch_ep.dispatch_recv(in_flight, plan))[1]


@pytest.mark.parametrize("how", ["exit", "destroy", "destroy_process_group"])
def test_ranks_may_leave_with_rows_in_flight(launcher: Launcher, how: str) -> None:
    for message in launcher.run(_leaves_in_flight, WORLD_SIZE, how):
        assert how == "exit" or "was in flight when the group was reset or destroyed" in message, message


def _two_die(r: Rank) -> tuple[str, str] | None:
    if r.rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return attempt(exchange_until_error)


def test_two_ranks_that_die_are_named(launcher: Launcher) -> None:
    kind, message = launcher.run(_two_die, WORLD_SIZE)[0]
    assert kind == "DistError"
    assert names(message, "ranks 1, 2"), message


def _survivors_leave(r: Rank, folder: str) -> None:
    if r.rank == LAST:
        os.kill(os.getpid(), signal.SIGKILL)
    _, message = attempt(exchange_until_error)
    with open(f"{folder}/{r.rank}", "w") as f:
        f.write(message)
    os._exit(1)  # as a training script does, at once


def test_survivors_that_leave_at_once_are_not_blamed(launcher: Launcher, tmp_path: Any) -> None:
    for _ in range(5):
        launcher.run(_survivors_leave, WORLD_SIZE, str(tmp_path))
        for rank in range(LAST):
            message = (tmp_path / str(rank)).read_text()
            assert names(message, f"rank {LAST}"), message


def _say_goodbye(r: Rank) -> tuple[str, str]:
    if r.rank == LAST:
        torch_ep.destroy()
        return attempt(exchange)
    return attempt(exchange_until_error)


def test_a_rank_that_destroys_its_communicator_is_named(launcher: Launcher) -> None:
    answers = launcher.run(_say_goodbye, WORLD_SIZE)
    for kind, message in answers[:LAST]:
        assert kind == "DistError"
        assert f"rank {LAST} left the group: torch_ep.destroy was called there, or its process ended" in message
    assert answers[LAST][0] == "RuntimeError"
    assert "expected an initialized group, got group '0'" in answers[LAST][1]


def _init_alone(r: Rank, arguments: dict) -> tuple[str, str] | None:
    if r.rank == LAST:
        r.await_marks("told", range(LAST))
        return None
    if arguments.pop("destroyed"):
        torch_ep.destroy()
    answer = attempt(lambda: torch_ep.init(timeout=TIMEOUT, **arguments))
    r.mark(f"told {r.rank}")
    return answer


@pytest.mark.parametrize("arguments", [{}, {"hidden": 64}], ids=["same arguments", "other arguments"])
@pytest.mark.parametrize("destroyed", [False, True], ids=["connected", "destroyed"])
def test_init_that_a_rank_does_not_join(launcher: Launcher, arguments: dict, destroyed: bool) -> None:
    for kind, message in launcher.run(_init_alone, WORLD_SIZE, {**arguments, "destroyed": destroyed})[:LAST]:
        assert kind == "DistError"
        assert message.startswith("torch_ep.init: rank ")
        assert f" for rank {LAST}, {NOT_HEARD}" in message, message


# --- a rank that comes back ---------------------------------------------------------------------------------------


def _reset_after_a_stall(r: Rank) -> list[tuple[str, str]]:
    if r.rank == LAST:
        r.await_marks("told", range(LAST))
    else:
        first = attempt(exchange)
        r.mark(f"told {r.rank}")
    answers = [attempt(torch_ep.reset), attempt(exchange), attempt(lambda: dist.all_reduce(torch.ones(3)))]
    return answers if r.rank == LAST else [first, *answers]


def test_reset_makes_the_group_usable_after_a_stall(launcher: Launcher) -> None:
    answers = launcher.run(_reset_after_a_stall, WORLD_SIZE)
    assert answers[LAST] == [("", "")] * 3
    for first, *then in answers[:LAST]:
        assert first[0] == "DistError"
        assert then == [("", "")] * 3


def _go_on_without_the_dead(r: Rank, port: int) -> str | None:
    if r.rank == LAST:
        os.kill(os.getpid(), signal.SIGKILL)
    attempt(exchange_until_error)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=r.rank, world_size=LAST)
    torch_ep.init(timeout=TIMEOUT)
    exchange()
    return "went on"


def test_survivors_go_on_in_a_group_of_their_own(launcher: Launcher) -> None:
    from support.harness import free_port

    assert launcher.run(_go_on_without_the_dead, WORLD_SIZE, free_port()) == ["went on"] * LAST + [None]


def _other_history(r: Rank) -> list[str]:
    """A group that only some ranks had before, then one that all have: torch gives them the same name."""
    first = dist.new_group([0, 1])
    if r.rank < 2:
        torch_ep.init(first, timeout=TIMEOUT)
    dist.barrier()
    dist.destroy_process_group(first)
    second = dist.new_group([0, 1, 2])
    torch_ep.init(second, timeout=TIMEOUT)
    exchange(second)
    if r.rank == 1:
        r.await_marks("told", [0, 2])
        return []
    message = attempt(lambda: exchange(second))[1]
    r.mark(f"told {r.rank}")
    return [message]


def test_ranks_with_other_histories_name_the_right_one(launcher: Launcher) -> None:
    answers = launcher.run(_other_history, WORLD_SIZE)
    for rank in (0, 2):
        assert names(answers[rank][0], "rank 1"), answers[rank]


# --- a rank that fails within an exchange -------------------------------------------------------------------------


def _cannot_allocate(r: Rank, what: str) -> list[tuple[str, str]]:
    """The last rank has no memory for what it sends or receives, catches that and goes on."""
    num_tokens, hidden = 4096, 4096
    sends = (r.rank == LAST) == (what == "sends")
    expert = 0 if what == "sends" else EXPERTS - 1
    plan = torch_ep.plan(torch.full((num_tokens if sends else 0, 1), expert), EXPERTS, layout="rank_major")
    x = torch.full((num_tokens if sends else 0, hidden), 5.0)
    rows = []

    def dispatch() -> None:
        if r.rank == LAST:
            with open("/proc/self/statm") as f:
                used = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + 30 * 2**20, resource.RLIM_INFINITY))
        try:
            rows.append(torch_ep.dispatch(x, plan))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    answers = [attempt(dispatch)]
    assert all((got == 5).all() for got in rows), "wrong rows, silently"
    r.mark(f"told {r.rank}")
    r.await_marks("told", range(r.world_size))
    return [*answers, attempt(exchange), attempt(torch_ep.reset), attempt(exchange)]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux: limits the memory of a process")
@pytest.mark.parametrize("what", ["sends", "receives"])
def test_a_rank_without_memory_is_no_source_of_wrong_rows(launcher: Launcher, what: str) -> None:
    answers = launcher.run(_cannot_allocate, WORLD_SIZE, what)
    (kind, message), (again, closed), reset, after = answers[LAST]
    assert kind == "RuntimeError" and "can't allocate memory" in message
    assert again == "DistError" and "can't allocate memory" in closed
    assert reset == after == ("", "")
    for first, second, reset, after in answers[:LAST]:
        told = [message for kind, message in (first, second) if kind == "DistError"]
        assert told, (first, second)
        assert f"rank {LAST} left the group: [enforce fail" in told[0], told[0]
        assert reset == after == ("", "")


def _interrupted(r: Rank) -> tuple[str, str]:
    torch_ep.init(timeout=timedelta(hours=1))
    if r.rank == LAST:
        r.await_marks("told", range(LAST))
    if r.rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal_within(signal.SIGINT)
    answer = attempt(exchange)
    r.mark(f"told {r.rank}")
    return answer


def test_a_signal_is_handled_within_an_exchange(launcher: Launcher) -> None:
    """The exchange cannot end before the interrupted rank has published its failure."""
    answers = launcher.run(_interrupted, WORLD_SIZE)
    assert answers[0][0] == "KeyboardInterrupt"
    for kind, message in answers[1:]:
        assert kind == "DistError"
        assert "rank 0 left the group: interrupted by a signal, such as Ctrl-C" in message


def _handled_signal(r: Rank) -> tuple[str, str]:
    seen = []
    if r.rank == 0:
        signal.signal(signal.SIGUSR1, lambda *_: (seen.append(1), r.mark("seen 0")))
        signal_within(signal.SIGUSR1)
    torch_ep.init(timeout=timedelta(hours=1))
    if r.rank == LAST:
        r.await_mark("seen 0")
    return attempt(exchange)


def test_an_exchange_goes_on_after_a_handler_that_returns(launcher: Launcher) -> None:
    assert launcher.run(_handled_signal, WORLD_SIZE) == [("", "")] * WORLD_SIZE


# --- a rank that does something else ------------------------------------------------------------------------------

RAW = {
    "all_reduce": lambda: dist.all_reduce(torch.ones(3)),
    "all_to_all of few bytes": lambda: dist.all_to_all_single(torch.ones(3), torch.ones(3)),
    "all_to_all of many bytes": lambda: dist.all_to_all_single(torch.ones(30000), torch.ones(30000)),
}


def _raw_collective(r: Rank, which: str) -> list[tuple[str, str]]:
    if r.rank == LAST:
        work = threading.Thread(target=lambda: attempt(RAW[which]), daemon=True)
        work.start()
        r.await_marks("told", range(LAST))
        return [attempt(torch_ep.reset), attempt(exchange)]
    first = attempt(exchange)
    r.mark(f"told {r.rank}")
    return [first, attempt(torch_ep.reset), attempt(exchange)]


@pytest.mark.parametrize("which", RAW)
def test_a_collective_of_the_program_is_not_taken_for_an_exchange(launcher: Launcher, which: str) -> None:
    answers = launcher.run(_raw_collective, WORLD_SIZE, which)
    for first, *then in answers[:LAST]:
        assert names(first[1], f"rank {LAST}"), first
        assert then == [("", "")] * 2
    assert answers[LAST] == [("", "")] * 2


def _busy_backend(r: Rank) -> tuple[str, str] | None:
    if r.rank == LAST:
        r.await_marks("told", range(LAST))
        return None
    works = [dist.all_reduce(torch.ones(4), async_op=True) for _ in range(2)]  # as many as gloo has threads
    answer = attempt(exchange)
    r.mark(f"told {r.rank}")
    assert len(works) == 2
    return answer


def test_unfinished_collectives_do_not_delay_the_timeout(launcher: Launcher) -> None:
    """The collectives would end after the process group's own timeout, which is longer than this test may take."""
    for answer in launcher.run(_busy_backend, WORLD_SIZE)[:LAST]:
        assert answer is not None and names(answer[1], f"rank {LAST}"), answer


def _init_meets_plan(r: Rank, arguments: dict) -> list[tuple[str, str]]:
    first = attempt((lambda: torch_ep.init(timeout=TIMEOUT, **arguments)) if r.rank == LAST else exchange)
    return [first, attempt(exchange), attempt(exchange)]


@pytest.mark.parametrize("arguments", [{}, {"hidden": 64}], ids=["same arguments", "other arguments"])
def test_init_that_meets_another_operator(launcher: Launcher, arguments: dict) -> None:
    for first, *then in launcher.run(_init_meets_plan, WORLD_SIZE, arguments):
        assert first[0] == "DistError"
        assert "ranks issued different sequences of operators on group '0'" in first[1]
        assert then == [("", "")] * 2


def _forked(r: Rank) -> str:
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, attempt(exchange)[1].encode())
        os._exit(0)
    os.wait()
    exchange()
    return os.read(read, 1000).decode()


def test_a_forked_child_is_refused(launcher: Launcher) -> None:
    for message in launcher.run(_forked, 2):
        assert message.startswith("ep::plan: group '0' was initialized in the process that this one was forked from")


def _versions(r: Rank) -> tuple[str, str]:
    torch_ep.destroy()
    if r.rank == LAST:
        torch_ep.rendezvous.PROTOCOL += 1
    return attempt(lambda: torch_ep.init(timeout=TIMEOUT))


def test_versions_that_differ(launcher: Launcher) -> None:
    for kind, message in launcher.run(_versions, WORLD_SIZE):
        assert kind == "DistError"
        assert message.startswith("torch_ep.init: expected the same version of torch_ep on every rank, got protocol ")


def _forgets(r: Rank) -> list[int]:
    counts = []
    for _ in range(4):
        group = dist.new_group()
        torch_ep.init(group, timeout=TIMEOUT)
        exchange(group)
        dist.destroy_process_group(group)
        counts.append(len(torch_ep.comm.communicators))
    torch_ep.destroy("0")
    return [*counts, len(torch_ep.comm.communicators)]


def test_communicators_of_destroyed_groups_are_forgotten(launcher: Launcher) -> None:
    """At most one of them is left until the next call of init or destroy."""
    assert launcher.run(_forgets, 2) == [[2, 2, 2, 2, 0]] * 2


def _destroy_after_the_group(r: Rank) -> list[int]:
    name = torch_ep.init(timeout=TIMEOUT).group_name
    dist.destroy_process_group()
    counts = []
    for group in (None, name):
        torch_ep.destroy(group)
        counts.append(len(torch_ep.comm.communicators))
    return counts


def test_destroy_after_the_process_group(launcher: Launcher) -> None:
    assert launcher.run(_destroy_after_the_group, 2) == [[0, 0]] * 2


def _fake_backend(r: Rank) -> tuple[str, str]:
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 - registers it

    group = dist.new_group(backend="fake")
    return attempt(lambda: torch_ep.init(group, timeout=TIMEOUT))


def test_a_backend_that_moves_no_data_is_refused(launcher: Launcher) -> None:
    for kind, message in launcher.run(_fake_backend, 2):
        assert kind == "RuntimeError"
        assert message.startswith("torch_ep.init: expected a process group that moves data, got torch's backend 'fake'")
        assert "FakeTensorMode" in message


# --- an error of one rank alone, before its exchange --------------------------------------------------------------

ALONE: dict[str, tuple[str, Callable[[Tensor, torch_ep.Plan], Any]]] = {
    "group of another type": ("plan", lambda x, p: torch_ep.plan(topk_of(WORLD_SIZE), EXPERTS, 3)),
    "unknown group": ("dispatch", lambda x, p: torch_ep.dispatch(x, p._replace(group_name="nowhere"))),
    "float for int": ("plan", lambda x, p: torch_ep.plan(topk_of(WORLD_SIZE), float(EXPERTS))),
    "list for Tensor": ("dispatch", lambda x, p: torch_ep.dispatch(x.tolist(), p)),
    "no plan": ("dispatch", lambda x, p: torch_ep.dispatch(x, None)),
    "plan with a field of None": ("dispatch", lambda x, p: torch_ep.dispatch(x, p._replace(recv_pair=None))),
    "plan of another world size": (
        "dispatch",
        lambda x, p: torch_ep.dispatch(x, p._replace(send_counts=p.send_counts[:2], recv_counts=p.recv_counts[:2])),
    ),
    "layout of another type": ("dispatch", lambda x, p: torch_ep.dispatch(x, p._replace(layout=7))),
    "meta": ("dispatch", lambda x, p: torch_ep.dispatch(x.to("meta"), p)),
    "sparse": ("dispatch", lambda x, p: torch_ep.dispatch(x.to_sparse(), p)),
    "two kinds of weights": (
        "combine",
        lambda x, p: torch_ep.combine(
            torch.ones(p.num_rows, 16), p, row_weights=torch.ones(p.num_rows), topk_weights=torch.ones(p.num_rows)
        ),
    ),
    "sizes by position": (
        "low_latency_dispatch",
        lambda x, p: torch_ep.low_latency_dispatch(x, topk_of(WORLD_SIZE), EXPERTS, 4),
    ),
}
RIGHT: dict[str, Callable[[Tensor, torch_ep.Plan], Any]] = {
    "plan": lambda x, p: torch_ep.plan(topk_of(WORLD_SIZE), EXPERTS),
    "dispatch": lambda x, p: torch_ep.dispatch(x, p),
    "combine": lambda x, p: torch_ep.combine(torch.ones(p.num_rows, 16), p),
    "low_latency_dispatch": lambda x, p: torch_ep.low_latency_dispatch(
        x, topk_of(WORLD_SIZE), num_experts=EXPERTS, max_tokens_per_rank=4
    ),
}


def _wrong_alone(r: Rank) -> dict[str, list[tuple[str, str]]]:
    torch_ep.init(timeout=timedelta(hours=1))  # a rank that is not told waits until the test is stopped
    plan = torch_ep.plan(topk_of(WORLD_SIZE), EXPERTS)
    x = torch.ones(4, 16)
    answers = {}
    for name, (op, wrong) in ALONE.items():
        call = wrong if r.rank == LAST else RIGHT[op]
        answers[name] = [attempt(lambda call=call: call(x, plan)), attempt(exchange)]
    return answers


def test_an_error_of_one_rank_raises_on_all_ranks(launcher: Launcher) -> None:
    answers = launcher.run(_wrong_alone, WORLD_SIZE)
    for name, (op, _) in ALONE.items():
        (kind, own), after = answers[LAST][name]
        assert kind in ("TypeError", "ValueError", "RuntimeError"), (name, kind, own)
        assert after == ("", ""), name
        for answer in answers[:LAST]:
            (kind, message), after = answer[name]
            assert kind == "DistError", name
            assert message.startswith(f"ep::{op}: rank {LAST} failed before exchange "), (name, message)
            assert message.split(": ", 2)[2][:100] == own[:100], name
            assert after == ("", ""), name


# --- two hosts ----------------------------------------------------------------------------------------------------

CLONE_NEWNET = 0x40000000


def _namespaces_work() -> str | None:
    """Why network namespaces cannot be made here; None if they can."""
    if shutil.which("ip") is None:
        return "needs the command ip (iproute2)"
    name = f"ep-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"needs to make network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces that a veth pair joins, 10.91.0.1 and 10.91.0.2."""
    reason = _namespaces_work()
    if reason:
        pytest.skip(reason)
    names = [f"ep-{os.getpid()}-{k}" for k in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "ep0", "netns", names[0], "type", "veth", "peer", "name", "ep1", "netns", names[1])
        for k, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"10.91.0.{k + 1}/24", "dev", f"ep{k}")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", f"ep{k}", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _on_host(rank: int, namespace: str, folder: str, timeout: timedelta) -> None:
    with open(f"/var/run/netns/{namespace}") as f:
        assert ctypes.CDLL(None).setns(f.fileno(), CLONE_NEWNET) == 0
    os.environ["GLOO_SOCKET_IFNAME"] = f"ep{rank}"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="tcp://10.91.0.1:29400", rank=rank, world_size=2)
    torch_ep.init(timeout=timeout)
    exchange()
    open(f"{folder}/ready {rank}", "w").close()
    answers = [attempt(exchange_until_error), attempt(exchange)]
    with open(f"{folder}/answer {rank}", "w") as f:
        f.write("\n".join(message for _, message in answers))
    os._exit(0)


def _await(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_hosts_whose_link_is_cut(hosts: list[str], tmp_path: Any) -> None:
    """The side without the store, too, raises by its own timeout."""
    context = process_context()
    ranks = [
        context.Process(target=_on_host, args=(k, hosts[k], str(tmp_path), TIMEOUT), daemon=True) for k in range(2)
    ]
    try:
        for process in ranks:
            process.start()
        _await(lambda: all((tmp_path / f"ready {k}").exists() for k in range(2)))
        _ip("-n", hosts[1], "link", "set", "ep1", "down")
        for process in ranks:
            process.join(LIMIT_S)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
    for rank in range(2):
        message, closed = (tmp_path / f"answer {rank}").read_text().splitlines()
        assert names(message, f"rank {1 - rank}"), message
        assert "is closed since an exchange on it failed" in closed
