"""A study of scale from arithmetic: what a training step costs over models, GPUs, lengths, vocabularies and methods.

    python tools/scaling_study.py --cluster slurm/clusters/h100.yaml --out study

writes study/study.csv, one row a case and place of the teachers with all parts of its time and memory, and
study/study.html, figures and what each shows, without any outside file. Every case has the best layout that
`megakd.planning.search` finds for it. Nothing is started and no model is read; the sizes are those of the published
Llama models.

    python tools/scaling_study.py --cluster CPU.yaml --measure --sizes tiny,13M --ranks 1,2 --out study

runs training steps of small models on this machine's CPU (tools/scaling_measure.py) and puts what they took beside what
the plan says for the same layouts, with the rates of CPU.yaml, a description with `device_type: cpu`.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling_page import page

from megakd.chunks import chunk_tokens_on
from megakd.config_objectives import AdpaObjective, DckdObjective, DpoObjective, KdObjective, Objective, SftObjective
from megakd.disk import write_text_atomic
from megakd.errors import ConfigError, MegakdError
from megakd.hf.families import Architecture
from megakd.objectives import build_objective
from megakd.planning.candidate import GIB, Candidate, layout_text
from megakd.planning.cluster import Cluster, cluster_named
from megakd.planning.recipe import loss_calls
from megakd.planning.search import Limits, Question, search
from megakd.planning.timing import call_seconds, link_of
from megakd.planning.traffic import training_traffic
from megakd.planning.work import Lengths


def llama(hidden: int, layers: int, heads: int, head_dim: int, ffn: int, tied: bool = False) -> Architecture:
    """A model of the Llama 3 family."""
    return Architecture("llama", hidden, layers, heads, 8, head_dim, ffn, 128256, 1e-5, 5e5, None, tied, False, 131072)


MODELS = {
    # config.json of meta-llama/Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B, Llama-3.1-70B and Llama-3.1-405B;
    # tests/unit/test_planning.py holds their parameters to the published counts.
    "1B": llama(2048, 16, 32, 64, 8192, tied=True),
    "3B": llama(3072, 28, 24, 128, 8192, tied=True),
    "8B": llama(4096, 32, 32, 128, 14336),
    "70B": llama(8192, 80, 64, 128, 28672),
    "405B": llama(16384, 126, 128, 128, 53248),
}
METHODS: dict[str, Objective] = {
    "adpa": AdpaObjective(), "dckd": DckdObjective(), "kd": KdObjective(), "dpo": DpoObjective(), "sft": SftObjective(),
}
LIMITS = Limits(virtual_pipeline=4, context=1, micro_batch=16, best=1)
PLACES = {True: "before", False: "beside"}
"""Of the teachers: they score the answers beforehand, or run beside the student."""


@dataclass(frozen=True)
class Case:
    """One question to the planner."""

    figure: str
    """What it is for: weak, strong, length, vocabulary, precision or method."""
    teacher: str
    student: str
    world: int
    groups: int
    """Of a step: a prompt with its answers."""
    method: str = "dckd"
    prompt: int = 256
    answer: int = 768
    vocabulary: int = 128256
    dtype: str = "bf16"

    def question(self, device: str) -> Question:
        """What the search is asked. ADPA's reference is of the teacher's size, DPO's of the student's."""
        objective = METHODS[self.method]
        requires = build_objective(objective).requires
        student = replace(MODELS[self.student], vocab_size=self.vocabulary)
        teacher = replace(MODELS[self.teacher], vocab_size=self.vocabulary)
        signals = [kind for kind in ("token_log_probs", "hidden_states") if kind in objective.signal_kinds]
        return Question(
            student, {role: student if self.method == "dpo" else teacher for role in requires.teachers},
            requires.kinds, dict(requires.teacher_kinds), loss_calls(objective, requires),
            Lengths(self.prompt, self.answer), self.groups, self.world,
            chunk_tokens_on(device, None), self.dtype, device,
            signal=signals[0] if signals else None)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Pairs of models over numbers of GPUs with equal work a GPU, one pair with equal work in all, and one pair with
    everything else varied in turn."""
    worlds = sorted(options.worlds)
    base = Case("weak", options.teacher, options.student, options.world, options.world * options.groups_a_gpu,
                options.method)
    pairs = [(teacher, student) for student in options.students for teacher in options.teachers
             if list(MODELS).index(teacher) >= list(MODELS).index(student)]
    for teacher, student in pairs:
        for world in sorted({*worlds, base.world}):
            yield replace(base, teacher=teacher, student=student, world=world, groups=world * options.groups_a_gpu)
    for world in worlds:
        yield replace(base, figure="strong", world=world, groups=options.strong_groups)
    tokens = base.groups * (base.prompt + base.answer)
    for length in options.lengths:
        # As many tokens a step as in the base, however long an answer is.
        yield replace(base, figure="length", answer=length - base.prompt, groups=max(1, tokens // length))
    for vocabulary in options.vocabularies:
        yield replace(base, figure="vocabulary", vocabulary=vocabulary)
    for dtype in options.dtypes:
        yield replace(base, figure="precision", dtype=dtype)
    for method in options.methods:
        yield replace(base, figure="method", method=method)


# ----------------------------------------------------------------------------------------------------------- numbers
def rows_of(case: Case, cluster: Cluster, tokens: float) -> list[dict[str, Any]]:
    """A row for each place of the teachers with the best layout there; one that says so where none fits."""
    known = {"figure": case.figure, "teacher": case.teacher, "student": case.student, "method": case.method,
             "world": case.world, "groups": case.groups, "length": case.prompt + case.answer,
             "vocabulary": case.vocabulary, "dtype": case.dtype}
    found = search(case.question(cluster.device_type), cluster, LIMITS)
    if not found:
        return [known | {"place": "none fits"}]
    return [known | numbers_of(candidate, tokens) for candidate in found]


def numbers_of(candidate: Candidate, tokens: float) -> dict[str, Any]:
    """All of a layout's numbers. Hours are those of `tokens` tokens of the student."""
    numbers = {
        "place": PLACES[bool(candidate.scoring)], "layout": layout_text(candidate.setup.trained),
        "teachers' layout": "; ".join(dict.fromkeys(
            layout_text(role) for role in (*candidate.setup.teachers.values(),
                                           *(each.setup for each in candidate.scoring.values())))),
        "tokens a step": candidate.setup.work.tokens, "seconds": candidate.seconds,
        "training seconds": candidate.time.total, "scoring seconds": candidate.scoring_seconds,
        "tokens a second": candidate.tokens_per_second, "model FLOPs utilisation": candidate.mfu,
        "GPU-hours": candidate.gpu_hours_of_tokens(tokens), "memory GiB": candidate.memory.total / GIB,
        **{f"messages: {axis}": seconds for axis, seconds in messages_of(candidate).items()},
        **{f"time: {name}": seconds for name, seconds in candidate.time.parts.items()},
        **{f"memory: {name}": size / GIB for name, size in candidate.memory.parts.items()},
    }
    if candidate.scoring:
        extra, seconds = separate(candidate)
        steps = tokens / candidate.setup.work.tokens
        numbers |= {"separate: more GPUs": extra, "separate: seconds": seconds,
                    "separate: GPU-hours": steps * seconds * (candidate.world + extra) / 3600}
    return numbers


def messages_of(candidate: Candidate) -> dict[str, float]:
    """Seconds that a rank of the student's last stage sends in a step, by axis, as far as the plan shows them: the
    gradients' are those that no computation hides."""
    setup, found = candidate.setup, dict.fromkeys(("tensor", "pipeline", "data", "world"), 0.0)
    rank = setup.trained.layout.rank(pipeline=setup.trained.parallel.pipeline - 1)
    for call in training_traffic(setup, rank):
        name, _, what = call.purpose.partition(": ")
        role = setup.teachers[name] if name in setup.teachers and what != "hidden states" else setup.trained
        axis = {"tied": "pipeline"}.get(call.axis, call.axis)
        if axis != "data" and call.operation != "receive":
            found[axis] += call_seconds(candidate.cluster, call, link_of(candidate.cluster, role, call.axis))
    parts = candidate.time.parts
    found["data"] = sum(seconds for name, seconds in parts.items() if name.endswith("replicas"))
    return found


def separate(candidate: Candidate) -> tuple[float, float]:
    """Teachers on GPUs of their own, as many more as keep pace with the training, sending hidden states over the
    network: how many GPUs more, and seconds of a step. The engine does not have it; it is counted for comparison."""
    link = candidate.cluster.network_link or candidate.cluster.node_link
    receivers = candidate.setup.trained.layout.data * candidate.setup.trained.parallel.tensor
    arrives = sum(each.file_bytes for each in candidate.scoring.values()) / receivers / (link.gb_s * 1e9)
    seconds = candidate.time.total + arrives
    return candidate.world * candidate.scoring_seconds / seconds, seconds


# ------------------------------------------------------------------------------------------------------------ program
def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows with the columns of all of them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--cluster", required=True,
                      help="a description: a file, or a name in slurm/clusters/ such as h100")
    made.add_argument("--out", type=Path, required=True, help="folder for study.csv and study.html")
    made.add_argument("--teachers", type=_words, default=list(MODELS))
    made.add_argument("--students", type=_words, default=["1B", "8B"])
    made.add_argument("--worlds", type=_numbers, default=[2**power for power in range(3, 15)])
    made.add_argument("--lengths", type=_numbers, default=[1024, 4096, 16384])
    made.add_argument("--vocabularies", type=_numbers, default=[32000, 128256, 256000])
    made.add_argument("--dtypes", type=_words, default=["bf16", "fp8"])
    made.add_argument("--methods", type=_words, default=list(METHODS))
    made.add_argument("--teacher", default="70B", help="of the cases where something else varies")
    made.add_argument("--student", default="8B")
    made.add_argument("--method", default="dckd")
    made.add_argument("--world", type=int, default=256)
    made.add_argument("--groups-a-gpu", type=int, default=2, help="prompts with their answers in a step")
    made.add_argument("--strong-groups", type=int, default=1024, help="of a step, where more GPUs share equal work")
    made.add_argument("--tokens", type=float, default=1e9, help="of the student, for GPU-hours")
    made.add_argument("--measure", action="store_true", help="run small models on this machine instead")
    made.add_argument("--sizes", type=_words, default=["tiny", "13M", "38M", "135M"], help="with --measure")
    made.add_argument("--ranks", type=_numbers, default=[1, 2, 4, 8], help="with --measure")
    made.add_argument("--measured-methods", type=_words, default=["sft", "dckd"], help="with --measure")
    return made


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def check(options: argparse.Namespace) -> None:
    """Refuses names that are not there. Raises ConfigError."""
    for field, names, known in (("--teachers", options.teachers, MODELS), ("--students", options.students, MODELS),
                                ("--teacher", [options.teacher], MODELS), ("--student", [options.student], MODELS),
                                ("--method", [options.method], METHODS), ("--methods", options.methods, METHODS)):
        for name in names:
            if name not in known:
                raise ConfigError(field, name, "is not known", f"Write one of {', '.join(known)}")
    if options.measure and cluster_named(options.cluster).device_type != "cpu":
        raise ConfigError("--measure", options.cluster, "measures on this machine's CPU, whose rates it needs",
                          "Give --cluster a description with device_type: cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the table and the page."""
    options = parser().parse_args(arguments)
    try:
        check(options)
        cluster = cluster_named(options.cluster)
        measured: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        if options.measure:
            from scaling_measure import measure

            measured = measure(options, cluster)
        else:
            for number, case in enumerate(cases(options), 1):
                rows += rows_of(case, cluster, options.tokens)
                print(f"\r{number} cases", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
        options.out.mkdir(parents=True, exist_ok=True)
        name = "measured" if options.measure else "study"
        write_text_atomic(options.out / f"{name}.csv", csv_text(measured if options.measure else rows))
        write_text_atomic(options.out / f"{name}.html", page(cluster, rows, measured, options, MODELS))
    except MegakdError as error:
        print(f"scaling_study: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
