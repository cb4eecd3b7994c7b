"""What is written for the Slurm cluster of the tests: its numbers and names, and the texts of its files and scripts.

Texts with {names} are filled in by `slurm_cluster`, which knows the folders and the ports. Nothing runs here.
After it: `slurm_cluster`.
"""

from __future__ import annotations

GPU = "A100-80GB"
GPUS = 2
CPUS = 16
RAM_MB = 128 * 1024
NODE = "node"
NAME = "test-slurm"  # SkyPilot's "region"; the partition is its "zone"
PARTITION = "gpu"

MACHINE = """\
set -eu
hostname {node}
mount --bind {folder}/etc/passwd-node /etc/passwd
mount --bind {folder}/etc/hosts /etc/hosts
mount --bind {folder}/etc/slurm /etc/slurm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/munge /run/sshd
mkdir -p /tmp/uv_cache_0
mount --bind {folder}/uv-cache /tmp/uv_cache_0
cd {folder}
munged --foreground --num-threads=2 --key-file=etc/munge.key --log-file=munged.log --pid-file=/run/munge/munged.pid \
  --seed-file=/run/munge/seed --socket=/run/munge/munge.socket.2 >munged.out 2>&1 &
while [ ! -S /run/munge/munge.socket.2 ]; do sleep 0.05; done
slurmctld -D -i >slurmctld.out 2>&1 &
slurmd -D >slurmd.out 2>&1 &
/usr/sbin/sshd -D -e -f etc/sshd_config >sshd.log 2>&1 &
wait
"""

SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={slurmctld}
SlurmdPort={slurmd}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
KillWait=5
PrologSlurmctld={folder}/etc/job-begins
EpilogSlurmctld={folder}/etc/job-ended
GresTypes=gpu
NodeName={node} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={ram} Gres=gpu:{gpu}:{gpus} State=UNKNOWN
PartitionName={partition} Nodes={node} Default=YES MaxTime=24:00:00 State=UP
"""

# SkyPilot fetches uv from astral.sh unless it finds one in the home folder of the rented machine.
JOB_BEGINS = """\
#!/bin/sh
bin={folder}/node/.sky_clusters/$SLURM_JOB_NAME/.local/bin
mkdir -p "$bin" && ln -sf {uv} "$bin/uv"
"""

# What a machine does when it ends, and what sites do: nothing of the job stays, be it detached. A session of ssh has no
# SLURM_JOB_ID, but the name that SkyPilot gave it.
JOB_ENDED = """\
#!/bin/sh
for process in /proc/[0-9]*; do
  [ "${{process#/proc/}}" = $$ ] && continue
  if tr '\\0' '\\n' <"$process/environ" 2>/dev/null |
    grep -qxE "SLURM_JOB_ID=$SLURM_JOB_ID|SKY_CLUSTER_NAME=$SLURM_JOB_NAME"; then
    kill -KILL "${{process#/proc/}}" 2>/dev/null
  fi
done
exit 0
"""

SSHD_CONFIG = """\
Port {sshd}
ListenAddress 127.0.0.1
HostKey {folder}/etc/host_key
PidFile none
AuthorizedKeysFile .ssh/authorized_keys
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes yes
UsePAM no
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
"""

SLURM_HOST = """\
Host {name}
  HostName 127.0.0.1
  Port {sshd}
  User root
  IdentityFile {folder}/home/.ssh/login_key
  IdentitiesOnly yes
"""

SKY_CONFIG = """\
allowed_clouds: [slurm]
slurm:
  cluster_configs:
    {name}:
      tmpdir: {folder}/node/tmp
"""

# SkyPilot fetches these two from GitHub unless they are there.
CATALOGS = {
    "accelerators.csv": f"AcceleratorName,Clouds\n{GPU},['Slurm']\n",
    "metadata.csv": f"GPU,MemoryGB,Manufacturer\n{GPU},80.0,NVIDIA\n",
}

# OpenSSH takes the home folder (its configuration, and every `~` in it) from passwd and not from HOME.
SSH = """\
#!/bin/sh
exec unshare --mount sh -c 'mount --bind "$0" /etc/passwd && exec {command} "$@"' {folder}/etc/passwd-home "$@"
"""

API_SERVER = """\
set -eu
mount --bind {folder}/etc/passwd-home /etc/passwd
cd {folder}/home
exec {python} -m sky.server.server --host=127.0.0.1 --port={api}
"""
