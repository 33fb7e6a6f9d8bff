"""The cluster, a user's folder on it, and the losses that every way of running there has to give."""

from collections.abc import Iterator

import pytest

from tests import toy
from tests.cluster.slurm import Cluster
from tests.cluster.workspace import STEPS, Workspace
from tests.conftest import ROOT


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="package")
def workspace(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("a user's folder")
    for name in ("slurm", "configs"):
        (folder / name).symlink_to(ROOT / name)
    toy.base_model(folder / "base")
    toy.write_records(folder / "data.json", 50)
    return Workspace(cluster, folder)


@pytest.fixture(scope="package")
def uninterrupted(workspace: Workspace) -> dict[int, float]:
    """The losses by step of two ranks on one machine, started by torchrun."""
    file = workspace.write_config("torchrun")
    workspace.run("torchrun", "--nproc-per-node", 2, ROOT / "launch" / "train.py", "--config", file)
    losses = workspace.losses("torchrun")
    assert list(losses) == list(range(1, STEPS + 1))
    return losses
