#!/usr/bin/env bash
# What both container recipes run, as root on Debian or Ubuntu, in the folder that holds the project's sources:
#
#     bash containers/install.sh system            # what pip cannot install
#     bash containers/install.sh torch VENV        # a virtual environment with torch: the largest part, seldom changed
#     bash containers/install.sh project VENV all  # dora_dist with these extras of pyproject.toml
#
# The Python packages have the versions of constraints.txt.
set -euo pipefail

system() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    # ssh and pdsh: starting ranks on other nodes, with mpirun or deepspeed
    apt-get install -y --no-install-recommends ca-certificates openssh-client pdsh python3
    bash tools/system_packages.sh python3
    rm -rf /var/lib/apt/lists/*
}

torch() {
    python3 -m venv "$1"
    install_packages "$1" setuptools torch
}

# Without build isolation DeepSpeed's source package is built with the pinned tools, against the torch that it will run
# with. It is imported once, so that an image that cannot start is not built.
project() {
    install_packages "$1" --no-build-isolation ".[$2]"
    rm -rf build ./*.egg-info
    "$1/bin/dora-dist" --version
}

install_packages() {
    local venv=$1
    shift
    DS_BUILD_OPS=0 "$venv/bin/python" -m pip --disable-pip-version-check install --no-cache-dir --constraint constraints.txt "$@"
}

"$@"
