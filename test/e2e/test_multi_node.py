"""Exchanges between hosts made of network namespaces: results, bytes on the network, bad networks and lost hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.harness import LIMIT_S

from e2e.test_bench import ROOT, module, run_script

hosts = module("hosts")
needs_hosts = pytest.mark.skipif(hosts.why_not() is not None, reason=f"simulated hosts: {hosts.why_not()}")


def simulate(tmp_path: Path, *arguments: str) -> dict:
    """The results of the benchmark, which raises unless all sides give the same sums."""
    output = tmp_path / "multi_node"
    sizes = ["--iterations", "1", "--hidden", "512", "--experts", "16", "--topk", "4", "--output", str(output)]
    done = run_script("multi_node.py", "--simulate", *arguments, *sizes)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return json.loads(Path(f"{output}.json").read_text())


@needs_hosts
@pytest.mark.parametrize("count", [2, 4])
def test_a_row_crosses_the_network_once_per_node(tmp_path: Path, count: int) -> None:
    results = simulate(tmp_path, str(count), "--tokens", "512")
    (row,) = results["rows"]
    assert results["settings"]["nodes"] == count and results["settings"]["ranks_per_node"] == 2
    assert row["two levels"]["sent_bytes"] == pytest.approx(row["paper_bytes_per_node"], rel=0.03)
    # Flat, a row crosses once per rank, so that there is something to save.
    assert row["flat"]["sent_bytes"] > 1.2 * row["two levels"]["sent_bytes"]


@pytest.mark.skipif(hosts.why_not(delay_s=0.02) is not None, reason=f"a tun device: {hosts.why_not(delay_s=0.02)}")
def test_a_slow_network_that_loses_packets(tmp_path: Path) -> None:
    results = simulate(tmp_path, "2", "--tokens", "64", "--delay", "0.02", "--loss", "0.005")
    assert results["rows"][0]["two levels"]["median_us"] > 0


def _await(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@needs_hosts
def test_every_rank_names_a_rank_of_a_lost_host(tmp_path: Path) -> None:
    """Two hosts of two ranks. The link is cut, and comes back: then the group is usable after another init."""
    timeout_s, ranks = 6.0, range(4)
    tests = Path(__file__).parents[1]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tests)]),
        "MASTER_ADDR": hosts.MASTER_ADDRESS,
        "MASTER_PORT": "29500",
        "WORLD_SIZE": "4",
        "GLOO_SOCKET_IFNAME": hosts.CARD,
    }
    case = [sys.executable, str(tests / "support" / "link_case.py"), "2", str(timeout_s), str(tmp_path)]
    with hosts.simulated_hosts(2) as names:
        processes = [
            subprocess.Popen([*hosts.on_host(names[rank // 2]), *case], env={**env, "RANK": str(rank)})
            for rank in ranks
        ]
        try:
            _await(lambda: all((tmp_path / f"ready {rank}").exists() for rank in ranks))
            subprocess.run(["ip", "-n", names[1], "link", "set", hosts.CARD, "down"], check=True)
            _await(lambda: all((tmp_path / f"answer {rank}").exists() for rank in ranks))
            subprocess.run(["ip", "-n", names[1], "link", "set", hosts.CARD, "up"], check=True)
            (tmp_path / "back").touch()
            assert [process.wait(LIMIT_S) for process in processes] == [0] * 4
        finally:
            for process in processes:
                process.kill()
    for rank in ranks:
        message = (tmp_path / f"answer {rank}").read_text()
        assert "DistError" in message, message
        # It waited for its peer on the rail, or learned from the other rank of its node whom that one waited for.
        lost = (2, 3) if rank < 2 else (0, 1)
        assert any(f"for rank {other}, not heard of since" in message for other in lost), message
        assert (tmp_path / f"again {rank}").exists()


def test_messages_and_memory_are_as_computed() -> None:
    """What `growth.py` prints for thousands of ranks, counted on four."""
    done = run_script("growth.py", "--check", "4")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "4 processes: messages, bytes and memory as computed" in done.stdout
