"""What a layout comes to on a cluster: memory, time, throughput, traffic. One for a recipe's own layout and for each
that a search finds.

Model FLOPs are those of one forward and two backward passes of the trained model and one forward pass of each teacher,
with heads at the loss positions alone; what is made again in a backward pass (recompute) is not counted, and neither is
what a training draws (`online`): MFU is that of the learning, over seconds that have the drawing in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from megakd.batch import Kind
from megakd.planning.cluster import Cluster
from megakd.planning.memory import Memory
from megakd.planning.online import draw_calls, draw_time, memory_with_draws, time_with_draws
from megakd.planning.setup import RoleSetup, TrainingSetup
from megakd.planning.sizes import model_flops
from megakd.planning.timing import BACKWARD, StepTime, link_of
from megakd.planning.traffic import training_traffic
from megakd.planning.work import RoleWork

GIB = 2**30
MARGIN = 0.05
"""Share of what is planned that is kept free besides the cluster's `reserved_gib`: the formulas are within 5 %."""
WAIT = "pipeline's wait"
"""The part of `StepTime` in which stages have nothing to do."""


@dataclass(frozen=True)
class ScoredBeforehand:
    """A teacher that a `score` stage runs beforehand, by itself on all ranks: its share of one training step."""

    setup: RoleSetup
    seconds: float
    """Forward pass over a step's answers."""
    file_bytes: float
    """What it writes of a step's answers, and the training reads."""


@dataclass(frozen=True)
class Volume:
    """What one rank sends in a step for one purpose."""

    purpose: str
    operation: str
    axis: str
    link: str
    """`node` or `network`: the slowest link that the axis goes over."""
    calls: float
    bytes: float


