"""A real Slurm on this machine: Debian's packages, one controller, two nodes, all in a temporary folder."""

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

# `srun` inside a job finds its configuration only here.
SYSTEM_CONFIG = Path("/etc/slurm/slurm.conf")
PACKAGES = ["slurm-wlm", "munge"]
CONFIG = """
ClusterName=book
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
# A node that is silent for this long is down, and its jobs go back into the queue.
SlurmdTimeout=10
KillWait=5
MinJobAge=600
JobRequeue=1
ReturnToService=2
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=12000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def install() -> None:
    """Debian's packages, if they are missing; needs root."""
    if shutil.which("slurmctld") and shutil.which("munged"):
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    subprocess.run(["apt-get", "install", "-y", "-qq", *PACKAGES], check=True, env=environment, capture_output=True)


class Slurm:
    """Controller and nodes as child processes."""

    def __init__(self, home: Path):
        self.home, self.processes = home, {}
        ports = free_ports(3)
        (home / "state").mkdir(parents=True)
        config = CONFIG.format(host=socket.gethostname(), home=home, controller=ports[0], first=ports[1], last=ports[2])
        (home / "slurm.conf").write_text(config)

    def start(self) -> None:
        if SYSTEM_CONFIG.exists():
            raise FileExistsError(f"{SYSTEM_CONFIG} is there: this machine belongs to a cluster; try this on another")
        SYSTEM_CONFIG.parent.mkdir(exist_ok=True)
        SYSTEM_CONFIG.unlink(missing_ok=True)  # a link that an earlier run left, whose folder is gone
        SYSTEM_CONFIG.symlink_to(self.home / "slurm.conf")
        key = self.home / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {
            "key-file": key,
            "socket": self.home / "munge.socket",
            "pid-file": self.home / "munged.pid",
            "log-file": self.home / "munged.log",
            "seed-file": self.home / "munged.seed",
        }
        self._run("munged", "--foreground", "--force", *[f"--{name}={path}" for name, path in files.items()])
        self.wait_until(lambda: (self.home / "munge.socket").exists(), "munged")
        self._run("slurmctld", "-D")
        for node in ("node1", "node2"):
            self.start_node(node)
        self.wait_until(lambda: self.ask("sinfo", "-h", "-o", "%T %D").strip() == "idle 2", "two idle nodes")

    def start_node(self, name: str) -> None:
        (self.home / name).mkdir(exist_ok=True)
        self._run("slurmd", "-D", "-N", name)

    def lose_node(self, name: str) -> None:
        """A node goes down with all that runs on it, as if its power had failed."""
        slurmd = self.processes.pop(f"slurmd {name}")
        below = psutil.Process(slurmd.pid).children(recursive=True)
        # What a step has started is no child of slurmd's any more.
        steps = [
            p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("SLURMD_NODENAME") == name
        ]
        slurmd.kill()
        slurmd.wait()
        for process in [*below, *steps]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def ask(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout

    def jobs(self) -> list[tuple[str, str, str, str]]:
        """(id, state, node, comment) of every job that is queued or runs."""
        lines = self.ask("squeue", "-h", "-o", "%i|%T|%N|%k").splitlines()
        return [tuple(line.split("|")) for line in lines]

    def stop(self) -> None:
        if SYSTEM_CONFIG.is_symlink() and SYSTEM_CONFIG.readlink() == self.home / "slurm.conf":
            SYSTEM_CONFIG.unlink()
        for process in reversed(list(self.processes.values())):
            process.terminate()
        for process in self.processes.values():
            process.wait(30)

    def wait_until(self, condition, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in self.home.glob("*.log")]
                raise TimeoutError("\n".join([f"{what} did not come within {seconds} s", *logs]))
            time.sleep(0.2)

    def _run(self, program: str, *arguments: str) -> None:
        label = f"{program} {arguments[-1]}" if program == "slurmd" else program
        log = (self.home / f"{label.replace(' ', '-')}.out").open("w")
        self.processes[label] = subprocess.Popen(
            [shutil.which(program) or f"/usr/sbin/{program}", *arguments], stdout=log, stderr=log
        )


@contextmanager
def running(home: Path):
    cluster = Slurm(home)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def free_ports(count: int) -> list[int]:
    """A free port for the controller, then `count - 1` in a row for the nodes."""
    for first in range(20_000 + os.getpid() % 10_000, 60_000, count):
        taken = 0
        for port in range(first, first + count):
            with socket.socket() as probe:
                taken += probe.connect_ex(("127.0.0.1", port)) == 0
        if not taken:
            return list(range(first, first + count))
    raise OSError("no free ports")
