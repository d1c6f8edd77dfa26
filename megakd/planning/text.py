"""Plans as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from megakd.config import Recipe
from megakd.config_stages import TrainStage
from megakd.planning.candidate import GIB, Candidate, layout_text, room
from megakd.planning.cluster import Cluster
from megakd.planning.nearest import changes_between
from megakd.planning.plan import TrainingPlan
from megakd.planning.plan_inference import InferencePlan

SMALL = 0.005
"""Share of a whole below which a part is not named."""
LABEL = 13
"""Width of the names on the left."""


def describe(recipe: Recipe, cluster: Cluster, plans: Sequence[TrainingPlan | InferencePlan], given_lengths: bool,
             given_nodes: bool) -> str:
    """The whole text."""
    node = cluster.devices_per_node
    lines = [f"{recipe.name} in {recipe.precision.dtype} on {cluster.name}: nodes of {node} x {cluster.device.kind}",
             f"Memory to plan with: {room(cluster) / GIB:.1f} of {cluster.device.memory_gib:g} GiB a GPU. Lengths are "
             f"{'as given' if given_lengths else 'measured in the data'}. Times are predictions."]
    planned = {plan.stage.name: plan for plan in plans}
    others = []
    for stage in recipe.stages:
        if stage.name in planned:
            plan = planned[stage.name]
            told = _stage(plan, given_nodes) if isinstance(plan, TrainingPlan) else \
                _inference(plan, cluster, given_nodes)
            lines += ["", *told]
        elif not isinstance(stage, TrainStage):
            others.append(f"{stage.name} ({stage.kind})")
    if others:
        lines += ["", f"Not planned: {', '.join(others)}"]
    return "\n".join(lines) + "\n"


def _inference(plan: InferencePlan, cluster: Cluster, given_nodes: bool) -> list[str]:
    """A stage that trains nothing."""
    memory, lengths = plan.memory, plan.lengths
    written = f"; writes {_bytes(plan.written)}" if plan.written else ""
    lines = [*(_line(name, layout_text(role)) for name, role in plan.roles.items()),
             _line("the stage", f"{_duration(plan.time.total)}, {plan.gpu_hours:,.1f} GPU-hours{written} = "
                                f"{_shares(plan.time.parts, plan.time.total, _duration)}"),
             _line("memory", f"{_gib(memory.total)} of {_gib(room(cluster))} GiB, most in {memory.fullest!r}: "
                             f"{_shares(memory.parts, memory.total, _gib)}")]
    return [f"{plan.stage.name} ({plan.stage.kind}), {_nodes(plan.nodes, plan.world, given_nodes)}",
            f"  {plan.rows:,} rows ({plan.rows_from}); prompt {lengths.prompt:.0f} + answer {lengths.answer:.0f} "
            "tokens",
            *_indented(lines)]


def _nodes(nodes: int, world: int, given: bool) -> str:
    fewest = "" if given else " (the fewest; --nodes for others)"
    return f"{nodes} node{'s' if nodes > 1 else ''} = {world} GPUs{fewest}"


def _stage(plan: TrainingPlan, given_nodes: bool) -> list[str]:
    stage, question = plan.stage, plan.question
    tokens = plan.own.setup.work.tokens
    where = _nodes(plan.nodes, question.world, given_nodes)
    lines = [f"{stage.name} ({stage.kind}: {stage.objective.kind}), {where}",
             f"  {plan.steps:,} steps of {stage.global_batch:,} groups, {tokens:,.0f} tokens a step; prompt "
             f"{question.lengths.prompt:.0f} + answer {question.lengths.answer:.0f} tokens",
             "  the recipe's layout", *_indented(_own(plan))]
    if plan.best:
        lines += ["  the best layouts found"]
    for number, candidate in enumerate(plan.best, start=1):
        lines += _indented(_found(plan, candidate, number))
    return lines + [f"  note: {note}" for note in plan.notes]


def _own(plan: TrainingPlan) -> list[str]:
    own, steps = plan.own, plan.steps
    memory = own.memory
    lines = [*_roles(own, plan.question.trains), *_draw(own, plan.question.trains),
             _line("a step", f"{_seconds(own.seconds)} = {_shares(own.time.parts, own.time.total, _seconds)}"),
             _line("throughput", _throughput(own)),
             _line("the stage", f"{_duration(steps * own.seconds)}, {own.gpu_hours(steps):,.1f} GPU-hours"),
             _line("memory", f"{_gib(memory.total)} of {_gib(room(own.cluster))} GiB on pipeline rank "
                             f"{own.pipeline_rank} ({_gib(plan.longest)} if all sequences had data.max_length), "
                             f"most in {memory.fullest!r}: {_shares(memory.parts, memory.total, _gib)}"),
             *([_line("host memory", f"{_gib(memory.host)} GiB a GPU for the optimizer's states between steps; up to "
                                     "twice that is taken, as pinned memory comes in powers of two")]
               if memory.host else []),
             _line("FLOPs", f"{sum(own.flops.values()):.3g} a step: "
                            f"{_shares(_named(own.flops, plan.question.trains), sum(own.flops.values()), None)}")]
    for link, name in (("node", "in the node"), ("network", "network")):
        volumes = Counter()
        for volume in own.traffic:
            if volume.link == link:
                volumes[f"{volume.operation} for {volume.purpose}"] += volume.bytes
        if volumes:
            lines.append(_line(name, f"a GPU sends {_bytes(volumes.total())} a step: "
                                     f"{_shares(volumes, volumes.total(), _bytes)}"))
    return lines


def _draw(own: Candidate, trains: str) -> list[str]:
    """What is drawn between steps, how often, and what it takes each time."""
    draws = own.setup.draws
    if draws is None:
        return []
    asked = [f"{who} {prompts:,} prompts" for who, prompts in (
        (f"the {trains}'s and the teacher's together of" if draws.mixed else f"the {trains}'s of", draws.own_prompts),
        ("the teacher's of", draws.teacher_prompts)) if prompts > 0]
    answers = "an answer each" if draws.n == 1 else f"{draws.n} answers each"
    time, every = own.draw_time, "each step" if draws.every == 1 else f"every {draws.every} steps"
    return [*([_line("teacher", f"{layout_text(draws.teacher)}; draws alone")] if draws.teacher is not None else []),
            _line("a draw", f"{every}, {', '.join(asked)}, {answers}: {_seconds(time.total)} = "
                            f"{_shares(time.parts, time.total, _seconds)}")]


def _found(plan: TrainingPlan, candidate: Candidate, number: int) -> list[str]:
    own = plan.own
    change = candidate.seconds / own.seconds - 1
    than = f"{abs(change):.0%} {'less' if change < 0 else 'more'} time" if abs(change) >= SMALL else "as quick"
    lines = [f"{number}. {_seconds(candidate.seconds)} a step, {than}; "
             f"{_duration(plan.steps * candidate.seconds)}, {candidate.gpu_hours(plan.steps):,.1f} GPU-hours; "
             f"{_gib(candidate.memory.total)} GiB",
             *(f"   {line}" for line in _roles(candidate, plan.question.trains))]
    if candidate.scoring:
        size = sum(each.file_bytes for each in candidate.scoring.values())
        lines.append(f"   {_line('beforehand', f'{_seconds(candidate.scoring_seconds)} of each step; ')}"
                     f"{_bytes(size)} of files a step, {_bytes(size * plan.steps)} in all (their reading and writing "
                     "is not counted)")
    lines.append(f"   {_line('throughput', _throughput(candidate))}")
    settings = changes_between(own, candidate, plan.question.trains)
    words = " ".join(settings) if settings else "as the recipe has them"
    if candidate.scoring:
        words += f"; a score stage for each, named in stages.{plan.stage.name}.signals"
    lines.append(f"   {_line('settings', words)}")
    return [*lines, f"   {_line('why', candidate.reason)}"]


def _roles(candidate: Candidate, trains: str) -> list[str]:
    lines = [_line(trains if name == "student" else name, layout_text(role)) for name, role in candidate.roles.items()]
    return lines + [_line(role, f"beforehand, {layout_text(each.setup)}") for role, each in candidate.scoring.items()]


def _throughput(candidate: Candidate) -> str:
    rate = candidate.tokens_per_second
    return (f"{rate:,.0f} tokens/s, {rate / candidate.world:,.0f} a GPU; MFU {candidate.mfu:.1%}; pipelines wait "
            f"{max(0.0, candidate.bubble):.1%}")


def _named(flops: dict[str, float], trains: str) -> dict[str, float]:
    return {trains if name == "student" else name: value for name, value in flops.items()}


def _shares(parts: Mapping[str, float], whole: float, number: Callable[[float], str] | None) -> str:
    """The parts of a whole, the largest first, without those that are next to nothing; in per cent without `number`."""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    named = [(name, value) for name, value in ordered if value >= SMALL * whole]
    words = [f"{name} {value / whole:.0%}" if number is None else f"{name} {number(value)}" for name, value in named]
    return ", ".join(words) + (" and less" if len(named) < len(ordered) else "")


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else _seconds(seconds)


def _bytes(size: float) -> str:
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
