"""The best layouts for a training step on a cluster: of the trained model and of each teacher, all at once.

Teachers run beside the trained model, all roles on all ranks, as the engine has them; or they score the answers
beforehand (`score` stages), each by itself on all ranks, and the training reads files.

A step's time is, all but exactly, the trained model's plus each teacher's, whichever layout the others have; they meet
in the memory of a GPU. So each role is searched by itself, what is worse in memory and time at once is left out, and
the rest is combined. The best combinations are then timed together, which makes their numbers exact. What the engine
refuses is left out by the engine's own rules (`check_parallel`, `check_layout`, `batch_multiple`).

What a training draws between its steps (`online`) belongs to the role that draws it, in time and memory, and is
searched with it, for the recipe's number of slots. Where two models answer together, the memory that each has beside
the other, and the teacher's rows, which follow from the student's slots and replicas, are known of a combination alone:
these count when the best are timed.

Left out, too, are interleaved pipelines whose stages have chunks of different sizes (`uneven_within`): what takes turns
with what it is not as long as waits, which `pipeline_seconds` does not know.

Context ranks whose number shares a factor with the micro-batch are left out, too: as many times more replicas with as
many times smaller micro-batches have as many positions on a rank and as many micro-batches, and send no keys and values
for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from itertools import islice, product, zip_longest
from math import gcd

from megakd.batch import Kind
from megakd.check_precision import check_sizes
from megakd.config import Parallel, Precision
from megakd.config_checks import batch_multiple, check_parallel
from megakd.errors import ConfigError
from megakd.hf.families import Architecture
from megakd.hf.pieces import check_layout, padded_kv_heads
from megakd.planning.candidate import Candidate, ScoredBeforehand, room, settings_of
from megakd.planning.cluster import Cluster
from megakd.planning.online import TEACHER, memory_with_draws, own_phases, teacher_phases, time_with_draws
from megakd.planning.setup import Draws, LossCall, RoleSetup, TrainingSetup
from megakd.planning.timing import uneven_within
from megakd.planning.work import Lengths, work_of_lengths

RECOMPUTE = ("none", "mlp", "full")
BESIDE, BEFORE = "beside", "before"
"""Where teachers run: on the same GPUs in the same step, or in score stages before the training."""
EXACT = 12
"""Combinations of one layout of the trained model that are timed together."""
MIXED = 300
"""Combinations that are looked at where two models answer together, for EXACT that fit: their own needs do not say."""
MOST_FULLEST = 4
"""Stages that `RoleSetup.fullest` has at most: two ends, and two kinds between."""
TIE = 1e-6
"""Relative difference of times that is none."""


@dataclass(frozen=True)
class Question:
    """What is to be trained, with what, on how many ranks."""

    trained: Architecture
    teachers: Mapping[str, Architecture]
    """Role -> its model."""
    kinds: tuple[Kind, ...]
    """Kinds of a group's sequences; one that comes twice stands for two answers."""
    teacher_kinds: Mapping[str, tuple[Kind, ...]]
    """Teacher role -> kinds that it reads."""
    losses: tuple[LossCall, ...]
    lengths: Lengths
    global_batch: int
    world: int
    chunk_tokens: int
    dtype: str
    device: str
    signal: str | None = "hidden_states"
    """What a score stage would write of the teachers: hidden_states, token_log_probs or top_k. None: the objective
    takes none, they have to run beside."""
    listed: int = 0
    """top_k: tokens at each position."""
    trains: str = "student"
    """The role whose settings the trained model has."""
    precision: Precision = Precision()
    """Says whose weights are held in FP8."""
    overlap: bool = True
    offload: bool = False
    draws: Draws | None = None
    """All three as in `TrainingSetup`."""

    def setup(self, trained: RoleSetup, teachers: Mapping[str, RoleSetup],
              stored: Mapping[str, str]) -> TrainingSetup:
        """The stage in given layouts.

        Args:
            trained: the trained model's.
            teachers: those of the teachers that run beside it.
            stored: role -> kind of signal of those that are read from disk.
        """
        roles = {"student": trained, **teachers}
        kinds = {role: self.teacher_kinds[role] for role in self.teachers}
        work = work_of_lengths(self.lengths, self.kinds, self.global_batch,
                               {role: setup.layout for role, setup in roles.items()},
                               {role: setup.micro_batch for role, setup in roles.items()}, kinds)
        heads = {role: self.teachers[role] for role, signal in stored.items() if signal == "hidden_states"}
        return TrainingSetup(trained, dict(teachers), losses_with(self.losses, stored), work, self.chunk_tokens,
                             self.dtype, self.device, heads, self.overlap, self.offload, self.draws)

    def signal_bytes(self, role: str) -> float:
        """Bytes in a step's files of one role's signals."""
        answers = sum(kind in self.teacher_kinds[role] for kind in self.kinds)
        width = {"hidden_states": self.teachers[role].hidden_size * (4 if self.dtype == "fp32" else 2),
                 "token_log_probs": 4, "top_k": 8 * self.listed}[self.signal]
        return self.global_batch * answers * self.lengths.answer * width


