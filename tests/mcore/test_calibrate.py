"""`megakd plan --calibrate`: what it writes loads again, and the fit of its rates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megakd.layout import Layout
from megakd.mcore import runtime
from megakd.mcore.grid import make_grid
from megakd.planning import calibrate
from megakd.planning.cluster import Rates, load_cluster
from tests.mcore.cases import KeptCalls
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("half_side", "noise"), [(40.0, 0.0), (0.0, 0.0), (300.0, 0.02)])
def test_the_fit_gives_back_the_rates_that_made_the_points(half_side, noise):
    best, points = 0.09, []
    for number, side in enumerate((32, 64, 128, 256, 512, 1024)):
        rate = best * side / (side + half_side) * (1 + noise * (-1) ** number)
        points.append((4 * side, side, 2 * side, rate))
    rates = Rates.model_validate(calibrate.fitted(points, min))
    for rows, inner, columns, rate in points:
        operations = 2.0 * rows * inner * columns
        assert operations / rates.seconds(operations, inner) / 1e12 == pytest.approx(rate, rel=1e-3 + 2 * noise)
    assert rates.half_side == pytest.approx(half_side, abs=0.1 + 500 * noise)
    assert rates.efficiency <= 1 and rates.measured == tuple(points)


def _measured_quickly() -> tuple[dict, float, int, int]:
    """On a rank: a description from measurements of a size that says nothing."""
    calibrate.REPEATS = 1
    calibrate.SMALL = {"cpu": 1e5}
    calibrate.SIDES = calibrate.LENGTHS = {"cpu": (16, 32)}
    calibrate.PASS_NUMBERS = calibrate.UPDATE_NUMBERS = {"cpu": 1 << 12}
    calibrate.MESSAGE_BYTES, calibrate.COLD_BYTES = (1 << 8, 1 << 12), {"cpu": 0}
    world = runtime.adopt(torch.device("cpu"))
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if each rank had a node of its own
    cluster = calibrate.measured_cluster(world).model_dump(mode="json")
    calibrate.REPLAYED_LAYERS, recorder = (1, 3), KeptCalls()
    grid = make_grid(Layout(world.size, 1, 1), world.timeout)
    return cluster, calibrate.replayed_time(world, grid, recorder), recorder.recorded, len(recorder.replayed)


def test_ranks_on_two_nodes_measure_the_network():
    (first, *passes), (second, *others) = run_ranks(2, _measured_quickly)
    for cluster in (first, second):
        assert cluster["device"]["layer_replayed_us"] is None  # a CPU records nothing
        assert cluster["devices_per_node"] == 1 and cluster["node_link"] is None
        assert cluster["network_link"]["gb_s"] > 0 and cluster["device"]["memory_gb_s"] > 0
        assert cluster["device"]["layer_backward_us"] >= 0 and len(cluster["device"]["rates"]["fp32"]["measured"]) == 18
    # All ranks hear of the slowest.
    assert first["device"]["rates"] == second["device"]["rates"]
    # A stand-in for the recorder: one recording a model, which each call runs; the first one makes it.
    assert passes == others and passes[0] >= 0 and passes[1:] == [2, 2 * 2 * 4]


def test_the_command_writes_a_description_that_loads(tmp_path):
    file = tmp_path / "here.yaml"
    program = ("import sys; from megakd.planning import calibrate as c; c.REPEATS = 1; c.SMALL = {'cpu': 1e5}; "
               "c.SIDES = c.LENGTHS = {'cpu': (16, 32)}; c.PASS_NUMBERS = c.UPDATE_NUMBERS = {'cpu': 4096}; "
               "c.MESSAGE_BYTES = (256, 4096); c.COLD_BYTES = {'cpu': 0}; "
               "from megakd.cli import main; sys.exit(main(sys.argv[1:]))")
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
                 "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", "--calibrate", str(file), "--device", "cpu"], cwd=ROOT, text=True,
        env=os.environ | variables, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(file)
    cluster = load_cluster(file)
    assert cluster.device_type == "cpu" and cluster.network_link is None and cluster.node_link is None
    assert all("measured" in source for field, source in cluster.sources.items()
               if field not in ("device.reserved_gib", "overlap"))
