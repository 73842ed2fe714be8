"""Symmetric memory: who can reach whom, and buffers of both providers that every rank of a group can write into.

Without a GPU, what ranks tell each other; with several, the memory itself.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.harness import LIMIT_S, PATIENCE, World, free_port, short_timeout, world

from torch_ep import symmetric

TIMEOUT = PATIENCE
CUDA = torch.device("cuda", 0)
GIB = 2**30

# --- who can reach whom ---


def facts(rank: int, **changes: Any) -> dict[str, Any]:
    """Of a rank on a host where all is well."""
    all_reached = {f"gpu {i}": True for i in range(4)}
    healthy = {"host": "a", "gpu": f"gpu {rank}", "index": rank, "reach": all_reached, "runs": True, "problem": None}
    return {**healthy, **changes}


REASONS = {
    "none": ([facts(0), facts(1), facts(2)], None),
    "other order": ([facts(3), facts(0)], None),
    "no device": ([facts(0), facts(1, gpu=None)], "there is no CUDA device on ranks [1]"),
    "other GPU": ([facts(0), facts(1, runs=False)], "torch_ep was not built for the GPU of rank 1"),
    "hosts": ([facts(0), facts(1), facts(0, host="b")], "several hosts: [0, 1] on a, [2] on b"),
    "shared": ([facts(0), facts(1), facts(1)], "ranks 1 and 2 share one GPU, which provider 'nvshmem' takes"),
    "hidden": ([facts(0), facts(1, reach={"gpu 1": True})], "rank 1 does not see the GPU of rank 0"),
    "no access": (
        [facts(0), facts(1, reach={"gpu 0": False, "gpu 1": True})],
        "no peer access from the GPU of rank 1 to that of rank 0",
    ),
    "permuted": ([facts(0), facts(1, index=0)], "ranks 0 and 1 both call their GPU cuda:0"),
    "problem": ([facts(0), facts(1, problem="RuntimeError: broken")], "rank 1 could not ask its GPU: RuntimeError"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reason(name: str) -> None:
    ranks, want = REASONS[name]
    reason = symmetric._why_not(ranks)
    assert reason is None if want is None else want in str(reason)


def test_ranks_may_share_a_gpu_on_the_heap_of_nvshmem() -> None:
    assert symmetric._why_not([facts(0), facts(1), facts(1)], "nvshmem") is None


def access(rank: int, world_size: int, device: torch.device) -> str | None:
    return symmetric.peer_access(dist.group.WORLD, device, timeout=TIMEOUT).why_not


def test_no_cuda_device() -> None:
    assert world(2).run(access, torch.device("cpu")) == ["there is no CUDA device on ranks [0, 1]"] * 2


def access_between_hosts(rank: int, world_size: int) -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric, "_facts", lambda device: facts(rank, host="ab"[rank // 2]))
        return access(rank, world_size, CUDA)


def test_every_rank_gets_the_same_reason() -> None:
    assert world(3).run(access_between_hosts) == ["its ranks are on several hosts: [0, 1] on a, [2] on b"] * 3


def test_hosts_of_one_name_are_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
    before = symmetric._host()
    assert before == symmetric._host()
    monkeypatch.setattr(symmetric.Path, "read_text", lambda path: "another boot\n")
    assert before != symmetric._host()


def test_too_many_ranks() -> None:
    class Group:
        def size(self) -> int:
            return 17

    reason = symmetric.peer_access(Group(), CUDA).why_not  # type: ignore[arg-type]
    assert reason == "it takes at most 16 ranks, and there are 17"


def one_does_not_come(rank: int, world_size: int, timeout: timedelta) -> str:
    group = dist.new_group([0, 1, 2])
    if rank == 1:
        return ""
    with pytest.raises(dist.DistError) as error:
        symmetric.peer_access(group, torch.device("cpu"), timeout=timeout)
    return str(error.value)


def test_a_rank_that_does_not_come_is_named() -> None:
    timeout = short_timeout()
    first, _, last = world(3).run(one_does_not_come, timeout)
    for message in (first, last):
        assert message.startswith("torch_ep: symmetric memory: rank ")
        assert (
            f"(timeout {timeout}) for rank 1, not heard of since: dead, stalled, or running something else" in message
        )


# --- what ranks agree on ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, CUDA), "expected a positive nbytes, got 0"),
        ((1, torch.device("cpu")), "expected a CUDA device, got cpu"),
        ((1, CUDA, "nccl"), "expected provider 'torch' or 'nvshmem', got 'nccl'"),
    ],
    ids=["nbytes", "device", "provider"],
)
def test_bad_argument(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        symmetric.allocate(None, *arguments)  # type: ignore[arg-type]


def error_of(rank: int, world_size: int, nbytes: list[int], provider: symmetric.Provider, members: int) -> str:
    """Of `allocate` on a group of the first ranks; nothing for the others."""
    group = dist.new_group(list(range(members)))
    if rank >= members:
        return ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "nvshmem", None)  # makes its import fail
        with pytest.raises((ValueError, RuntimeError)) as error:
            symmetric.allocate(group, nbytes[rank], CUDA, provider, timeout=TIMEOUT)
    return f"{error.type.__name__}: {error.value}"


def test_different_sizes() -> None:
    for message in world(2).run(error_of, [16, 32], "torch", 2):
        assert message.startswith("ValueError")
        assert "the same request from every rank, got ['16 bytes from torch', '32 bytes from torch']" in message


def test_nvshmem_on_a_part_of_the_ranks() -> None:
    for message in world(3).run(error_of, [16, 16], "nvshmem", 2)[:2]:
        assert message.startswith("ValueError")
        assert "expected a group of all 3 ranks, got 2" in message


def test_missing_nvshmem4py() -> None:
    for message in world(2).run(error_of, [16, 16], "nvshmem", 2):
        assert message.startswith("RuntimeError")
        assert "provider 'nvshmem': ranks [0, 1]: " in message
        assert "pip install nvshmem4py-cu13" in message


def one_fails(rank: int, world_size: int) -> str:
    def act() -> None:
        if rank == 1:
            raise OSError("full")

    with pytest.raises(RuntimeError) as error:
        symmetric._on_every_rank(dist.group.WORLD, "torch", TIMEOUT, act)
    return str(error.value)


def test_a_failure_on_one_rank_raises_on_all_ranks() -> None:
    assert world(3).run(one_fails) == ["torch_ep: symmetric memory from provider 'torch': ranks [1]: OSError: full"] * 3


def exchange_by_number(rank: int, world_size: int, first: list[int]) -> list[list[bytes]]:
    """As torch's rendezvous does, with its own number first[rank]: in the manner of torch 2.11, of 2.13, a barrier."""
    # A new prefix each time: the shared world's store lives on.
    name = symmetric._all_gather(dist.group.WORLD, uuid.uuid4().hex, TIMEOUT)[0]
    shared = dist.PrefixStore(f"test/{name}", dist.group.WORLD.get_group_store())
    renumbered = symmetric._RenumberingStore(shared, TIMEOUT)
    store = dist.PrefixStore("any", renumbered)  # calls it from C++
    found = []
    for count in range(2):
        keys = [f"CUDASymmetricMemory/{first[rank] + count}/{r}" for r in range(world_size)]
        store.set(keys[rank], f"{count} of {rank}")
        if count == 0:
            for key in keys:
                store.wait([key])
            found.append([store.get(key) for key in keys])
        else:
            found.append(store.multi_get(keys))
    if hasattr(store, "barrier"):  # torch 2.13 has it, 2.11 not yet
        store.barrier(f"CUDASymmetricMemory/{first[rank] + 2}", world_size)
    return found