@dataclass(frozen=True)
class Candidate:
    """A layout of all roles, with what it needs and takes."""

    cluster: Cluster
    setup: TrainingSetup
    scoring: Mapping[str, ScoredBeforehand] = field(default_factory=dict)
    """Teachers that score the answers beforehand."""
    reason: str = ""
    """Why it is better than the next that a search has found."""

    @cached_property
    def memories(self) -> dict[int, Memory]:
        """Of the pipeline ranks that can be the fullest."""
        return {rank: memory_with_draws(self.setup, rank) for rank in self.setup.trained.fullest}

    @property
    def pipeline_rank(self) -> int:
        """The fullest."""
        return max(self.memories, key=lambda rank: self.memories[rank].total)

    @property
    def memory(self) -> Memory:
        """Of the fullest rank."""
        return self.memories[self.pipeline_rank]

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room for it, margin included."""
        return self.memory.total <= room(self.cluster)

    @cached_property
    def time(self) -> StepTime:
        """Of a step of the training, with its share of a draw."""
        return time_with_draws(self.cluster, self.setup)

    @cached_property
    def draw_time(self) -> StepTime | None:
        """Of a draw, where the training draws answers."""
        return None if self.setup.draws is None else draw_time(self.cluster, self.setup)

    @property
    def scoring_seconds(self) -> float:
        """What scoring beforehand takes for a step's answers."""
        return sum(each.seconds for each in self.scoring.values())

    @property
    def seconds(self) -> float:
        """All that a step costs, scoring included."""
        return self.time.total + self.scoring_seconds

    @property
    def world(self) -> int:
        """GPUs."""
        return self.setup.trained.world

    @property
    def tokens_per_second(self) -> float:
        """Of the trained model, prompts included."""
        return self.setup.work.tokens / self.seconds

    @cached_property
    def flops(self) -> dict[str, float]:
        """Model FLOPs of a step over all ranks, by role."""
        trained, work = self.setup.trained, self.setup.work
        flops = {"student": (1 + BACKWARD) * _forward_flops(trained, work.roles["student"], work.rows(Kind))}
        for role, teacher in self.setup.teachers.items():
            flops[role] = _forward_flops(teacher, work.roles[role], work.rows(work.teacher_kinds[role]))
        for role, scoring in self.scoring.items():
            flops[role] = self._scored_flops(role, scoring)
        return flops

    def _scored_flops(self, role: str, scoring: ScoredBeforehand) -> float:
        """The trained model's micro-batches hold what the teacher has scored, and answers that it has not."""
        work = self.setup.work
        rows = work.rows(work.teacher_kinds[role])
        share = rows / work.rows(Kind)
        return share * _forward_flops(replace(self.setup.trained, architecture=scoring.setup.architecture),
                                      work.roles["student"], work.rows(Kind))

    @property
    def mfu(self) -> float:
        """Model FLOPs a second and GPU, as a share of the peak of the layers' arithmetic."""
        peak = self.cluster.device.rates[self.setup.dtype].peak_tflops * 1e12
        return sum(self.flops.values()) / (self.seconds * self.world * peak)

    @property
    def bubble(self) -> float:
        """Share of a training step in which pipeline stages wait for one another."""
        return self.time.parts[WAIT] / self.time.total

    @cached_property
    def traffic(self) -> list[Volume]:
        """What the first rank of the trained model's last stage sends in a step, where the loss is made."""
        trained, draws = self.setup.trained, self.setup.draws
        rank = trained.layout.rank(pipeline=trained.parallel.pipeline - 1)
        calls = []
        for call in training_traffic(self.setup, rank):
            name, _, what = call.purpose.partition(": ")
            # A teacher's own layers and stages are in its layout; its rows travel in the trained model's.
            own = name in self.setup.teachers and what != "hidden states"
            calls.append((self.setup.teachers[name] if own else trained, call))
        if draws is not None:
            calls += [(role, replace(call, calls=call.calls / draws.every))
                      for role, call in draw_calls(self.setup, rank)]
        volumes = []
        for role, call in calls:
            link = link_of(self.cluster, role, call.axis)
            if call.link_bytes > 0:
                volumes.append(Volume(call.purpose, call.operation, call.axis,
                                      "node" if link is self.cluster.node_link else "network", call.calls,
                                      call.link_bytes))
        return volumes

    def gpu_hours(self, steps: float) -> float:
        """Of so many steps, scoring included."""
        return steps * self.seconds * self.world / 3600

    def gpu_hours_of_tokens(self, tokens: float) -> float:
        """Of so many tokens of the trained model."""
        return self.gpu_hours(tokens / self.setup.work.tokens)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON: seconds, bytes, operations."""
        return {
            "layout": {name: settings_of(role) | {"data": role.layout.data} for name, role in self.roles.items()},
            "scored_beforehand": {role: {"layout": settings_of(each.setup), "seconds": each.seconds,
                                         "file_bytes": each.file_bytes} for role, each in self.scoring.items()},
            "memory": {"pipeline_rank": self.pipeline_rank, "fullest": self.memory.fullest, "parts": self.memory.parts,
                       "total": self.memory.total, "room": room(self.cluster), "fits": self.fits,
                       "host": self.memory.host},
            "time": {"parts": self.time.parts, "total": self.time.total, "with_scoring": self.seconds,
                     "bubble": self.bubble},
            **({} if self.setup.draws is None else {"draw": self._draw_numbers()}),
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": self.tokens_per_second / self.world,
            "flops": self.flops, "mfu": self.mfu,
            "traffic": [vars(each) for each in self.traffic],
            "reason": self.reason,
        }

    def _draw_numbers(self) -> dict[str, Any]:
        draws = self.setup.draws
        return {"every": draws.every, "slots": draws.slots, "answers_per_prompt": draws.n,
                "prompts": {"own": draws.own_prompts, "teacher": draws.teacher_prompts},
                "lengths": vars(draws.mean), "longest": vars(draws.longest),
                "time": {"parts": self.draw_time.parts, "total": self.draw_time.total}}

    @property
    def roles(self) -> dict[str, RoleSetup]:
        """The trained model, as `student`, and the teachers that run beside it."""
        return {"student": self.setup.trained, **self.setup.teachers}


def room(cluster: Cluster) -> float:
    """Bytes that a plan may fill of a device."""
    return (cluster.device.memory_gib - cluster.device.reserved_gib) * GIB / (1 + MARGIN)


def settings_of(role: RoleSetup) -> dict[str, Any]:
    """A role's settings, by the recipe's names."""
    return {**{f"parallel.{name}": value for name, value in role.parallel.model_dump().items()},
            "micro_batch": role.micro_batch, "recompute": role.recompute}


def lack_of_room(cluster: Cluster, memory: Memory, where: str) -> str:
    """What is said of a rank that does not fit: what it needs and has, and the part that is the largest."""
    largest, device = max(memory.parts, key=lambda part: memory.parts[part]), cluster.device
    return (f"needs {memory.total / GIB:.1f} GiB of a GPU ({where}{memory.fullest!r}) and has "
            f"{room(cluster) / GIB:.1f} ({device.memory_gib:g} less {device.reserved_gib:g} reserved, "
            f"{100 * MARGIN:.0f} % kept free); most of it is {largest!r}, {memory.parts[largest] / GIB:.1f} GiB")


def layout_text(role: RoleSetup) -> str:
    """A layout as people write it."""
    cut = role.parallel
    words = [f"TP{cut.tensor}", f"PP{cut.pipeline}"]
    words += [f"VPP{cut.virtual_pipeline}"] if cut.virtual_pipeline > 1 else []
    words += [f"CP{cut.context}"] if cut.context > 1 else []
    words += [f"DP{role.layout.data}"]
    extras = [*(["sequence"] if cut.sequence else []), f"micro-batch {role.micro_batch}",
              *([f"recompute {role.recompute}"] if role.recompute != "none" else [])]
    return f"{' x '.join(words)}, {', '.join(extras)}"


def _forward_flops(role: RoleSetup, work: RoleWork, rows: float) -> float:
    """Over all ranks; `rows` loss positions in all."""
    copies = role.layout.copies
    return model_flops(role.architecture, copies * work.sum("tokens"), copies * work.sum("pairs"), rows)
