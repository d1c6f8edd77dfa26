"""The measured mode of tools/scaling_study.py: real training steps of small random models on this machine's CPU.

Each case has a pool of ranks of its own: the models are built, a student is trained for some steps by the real engine,
and the first rank tells how long the steps took. The plan for the same layouts and the same groups stands beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megakd.batch import Group, Kind, Padding, Sample, Step
from megakd.config import Parallel
from megakd.errors import ConfigError
from megakd.hf.families import Architecture
from megakd.hf.pieces import padded_kv_heads
from megakd.hf.random_model import write_random_model
from megakd.objectives import build_objective
from megakd.planning.cluster import Cluster
from megakd.planning.recipe import loss_calls
from megakd.planning.setup import RoleSetup, TrainingSetup
from megakd.planning.sizes import parameter_count
from megakd.planning.timing import training_time
from megakd.planning.work import work_of_step

ROOT = Path(__file__).parents[1]
PROMPT, ANSWER, MICRO_BATCH, CHUNK = 32, 96, 2, 256
MICRO_BATCHES = 2
"""Of a replica in a step."""
WARM_UP, STEPS = 2, 5


def small(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int) -> Architecture:
    """A Llama of few parameters, embeddings tied."""
    return Architecture("llama", hidden, layers, heads, kv_heads, hidden // heads, ffn, vocabulary, 1e-5, 1e4, None,
                        True, False, 2048)


SIZES = {
    "tiny": small(128, 4, 8, 4, 384, 4096),
    "13M": small(384, 6, 8, 4, 1024, 8192),
    "38M": small(512, 10, 8, 4, 1408, 16384),
    "135M": small(576, 30, 9, 3, 1536, 49152),
}
"""The last is of SmolLM2-135M's sizes. A teacher is of its student's."""


@dataclass(frozen=True)
class Run:
    """One measured case."""

    size: str
    method: str
    world: int
    tensor: int

    @property
    def parallel(self) -> Parallel:
        """Of student and teacher."""
        kv_heads = SIZES[self.size].kv_heads
        return Parallel(tensor=self.tensor, pad_heads=padded_kv_heads(kv_heads, self.tensor) != kv_heads)


def runs_of(options: argparse.Namespace) -> list[Run]:
    """Every size and method on every number of ranks, as replicas and as one tensor group. Raises ConfigError."""
    for size in options.sizes:
        if size not in SIZES:
            raise ConfigError("--sizes", size, "is not known", f"Write some of {', '.join(SIZES)}")
    return [Run(size, method, world, tensor) for size in options.sizes for method in options.measured_methods
            for world in options.ranks for tensor in sorted({1, world})
            if SIZES[size].ffn_size % tensor == 0]


def measure(options: argparse.Namespace, cluster: Cluster) -> list[dict[str, Any]]:
    """A row for each case: planned and measured seconds of a step, and the plan's parts."""
    rows = []
    runs = runs_of(options)
    with tempfile.TemporaryDirectory() as folder:
        for size in dict.fromkeys(run.size for run in runs):
            for seed, role in enumerate(("student", "teacher")):
                write_random_model(Path(folder, size, role), SIZES[size], seed)
        for run in runs:
            seconds = measured_steps(run, Path(folder))
            parts = training_time(cluster, setup_of(run)).parts
            rows.append({
                "size": run.size, "parameters": parameter_count(SIZES[run.size]), "method": run.method,
                "world": run.world, "tensor": run.tensor, "steps": len(seconds),
                "planned seconds": sum(parts.values()), "measured seconds": median(seconds),
                "fastest": min(seconds), "slowest": max(seconds),
                **{f"time: {name}": value for name, value in parts.items()},
            })
            print(f"{run}: {rows[-1]['measured seconds']:.3f} s, planned {rows[-1]['planned seconds']:.3f} s",
                  file=sys.stderr)
    return rows


def objective_of(method: str):
    """The objective with its own settings."""
    from scaling_study import METHODS  # it imports this module when it measures

    return METHODS[method]


def step_of(run: Run) -> Step:
    """Groups of equal lengths: every replica has as much to do."""
    draw, kinds = random.Random(0), build_objective(objective_of(run.method)).requires.kinds
    count = MICRO_BATCH * MICRO_BATCHES * run.world // run.tensor
    vocabulary = SIZES[run.size].vocab_size

    def sample(kind: Kind) -> Sample:
        return Sample(tuple(draw.randrange(vocabulary) for _ in range(PROMPT + ANSWER)), PROMPT, kind)

    return Step(tuple(Group(f"row:{number}", tuple(map(sample, kinds))) for number in range(count)))


def setup_of(run: Run) -> TrainingSetup:
    """The planner's view of a case."""
    objective = objective_of(run.method)
    requires = build_objective(objective).requires
    roles = {role: RoleSetup(SIZES[run.size], run.parallel, run.world, MICRO_BATCH)
             for role in ("student", *requires.teachers)}
    work = work_of_step(step_of(run), {role: setup.layout for role, setup in roles.items()},
                        dict.fromkeys(roles, MICRO_BATCH), dict.fromkeys(roles, Padding()),
                        dict(requires.teacher_kinds))
    teachers = {role: roles[role] for role in requires.teachers}
    return TrainingSetup(roles["student"], teachers, loss_calls(objective, requires), work, CHUNK, "fp32", "cpu")


def measured_steps(run: Run, folder: Path) -> list[float]:
    """Seconds of the steps after the warm-up, on ranks of this machine."""
    sys.path.insert(0, str(ROOT))  # tools/ is no package
    from benchmarks.planner import steps_of_a_rank
    from tests.mcore.cases import Distillation
    from tests.ranks import close_pools, run_ranks

    objective, groups = objective_of(run.method), step_of(run).groups
    roles = ("student", *build_objective(objective).requires.teachers)
    case = Distillation(
        {role: str(folder / run.size / ("student" if role == "student" else "teacher")) for role in roles},
        dict.fromkeys(roles, run.parallel), dict.fromkeys(roles, MICRO_BATCH), objective, groups,
        len(groups), WARM_UP + STEPS, learning_rate=1e-5, chunk_tokens=CHUNK,
    )
    threads = max(1, (os.cpu_count() or 1) // run.world)
    ranks = run_ranks(run.world, steps_of_a_rank, case, WARM_UP, STEPS, threads, timeout=900)
    close_pools()  # the next case's ranks need the cores, which process groups of idle ones would take
    return [each.wall for each in ranks[0]]