@pytest.mark.parametrize("first", [[0, 0, 0], [7, 0, 3], [0, 1, 2]], ids=str)
def test_rendezvous_after_different_numbers_of_them(first: list[int]) -> None:
    want = [[b"0 of 0", b"0 of 1", b"0 of 2"], [b"1 of 0", b"1 of 1", b"1 of 2"]]
    assert world(3).run(exchange_by_number, first) == [want] * 3


def reused(rank: int, world_size: int, released: list[list[int]], nbytes: int) -> tuple[int | None, list[int]]:
    """The block that is used again, and what is left. Block n has 100 * (n % 3) bytes."""
    with pytest.MonkeyPatch.context() as patch:
        blocks = [symmetric._Block(n, 4096 * n + rank, 100 * (n % 3)) for n in released[rank]]
        patch.setattr(symmetric, "_released_heap", blocks)
        block = symmetric._reusable(dist.group.WORLD, nbytes, TIMEOUT)
        return block and block.number, [b.number for b in blocks]


@pytest.mark.parametrize(
    ("released", "nbytes", "want"),
    [
        ([[], []], 1, None),
        ([[1, 2], [2, 1]], 100, 1),
        ([[1, 2], [2, 1]], 101, 2),
        ([[1, 2], [2, 1]], 201, None),
        ([[1, 2], [2]], 100, 2),
        ([[1], [2]], 100, None),
        ([[4, 1, 5], [5, 4, 1]], 50, 1),
    ],
    ids=["nothing", "smallest", "large enough", "too small", "on every rank", "on one each", "oldest"],
)
def test_ranks_choose_the_same_block(released: list[list[int]], nbytes: int, want: int | None) -> None:
    for rank, (chosen, left) in enumerate(world(2).run(reused, released, nbytes)):
        assert chosen == want
        assert left == [n for n in released[rank] if n != want]


