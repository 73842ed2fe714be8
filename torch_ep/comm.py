"""Communicators: one per process group, created collectively, looked up by group name in the operators."""

from __future__ import annotations

import atexit
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from numbers import Integral
from typing import Any, Literal, NamedTuple, Union

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from . import rendezvous, symmetric
from .grid import destroy_orphans, flat_group_of, gather_hosts, make_flat_group, make_grid, ranks_per_node_of

__all__ = ["Communicator", "Group", "active_ranks", "destroy", "init", "mask_ranks", "reset"]

Group = Union[dist.ProcessGroup, DeviceMesh, str, None]  # noqa: UP007 - evaluated, also on Python 3.10
BackendChoice = Literal["auto", "c10d", "nvlink"]
OnTimeout = Literal["raise", "mask"]

_BACKENDS = ("auto", "c10d", "nvlink")
_PROVIDERS = ("torch", "nvshmem")
_ON_TIMEOUT = ("raise", "mask")
_LIMITS = ("max_tokens_per_rank", "hidden", "num_topk", "num_experts")
# Of the nvlink kernels (csrc/nvlink/layout.h, csrc/nvlink/params.h).
_MAX_RANKS = 16
_MAX_TOPK = 32
_MIN_SMS = 2  # senders and receivers are separate thread blocks
_MAX_SMS = 128
# How long a rank with a bad argument waits for the other ranks to report it to them.
_MAX_REPORT = timedelta(seconds=30)
# A longer timeout overflows the nanosecond clocks of gloo and of stores.
_MAX_TIMEOUT = timedelta(days=365)
# Making buffers takes longer than an exchange may.
_LEAST_INIT_TIMEOUT = timedelta(minutes=1)


class Communicator(NamedTuple):
    """What `init` agreed on for one group. A limit of None is no limit."""

    group_name: str
    rank: int
    world_size: int
    timeout: timedelta
    max_tokens_per_rank: int | None = None
    hidden: int | None = None
    num_topk: int | None = None
    num_experts: int | None = None
    low_latency_tokens: int | None = None
    #: Backend of CUDA tensors: "c10d", "nvlink", or on a grid of nodes "hierarchical". Other tensors always use c10d.
    backend: str = "c10d"
    #: Why `init` chose this backend.
    reason: str = ""
    #: Bytes of symmetric memory that this rank holds for the communicator.
    symmetric_bytes: int = 0
    #: Thread blocks per nvlink kernel. Each occupies one streaming multiprocessor (SM).
    num_sms: int = 0
    #: What a timeout of the low-latency pair does on nvlink.
    on_timeout: OnTimeout = "raise"
    #: Most rows that a rank relays into its node, on a grid of nodes.
    max_relay_rows: int | None = None
    #: On a grid of nodes: the communicator of the ranks that have this rank's position in their nodes.
    rail: Communicator | None = None
    #: On a grid of nodes: the communicator of this rank's node.
    node: Communicator | None = None


# By group name. The kernels have a table of their own; this one is for what is decided while tracing.
communicators: dict[str, Communicator] = {}
# Buffers that the kernels of a communicator write into, by group name, kept as long as the kernels may run.
_buffers: dict[str, symmetric.Buffer] = {}
_still_running: list[symmetric.Buffer] = []
# Arguments of `init`, by group name.
_arguments_of: dict[str, tuple[dist.ProcessGroup | None, dict[str, Any]]] = {}
# Names of communicators without a process group, whose ranks all share this process.
_virtual: set[str] = set()


def process_group(group_name: str) -> dist.ProcessGroup:
    try:
        return dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type] # a NewType of str
    except RuntimeError as error:
        raise RuntimeError(
            f"torch_ep: expected the name of a process group, got '{group_name}', which there is not, or no longer: "
            "after torch.distributed.destroy_process_group create a group anew, call torch_ep.init(group) on every "
            "rank, and make plans and layers with it"
        ) from error


