"""An SSH machine with its own network, hostname, process tree and mounts: its cable can be cut. Needs root.

Before it: `ssh_machine`, `ssh_tools`. After it: the tests, which have it from `remote`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import pwd
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tests.support.ssh_machine import SshMachine
from tests.support.ssh_tools import await_true, find_tool, root_lacks, run_tool

_NETWORK = ipaddress.ip_network("198.18.0.0/15")  # reserved for benchmarks (RFC 2544): not a real network

# What a machine of its own sees of the accounts: the same ones, with its own home, and none of them locked.
_OWN_ACCOUNTS = """
mount --bind "$1" /etc/passwd && mount --bind "$2" /etc/shadow || exit 1
shift 2
exec "$@"
"""


class NetnsMachine(SshMachine):
    """A machine with its own network, hostname, process tree and mounts, reached over a cable that can be cut.

    Needs root. It has no route but the one to this side. With `disk_mb` its home is a disk of that size. It sees this
    side's files, as root: what is to be its own belongs into its home.
    """

    def __init__(self, folder: Path, alias: str = "rented", *, disk_mb: int | None = None, **options) -> None:
        super().__init__(folder, alias, **options)
        self.disk_mb = disk_mb
        self.name = ""
        self._cut_by_kill = False

    @property
    def device(self) -> str:
        """This side's end of the cable."""
        return self.name.replace("outliers-", "ov")

    def cut(self) -> None:
        """Cuts the cable: packets vanish both ways, and this side gets no error: connections hang, new ones time out."""
        # at the far end: with this end down, this side would send the packets by its default route instead
        run_tool("ip", "-n", self.name, "link", "set", "eth0", "down")

    def join(self) -> None:
        """The cable again. Returns when packets pass; open connections go on at their next attempt to send."""
        run_tool("ip", "-n", self.name, "link", "set", "eth0", "up")
        state = Path(f"/sys/class/net/{self.device}/operstate")
        await_true(lambda: state.read_text().strip() == "up", lambda: f"{self.device} is {state.read_text()}")

    def kill(self, *, silently: bool = False) -> None:
        """SIGKILL for all its processes at once: a preemption. Clients see their connections close and, from then on,
        refused; if `silently`, the cable is cut first and they see nothing, until `boot`."""
        if silently:
            self._cut_by_kill = True
            self.cut()
        super().kill()

    def boot(self) -> None:
        super().boot()
        if self._cut_by_kill:
            self._cut_by_kill = False
            self.join()

    def close(self) -> None:
        self.kill()
        if self.name:
            _remove(self.name)
            self.name = ""

    def processes(self) -> list[tuple[int, str]]:
        if not self.running:
            return []
        found = []
        for entry in Path(f"/proc/{self._init}/root/proc").iterdir():
            if not entry.name.isdigit() or entry.name == "1":
                continue
            with contextlib.suppress(OSError):
                if command := (entry / "cmdline").read_bytes():
                    text = command.decode(errors="replace").replace("\0", " ").strip()
                    found.append((int(entry.name), text))
        return sorted(found)

    def host_pid(self, pid: int) -> int:
        inside = Path(f"/proc/{self._init}/ns/pid").readlink()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if (entry / "ns/pid").readlink() == inside:
                    numbers = re.search(r"^NSpid:(.*)$", (entry / "status").read_text(), re.MULTILINE)
                    if numbers and int(numbers[1].split()[-1]) == pid:
                        return int(entry.name)
        raise ProcessLookupError(f"no process {pid} in {self.alias}")

    def _build(self) -> None:
        if reason := root_lacks():
            raise RuntimeError(reason)
        remove_leftovers()
        self._make_network()
        self.home.mkdir(parents=True, exist_ok=True)
        if self.disk_mb is not None:
            run_tool("mount", "-t", "tmpfs", "-o", f"size={self.disk_mb}m,mode=0700", self.name, self.home)
        me = pwd.getpwuid(0)
        accounts = [f"{me.pw_name}:x:0:0:{me.pw_gecos}:{self.home}:{me.pw_shell}"]
        accounts += [line for line in Path("/etc/passwd").read_text().splitlines() if line.split(":")[2:3] != ["0"]]
        (self.folder / "passwd").write_text("\n".join(accounts) + "\n")
        shadow = self.folder / "shadow"
        shadow.touch(mode=0o600)
        shadow.write_text("".join(f"{line.split(':')[0]}:*:19000:0:99999:7:::\n" for line in accounts))
        super()._build()

    def _make_network(self) -> None:
        number = 0
        while not self.name:
            name = f"outliers-{os.getpid()}-{number}"
            if Path("/run/netns", name).exists():
                number += 1
                continue
            run_tool("ip", "netns", "add", name)
            self.name = name
        with _addresses():
            here, self.address = _free_addresses()
            # known for good: else a cut would become "no route to host" as soon as this side asks who has the address
            card = "02:00:" + ipaddress.ip_address(self.address).packed.hex(":")
            run_tool(
                *("ip", "-batch", "-"),
                script=f"link add {self.device} type veth peer name eth0 address {card} netns {self.name}\n"
                f"addr add {here}/30 dev {self.device}\n"
                f"link set {self.device} up\n"
                f"neigh replace {self.address} lladdr {card} dev {self.device} nud permanent\n",
            )
        script = f"link set lo up\naddr add {self.address}/30 dev eth0\nlink set eth0 up\n"
        run_tool("ip", "-n", self.name, "-batch", "-", script=script)

    def _init_parent(self) -> str:
        return "0"

    def _before_init(self) -> Sequence[str]:
        command = [str(find_tool("setpriv")), "--pdeathsig", "KILL", "ip", "netns", "exec", self.name]
        command += ["unshare", "--uts", "--pid", "--mount", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        command += ["/bin/sh", "-c", _OWN_ACCOUNTS, "init", str(self.folder / "passwd"), str(self.folder / "shadow")]
        return command

    def _find_init(self) -> int:
        assert self._process is not None
        (init,) = psutil.Process(self._process.pid).children()
        return init.pid

    def _end(self) -> None:
        # the kernel ends all of a pid namespace before its first process is gone
        assert self._process is not None
        inits = psutil.Process(self._process.pid).children()
        for init in inits:
            init.kill()
        if not inits:
            self._process.kill()


@contextlib.contextmanager
def _addresses() -> Iterator[None]:
    """One test process at a time chooses addresses: the lock is a name of this network, which ends with its holder."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:

        def taken() -> bool:
            try:
                lock.bind("\0outliers-test-addresses")
            except OSError:
                return False
            return True

        await_true(taken, lambda: "another test holds the lock on addresses")
        yield


def _free_addresses() -> tuple[str, str]:
    """Both ends of a /30 that nothing here uses; where the search starts depends on the pid."""
    used = {
        address["local"] for link in json.loads(run_tool("ip", "-j", "-4", "addr")) for address in link["addr_info"]
    }
    count = _NETWORK.num_addresses // 4
    for step in range(count):
        first = _NETWORK.network_address + 4 * ((os.getpid() + step) % count)
        if used.isdisjoint({str(first + 1), str(first + 2)}):
            return str(first + 1), str(first + 2)
    raise RuntimeError(f"no free addresses in {_NETWORK}")


def _remove(name: str) -> None:
    """Removes all of a machine: processes, cable, namespace, disk. What is gone already is not an error."""
    for pid in run_tool("ip", "netns", "pids", name, check=False).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    run_tool("ip", "link", "del", name.replace("outliers-", "ov"), check=False)
    run_tool("ip", "netns", "del", name, check=False)
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, target, *_ = line.split()
        if source == name:
            run_tool("umount", "--lazy", re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), target), check=False)


def remove_leftovers() -> None:
    """Removes the machines of test processes that are dead."""
    names = {path.name for path in Path("/run/netns").glob("outliers-*")}
    names |= {line.split()[0] for line in Path("/proc/self/mounts").read_text().splitlines()}
    for name in names:
        owner = re.fullmatch(r"outliers-(\d+)-\d+", name)
        if owner and not psutil.pid_exists(int(owner[1])):
            _remove(name)
