"""A real Slurm cluster of one node for tests, and a SkyPilot API server that rents from it, on loopback.

The "machine" is Debian's munged, slurmctld, slurmd and sshd (login node and compute node are one) in PID, mount and UTS
namespaces of its own, with its own /run, /etc/slurm, /etc/passwd (whose root lives in `folder/node`) and host name. GPUs
are declared: Slurm counts them, and they do not exist. SkyPilot's side has a HOME of its own, `folder/home`.

Both are killed as a whole, with all that they started, when the process that made them ends, however that ends. It needs
root, Debian's slurm-wlm, munge, openssh-server and rsync, and `uv` and SkyPilot (extra `sky`) in this
environment. Before it: `slurm_files`, the texts that it fills in.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support import slurm_files as files
from tests.support.s3 import free_ports

START_SECONDS = 600.0
# The kernel kills it when its parent dies (PR_SET_PDEATHSIG = 1); a fork hook of subprocess would run Python between
# fork and exec, which may deadlock in a process with threads. `unshare --kill-child` does the same for the next one,
# which is the first process of a PID namespace: with it ends everything in there.
_DIES_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
_OF_ITS_OWN = ("/usr/bin/unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts")


def missing() -> str:
    """What this machine lacks for a SlurmCluster, as a reason to skip a test; "" when nothing."""
    if os.geteuid() != 0:
        return "Slurm in namespaces needs root"
    path = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin"
    for program in ("slurmctld", "slurmd", "munged", "sshd", "rsync", "nsenter", "unshare"):
        if shutil.which(program, path=path) is None:
            return f"{program} is missing: apt install slurm-wlm munge openssh-server rsync"
    if importlib.util.find_spec("sky") is None or importlib.util.find_spec("hostlist") is None:
        return "SkyPilot is missing: pip install '.[sky]' python-hostlist"
    return ""


class SlurmCluster:
    """The machine and the API server; `environment` is for whoever calls sky, or ssh to what sky rented."""

    def __init__(self, folder: Path, *, variables: dict[str, str] | None = None) -> None:
        """`variables` are added to the environment of everything that runs on the node."""
        self.folder = folder
        self.home = folder / "home"
        self.node_home = folder / "node"
        names = ("sshd", "slurmctld", "slurmd", "api")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.api = f"http://127.0.0.1:{self.ports['api']}"
        self._variables = variables or {}
        self._user = secrets.token_hex(4)
        # without its compiled files, `import sky` takes 10 s more, in every worker of the server and for every new ssh
        dropped = ("AWS_", "SKY_", "SKYPILOT_", "SLURM_", "SSH_", "PYTHONDONTWRITEBYTECODE")
        self._path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        self._outside = {name: value for name, value in os.environ.items() if not name.startswith(dropped)} | {
            "HOME": str(self.home),
            "PATH": self._path,
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            "SKYPILOT_API_SERVER_LOCAL_PORT": str(self.ports["api"]),
            "SKYPILOT_USER_ID": self._user,  # it ends the names of what is rented, and of a folder in /tmp
        }
        self.environment = self._outside | {"PATH": f"{folder / 'bin-home'}{os.pathsep}{self._path}"}
        self._machine: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SlurmCluster:
        try:
            self._write()
            self.start_machine(wait=False)
            self.start_api_server(wait=False)
            self._await(self._node_is_up, "Slurm node")
            self._await(self._api_is_up, "API server")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_api_server()
        self.kill_machine()
        shutil.rmtree(f"/tmp/sky_ssh_{self._user}", ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/tmp/uv_cache_0").rmdir()  # a mount point, empty unless somebody else's SkyPilot filled it

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command on the node (squeue, scancel, ps ...), as its operator; returns what it printed."""
        if self._machine is None:
            raise RuntimeError("the machine is not started")
        inside = ["nsenter", "-t", str(_first_inside(self._machine.pid)), "-m", "-p", "-u", "--", *command]
        done = subprocess.run(
            inside, env=self._node_environment(), capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {done.stdout}\n{done.stderr}")
        return done.stdout

    def start_machine(self, wait: bool = True) -> None:
        """Start (again) on the state it had; call it on a thread that stays."""
        script = files.MACHINE.format(**self._names())
        self._machine = self._spawn("machine", script, self._node_environment())
        if wait:
            self._await(self._node_is_up, "Slurm node")

    def start_api_server(self, wait: bool = True) -> None:
        self._server = self._spawn("api-server", files.API_SERVER.format(**self._names()), self._server_environment())
        if wait:
            self._await(self._api_is_up, "API server")

    def kill_machine(self) -> None:
        """Login node, compute node and all that runs on them are gone at once, as with a power cut."""
        _kill(self._machine)
        self._machine = None

    def kill_api_server(self) -> None:
        """Also one that a client started for itself after ours had ended."""
        _kill(self._server)
        self._server = None
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_bytes().split(b"\0")
                if b"sky.server.server" in command and f"--port={self.ports['api']}".encode() in command:
                    os.kill(int(process.name), 9)

    def _write(self) -> None:
        if lacking := missing():
            raise RuntimeError(lacking)
        for name in ("etc/slurm", "home/.ssh", "home/.slurm", "home/.sky", "node/.ssh", "node/tmp", "state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("uv-cache", "bin-home", "bin-node", "gpus"):
            (self.folder / name).mkdir(exist_ok=True)
        etc = self.folder / "etc"
        names = self._names()
        (etc / "munge.key").touch(mode=0o600)
        (etc / "munge.key").write_bytes(os.urandom(1024))
        (etc / "slurm" / "slurm.conf").write_text(files.SLURM_CONF.format(**names))
        (etc / "slurm" / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName={files.NODE} Name=gpu Type={files.GPU} File={self.folder}/gpus/gpu[0-{files.GPUS - 1}]\n"
        )
        for number in range(files.GPUS):
            (self.folder / "gpus" / f"gpu{number}").touch()
        (etc / "slurm" / "plugstack.conf").write_text("")
        (etc / "hosts").write_text(f"127.0.0.1 localhost {files.NODE}\n")
        (etc / "sshd_config").write_text(files.SSHD_CONFIG.format(**names))
        for name in ("node", "home"):
            (etc / f"passwd-{name}").write_text(_passwd(self.folder / name))
        for path, script in ((etc / "job-begins", files.JOB_BEGINS), (etc / "job-ended", files.JOB_ENDED)):
            path.write_text(script.format(**names))
            path.chmod(0o755)
        for command in ("ssh", "scp", "sftp"):
            shim = self.folder / "bin-home" / command
            shim.write_text(files.SSH.format(command=shutil.which(command, path=self._path), **names))
            shim.chmod(0o755)
        _key(etc / "host_key")
        _key(self.home / ".ssh" / "login_key")
        public = (self.home / ".ssh" / "login_key.pub").read_text()
        (self.node_home / ".ssh" / "authorized_keys").write_text(public)
        (self.home / ".slurm" / "config").write_text(files.SLURM_HOST.format(**names))
        (self.home / ".sky" / "config.yaml").write_text(files.SKY_CONFIG.format(**names))
        catalogs = self.home / ".sky" / "catalogs" / "v8" / "common"
        catalogs.mkdir(parents=True, exist_ok=True)
        for name, text in files.CATALOGS.items():
            (catalogs / name).write_text(text)
        for name, target in self._programs().items():
            (self.folder / "bin-node" / name).symlink_to(target)
        # sshd gives a fresh environment; bash reads the one file in a session, the other as a login shell
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self._node_variables().items())
        (self.node_home / ".bashrc").write_text(exports)
        (self.node_home / ".profile").write_text(". ~/.bashrc\n")

    def _names(self) -> dict[str, object]:
        return {
            **self.ports,
            "folder": self.folder,
            "name": files.NAME,
            "node": files.NODE,
            "partition": files.PARTITION,
            "gpu": files.GPU,
            "gpus": files.GPUS,
            "cpus": files.CPUS,
            "ram": files.RAM_MB,
            "python": shlex.quote(sys.executable),
            "uv": self._uv(),
        }

    def _uv(self) -> str:
        uv = shutil.which("uv", path=self._path)
        if uv is None:
            raise RuntimeError("uv is missing: pip install uv")
        return uv

    def _uv_cache(self) -> str:
        """Where this environment's packages were unpacked: an environment on the node is links to the same files."""
        asked = [self._uv(), "cache", "dir"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    def _programs(self) -> dict[str, Path]:
        """What the node has in addition to Debian's: our Python for studies, and one of 3.10, which SkyPilot asks uv for."""
        base = Path(sys.base_prefix) / "bin"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        found = {"uv": Path(self._uv()), version: base / version}
        roots = [os.environ.get("PYENV_ROOT"), Path.home() / ".pyenv"]
        others = [path for root in roots if root for path in Path(root).glob("versions/3.10.*/bin/python3.10")]
        others += [Path(path) for path in ("/usr/bin/python3.10", "/usr/local/bin/python3.10") if Path(path).exists()]
        if others:
            found["python3.10"] = others[0]
        return found

    def _node_variables(self) -> dict[str, str]:
        """For package registries, as this process reaches them, and for nothing else of its environment."""
        kept = (
            "SSL_CERT_",
            "PIP_",
            "UV_",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "NO_PROXY",
            "http_proxy",
            "https_proxy",
            "no_proxy",
        )
        inherited = {name: value for name, value in os.environ.items() if name.startswith(kept)}
        # each rented machine has a home of its own: without this, each would download and unpack torch again
        inherited["UV_CACHE_DIR"] = self._uv_cache()
        path = f"{self.folder / 'bin-node'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return inherited | {"LANG": "C.UTF-8", "PATH": path} | self._variables

    def _node_environment(self) -> dict[str, str]:
        return self._node_variables() | {
            "HOME": str(self.node_home),
            "USER": "root",
            "LOGNAME": "root",
            "SHELL": "/bin/bash",
        }

    def _server_environment(self) -> dict[str, str]:
        return self._outside | {"IS_SKYPILOT_SERVER": "true", "PYTHONUNBUFFERED": "1"}

    def _spawn(self, name: str, script: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _DIES_WITH_PARENT, str(os.getpid()), *_OF_ITS_OWN, "/bin/sh", "-c", script],
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _node_is_up(self) -> bool:
        try:
            return self.run("sinfo", "-h", "-o", "%T", check=False).strip() in ("idle", "mixed", "allocated")
        except RuntimeError:
            return False

    def _api_is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api}/api/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _await(self, condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            for process in (self._machine, self._server):
                if process is not None and process.poll() is not None:
                    raise RuntimeError(f"a process ended while waiting for the {what}: {self.logs()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} within {seconds} s: {self.logs()}")
            time.sleep(0.2)

    def logs(self, characters: int = 2000) -> str:
        """The ends of all logs of the daemons."""
        paths: Sequence[Path] = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-characters:]}" for path in paths)


def _passwd(home: Path) -> str:
    """This machine's users, with another home folder for root."""
    lines = []
    for line in Path("/etc/passwd").read_text().splitlines():
        fields = line.split(":")
        if fields[0] == "root":
            fields[5:] = [str(home), "/bin/bash"]
        lines.append(":".join(fields))
    return "\n".join(lines) + "\n"


def _key(path: Path) -> None:
    if not path.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=30)


def _first_inside(pid: int) -> int:
    """The first process of the namespace that `unshare` (whose id is `pid`) made."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = children.read_text().split() if children.exists() else []
    if not found:
        raise RuntimeError(f"process {pid} has made no namespace")
    return int(found[0])


def _kill(process: subprocess.Popen[bytes] | None) -> None:
    """End `unshare`, with it its namespace, and wait until nothing of that is left."""
    if process is None:
        return
    first = None
    with contextlib.suppress(RuntimeError, OSError):
        first = _first_inside(process.pid)
    process.kill()
    process.wait()
    # the first process of a PID namespace is gone once all others are
    deadline = time.monotonic() + 20
    while first is not None and _lives(first) and time.monotonic() < deadline:
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"  # who takes it over may be slow to ask for its status
