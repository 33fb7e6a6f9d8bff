#!/usr/bin/env bash
# Installs what pip cannot: usage `bash tools/system_packages.sh PYTHON [EXTRA]`, for one of pyproject.toml's extras.
# Root on Debian or Ubuntu: with apt-get. Anyone else is told what to install; only what nothing works without is an
# error.
set -euo pipefail
python=$1

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "The pinned versions need Python 3.11 or newer; $python is $("$python" --version 2>&1)." >&2
    echo "Name a newer one: make ... PYTHON=python3.12" >&2
    exit 1
}

needed=() useful=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || needed+=(python3-venv)
# DeepSpeed on CPUs compiles shared-memory collectives, where a program starts it otherwise than through our `start`.
command -v g++ >/dev/null || needed+=(g++)
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    needed+=(python3-dev)
command -v numactl >/dev/null || useful+=(numactl)    # deepspeed --bind_cores_to_rank
command -v mpirun >/dev/null || useful+=(openmpi-bin) # starting ranks with mpirun; the library of mpi4py
case ${2:-} in test | demo-llava | demo-vlbart) command -v npm >/dev/null || useful+=(npm) ;; esac # the pictures' package
if [ "${2:-}" = test ]; then
    PATH=$PATH:/usr/sbin:/sbin
    command -v shellcheck >/dev/null || useful+=(shellcheck)
    command -v chromium >/dev/null || command -v google-chrome >/dev/null || useful+=(chromium) # the run's page
    command -v mpirun.mpich >/dev/null || useful+=(mpich) # tests/launch
    # tests/cluster: deepspeed --hostfile, and the Slurm cluster
    command -v pdsh >/dev/null || useful+=(pdsh)
    command -v ip >/dev/null || useful+=(iproute2)
    command -v munged >/dev/null || useful+=(munge)
    { command -v slurmctld && command -v slurmd && command -v sbatch; } >/dev/null || useful+=(slurm-wlm)
fi

missing=(${needed[@]+"${needed[@]}"} ${useful[@]+"${useful[@]}"})
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
    exit 0
fi
echo "Missing system packages (Debian's names): ${missing[*]}" >&2
echo "On Debian or Ubuntu: sudo apt-get install ${missing[*]}" >&2
if [ ${#needed[@]} -gt 0 ]; then
    echo "Nothing works without: ${needed[*]}. Install and run make again." >&2
    exit 1
fi
echo "Going on without them; what needs them is not available." >&2