def losses_with(losses: Sequence[LossCall], stored: Mapping[str, str]) -> tuple[LossCall, ...]:
    """The calls that are left where roles are read from disk: log-probabilities of the answers are made already, and a
    list of likely tokens needs no logits of its model."""
    listed = sum(signal == "top_k" for signal in stored.values())
    made = "token_log_probs" in stored.values()
    return tuple(replace(call, models=max(1, call.models - listed)) for call in losses
                 if not (made and call.gradient == "none"))


@dataclass(frozen=True)
class Limits:
    """What a search looks at."""

    tensor: int | None = None
    """Largest tensor-parallel size; a node's devices when None, which it never exceeds."""
    pipeline: int = 64
    virtual_pipeline: int = 8
    context: int = 8
    micro_batch: int = 64
    recompute: tuple[str, ...] = RECOMPUTE
    placements: tuple[str, ...] = (BESIDE, BEFORE)
    best: int = 3
    """Layouts that are returned of each placement."""


@dataclass(frozen=True)
class Option:
    """One layout of one role."""

    role: RoleSetup
    kept: tuple[float, ...]
    """Bytes that it keeps throughout, on each rank that is looked at."""
    phase: tuple[float, ...]
    """Bytes that it needs besides at its fullest moment, on each of these ranks."""
    seconds: float
    """Of a step: for the trained model beside the first options of the teachers; for a teacher beside one and the same
    trained model."""
    forward: float = 0.0
    """A teacher's own forward pass."""


@dataclass(frozen=True)
class Teachers:
    """One layout of each teacher beside the trained model: bytes kept, bytes of the fullest phase, and seconds beyond
    those of the first options."""

    roles: Mapping[str, RoleSetup] = field(default_factory=dict)
    kept: float = 0.0
    phase: float = 0.0
    seconds: float = 0.0


def search(question: Question, cluster: Cluster, limits: Limits = Limits()) -> list[Candidate]:
    """The best layouts, best first; empty where none fits into the devices' memory.

    No two have the same tensor, pipeline and context sizes of the trained model and the same place of the teachers:
    each has the best of everything else. Best is what takes least time for a step, scoring included; between equal
    ones, least memory. Reading and writing the files of signals is not counted in the time.

    Raises:
        ConfigError: the cluster's description has no rate of the wanted arithmetic.
    """
    check_arithmetic(question, cluster)
    students = [each for each in layouts(question, cluster, limits, question.trains)
                if gcd(each.parallel.context, each.micro_batch) == 1]
    if not students:
        return []
    options = teachers_options(question, cluster, limits, students)
    if not all(options.values()):
        return []  # a teacher that fits nowhere even alone
    found: list[Candidate] = []
    if BESIDE in limits.placements or not options:
        fronts = {role: pareto(each, _costs) for role, each in options.items()}
        found += _best(question, cluster, limits, _student_options(question, cluster, students, fronts),
                       beside(fronts), {})
    if BEFORE in limits.placements and options and question.signal is not None:
        quickest = {role: min(each, key=lambda option: option.forward) for role, each in options.items()}
        scoring = {role: ScoredBeforehand(option.role, option.forward, question.signal_bytes(role))
                   for role, option in quickest.items()}
        found += _best(question, cluster, limits, _student_options(question, cluster, students, {}), [Teachers()],
                       scoring)
    found.sort(key=_order)
    with_reasons = [replace(one, reason=why(one, other, question.trains))
                    for one, other in zip_longest(found, found[1:])]
    of_each = [[each for each in with_reasons if bool(each.scoring) == scored][: limits.best]
               for scored in (False, True)]
    return sorted((each for some in of_each for each in some), key=_order)