def resolve(group: Group) -> tuple[str, int]:
    """The name and world size of a group; ("", 1) for a single rank."""
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            if not torch.compiler.is_compiling():
                _warn_of_separate_worlds()
            return "", 1
        group = dist.group.WORLD
    elif isinstance(group, DeviceMesh):
        group = group.get_group() if group.ndim == 1 else _flat_group(group)
    elif isinstance(group, str):
        if group == "":
            return "", 1
        if group in communicators and (torch.compiler.is_compiling() or group in _virtual):
            return group, communicators[group].world_size  # Dynamo cannot trace the look-up below
        group = process_group(group)
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"torch_ep: expected group to be a ProcessGroup, a DeviceMesh, a group's name or None, "
            f"got {type(group).__name__}"
        )
    world_size = group.size()
    return ("", 1) if world_size == 1 else (group.group_name, world_size)


def _flat_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all ranks of a mesh (node, position in the node)."""
    if mesh.ndim != 2:
        raise ValueError(
            f"torch_ep: expected a DeviceMesh of one dimension, or of two for a grid of nodes, got {mesh.ndim} "
            'dimensions: pass the ones that experts are spread over, as in mesh["ep"] or mesh["node", "local"]'
        )
    flat = flat_group_of(mesh)
    if flat is None:
        raise RuntimeError(
            f"torch_ep: expected an initialized DeviceMesh, got one of {mesh.mesh.shape[0]} nodes of "
            f"{mesh.mesh.shape[1]} ranks: call torch_ep.init(mesh) on every rank first, or pass the dimension that "
            'experts are spread over, as in mesh["ep"]'
        )
    return flat


_warned_of_separate_worlds = False


def _warn_of_separate_worlds() -> None:
    global _warned_of_separate_worlds
    world_size = os.environ.get("WORLD_SIZE", "1")
    if not _warned_of_separate_worlds and "RANK" in os.environ and world_size not in ("", "1"):
        _warned_of_separate_worlds = True
        warnings.warn(
            f"torch_ep: this process was launched as one of WORLD_SIZE = {world_size}, but torch.distributed is not "
            "initialized: it works alone, with all experts. Call torch.distributed.init_process_group(), then "
            "torch_ep.init(); pass group='' for one rank alone",
            stacklevel=4,
        )


def init(
    group: Group = None,
    *,
    max_tokens_per_rank: int | None = None,
    hidden: int | None = None,
    num_topk: int | None = None,
    num_experts: int | None = None,
    low_latency_tokens: int | None = None,
    timeout: timedelta = timedelta(minutes=5),
    backend: BackendChoice = "auto",
    num_sms: int = 24,
    provider: symmetric.Provider = "torch",
    on_timeout: OnTimeout = "raise",
    ranks_per_node: int | Literal["auto"] | None = None,
    max_relay_rows: int | None = None,
) -> Communicator:
    """Prepares a process group for the operators. Collective: all ranks of the group call it with the same arguments.

    A second call with the same arguments returns the existing communicator after one small exchange.
    With other arguments it replaces the communicator of that group: with larger limits, buffers grow. Without a process
    group, or with a group of one rank, no other rank has to be prepared for: plan, dispatch and combine run the same
    with and without `init`. The low-latency pair needs it, with all limits, to run in kernels of its own on a CUDA
    device.

    The ranks connect over TCP, by a gloo backend of torch_ep's own. The program's collectives on the same group and
    torch_ep's exchanges on the CPU cannot disturb each other. On a CUDA device with backend "c10d", rows travel over
    the group itself, which must not run other collectives from another thread meanwhile.

    On a grid of nodes, with `ranks_per_node` or a two-dimensional mesh, every exchange is two: between the ranks of a
    rail, which have one position in their nodes, then inside each node; back in the other order. A row crosses the
    network once per (token, node). Each of the two groups has a backend of its own. See docs/multi_node.md.

    Args:
        group: a ProcessGroup, a one-dimensional DeviceMesh, a group's name, or None for the default group. Or a
            DeviceMesh of two dimensions (node, position in the node), of ascending ranks.
        max_tokens_per_rank: most tokens that a rank will ever pass to `plan`. Bounds the symbolic sizes of compiled
            graphs. None: no limit.
        hidden: most elements of a row. None: no limit. Room in the buffers of backend nvlink is for elements of two
            bytes: rows of wider ones travel in several parts, but those of the low-latency pair in one, so they need a
            `hidden` that is as many times larger.
        num_topk: most experts per token. None: no limit.
        num_experts: most experts. None: no limit.
        low_latency_tokens: most tokens that a rank will ever pass to `low_latency_dispatch`, for which backend nvlink
            sets aside memory: about 8 * world_size * low_latency_tokens * hidden bytes, and at most 16 MiB more for
            rows of few tokens. With float32 rows, `hidden` has to be twice theirs. None: there, none at all; elsewhere
            no limit.
        timeout: how long an exchange waits for a peer before it raises `torch.distributed.DistError`, naming it.
        backend: how rows of CUDA tensors travel. "nvlink": by kernels that write into the peers' memory; needs all
            four limits, GPUs that can write into each other, at most 16 ranks and 32 experts per token. "c10d": through
            the process group. "auto": nvlink where it can be, else c10d; `Communicator.reason` says why.
        num_sms: streaming multiprocessors that an nvlink kernel may occupy.
        provider: whose symmetric memory nvlink uses: "torch", or "nvshmem" (the package nvshmem4py). With "nvshmem"
            ranks may share a GPU, for tests: num_sms times the ranks of one GPU is then at most its number of SMs, and
            the ranks run at the same time only under NVIDIA MPS.
        on_timeout: what the low-latency pair does on backend nvlink when a rank does not come in time: "raise", or
            "mask" it and go on without it; see `mask_ranks`. All other operators raise.
        ranks_per_node: makes the group a grid of nodes of so many consecutive ranks. "auto": the ranks of each host,
            if they are consecutive and equally many; else no grid, and `Communicator.reason` says why. None: no grid,
            except for a two-dimensional mesh.
        max_relay_rows: most rows that a rank receives from other nodes, and its own, to pass on inside its node. None:
            the number of nodes times `max_tokens_per_rank`, which always suffices. On a grid only. An exact plan of
            more rows raises; a plan with a capacity drops those rows and counts them.

    Returns:
        What was agreed on, with the backend chosen and the bytes of symmetric memory that it took.

    Raises:
        ValueError, TypeError: an argument is out of its range, or of another type.
        RuntimeError: backend "nvlink" was asked for and cannot be; or the ranks cannot connect; or the group has
            torch's fake backend. The message says why.
        torch.distributed.DistError: ranks passed different arguments or run different versions, or one did not come.
    """
    arguments: dict[str, Any] = dict(
        max_tokens_per_rank=max_tokens_per_rank, hidden=hidden, num_topk=num_topk, num_experts=num_experts,
        low_latency_tokens=low_latency_tokens, timeout=timeout, backend=backend, num_sms=num_sms, provider=provider,
        on_timeout=on_timeout,
    )  # fmt: skip
    _forget_orphans()
    is_mesh = isinstance(group, DeviceMesh) and group.ndim == 2
    if is_mesh or ranks_per_node is not None or max_relay_rows is not None:
        return _init_grid(group, ranks_per_node, max_relay_rows, arguments)
    group_name, world_size = resolve(group)
    process = process_group(group_name) if world_size > 1 else None
    try:
        _check_arguments(arguments)
    except (TypeError, ValueError) as error:
        if process is not None:
            _report_failure(process, str(error))
        raise
    limits = {name: arguments[name] for name in _LIMITS}
    rank = 0 if process is None else process.rank()
    if process is not None:
        _refuse_fake(process)
        has_connected = _agree(process, timeout, arguments)
        if not has_connected and _arguments_of.get(group_name) == (process, arguments):
            return communicators[group_name]
        _forget_grid(group_name)
    elif group is None and not (dist.is_available() and dist.is_initialized()):
        torch.ops.ep._hint_at_init(
            ". (torch_ep.init was called before torch.distributed.init_process_group, where there was no group yet: "
            "call it again after that)"
        )
    communicator = Communicator(
        group_name, rank, world_size, timeout, max_tokens_per_rank, hidden, num_topk, num_experts, low_latency_tokens,
        on_timeout=on_timeout,
    )  # fmt: skip
    if backend == "c10d":
        communicator = communicator._replace(reason="asked for")
        _forget(group_name)
    else:
        why_not, ranks_per_gpu = _why_not_nvlink(process, world_size, limits), 1
        if why_not is None and process is not None:
            why_not, ranks_per_gpu = symmetric.peer_access(process, _device(), provider, timeout=_init_timeout(timeout))
        if why_not is None and ranks_per_gpu > 1:
            why_not = _why_not_shared(ranks_per_gpu, num_sms)
        if why_not is None:
            communicator = _init_nvlink(communicator, process, num_sms, provider, ranks_per_gpu)
        elif backend == "nvlink":
            raise RuntimeError(f"torch_ep.init: backend 'nvlink' cannot be used: {why_not}")
        else:
            communicator = communicator._replace(reason=why_not)
            _forget(group_name)
    if world_size > 1 or communicator.backend == "nvlink":
        communicators[group_name] = communicator
        _arguments_of[group_name] = (process, arguments)
    else:
        communicators.pop(group_name, None)
    return communicator


def _init_grid(
    group: Group, ranks_per_node: int | Literal["auto"] | None, max_relay_rows: int | None, arguments: dict[str, Any]
) -> Communicator:
    """`init` of a group as a grid of nodes."""
    is_valid = isinstance(arguments["timeout"], timedelta)  # else `_check_arguments` raises
    timeout = _init_timeout(arguments["timeout"]) if is_valid else _MAX_REPORT
    mesh_size = None
    if isinstance(group, DeviceMesh) and group.ndim == 2:
        process, mesh_size = make_flat_group(group, timeout), group.mesh.shape[1]
    else:
        group_name, world_size = resolve(group)
        if world_size == 1:
            return init("", **arguments)._replace(reason="no grid: there is one rank")
        process = process_group(group_name)
    name = process.group_name
    # Ranks leave their connections together: one that passes no ranks_per_node waits for the others on them.
    if torch.ops.ep._is_connected(name):
        torch.ops.ep._report_failure("torch_ep.init", name, "it was called with ranks_per_node or a mesh of nodes")
        _destroy(name)
    try:
        _check_arguments(arguments)
        _check_grid(process.size(), mesh_size, ranks_per_node, max_relay_rows)
        _refuse_fake(process)
    except (TypeError, ValueError, RuntimeError) as error:
        with suppress(dist.DistError):
            gather_hosts(process, {}, _MAX_REPORT, failure=str(error))
        raise
    all_arguments = {**arguments, "ranks_per_node": ranks_per_node, "max_relay_rows": max_relay_rows}
    hosts, serial = gather_hosts(process, all_arguments, timeout)
    _destroy(name)
    size: Any = mesh_size if ranks_per_node is None else ranks_per_node
    reason = "asked for" if mesh_size is None else "a DeviceMesh"
    if size == "auto":
        size, reason = ranks_per_node_of(hosts)
    elif size in (1, process.size()):
        size, reason = None, "one rank per node" if size == 1 else "one node"
    if size is None:
        communicator = init(process, **arguments)
        communicators[name] = communicator._replace(reason=f"no grid: {reason}; {communicator.reason}")
        return communicators[name]
    grid = make_grid(process, size, serial, timeout)
    num_nodes = grid.rail.size()
    if max_relay_rows is None and arguments["max_tokens_per_rank"] is not None:
        max_relay_rows = num_nodes * arguments["max_tokens_per_rank"]
    in_rail = {**arguments, "backend": "c10d" if arguments["backend"] == "c10d" else "auto"}
    in_node = {**arguments, "max_tokens_per_rank": max_relay_rows}
    for limit, divide in (("num_experts", True), ("low_latency_tokens", False)):
        if arguments[limit] is not None:
            in_node[limit] = arguments[limit] // num_nodes if divide else arguments[limit] * num_nodes
    node = _init_level(process, grid.node, in_node, timeout)
    rail = _init_level(process, grid.rail, in_rail, timeout)
    torch.ops.ep._link_groups(rail.group_name, node.group_name)
    limits = {limit: arguments[limit] for limit in (*_LIMITS, "low_latency_tokens", "on_timeout")}
    communicators[name] = Communicator(
        name,
        process.rank(),
        process.size(),
        arguments["timeout"],
        **limits,
        backend="hierarchical",
        reason=(
            f"{num_nodes} nodes of {grid.node.size()} ranks ({reason}): {rail.backend} between them ({rail.reason}), "
            f"{node.backend} inside ({node.reason})"
        ),
        symmetric_bytes=rail.symmetric_bytes + node.symmetric_bytes,
        num_sms=max(rail.num_sms, node.num_sms),
        max_relay_rows=max_relay_rows,
        rail=rail,
        node=node,
    )
    _arguments_of[name] = (process, {**all_arguments, "ranks_per_node": size})  # `reset` has no mesh
    return communicators[name]


def _check_grid(world_size: int, mesh_size: int | None, ranks_per_node: Any, max_relay_rows: Any) -> None:
    """`mesh_size`: ranks per node of a mesh."""
    op = "torch_ep.init"
    if mesh_size is not None and ranks_per_node not in (None, mesh_size):
        raise ValueError(f"{op}: expected ranks_per_node = {mesh_size} or None with this mesh, got {ranks_per_node!r}")
    if mesh_size is None and ranks_per_node is None:
        raise ValueError(
            f"{op}: expected ranks_per_node with max_relay_rows, got None: only a grid of nodes has relays"
        )
    if ranks_per_node not in (None, "auto"):
        if isinstance(ranks_per_node, bool) or not isinstance(ranks_per_node, Integral):
            raise TypeError(f"{op}: expected ranks_per_node to be an int, 'auto' or None, got {ranks_per_node!r}")
        if ranks_per_node <= 0 or world_size % ranks_per_node:
            raise ValueError(
                f"{op}: expected ranks_per_node to divide the {world_size} ranks of the group, got {ranks_per_node}"
            )
    if max_relay_rows is not None and not isinstance(max_relay_rows, Integral):
        raise TypeError(f"{op}: expected max_relay_rows to be an int or None, got {type(max_relay_rows).__name__}")
    if max_relay_rows is not None and max_relay_rows <= 0:
        raise ValueError(f"{op}: expected a positive max_relay_rows or None, got {max_relay_rows}")


def _init_level(
    flat: dist.ProcessGroup, process: dist.ProcessGroup, arguments: dict[str, Any], timeout: timedelta
) -> Communicator:
    """`init` of one of the groups of a grid. A failure is raised on all ranks of the grid."""
    try:
        communicator = init(process, **arguments)
    except Exception as error:
        rendezvous.report_failure(flat, "torch_ep.init", str(error), timeout)
        raise
    rendezvous.all_gather(flat, "torch_ep.init", "", timeout)
    return communicator


def _forget_grid(group_name: str) -> None:
    """Ends the communicators of a grid's groups. The group itself stays."""
    communicator = communicators.get(group_name)
    if communicator is None or communicator.rail is None or communicator.node is None:
        return
    torch.ops.ep._unlink_group(communicator.rail.group_name)
    for level in (communicator.rail, communicator.node):
        _destroy(level.group_name)
    communicators.pop(group_name)
    _arguments_of.pop(group_name, None)


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Of `init`, without the group."""
    for name in (*_LIMITS, "low_latency_tokens"):
        limit = arguments[name]
        if limit is not None and not isinstance(limit, Integral):
            raise TypeError(f"torch_ep.init: expected {name} to be an int or None, got {type(limit).__name__}")
        if limit is not None and limit <= 0:
            raise ValueError(f"torch_ep.init: expected a positive {name} or None, got {limit}")
    timeout, backend, provider = arguments["timeout"], arguments["backend"], arguments["provider"]
    on_timeout, num_sms = arguments["on_timeout"], arguments["num_sms"]
    if not isinstance(timeout, timedelta):
        raise TypeError(f"torch_ep.init: expected timeout to be a datetime.timedelta, got {type(timeout).__name__}")
    if not timedelta() < timeout <= _MAX_TIMEOUT:
        raise ValueError(f"torch_ep.init: expected a timeout above 0 and of at most {_MAX_TIMEOUT}, got {timeout}")
    if backend not in _BACKENDS:
        raise ValueError(f"torch_ep.init: expected backend 'auto', 'c10d' or 'nvlink', got {backend!r}")
    if provider not in _PROVIDERS:
        raise ValueError(f"torch_ep.init: expected provider 'torch' or 'nvshmem', got {provider!r}")
    if on_timeout not in _ON_TIMEOUT:
        raise ValueError(f"torch_ep.init: expected on_timeout 'raise' or 'mask', got {on_timeout!r}")
    if not _MIN_SMS <= num_sms <= _MAX_SMS:
        raise ValueError(f"torch_ep.init: expected num_sms from {_MIN_SMS} to {_MAX_SMS}, got {num_sms}")


def _report_failure(process: dist.ProcessGroup, failure: str) -> None:
    """Tells the other ranks, which are in `init` or will come to it, that this rank has a bad argument."""
    name = process.group_name
    if torch.ops.ep._is_connected(name):
        torch.ops.ep._report_failure("torch_ep.init", name, failure)
    else:
        rendezvous.report_failure(process, "torch_ep.init", failure, _MAX_REPORT)


def _refuse_fake(process: dist.ProcessGroup) -> None:
    if "fake" in dist.get_backend_config(process):
        raise RuntimeError(
            "torch_ep.init: expected a process group that moves data, got torch's backend 'fake', which moves none: to "
            "check shapes and memory in one process, run the model under torch._subclasses.FakeTensorMode, or with a "
            "capacity on the meta device"
        )


def _agree(process: dist.ProcessGroup, timeout: timedelta, arguments: Mapping[str, Any]) -> bool:
    """The ranks agree on the arguments: over the connections of the earlier communicator where all are still on them.

    Returns whether they had to connect.
    """
    options = {
        **arguments,
        "timeout_ms": _milliseconds(timeout),
        "global_ranks": dist.get_process_group_ranks(process),
    }
    del options["timeout"]
    name = process.group_name
    if torch.ops.ep._init(name, "", **options):
        return False
    torch.ops.ep._destroy(name)
    with rendezvous.connect(process, timeout) as connections:
        torch.ops.ep._init(name, connections, **options)
    return True


def _init_timeout(timeout: timedelta) -> timedelta:
    return max(timeout, _LEAST_INIT_TIMEOUT)


def _milliseconds(timeout: timedelta) -> int:
    return max(1, int(timeout.total_seconds() * 1000))


def _why_not_nvlink(process: dist.ProcessGroup | None, world_size: int, limits: Mapping[str, int | None]) -> str | None:
    """What this rank can tell without the others; the same answer on every rank."""
    if "nvlink" not in torch.ops.ep._backends():
        return "torch_ep was built without CUDA"
    missing = [name for name, limit in limits.items() if limit is None]
    if missing:
        return f"its buffers need every limit, and {', '.join(missing)} is not given"
    num_topk, num_experts = limits["num_topk"] or 0, limits["num_experts"] or 0
    if num_topk > _MAX_TOPK:
        return f"it takes at most {_MAX_TOPK} experts per token, and num_topk is {num_topk}"
    if num_experts % world_size:
        return f"num_experts = {num_experts} is no multiple of the {world_size} ranks"
    most_experts = torch.ops.ep._nvlink_most_experts(world_size)
    if num_experts > most_experts:
        return f"it takes at most {most_experts} experts on {world_size} ranks, and num_experts is {num_experts}"
    if process is None:
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        return None if torch.ops.ep._nvlink_runs() else "torch_ep was not built for this GPU"
    if world_size > _MAX_RANKS:
        return f"it takes at most {_MAX_RANKS} ranks, and there are {world_size}"
    if torch.device("cuda") not in process._device_types:
        return "the process group has no backend for CUDA"
    return None


def _why_not_shared(ranks_per_gpu: int, num_sms: int) -> str | None:
    """Thread blocks of all ranks wait for each other, so all have to run at once."""
    available = torch.cuda.get_device_properties(_device()).multi_processor_count
    if ranks_per_gpu * num_sms > available:
        return (
            f"{ranks_per_gpu} ranks share a GPU of {available} SMs, so each may use {available // ranks_per_gpu}, and "
            f"num_sms is {num_sms}"
        )
    return None


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _limits(communicator: Communicator) -> dict[str, int]:
    """Limits of a communicator that has all of them; low_latency_tokens is 0 if there is to be no low-latency pair."""
    return {name: getattr(communicator, name) or 0 for name in (*_LIMITS, "low_latency_tokens")}


def _init_nvlink(
    communicator: Communicator,
    process: dist.ProcessGroup | None,
    num_sms: int,
    provider: symmetric.Provider,
    ranks_per_gpu: int,
) -> Communicator:
    world_size = communicator.world_size
    nbytes = torch.ops.ep._nvlink_bytes(world_size, **_limits(communicator), num_sms=num_sms)
    if process is None:
        buffer, reason = _local_buffers(1, nbytes)[0], "one CUDA device, no peers"
    else:
        buffer = symmetric.allocate(process, nbytes, _device(), provider, timeout=_init_timeout(communicator.timeout))
        reason = "every GPU of the group can write into every other"
        if ranks_per_gpu > 1:
            reason = f"up to {ranks_per_gpu} ranks share one GPU"
    communicator = communicator._replace(backend="nvlink", reason=reason, symmetric_bytes=nbytes, num_sms=num_sms)
    _start_nvlink(communicator, buffer, groupless=process is None, shares_device=ranks_per_gpu > 1)
    return communicator


def _local_buffers(count: int, nbytes: int) -> list[symmetric.Buffer]:
    """Buffers of `count` ranks in this process."""
    tensors = [torch.zeros(nbytes, dtype=torch.uint8, device="cuda") for _ in range(count)]
    torch.cuda.synchronize()
    return [symmetric.Buffer([t.data_ptr() for t in tensors], nbytes, "local", tensors) for _ in range(count)]


def _start_nvlink(
    communicator: Communicator, buffer: symmetric.Buffer, *, groupless: bool, shares_device: bool
) -> None:
    name = communicator.group_name
    was_idle = torch.ops.ep._init_nvlink(
        name,
        communicator.rank,
        communicator.world_size,
        buffer.pointers,
        **_limits(communicator),
        num_sms=communicator.num_sms,
        timeout_ms=_milliseconds(communicator.timeout),
        groupless=groupless,
        shares_device=shares_device,
        masks=communicator.on_timeout == "mask",
    )
    if name in _buffers and not was_idle:
        _still_running.append(_buffers[name])
    _buffers[name] = buffer


def _forget(group_name: str) -> None:
    """Ends the nvlink backend of a group, if it has one. Its memory stays while a kernel still runs."""
    buffer = _buffers.pop(group_name, None)
    if buffer is not None and not torch.ops.ep._destroy_nvlink(group_name):
        _still_running.append(buffer)


def init_virtual(
    world_size: int,
    *,
    max_tokens_per_rank: int,
    hidden: int,
    num_topk: int,
    num_experts: int,
    low_latency_tokens: int | None = None,
    timeout: timedelta = timedelta(seconds=30),
    num_sms: int = 8,
    on_timeout: OnTimeout = "raise",
) -> list[str]:
    """Several ranks of the nvlink backend on the current CUDA device, in this process: for tests on one GPU.

    Returns the name of each rank's group. Each rank's calls belong in a thread of its own, on a stream of its own. All
    blocks of all ranks have to fit on the device: world_size * num_sms is at most its number of multiprocessors.
    """
    if num_sms < _MIN_SMS:
        raise ValueError(f"torch_ep: virtual ranks: expected num_sms of at least {_MIN_SMS}, got {num_sms}")
    first = len(_virtual)
    names = [f"virtual {first}, rank {rank}" for rank in range(world_size)]
    first_rank = Communicator(
        names[0], 0, world_size, timeout, max_tokens_per_rank, hidden, num_topk, num_experts, low_latency_tokens,
        backend="nvlink", reason="virtual ranks", num_sms=num_sms, on_timeout=on_timeout,
    )  # fmt: skip
    nbytes = torch.ops.ep._nvlink_bytes(world_size, **_limits(first_rank), num_sms=num_sms)
    for rank, (name, buffer) in enumerate(zip(names, _local_buffers(world_size, nbytes), strict=True)):
        communicator = first_rank._replace(group_name=name, rank=rank, symmetric_bytes=nbytes)
        _start_nvlink(communicator, buffer, groupless=True, shares_device=world_size > 1)
        communicators[name] = communicator
        _virtual.add(name)
    return names


def reset(group: Group = None) -> None:
    """Makes a group usable again after a timeout or another error that closed it. Collective.

    On backend nvlink it waits until this rank's kernels have ended, which they do by their timeout, agrees with the
    other ranks on where to go on, and forgets the failure; results of the failed exchange are undefined. On backend
    c10d the ranks connect anew; the process group itself is not touched, unless rows of CUDA tensors were in flight on
    it: then it has to be created anew.

    Raises:
        RuntimeError: the group was never initialized.
        torch.distributed.DistError: a rank did not come in time.
    """
    group_name, world_size = resolve(group)
    communicator = communicators.get(group_name)
    for level in (communicator and communicator.rail, communicator and communicator.node, None):
        torch.ops.ep._drop_in_flight(group_name if level is None else level.group_name)
    if communicator is None:
        if world_size == 1:
            return
        raise RuntimeError(
            f"torch_ep.reset: expected an initialized group, got group '{group_name}': "
            "call torch_ep.init(group) on every rank first"
        )
    if group_name in _virtual:
        raise RuntimeError("torch_ep.reset: virtual ranks have no store to agree through: make new ones")
    process, arguments = _arguments_of[group_name]
    if communicator.rail is not None:
        # Both levels connect anew, and all ranks learn whether they have: half a grid is of no use.
        init(process, **arguments)
        return
    if communicator.backend == "nvlink":
        epoch = torch.ops.ep._settle_nvlink(group_name)
        if process is not None:
            # Every rank's kernels end by its own timeout; one may have to wait for that from now on.
            answers = rendezvous.all_gather(
                process,
                "torch_ep.reset",
                json.dumps([epoch, torch.ops.ep._is_connected(group_name)]),
                2 * communicator.timeout + timedelta(seconds=10),
            )
            epochs, connected = zip(*map(json.loads, answers), strict=True)
            epoch = max(epochs)
            if not all(connected):
                torch.ops.ep._destroy(group_name)
                _agree(process, communicator.timeout, arguments)
        torch.ops.ep._restart_nvlink(group_name, epoch + 1)
    elif process is not None:
        _agree(process, communicator.timeout, arguments)


def active_ranks(group: Group = None) -> list[bool]:
    """Of each rank, whether this rank's low-latency pair takes it into account. Local; waits for no kernel.

    All of them, but for those that `mask_ranks` or, after `init(on_timeout="mask")`, a timeout has masked.
    """
    group_name, world_size = resolve(group)
    communicator = communicators.get(group_name)
    masked = 0
    if communicator is not None and communicator.backend == "nvlink":
        masked = torch.ops.ep._masked_nvlink(group_name)
    return [not masked >> rank & 1 for rank in range(world_size)]


def mask_ranks(ranks: Sequence[int], group: Group = None) -> None:
    """Leaves ranks out of this rank's low-latency pair on backend nvlink, from its next exchange on. Local.

    A masked rank is neither written nor awaited: it counts as one without tokens, and what its experts would return
    counts as absent. Every rank masks for itself. `reset`, on all ranks, takes them in again.

    Raises:
        ValueError: no such ranks, or this rank is among them.
        RuntimeError: the group does not use backend nvlink, where a rank that is gone takes the others with it.
    """
    group_name, world_size = resolve(group)
    communicator = communicators.get(group_name)
    if communicator is None or communicator.backend != "nvlink":
        raise RuntimeError(f"torch_ep.mask_ranks: expected a group on backend nvlink, got group '{group_name}'")
    others = [rank for rank in range(world_size) if rank != communicator.rank]
    if not set(ranks) <= set(others):
        raise ValueError(f"torch_ep.mask_ranks: expected some of the other ranks {others}, got {list(ranks)}")
    torch.ops.ep._mask_nvlink(group_name, sum(1 << rank for rank in set(ranks)))


def destroy(group: Group = None) -> None:
    """Forgets the communicator of a group. Local, never waits; the process group itself stays as it is.

    Communicators of process groups that are gone are forgotten with any call, so the order does not matter: after
    `torch.distributed.destroy_process_group` both `destroy()` and `destroy(name)` work.
    """
    _forget_orphans()
    if isinstance(group, str) and group not in communicators:
        return
    _destroy(resolve(group)[0])


def _destroy(group_name: str) -> None:
    _forget_grid(group_name)
    communicators.pop(group_name, None)
    _arguments_of.pop(group_name, None)
    _forget(group_name)
    torch.ops.ep._destroy(group_name)


def _forget_orphans() -> None:
    for group_name in torch.ops.ep._orphaned():
        _destroy(group_name)
    for group_name in [name for name, communicator in communicators.items() if communicator.rail is not None]:
        if not _is_current(group_name):
            _destroy(group_name)
    destroy_orphans()


def _is_current(group_name: str) -> bool:
    try:
        return process_group(group_name) == _arguments_of[group_name][0]
    except RuntimeError:
        return False


@atexit.register
def _destroy_all() -> None:
    """Closes connections while the threads that serve them still can."""
    for group_name in [*communicators]:
        if group_name not in _virtual:
            torch.ops.ep._destroy(group_name)
