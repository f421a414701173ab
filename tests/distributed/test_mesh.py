"""Valid mesh sizes, and errors for other sizes, which name the valid sizes."""

import pytest

from smolseek.config import MeshConfig
from smolseek.distributed.mesh import choose
from smolseek.errors import SmolseekError
from smolseek.presets import preset

TINY = preset("tiny")  # 8 routed experts


@pytest.mark.parametrize(
    ("data", "expert", "shard", "size", "replicas", "expert_shard", "expert_replicas"),
    [
        (0, 1, 1, 4, 4, 1, 4),
        (0, 1, 4, 4, 1, 4, 1),
        (0, 1, 2, 4, 2, 2, 2),
        (2, 2, 1, 4, 4, 1, 2),
        (2, 2, 4, 4, 1, 2, 1),
        (8, 4, 8, 32, 4, 2, 4),
    ],
)
def test_every_weight_is_held_as_often_as_there_are_copies(
    data, expert, shard, size, replicas, expert_shard, expert_replicas
):
    mesh = choose(MeshConfig(data=data, expert=expert, shard=shard), TINY, size)
    assert (mesh.replicas, mesh.expert_shard, mesh.expert_replicas) == (replicas, expert_shard, expert_replicas)
    assert mesh.replicas * mesh.shard == mesh.expert_replicas * mesh.expert_shard * mesh.expert == size


@pytest.mark.parametrize(
    ("config", "size", "batch", "message"),
    [
        (MeshConfig(expert=3), 4, 4, "--mesh.expert 1, 2 or 4"),
        (MeshConfig(expert=16), 16, 16, "--mesh.expert 1, 2, 4 or 8"),
        (MeshConfig(data=3), 4, 4, "--mesh.data 4"),
        (MeshConfig(data=2, expert=2), 2, 4, "--mesh.data 1"),
        (MeshConfig(shard=3), 4, 4, "--mesh.shard 1, 2 or 4"),
        (MeshConfig(expert=4, shard=2), 8, 8, "--mesh.shard 1, 4 or 8"),
        (MeshConfig(), 4, 3, "--batch-size 4 or more"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(config, size, batch, message):
    with pytest.raises(SmolseekError) as refused:
        choose(config, TINY, size, batch)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_dense_model_has_no_experts_to_partition():
    with pytest.raises(SmolseekError, match=r"--mesh\.expert 1"):
        choose(MeshConfig(expert=2), preset("smollm2_135m"), 4)