def _best(question: Question, cluster: Cluster, limits: Limits, students: Sequence[Option],
          teachers: Sequence[Teachers], scoring: Mapping[str, ScoredBeforehand]) -> list[Candidate]:
    """The best combinations of one placement, and one more to compare with."""
    groups: dict[tuple[int, int, int], list[tuple[float, RoleSetup, Teachers]]] = {}
    for student in students:
        groups.setdefault(_group(student.role), []).extend(
            (student.seconds + each.seconds, student.role, each) for each in teachers
            if fits(student, each, cluster))
    mixed = question.draws is not None and question.draws.mixed
    ranked = sorted((nsmallest(MIXED if mixed else EXACT, group, key=lambda each: each[0])
                     for group in groups.values() if group), key=lambda group: group[0][0])
    found: list[Candidate] = []
    stored = dict.fromkeys(scoring, question.signal)
    for group in ranked:
        exact = (Candidate(cluster, question.setup(trained, each.roles, stored), scoring) for _, trained, each in group)
        found += sorted(islice((each for each in exact if each.fits), EXACT), key=_order)[:1]
        if len(found) == 2 * limits.best + 2:  # what is timed together may change places
            break
    return sorted(found, key=_order)[: limits.best + 1]


def _group(role: RoleSetup) -> tuple[int, int, int]:
    return role.parallel.tensor, role.parallel.pipeline, role.parallel.context


def check_arithmetic(question: Question, cluster: Cluster) -> None:
    """Refuses arithmetic that the cluster's devices do not have. Raises ConfigError."""
    # Heads and losses of FP8 models are BF16.
    for dtype in (question.dtype, "bf16" if question.dtype == "fp8" else question.dtype):
        if dtype not in cluster.device.rates:
            raise ConfigError("precision.dtype", question.dtype, f"{cluster.name} has no rate of {dtype}",
                              f"Write one of {', '.join(cluster.device.rates)}, or add device.rates.{dtype} to the "
                              "cluster's description")


