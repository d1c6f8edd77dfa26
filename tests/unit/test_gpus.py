"""Which GPU a rank takes, and what is set for CUDA and NCCL, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd import gpus
from megakd.errors import ConfigError


def test_one_gpu_a_rank():
    of_rank = {"LOCAL_WORLD_SIZE": "4"}
    assert [gpus.device_index(of_rank | {"LOCAL_RANK": str(rank)}, 4) for rank in range(4)] == [0, 1, 2, 3]
    # srun says a rank's own number alone.
    assert gpus.device_index({"LOCAL_RANK": "2"}, 4) == 2


@pytest.mark.parametrize("environment", [{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, {"LOCAL_RANK": "2"}])
def test_more_ranks_than_gpus_are_refused(environment):
    with pytest.raises(ConfigError) as error:
        gpus.device_index(environment, 2)
    message = str(error.value)
    assert error.value.field == "device" and "3 ranks, and torch sees 2 GPUs" in message
    assert "at most 2 on a node" in message and "NCCL_MULTI_RANK_GPU_ENABLE=1" in message
    with pytest.raises(ConfigError):
        gpus.device_index(environment | {gpus.SHARES_GPUS: "0"}, 2)
    rank = int(environment["LOCAL_RANK"])
    assert gpus.device_index(environment | {gpus.SHARES_GPUS: "1"}, 2) == rank % 2


def test_ranks_of_a_node_that_no_launcher_has_started():
    assert gpus.ranks_here({}, 8) == 8
    assert gpus.ranks_here({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 8) == 4


def test_collectives_are_recorded_in_the_run_s_folder():
    environment: dict[str, str] = {}
    gpus.order_kernels(environment)
    assert gpus.record_collectives(environment, Path("/runs/a/collectives")) == Path("/runs/a/collectives")
    assert environment == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/runs/a/collectives/rank_",
    }
    assert gpus.record_collectives({}, None) is None


@pytest.mark.parametrize("given", [
    {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
     "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/tmp/mine_"},
    {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "TORCH_FR_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
     "TORCH_FR_DUMP_TEMP_FILE": "/tmp/mine_"},
])
def test_what_the_user_has_set_stands(given):
    environment = dict(given)
    gpus.order_kernels(environment)
    assert gpus.record_collectives(environment, Path("/runs/a")) is None
    assert environment == given


def test_recorded_collectives_and_growing_memory():
    growing = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:64"}
    for environment in ({}, growing | {"NCCL_GRAPH_REGISTER": "0"},
                        {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}):
        gpus.check_graph_memory(environment)
    for environment in (growing, growing | {"NCCL_GRAPH_REGISTER": "1"},
                        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}):
        with pytest.raises(ConfigError, match="NCCL_GRAPH_REGISTER=0"):
            gpus.check_graph_memory(environment)
