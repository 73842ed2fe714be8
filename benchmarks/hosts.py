"""Hosts made of network namespaces on one Linux machine, for measurements and tests without a cluster.

Each host is a namespace with one network card `ep0`, 10.92.0.1 for the first. A bridge connects the cards, and tc
limits their rate. With a delay or loss the cards are tun devices, and this process carries their packets. Needs root
and iproute2.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import functools
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# From here to the end of a simulation that hangs.
_LIMIT_S = 1800.0
CARD = "ep0"
MASTER_ADDRESS = "10.92.0.1"

# <sched.h>, <linux/if_tun.h>
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_PACKET_BYTES = 2**16


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


@functools.cache
def why_not(*, delay_s: float = 0.0) -> str | None:
    """Why hosts cannot be simulated here; None if they can."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs the commands ip and tc (iproute2)"
    try:
        with simulated_hosts(1, delay_s=delay_s):
            return None
    except RuntimeError as error:
        return f"needs to make network namespaces: {error}"


@contextlib.contextmanager
def simulated_hosts(
    count: int, *, rate: str | None = None, delay_s: float = 0.0, loss: float = 0.0
) -> Iterator[list[str]]:
    """Yields the names of `count` network namespaces. Command prefix on a host: `on_host(name)`.

    Args:
        count: hosts, at most 254.
        rate: limit per host and direction, as tc takes it: "1gbit". Not together with a delay or loss.
        delay_s: seconds that a packet takes.
        loss: share of packets that are lost.
    """
    if rate and (delay_s or loss):
        raise ValueError("expected a rate, or a delay and loss, got both")
    names = [f"ep-{os.getpid()}-{k}" for k in range(count)]
    network = _userspace(names, delay_s, loss) if delay_s or loss else _bridged(names, rate)
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        with network:
            yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _connect(name: str, host: int) -> None:
    _run("ip", "-n", name, "addr", "add", f"10.92.0.{host + 1}/24", "dev", CARD)
    _run("ip", "-n", name, "link", "set", CARD, "up")


@contextlib.contextmanager
def _bridged(names: list[str], rate: str | None) -> Iterator[None]:
    switch = f"ep-{os.getpid()}-switch"
    limit = ["tbf", "rate", rate, "burst", "512k", "latency", "100ms"] if rate else []
    _run("ip", "netns", "add", switch)
    try:
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for k, name in enumerate(names):
            port = f"port{k}"
            _run("ip", "link", "add", CARD, "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            _connect(name, k)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            if limit:
                _run(*on_host(name), "tc", "qdisc", "add", "dev", CARD, "root", *limit)
                _run(*on_host(switch), "tc", "qdisc", "add", "dev", port, "root", *limit)
        yield
    finally:
        subprocess.run(["ip", "netns", "del", switch], capture_output=True)


def _open_tun(name: str) -> int:
    """A tun device in a namespace. The calling thread stays in it."""
    with Path(f"/var/run/netns/{name}").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
            raise RuntimeError(f"setns: {os.strerror(ctypes.get_errno())}")
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", CARD.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError as error:
        raise RuntimeError(f"/dev/net/tun: {error}") from None
    return tun


@contextlib.contextmanager
def _userspace(names: list[str], delay_s: float, loss: float) -> Iterator[None]:
    tuns: list[int] = []

    def open_all() -> None:
        tuns.extend(map(_open_tun, names))

    thread = threading.Thread(target=open_all)  # alone enters the namespaces
    thread.start()
    thread.join()
    if len(tuns) < len(names):
        raise RuntimeError("expected tun devices, got none: see the error above")
    for k, name in enumerate(names):
        _connect(name, k)
    stop = threading.Event()
    carrier = threading.Thread(target=_carry, args=(tuns, delay_s, loss, stop), daemon=True)
    carrier.start()
    try:
        yield
    finally:
        stop.set()
        carrier.join()
        for tun in tuns:
            os.close(tun)


def _carry(tuns: list[int], delay_s: float, loss: float, stop: threading.Event) -> None:
    """Carries packets between the devices until `stop`."""
    draw = random.Random(0)
    travelling: list[tuple[float, int, int, bytes]] = []  # when it arrives, a number, the host, the packet
    number = 0
    while not stop.is_set():
        wait_s = min(0.1, max(0.0, travelling[0][0] - time.monotonic())) if travelling else 0.1
        readable, _, _ = select.select(tuns, [], [], wait_s)
        for tun in readable:
            packet = os.read(tun, _PACKET_BYTES)
            host = packet[19] - 1  # the last byte of the destination's IPv4 address
            if packet[0] >> 4 == 4 and 0 <= host < len(tuns) and draw.random() >= loss:
                number += 1
                heapq.heappush(travelling, (time.monotonic() + delay_s, number, host, packet))
        while travelling and travelling[0][0] <= time.monotonic():
            _, _, host, packet = heapq.heappop(travelling)
            with contextlib.suppress(BlockingIOError):  # a full queue drops packets, as a network does
                os.write(tuns[host], packet)


def on_host(name: str) -> list[str]:
    """What runs a command on a simulated host, as a prefix of the command."""
    return ["ip", "netns", "exec", name]


def run_on_hosts(names: Sequence[str], commands: Sequence[Sequence[str]], env: dict[str, str], limit_s: float) -> None:
    """Runs a command on each host side by side. Raises if one fails; its output is shown."""
    environment = {**os.environ, **env, "GLOO_SOCKET_IFNAME": CARD}
    processes = [
        subprocess.Popen([*on_host(name), *command], env=environment)
        for name, command in zip(names, commands, strict=True)
    ]
    try:
        codes = [process.wait(limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise RuntimeError(f"expected every host to exit with 0, got {codes}")


def add_arguments(parser: argparse.ArgumentParser, ranks_per_node: int) -> None:
    """The arguments of `torchrun_on_simulated_hosts`, and that of the network card whose bytes are counted."""
    parser.add_argument("--interface", help="network card whose sent bytes are counted, with one host per node")
    local = parser.add_argument_group("hosts made of network namespaces (needs root)")
    local.add_argument("--simulate", type=int, metavar="HOSTS", help="makes this number of hosts on this machine")
    local.add_argument("--ranks-per-node", type=int, default=ranks_per_node, help="default: %(default)s")
    local.add_argument("--rate", help='limit of each host, as tc takes it, such as "1gbit" (default: none)')
    local.add_argument("--delay", type=float, default=0.0, help="seconds that a packet takes (default: none)")
    local.add_argument("--loss", type=float, default=0.0, help="share of packets lost, such as 0.005 (default: none)")


def torchrun_on_simulated_hosts(script: Path, arguments: Sequence[str], args: argparse.Namespace) -> None:
    """Runs a script with these arguments by torchrun, on each of `args.simulate` hosts."""
    root = script.resolve().parents[1]
    with simulated_hosts(args.simulate, rate=args.rate, delay_s=args.delay, loss=args.loss) as names:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(args.simulate)]
        torchrun += ["--nproc-per-node", str(args.ranks_per_node), "--master-addr", MASTER_ADDRESS]
        command = [str(script.resolve()), *arguments, "--interface", CARD]
        commands = [
            [*torchrun, "--node-rank", str(k), "--local-addr", f"10.92.0.{k + 1}", *command]
            for k in range(args.simulate)
        ]
        paths = [str(root), os.environ.get("PYTHONPATH", "")]
        env = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        run_on_hosts(names, commands, env, _LIMIT_S)