# ------------------------------------------------------------------------------------------------------- each role
def layouts(question: Question, cluster: Cluster, limits: Limits, name: str) -> Iterator[RoleSetup]:
    """All layouts of one role that the engine takes, within the limits.

    Tensor groups stay inside a node. Zero heads are added where a tensor size needs them. Teachers only run forward and
    have no context ranks.
    """
    trained = name == question.trains
    architecture = question.trained if trained else question.teachers[name]
    world = question.world
    node = min(cluster.devices_per_node, world)
    widest = min(node, limits.tensor or node)
    for tensor, pipeline in product(divisors(node, widest), range(1, min(architecture.layers, limits.pipeline) + 1)):
        if world % (tensor * pipeline) != 0:
            continue
        most = min(architecture.layers // pipeline, limits.virtual_pipeline)
        chunks = [number for number in range(1, most + 1) if not uneven_within(architecture.layers, pipeline, number)]
        contexts = divisors(world // (tensor * pipeline), limits.context) if trained else [1]
        for virtual, context, sequence in product(chunks, contexts, (False, True)):
            padded = padded_kv_heads(architecture.kv_heads, tensor) != architecture.kv_heads
            cut = Parallel(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context,
                           sequence=sequence, pad_heads=padded)
            if not _is_taken(architecture, cut, question.precision):
                continue
            rounds = batch_multiple(cut, 1, world)
            if question.global_batch % rounds != 0:
                continue
            for micro_batch in divisors(question.global_batch // rounds, limits.micro_batch):
                for recompute in limits.recompute if trained else ("none",):
                    yield RoleSetup(architecture, cut, world, micro_batch, recompute,
                                    question.precision.holds_fp8_weights(trained=trained))


def divisors(number: int, largest: int) -> list[int]:
    """Those of `number` up to `largest`."""
    return [size for size in range(1, min(number, largest) + 1) if number % size == 0]


def _is_taken(architecture: Architecture, cut: Parallel, precision: Precision) -> bool:
    """Whether the engine takes a layout."""
    try:
        check_parallel("role", cut)
        check_layout(architecture, cut.tensor, cut.pipeline, cut.virtual_pipeline, cut.pad_heads, "role")
        check_sizes(architecture, cut, precision, "role")
    except ConfigError:
        return False
    return True


def teachers_options(question: Question, cluster: Cluster, limits: Limits,
                     students: Sequence[RoleSetup]) -> dict[str, list[Option]]:
    """Every teacher's layouts that fit into the memory by themselves; their times beside one and the same student."""
    # Few stages and few micro-batches: quick to time.
    first = min(students, key=lambda each: (each.parallel.pipeline, -each.micro_batch * each.layout.data))
    # Beside it a teacher that answers together with it has fewest rows.
    fewest = min(students, key=lambda each: each.layout.copies)
    known: dict[tuple, list[Option]] = {}
    options = {}
    for role, architecture in question.teachers.items():
        alike = (architecture, question.teacher_kinds[role], _draws_beside(question, role))
        if alike not in known:
            known[alike] = _teacher_options(question, cluster, limits, role, first, fewest)
        options[role] = known[alike]
    return options


def _teacher_options(question: Question, cluster: Cluster, limits: Limits, role: str,
                     student: RoleSetup, fewest: RoleSetup) -> list[Option]:
    alone = replace(question, teachers={role: question.teachers[role]}, draws=_draws_beside(question, role))
    options: list[Option] = []
    for teacher in layouts(question, cluster, limits, role):
        setup = alone.setup(student, {role: teacher}, {})
        kept, phase = teacher_needs(alone.setup(fewest, {role: teacher}, {}), role)
        if kept + phase <= room(cluster):
            time = time_with_draws(cluster, setup)
            options.append(Option(teacher, (kept,), (phase,), time.total, time.parts[f"{role}: forward"]))
    return options


def _draws_beside(question: Question, role: str) -> Draws | None:
    """What is drawn while no teacher but `role` is there."""
    return question.draws if role == TEACHER else None


def teacher_needs(setup: TrainingSetup, role: str) -> tuple[float, float]:
    """What a teacher keeps, and needs at its own fullest moment: in a step, or while it draws."""
    memory = memory_with_draws(setup, 0)
    return memory.kept[f"{role}: weights"], max(teacher_phases(memory.phases, role).values())


def _student_options(question: Question, cluster: Cluster, students: Sequence[RoleSetup],
                     fronts: Mapping[str, Sequence[Option]]) -> list[Option]:
    """The trained model's layouts beside the first option of each teacher (from disk where `fronts` has none), without
    what the teachers themselves keep and need. Of those with equal sizes, those stay that no other beats."""
    teachers = {role: options[0].role for role, options in fronts.items()}
    stored = {} if teachers else dict.fromkeys(question.teachers, question.signal)
    least = {role: min(options, key=lambda each: each.kept[0] + each.phase[0]) for role, options in fronts.items()}
    lightest = Teachers(kept=sum(each.kept[0] for each in least.values()))
    groups: dict[tuple[int, int, int], list[Option]] = {}
    for student in students:
        setup = question.setup(student, teachers, stored)
        option = Option(student, *own_needs(setup), 0.0)
        if fits(option, lightest, cluster):
            timed = replace(option, seconds=time_with_draws(cluster, setup).total)
            groups.setdefault(_group(student), []).append(timed)
    return [option for group in groups.values() for option in pareto(group, _costs)]


def own_needs(setup: TrainingSetup) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the trained model keeps, and needs at its fullest moment, on the stages that can be the fullest: without the
    teachers' weights and forward passes, and without what these draw."""
    kept, phase = [], []
    for rank in setup.trained.fullest:
        memory = memory_with_draws(setup, rank)
        kept.append(sum(memory.kept.values()) - sum(memory.kept[f"{role}: weights"] for role in setup.teachers))
        phase.append(max(own_phases(memory.phases, setup.teachers).values()))
    # As many numbers for each layout of a group, for `pareto` compares them one by one.
    for numbers in (kept, phase):
        numbers += numbers[:1] * (MOST_FULLEST - len(numbers))
    return tuple(kept), tuple(phase)


def _costs(option: Option) -> tuple[float, ...]:
    return (option.seconds, *option.kept, *option.phase)


def pareto(options: Sequence, numbers: Callable[..., tuple[float, ...]]) -> list:
    """Those to which no other is at least equal in all numbers (less is better), by the first number."""
    front: list = []
    for option in sorted(options, key=numbers):
        own = numbers(option)
        if not any(all(a <= b for a, b in zip(numbers(other), own, strict=True)) for other in front):
            front.append(option)
    return front


# ----------------------------------------------------------------------------------------------------- all together
def beside(fronts: Mapping[str, Sequence[Option]]) -> list[Teachers]:
    """The layouts of all teachers together that no other beats."""
    together = []
    for choice in product(*fronts.values()):
        roles = dict(zip(fronts, (option.role for option in choice), strict=True))
        # Times are those beyond the first options', in whose company the trained model is timed.
        seconds = sum(option.seconds - options[0].seconds
                      for option, options in zip(choice, fronts.values(), strict=True))
        together.append(Teachers(roles, sum(option.kept[0] for option in choice),
                                 max((option.phase[0] for option in choice), default=0.0), seconds))
    return pareto(together, lambda each: (each.seconds, each.kept, each.phase))


def fits(student: Option, teachers: Teachers, cluster: Cluster) -> bool:
    """Whether there is room: teachers and trained model keep what they keep, and need the rest one after another."""
    return all(kept + teachers.kept + max(phase, teachers.phase) <= room(cluster)
               for kept, phase in zip(student.kept, student.phase, strict=True))


def _order(candidate: Candidate) -> tuple[float, float]:
    return float(f"{candidate.seconds:.6g}"), candidate.memory.total


# --------------------------------------------------------------------------------------------------------- in words
def differences(one: Candidate, other: Candidate, trains: str) -> list[str]:
    """The settings in which two layouts differ, as the first has them."""
    words = []
    if bool(one.scoring) != bool(other.scoring):
        words.append("teachers score beforehand" if one.scoring else "teachers run beside it")
    for name, role in one.roles.items():
        if name not in other.roles:
            continue
        theirs = settings_of(other.roles[name])
        label = trains if name == "student" else name
        words += [f"{label} {setting.removeprefix('parallel.')} {_value(value)} (not {_value(theirs[setting])})"
                  for setting, value in settings_of(role).items()
                  if value != theirs[setting] and setting != "parallel.pad_heads"]
    return words


def why(one: Candidate, other: Candidate | None, trains: str) -> str:
    """Why a layout is better than the next, in one sentence."""
    if other is None:
        return "No other layout was found to fit."
    what = ", ".join(differences(one, other, trains))
    gain = other.seconds - one.seconds
    if gain <= TIE * other.seconds:
        saved = (other.memory.total - one.memory.total) / 2**30
        return f"As quick as the next and {saved:.1f} GiB smaller: {what}."
    parts = _all_parts(one), _all_parts(other)
    saved = {name: parts[1].get(name, 0.0) - parts[0].get(name, 0.0) for name in {**parts[0], **parts[1]}}
    part = max(saved, key=lambda name: saved[name])
    return (f"{100 * gain / other.seconds:.1f} % less time than the next: {what}; that saves most in {part!r} "
            f"({parts[0].get(part, 0.0):.3g} s, not {parts[1].get(part, 0.0):.3g} s).")


def _all_parts(candidate: Candidate) -> dict[str, float]:
    return candidate.time.parts | {f"{role}: scores beforehand": each.seconds
                                   for role, each in candidate.scoring.items()}


def _value(value: object) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
