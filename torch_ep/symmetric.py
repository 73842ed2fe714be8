"""Symmetric memory: a buffer on each rank of a group that all of its ranks load from and store to, by address.

What ranks have to agree on goes through the group's store, never through a collective: a group of any backend will do,
and no stream is touched but the current one of this rank's device.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import socket
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory, _unregister_process_group

from . import rendezvous

__all__ = ["Buffer", "Provider", "allocate", "peer_access"]

Provider = Literal["torch", "nvshmem"]
T = TypeVar("T")

# Of the nvlink kernels (csrc/nvlink/layout.h).
_MAX_RANKS = 16
# How long a rank waits for the others. They come here together, from `torch_ep.init`.
_TIMEOUT = timedelta(minutes=5)


class Buffer(NamedTuple):
    """One rank's view of a symmetric buffer. It is released, on this rank alone, when `owner` is dropped."""

    #: Device address of every rank's buffer as seen from this rank, own included, by group rank.
    pointers: list[int]
    #: Bytes of each.
    nbytes: int
    provider: str
    #: What keeps the memory and the peers' mappings.
    owner: object


class PeerAccess(NamedTuple):
    """What `peer_access` found, equal on all ranks."""

    #: Why the ranks' GPUs cannot load from and store to each other; None if they can.
    why_not: str | None
    #: The largest number of ranks on one GPU.
    ranks_per_gpu: int


def peer_access(
    group: dist.ProcessGroup, device: torch.device, provider: Provider = "torch", *, timeout: timedelta = _TIMEOUT
) -> PeerAccess:
    """Whether the ranks' GPUs can load from and store to each other. Collective.

    Every rank has to see the GPUs of all ranks: CUDA answers for no GPU that `CUDA_VISIBLE_DEVICES` hides. Provider
    "torch" needs a GPU per rank as well, numbered differently on each. Ranks that share a GPU run at the same time only
    under NVIDIA MPS; without it the driver gives each rank time slices of milliseconds.

    Args:
        group: its ranks.
        device: this rank's.
        provider: whose memory the ranks are to share, as in `allocate`.
        timeout: how long to wait for the other ranks.

    Raises:
        torch.distributed.DistError: a rank did not come in time.
    """
    if group.size() > _MAX_RANKS:
        return PeerAccess(f"it takes at most {_MAX_RANKS} ranks, and there are {group.size()}", 1)
    facts = [json.loads(answer) for answer in _all_gather(group, json.dumps(_facts(device)), timeout)]
    return PeerAccess(_why_not(facts, provider), max(Counter(rank["gpu"] for rank in facts).values()))


def allocate(
    group: dist.ProcessGroup,
    nbytes: int,
    device: torch.device,
    provider: Provider = "torch",
    *,
    timeout: timedelta = _TIMEOUT,
) -> Buffer:
    """A zeroed buffer on every rank of the group, each mapped by every other. Collective.

    Dropping `Buffer.owner` releases it without waiting for anything, the peers' kernels included: they keep what they
    have mapped. The memory is used again at the next call, not before. Nothing has to be released before exit.

    "torch" is torch's symmetric memory with its backend "CUDA", for any group on one host. Where the GPUs have NVLink
    multicast, torch maps the buffer for that too, unused here; `TORCH_SYMM_MEM_DISABLE_MULTICAST=1` keeps it from it.

    "nvshmem" is the symmetric heap of NVSHMEM (package nvshmem4py), for groups of all ranks of the job: the heap
    allocates on all of them together. The first call initializes NVSHMEM, unless the program has, with a processing
    element's number equal to the global rank. The heap never shrinks, since freeing would be collective, and a released
    buffer serves a later call of at most its size. A heap of fixed size (`NVSHMEM_DISABLE_CUDA_VMM=1`) has 1 GiB unless
    `NVSHMEM_SYMMETRIC_SIZE` says otherwise; where that is not set and the first call needs more, it is set here.

    Args:
        group: its ranks; what `peer_access` gives no reason against.
        nbytes: of each rank's buffer, the same on every rank.
        device: this rank's.
        provider: whose memory.
        timeout: how long to wait for the other ranks.

    Raises:
        ValueError: nbytes is not positive or differs among the ranks, the device is no CUDA device, the provider is
            unknown or differs, or "nvshmem" is asked for on a part of the job's ranks.
        RuntimeError: a rank could not allocate, or lacks the provider's package. Raised on every rank.
        torch.distributed.DistError: a rank did not come in time.
    """
    if nbytes <= 0:
        raise ValueError(f"torch_ep: symmetric memory: expected a positive nbytes, got {nbytes}")
    if device.type != "cuda":
        raise ValueError(f"torch_ep: symmetric memory: expected a CUDA device, got {device}")
    if provider not in ("torch", "nvshmem"):
        raise ValueError(f"torch_ep: symmetric memory: expected provider 'torch' or 'nvshmem', got {provider!r}")
    if provider == "nvshmem" and group.size() != dist.get_world_size():
        raise ValueError(
            "torch_ep: symmetric memory: provider 'nvshmem' allocates on all ranks of the job together: expected a "
            f"group of all {dist.get_world_size()} ranks, got {group.size()}; provider 'torch' takes any group"
        )
    asked = _all_gather(group, f"{nbytes} bytes from {provider}", timeout)
    if len(set(asked)) > 1:
        raise ValueError(f"torch_ep: symmetric memory: expected the same request from every rank, got {asked}")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return (_from_torch if provider == "torch" else _from_nvshmem)(group, nbytes, device, timeout)