def test_release_leaves_the_memory_to_the_next() -> None:
    released: list[object] = []
    owner = symmetric._Owner("memory", released)
    assert released == []
    del owner
    gc.collect()
    assert released == ["memory"]


# --- the memory itself ---

BACKENDS = {"nccl": "cuda:nccl", "gloo-nccl": "cpu:gloo,cuda:nccl", "gloo": "gloo"}
needs_one_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
no_nvshmem = importlib.util.find_spec("nvshmem") is None
PROVIDERS = [
    "torch",
    pytest.param("nvshmem", marks=pytest.mark.skipif(no_nvshmem, reason="nvshmem4py is not installed")),
]
providers = pytest.mark.parametrize("provider", PROVIDERS)


every_backend = pytest.mark.parametrize("gpus", BACKENDS.values(), ids=BACKENDS, indirect=True)
_worlds: dict[str, World] = {}


@pytest.fixture
def gpus(request: pytest.FixtureRequest) -> Iterator[World]:
    """One rank on each GPU. A world in which something was raised is not used again."""
    backend = getattr(request, "param", BACKENDS["gloo-nccl"])
    if backend not in _worlds:
        _worlds[backend] = World(min(torch.cuda.device_count(), 8), c10d_backend=backend)
    yield _worlds[backend]
    if _worlds[backend].failed or not all(process.is_alive() for process in _worlds[backend].processes):
        _worlds.pop(backend).close()


@pytest.fixture(scope="module", autouse=True)
def close_worlds() -> Iterator[None]:
    yield
    for ranks in _worlds.values():
        ranks.close()
    _worlds.clear()


def bytes_at(address: int, nbytes: int) -> torch.Tensor:
    """[nbytes] uint8: memory of any GPU as a tensor of this rank's, whose kernels load from it and store to it."""
    device = torch.device("cuda", torch.cuda.current_device())
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,))


def allocate(rank: int, nbytes: int, provider: symmetric.Provider, group: Any = None) -> symmetric.Buffer:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    buffer = symmetric.allocate(group or dist.group.WORLD, nbytes, device, provider, timeout=TIMEOUT)
    assert buffer.nbytes == nbytes
    assert buffer.provider == provider
    return buffer


def meet(group: Any = None) -> None:
    torch.cuda.synchronize()
    symmetric._all_gather(group or dist.group.WORLD, "", TIMEOUT)


def check_exchange(buffer: symmetric.Buffer, group: Any = None) -> None:
    """Every rank stores a number of its own into a part of every rank's buffer, which holds zeros, and loads all."""
    group = group or dist.group.WORLD
    me, count = group.rank(), group.size()
    assert len(buffer.pointers) == count
    parts = [bytes_at(address, buffer.nbytes).tensor_split(count) for address in buffer.pointers]
    assert not any(bool(part.any()) for part in parts[me])
    meet(group)
    for peer in range(count):
        parts[peer][me].fill_(1 + count * me + peer)
    meet(group)
    for peer in range(count):
        for source, part in enumerate(parts[peer]):
            assert bool((part == 1 + count * source + peer).all()), f"rank {me}: part {source} of rank {peer}"
    meet(group)


def store_and_load(rank: int, world_size: int, provider: symmetric.Provider, nbytes: int) -> None:
    check_exchange(allocate(rank, nbytes, provider))


@pytest.mark.gpu
@needs_gpus
@every_backend
@pytest.mark.parametrize("nbytes", [16, 1_000_003, 2 * GIB], ids=["small", "odd", "large"])
@providers
def test_every_rank_stores_into_every_rank(gpus: World, provider: str, nbytes: int) -> None:
    gpus.run(store_and_load, provider, nbytes)


def two_buffers(rank: int, world_size: int, provider: symmetric.Provider) -> None:
    first = allocate(rank, 3 * 2**20, provider)
    second = allocate(rank, 5 * 2**20, provider)
    check_exchange(first)
    check_exchange(second)  # also sees that it still holds zeros
    assert bool(bytes_at(first.pointers[rank], first.nbytes).all())


@pytest.mark.gpu
@needs_gpus
@providers
def test_two_buffers_are_apart(gpus: World, provider: str) -> None:
    gpus.run(two_buffers, provider)


def used_again(rank: int, world_size: int, provider: symmetric.Provider) -> list[list[int]]:
    """Addresses of three buffers: the second is smaller and the third larger than the first."""
    found = []
    for nbytes in (3 * 2**20, 2**20, 7 * 2**20):
        buffer = allocate(rank, nbytes, provider)
        check_exchange(buffer)
        found.append(buffer.pointers)
        del buffer
    return found


