"""Two hosts on one machine: network namespaces with a cable between them.

Each is held by a sleeping process. Root makes them directly, others inside a user namespace.
"""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from small_run import ROOT, wait_until

CABLE = "eth0"


class NoNamespaces(Exception):
    """This machine does not let us make them; the message is what it said."""


class Host:
    """A network namespace of its own; a guest of another host may be joined to it."""

    def __init__(self, number: int, neighbour: "Host | None" = None):
        own = os.geteuid() != 0  # a user namespace is needed
        self.address = f"10.77.0.{number}"
        ours = ("--user", "--map-root-user") if own and neighbour is None else ()
        inside = neighbour.enter("--user") if own and neighbour else []
        self.keeper = subprocess.Popen(
            [*inside, "unshare", *ours, "--net", "sleep", "600"], stderr=subprocess.PIPE, text=True
        )
        self.spaces = ("--user", "--preserve-credentials", "--net") if own else ("--net",)
        wait_until(self.is_alone, self.keeper)

    def is_alone(self) -> bool:
        """Whether the keeper has left the namespace that it was started in."""
        if self.keeper.poll() is not None:
            raise NoNamespaces(self.keeper.stderr.read().strip())
        name = lambda process: os.readlink(f"/proc/{process}/ns/net")
        return name(self.keeper.pid) != name("self")

    def enter(self, *spaces: str) -> list[str]:
        flags = (*spaces, "--preserve-credentials") if spaces else self.spaces
        return ["nsenter", "--target", str(self.keeper.pid), *flags]

    def ip(self, *arguments: str) -> None:
        done = subprocess.run(
            [*self.enter(), "ip", *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NoNamespaces(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    def cable(self, state: str) -> None:
        """Pull it out ("down") or put it back ("up")."""
        self.ip("link", "set", CABLE, state)

    def torchrun(self, script: list[str], output: Path, name: str, store: "Host", **environment):
        """One rank of two, which restarts; `store` is the host they meet at."""
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": CABLE, "CUDA_VISIBLE_DEVICES": "",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        } | environment  # fmt: skip
        launcher = (
            f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 5 "
            f"--rdzv-backend c10d --rdzv-endpoint {store.address}:29400 --rdzv-id {name} "
            f"--rdzv-conf is_host={int(store is self)} --local-addr {self.address}"
        )
        with output.open("w") as file:
            return subprocess.Popen(
                [*self.enter(), sys.executable, *launcher.split(), *script],
                cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip


@contextmanager
def two_hosts():
    """Two hosts that reach each other; NoNamespaces where there can be none."""
    hosts = []
    try:
        hosts.append(Host(1))
        hosts.append(Host(2, hosts[0]))
        peer = ("type", "veth", "peer", "name", CABLE, "netns", str(hosts[1].keeper.pid))
        hosts[0].ip("link", "add", CABLE, *peer)
        for host in hosts:
            host.ip("link", "set", "lo", "up")
            host.ip("address", "add", f"{host.address}/24", "dev", CABLE)
            host.cable("up")
        yield hosts
    except FileNotFoundError as missing:  # unshare, nsenter or ip
        raise NoNamespaces(str(missing)) from None
    finally:
        for host in hosts:
            host.keeper.kill()
            host.keeper.communicate()


def rank_of(name: str, rank: int) -> int | None:
    """Process id of a rank that torchrun started under this name, if it is there."""
    wanted = {f"RANK={rank}".encode(), f"TORCHELASTIC_RUN_ID={name}".encode()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted <= set(path.read_bytes().split(b"\0")):
                return int(path.parent.name)
        except OSError:  # it has ended, or is not ours
            continue
    return None


def stop(processes: list[subprocess.Popen]) -> None:
    """End torchruns with their ranks, whatever they are doing."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 60
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