# --- exchanges between ranks ---


def _all_gather(group: dist.ProcessGroup, value: str, timeout: timedelta) -> list[str]:
    """Every rank's value, by group rank. No rank gets them before all have come."""
    return rendezvous.all_gather(group, "torch_ep: symmetric memory", value, timeout)


def _on_every_rank(group: dist.ProcessGroup, provider: str, timeout: timedelta, act: Callable[[], T]) -> T:
    """Runs `act` on every rank and returns its result. If `act` raises on any rank, every rank raises that error."""
    result, error = None, None
    try:
        result = act()
    except Exception as e:
        error = e
    ranks_of = defaultdict(list)
    for rank, problem in enumerate(_all_gather(group, _error_text(error), timeout)):
        if problem:
            ranks_of[problem].append(rank)
    if ranks_of:
        problems = "; ".join(f"ranks {ranks}: {problem}" for problem, ranks in ranks_of.items())
        raise RuntimeError(f"torch_ep: symmetric memory from provider '{provider}': {problems}") from error
    return result  # type: ignore[return-value]


def _error_text(error: Exception | None) -> str:
    if error is None:
        return ""
    return str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"


# --- peer access ---


def _facts(device: torch.device) -> dict[str, Any]:
    """This rank's device, for the other ranks. `reach`: peer access from this GPU to each visible GPU, by UUID."""
    facts: dict[str, Any] = {"host": _host(), "gpu": None, "index": None, "reach": {}, "runs": False, "problem": None}
    if device.type != "cuda" or not torch.cuda.is_available():
        return facts
    try:
        own = torch.cuda.current_device() if device.index is None else device.index
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        facts["gpu"], facts["index"] = uuids[own], own
        with torch.cuda.device(own):
            facts["runs"] = torch.ops.ep._nvlink_runs()
        facts["reach"] = {uuid: i == own or torch.cuda.can_device_access_peer(own, i) for i, uuid in enumerate(uuids)}
    except Exception as error:  # report it: the other ranks wait for this rank's value
        facts["problem"] = f"{type(error).__name__}: {error}"
    return facts


def _host() -> str:
    """Identifies the host. The boot id separates hosts that have the same name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}".strip()


def _why_not(ranks: Sequence[Mapping[str, Any]], provider: Provider = "torch") -> str | None:
    """`PeerAccess.why_not` from the facts of all ranks, by rank."""
    for rank, facts in enumerate(ranks):
        if facts["problem"]:
            return f"rank {rank} could not ask its GPU: {facts['problem']}"
    without = [rank for rank, facts in enumerate(ranks) if facts["gpu"] is None]
    if without:
        return f"there is no CUDA device on ranks {without}"
    for rank, facts in enumerate(ranks):
        if not facts["runs"]:
            return f"torch_ep was not built for the GPU of rank {rank}"
    ranks_on = defaultdict(list)
    for rank, facts in enumerate(ranks):
        ranks_on[facts["host"]].append(rank)
    if len(ranks_on) > 1:
        return "its ranks are on several hosts: " + ", ".join(f"{on} on {host}" for host, on in ranks_on.items())
    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if i != j]
    for i, j in pairs:
        if ranks[i]["gpu"] == ranks[j]["gpu"] and provider == "torch":
            return f"ranks {i} and {j} share one GPU, which provider 'nvshmem' takes and provider 'torch' does not"
    for i, j in pairs:
        if ranks[j]["gpu"] not in ranks[i]["reach"]:
            return (
                f"rank {i} does not see the GPU of rank {j}: CUDA_VISIBLE_DEVICES has to name the GPUs of all ranks, "
                "on every rank"
            )
    for i, j in pairs:
        if not ranks[i]["reach"][ranks[j]["gpu"]]:
            return f"no peer access from the GPU of rank {i} to that of rank {j}"
    for i, j in pairs:
        if ranks[i]["index"] == ranks[j]["index"] and provider == "torch":
            return (
                f"ranks {i} and {j} both call their GPU cuda:{ranks[i]['index']}: CUDA_VISIBLE_DEVICES has to name the "
                "GPUs in the same order on every rank"
            )
    return None


# --- release ---


class _Owner:
    """Holds memory. Its destructor keeps the memory for the next allocation: a free could wait for the device."""

    def __init__(self, memory: object, released: list) -> None:
        self._memory, self._released = memory, released

    def __del__(self) -> None:
        self._released.append(self._memory)


def _never_freed(items: list) -> list:
    """Leaks one reference to the list and returns the list.

    At exit the interpreter destroys the elements of lists, and torch waits for the device before it frees memory. The
    wait never ends if a kernel waits for a dead peer. The driver reclaims the memory when the process ends.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(items))
    return items