@pytest.mark.gpu
@needs_gpus
@providers
def test_released_memory_comes_back_zeroed(gpus: World, provider: str) -> None:
    for first, smaller, larger in gpus.run(used_again, provider):
        if provider == "nvshmem":
            assert smaller == first
            assert larger != first


def release_apart(rank: int, world_size: int, provider: symmetric.Provider) -> None:
    buffers = [allocate(rank, 2**20, provider) for _ in range(3)]
    del buffers[rank % 3]
    again = allocate(rank, 2**20, provider)
    check_exchange(again)
    buffers.clear()
    check_exchange(allocate(rank, 2**20, provider))


@pytest.mark.gpu
@needs_gpus
@providers
def test_ranks_release_different_buffers(gpus: World, provider: str) -> None:
    gpus.run(release_apart, provider)


def many_rounds(rank: int, world_size: int, provider: symmetric.Provider) -> None:
    total = torch.cuda.get_device_properties(rank).total_memory
    for _ in range(total // (4 * GIB) + 4):
        allocate(rank, 4 * GIB, provider)


@pytest.mark.gpu
@needs_gpus
@providers
def test_memory_does_not_grow(gpus: World, provider: str) -> None:
    gpus.run(many_rounds, provider)


def uneven_subgroups(rank: int, world_size: int) -> None:
    """Most ranks are in one group more than the last, so that torch's own count of rendezvous differs."""
    members = list(range(max(2, world_size - 1)))
    group = dist.new_group(members)
    reverse = dist.new_group(members[1:]) if len(members) > 2 else None
    if rank in members:
        for _ in range(3):
            check_exchange(allocate(rank, 2**20, "torch", group), group)
    if reverse is not None and rank in members[1:]:
        check_exchange(allocate(rank, 2**20, "torch", reverse), reverse)
    check_exchange(allocate(rank, 2**20, "torch"))


@pytest.mark.gpu
@needs_gpus
@every_backend
def test_subgroups(gpus: World) -> None:
    gpus.run(uneven_subgroups)


def too_much(rank: int, world_size: int, provider: symmetric.Provider) -> str:
    with pytest.raises(RuntimeError) as error:
        allocate(rank, 2**44, provider)
    check_exchange(allocate(rank, 2**20, provider))
    return str(error.value)


@pytest.mark.gpu
@needs_gpus
def test_more_than_there_is(gpus: World) -> None:
    for message in gpus.run(too_much, "torch"):
        assert f"ranks {list(range(gpus.world_size))}: " in message


def access_of_gpus(rank: int, world_size: int) -> str | None:
    torch.cuda.set_device(rank)
    return access(rank, world_size, torch.device("cuda", rank))


@pytest.mark.gpu
@needs_gpus
@every_backend
def test_gpus_that_reach_each_other_according_to_cuda(gpus: World) -> None:
    every = range(gpus.world_size)
    if not all(torch.cuda.can_device_access_peer(i, j) for i in every for j in every if i != j):
        pytest.skip("these GPUs do not reach each other")
    assert gpus.run(access_of_gpus) == [None] * gpus.world_size


@pytest.mark.gpu
@needs_one_gpu
def test_ranks_on_one_gpu() -> None:
    assert (
        world(2).run(access, CUDA)
        == ["ranks 0 and 1 share one GPU, which provider 'nvshmem' takes and provider 'torch' does not"] * 2
    )


# --- exit ---

EXIT_LIMIT_S = LIMIT_S
kept: list[symmetric.Buffer] = []


def allocate_and_exit(rank: int, world_size: int, port: int, provider: symmetric.Provider, killed: bool) -> None:
    """Ends as a program does that releases nothing; rank 1 without even that."""
    faulthandler.dump_traceback_later(EXIT_LIMIT_S - 10)
    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=TIMEOUT)
    kept.append(allocate(rank, 2**20, provider))
    check_exchange(kept[0])
    store = dist.group.WORLD.get_group_store()  # rank 0 has it, and leaves last
    if rank > 0:
        store.set(f"done/{rank}", "")
    else:
        store.wait([f"done/{peer}" for peer in range(1, world_size)], TIMEOUT)
    if killed and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def exit_codes(count: int, target: Callable[..., None], *args: Any) -> list[int | None]:
    """None of a process that has not ended in time."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, count, *args), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + EXIT_LIMIT_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.mark.gpu
@needs_gpus
@pytest.mark.parametrize("killed", [False, True], ids=["all exit", "one is killed"])
@providers
def test_exit_without_release(provider: str, killed: bool) -> None:
    count = min(torch.cuda.device_count(), 8)
    codes = exit_codes(count, allocate_and_exit, free_port(), provider, killed)
    assert codes == [-signal.SIGKILL if killed and rank == 1 else 0 for rank in range(count)]
