"""Teacher-mixed sampling (MiniLLM, arXiv 2306.08543, section 2.2): each token comes from a mixture of two models.

`(1 - mix) q + mix p` is sampled by a coin: with probability `mix` the teacher draws the token, otherwise the student.
So no distribution ever travels, and the two models may be cut in any way. Both read every token, whoever drew it.

All ranks of the world decode the same rows in step: a role's replicas share the rows out, and one sum over the world
tells everybody what both models would draw next. As in the engine, a response depends on (seed, sample id, index)
alone.

Legend: R rows of a round, B rows of one replica in a forward pass, S tokens of a row in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.batch import to_device
from megakd.errors import ModelError
from megakd.mcore.decoder import PipelineDecoder
from megakd.mcore.model import Model, evaluating
from megakd.rollout.engine import Prompt, Rollout, Row, logits
from megakd.rollout.ring import Pass, Ring
from megakd.rollout.sampling import Sampling, noise_keys, sample, uniform

STUDENT, TEACHER, COIN = 0, 1, 2
"""Streams of noise, told apart by the high bits of the seed; the first two are also the order of the models."""


@dataclass
class _Row(Row):
    """A response in the making; every rank has all of them. Log-probabilities are NaN where the teacher drew."""

    done: bool = False


class _Side:
    """One of the two models on this rank: its replica's share of the rows, and their cache."""

    def __init__(self, model: Model, stream: int, rows: Sequence[_Row], sampling: Sampling, longest: int, pad_id: int):
        self.decoder = PipelineDecoder(model, longest)
        self.ring = Ring(self.decoder)
        self.stream, self.sampling, self.pad_id = stream, sampling, pad_id
        grid = model.grid
        self.rows = list(rows)
        self.mine = list(range(grid.layout.copy(grid.at), len(rows), grid.layout.copies))
        # Of each copy one rank of the last stage speaks; the others have drawn the same.
        self.speaks = grid.is_last_stage and grid.at.tensor == 0
        if self.mine:
            width = max(len(rows[number].prompt.tokens) + rows[number].limit for number in self.mine)
            self.cache = self.decoder.new_cache(len(self.mine), width)

    def draw(self, drawn_2RN: Tensor) -> None:
        """Reads the newest tokens of the rows that go on (the prompts at first) and writes what this model would draw
        next, and its log-probability, to `drawn_2RN[stream]`."""
        slots = [slot for slot, number in enumerate(self.mine) if not self.rows[number].done]
        if not slots:
            return
        numbers = [self.mine[slot] for slot in slots]
        rows = [self.rows[number] for number in numbers]
        tokens_BS, positions_BS, last_B = self._input(rows)
        # The rows that are done are not looked at again.
        self.cache.begin(torch.tensor(slots), positions_BS, others_free=True)
        device = self.cache.device
        hidden_SBH = self.ring.whole(Pass(to_device(tokens_BS, device), to_device(positions_BS, device), self.cache))
        if hidden_SBH is None:
            return
        hidden_BH = hidden_SBH[to_device(last_B, device), torch.arange(len(rows), device=device)]
        keys_B = _keys(self.sampling.seed, self.stream, rows, device)
        tokens_B, log_probs_B = sample(
            logits(hidden_BH, self.decoder.head_VH), self.sampling, keys_B, tp_group=self.decoder.tp_group,
            vocab_size=self.decoder.vocab_size,
        )
        if self.speaks:
            drawn_2RN[self.stream, numbers] = torch.stack([tokens_B.double(), log_probs_B.double()], 1)

    def _input(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and positions [B, S] to read, and the column [B] of each row's last."""
        if rows[0].tokens:
            tokens_BS = torch.tensor([row.tokens[-1:] for row in rows])
            positions_BS = torch.tensor([[row.position] for row in rows])
            return tokens_BS, positions_BS, torch.zeros(len(rows), dtype=torch.int64)
        lengths = [len(row.prompt.tokens) for row in rows]
        tokens_BS = torch.full((len(rows), max(lengths)), self.pad_id)
        for number, row in enumerate(rows):
            tokens_BS[number, : lengths[number]] = torch.tensor(row.prompt.tokens)
        return tokens_BS, torch.arange(max(lengths)).expand(tokens_BS.shape), torch.tensor(lengths) - 1


def generate_mixed(
    student: Model, teacher: Model, prompts: Sequence[Prompt], sampling: Sampling, *, teacher_mix: float, slots: int,
    longest: int, pad_id: int, world_group: dist.ProcessGroup,
) -> list[Rollout]:
    """Lets two models answer prompts together, `sampling.n` times each.

    Collectives: the models' own, `sample`'s, and one SUM of 4 numbers a row over `world_group` for each token. Every
    rank of the world calls it with the same prompts.

    Args:
        student, teacher: in any two layouts over the same world.
        prompts: what to answer.
        sampling: how either draws.
        teacher_mix: chance of a token to be the teacher's.
        slots: rows that each copy of the student decodes at a time.
        longest: bound of prompt and answer together.
        pad_id: fills up prompts; never attended to.

    Returns:
        The responses on every rank, in the order of the prompts, then of the index. Their log-probabilities are the
        student's, NaN where the teacher drew.

    Raises:
        ModelError: non-finite logits; on every rank.
    """
    limit = min(longest, student.architecture.max_positions, teacher.architecture.max_positions)
    rows = [
        _Row(prompt, index, min(sampling.max_new_tokens, limit - len(prompt.tokens)))
        for prompt in prompts for index in range(sampling.n)
    ]
    # Longest first, as in the engine: rows of a round are of like length.
    order = sorted(rows, key=lambda row: -len(row.prompt.tokens))
    at_a_time = slots * student.grid.layout.copies
    with evaluating(student), evaluating(teacher):
        for start in range(0, len(order), at_a_time):
            part = order[start : start + at_a_time]
            # Nobody here keeps the sides, and with them their caches, until the next ones have been made.
            _decode(part, [_Side(model, stream, part, sampling, limit, pad_id)
                           for stream, model in ((STUDENT, student), (TEACHER, teacher))],
                    sampling, teacher_mix, world_group)
    return [Rollout(row.prompt.sample_id, row.index, tuple(row.tokens), tuple(row.log_probs),
                    "stop" if row.tokens[-1] in sampling.stop_ids else "length") for row in rows]


def _decode(
    rows: Sequence[_Row], sides: Sequence[_Side], sampling: Sampling, teacher_mix: float,
    world_group: dist.ProcessGroup,
) -> None:
    """Decodes rows to their ends, all in step."""
    device = next(sides[STUDENT].decoder.model.chunks[0].parameters()).device
    while not all(row.done for row in rows):
        drawn_2RN = torch.zeros((2, len(rows), 2), dtype=torch.float64, device=device)
        for side in sides:
            side.draw(drawn_2RN)
        dist.all_reduce(drawn_2RN, group=world_group)
        coins = uniform(_keys(sampling.seed, COIN, rows, torch.device("cpu"))).tolist()
        drawn = drawn_2RN.tolist()
        for number, (row, coin) in enumerate(zip(rows, coins, strict=True)):
            if not row.done:
                source = TEACHER if coin < teacher_mix else STUDENT
                _receive(row, source, *drawn[source][number], sampling)


def _receive(row: _Row, source: int, token: float, log_prob: float, sampling: Sampling) -> None:
    if not -torch.inf < log_prob < torch.inf:
        name = ("student", "teacher")[source]
        raise ModelError(f"non-finite logits of the {name} at token {len(row.tokens)} of response {row.index} to "
                         f"sample {row.prompt.sample_id}: the model's weights or activations are not finite")
    row.tokens.append(int(token))
    row.log_probs.append(log_prob if source == STUDENT else float("nan"))
    row.done = int(token) in sampling.stop_ids or len(row.tokens) == row.limit


def _keys(seed: int, stream: int, rows: Sequence[_Row], device: torch.device) -> Tensor:
    """Keys [B] of the noise of the rows' next tokens, in one of the streams."""
    numbers_B3 = torch.tensor([(row.prompt.sample_id, row.index, len(row.tokens)) for row in rows])
    ids_B, indices_B, steps_B = to_device(numbers_B3, device).unbind(1)
    return noise_keys(seed + (stream << 60), ids_B, indices_B, steps_B)