_released_by_torch: list[object] = _never_freed([])
_released_heap: list[_Block] = _never_freed([])


# --- provider "torch" ---


class _RenumberingStore(dist.Store):
    """A group's store for one rendezvous. Numbers the exchanges from 0.

    torch numbers the exchanges of all groups of a process in one sequence and uses the number as a key. Ranks that
    joined different numbers of groups would wait for keys that no rank sets.
    """

    def __init__(self, store: dist.Store, timeout: timedelta) -> None:
        super().__init__()
        self._store, self._timeout = store, timeout
        self._numbers: dict[str, int] = {}

    def _key(self, key: str) -> str:
        head, number, tail = key.rsplit("/", 2)
        return f"{head}/{self._numbers.setdefault(number, len(self._numbers))}/{tail}"

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        self._store.wait([self._key(key)], self._timeout)
        return self._store.get(self._key(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def add(self, key: str, value: int) -> int:
        return self._store.add(self._key(key), value)

    def check(self, keys: list[str]) -> bool:
        return self._store.check([self._key(key) for key in keys])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._store.wait([self._key(key) for key in keys], self._timeout)


def _from_torch(group: dist.ProcessGroup, nbytes: int, device: torch.device, timeout: timedelta) -> Buffer:
    def zeros() -> torch.Tensor:
        backend = _SymmetricMemory.get_backend(device)
        if backend != "CUDA":
            raise RuntimeError(
                f"expected torch's symmetric memory to have backend 'CUDA', got {backend!r}: TORCH_SYMMMEM or "
                "torch.distributed._symmetric_memory.set_backend has chosen it"
            )
        # Not `_symmetric_memory.empty`: its memory pool may return different blocks on different ranks, and the
        # rendezvous caches its result per block without an exchange with the other ranks.
        tensor = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
        tensor.zero_()
        torch.cuda.synchronize(device)
        return tensor

    with torch.cuda.device(device):
        _released_by_torch.clear()
        # Zeroed on every rank before any rank knows another's address.
        tensor = _on_every_rank(group, "torch", timeout, zeros)
        # The rendezvous of a process group that has no backend goes through its store alone.
        name = "torch_ep/symmetric/" + _all_gather(group, uuid.uuid4().hex, timeout)[0]
        store = _RenumberingStore(dist.PrefixStore(name, group.get_group_store()), timeout)
        stand_in = dist.ProcessGroup(store, group.rank(), group.size())
        _register_process_group(name, stand_in)  # type: ignore[arg-type] # a NewType of str
        try:
            handle = _SymmetricMemory.rendezvous(tensor, name)
        finally:
            _unregister_process_group(name)  # type: ignore[arg-type]
    return Buffer(list(handle.buffer_ptrs), nbytes, "torch", _Owner((tensor, handle), _released_by_torch))


# --- provider "nvshmem" ---


class _Block(NamedTuple):
    number: int  # counts allocations: the same block has the same number on every rank
    address: int
    nbytes: int


class _Bytes:
    """Device memory as torch.as_tensor takes it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


_HEAP_DEFAULT = 2**30  # NVSHMEM's own
_HEAP_SPARE = 2**28  # bytes of its heap that NVSHMEM uses itself, with a margin
_num_blocks = 0


def _from_nvshmem(group: dist.ProcessGroup, nbytes: int, device: torch.device, timeout: timedelta) -> Buffer:
    global _num_blocks
    core, bindings, device_type = _on_every_rank(group, "nvshmem", timeout, _import_nvshmem)
    with torch.cuda.device(device):
        _init_nvshmem(group, nbytes, device_type(device.index), core, timeout)
        block = _reusable(group, nbytes, timeout)
        if block is None:
            # Collective over all ranks, with no timeout: all have just been here. 0 if the heap is full, on all.
            block = _Block(_num_blocks, bindings.malloc(nbytes), nbytes)
            _num_blocks += 1

        def prepare() -> list[int]:
            if not block.address:
                raise RuntimeError(
                    f"no {nbytes} bytes left on the symmetric heap: set NVSHMEM_SYMMETRIC_SIZE before the program "
                    "starts, or NVSHMEM_MAX_MEMORY_PER_GPU for a heap that grows"
                )
            torch.as_tensor(_Bytes(block.address, nbytes), device=device).zero_()
            torch.cuda.synchronize(device)
            ranks = dist.get_process_group_ranks(group)
            pointers = [bindings.ptr(block.address, rank) for rank in ranks]
            if not all(pointers):
                raise RuntimeError(f"NVSHMEM reaches global rank {ranks[pointers.index(0)]} by no load or store")
            return pointers

        # Zeroed on every rank before any rank knows another's address.
        pointers = _on_every_rank(group, "nvshmem", timeout, prepare)
    return Buffer(pointers, nbytes, "nvshmem", _Owner(block, _released_heap))


def _import_nvshmem() -> tuple[ModuleType, ModuleType, Any]:
    """Modules nvshmem.core and nvshmem.bindings, and cuda.core's Device.

    Allocation goes through the bindings: nvshmem.core's own buffers complain when they are dropped before a free, which
    would be collective. Without any, exit leaves nothing to be done: NVSHMEM then closes its sockets and no more.
    """
    try:
        core, bindings = importlib.import_module("nvshmem.core"), importlib.import_module("nvshmem.bindings")
        return core, bindings, importlib.import_module("cuda.core").Device
    except Exception as error:
        raise RuntimeError(
            f"the package nvshmem4py is missing or does not load: pip install nvshmem4py-cu13 "
            f"({type(error).__name__}: {error})"
        ) from error


def _init_nvshmem(
    group: dist.ProcessGroup, nbytes: int, cuda_device: Any, core: ModuleType, timeout: timedelta
) -> None:
    """Initializes NVSHMEM over all ranks of the job, unless this process has."""
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def begin() -> bytes | None:
        """None: is initialized. Else the unique id on global rank 0, and nothing on the others."""
        uid = core.get_unique_id(empty=True)  # also loads the library
        if core.init_status() >= core.InitStatus.STATUS_IS_INITIALIZED:
            if (core.my_pe(), core.n_pes()) != (rank, world_size):
                raise RuntimeError(
                    f"expected NVSHMEM to number this rank {rank} of {world_size}, as torch.distributed does, got "
                    f"{core.my_pe()} of {core.n_pes()}"
                )
            return None
        if nbytes + _HEAP_SPARE > _HEAP_DEFAULT:
            os.environ.setdefault("NVSHMEM_SYMMETRIC_SIZE", str(nbytes + _HEAP_SPARE))
        cuda_device.set_current()
        if rank > 0:
            return b""
        uid = core.get_unique_id()
        return ctypes.string_at(uid.ptr, uid._data.nbytes)

    own = _on_every_rank(group, "nvshmem", timeout, begin)
    answers = _all_gather(group, "initialized" if own is None else own.hex(), timeout)
    if own is None and len(set(answers)) == 1:
        return
    if "initialized" in answers:
        raise RuntimeError(
            "torch_ep: symmetric memory from provider 'nvshmem': expected NVSHMEM to be initialized on all ranks or on "
            f"none, is on ranks {[i for i, answer in enumerate(answers) if answer == 'initialized']}"
        )
    data = bytes.fromhex(next(answer for answer in answers if answer))

    def init() -> None:
        uid = core.get_unique_id(empty=True)
        ctypes.memmove(uid.ptr, data, len(data))
        core.init(device=cuda_device, uid=uid, rank=rank, nranks=world_size, initializer_method="uid")

    _on_every_rank(group, "nvshmem", timeout, init)


def _reusable(group: dist.ProcessGroup, nbytes: int, timeout: timedelta) -> _Block | None:
    """The smallest block that is large enough and released on every rank, taken off the list; None if there is none."""
    fitting = {block.number: block for block in _released_heap if block.nbytes >= nbytes}
    everywhere = set(fitting)
    for numbers in _all_gather(group, json.dumps(sorted(fitting)), timeout):
        everywhere &= set(json.loads(numbers))
    if not everywhere:
        return None
    chosen = min((fitting[number] for number in everywhere), key=lambda block: (block.nbytes, block.number))
    _released_heap.remove(chosen)
    return chosen
