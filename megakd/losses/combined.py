"""Row losses around a row loss: one with log-probabilities of given tokens beside it, one of softcapped logits.

Legend: T tokens, C tokens of a chunk, V local vocabulary columns, S numbers a token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from megakd.losses.likelihood import add_at_labels, label_logits, outside_is_nan
from megakd.losses.statistics import Chunk, KernelForm, RowLoss, exp_


class _Around(RowLoss):
    """A row loss that keeps one more spare than the one inside it, whose maxima are its own."""

    def __init__(self, inner: RowLoss):
        self.inner = inner
        self.roles, self.spares, self.passes = inner.roles, inner.spares + 1, inner.passes

    @property
    def maxima(self) -> int:
        return self.inner.maxima

    def local_maxima(self, block: Chunk) -> Tensor:
        return self.inner.local_maxima(_without_own_spare(block))

    def kernel_sums(self, number: int, chunk: Chunk, state_SC: Tensor) -> Tensor:
        return self.inner.kernel_sums(number, chunk, state_SC)


class WithLogProbs(_Around):
    """Row loss `w * D + v * log Q(label)` for a row loss D of a teacher and the student Q; reports D and log Q(label).

    Its gradient adds `v (1[label] - Q)` to that of `w * D`. D is taken of logits that are divided by the temperature,
    Q(label) of the logits themselves.
    """

    reported: ClassVar[int] = 2

    def __init__(
        self, inner: RowLoss, labels_T: Tensor, inner_weights_T: Tensor, log_prob_weights_T: Tensor, temperature: float
    ):
        super().__init__(inner)
        self.labels_T, self.temperature = labels_T, temperature
        self.inner_weights_T, self.log_prob_weights_T = inner_weights_T, log_prob_weights_T

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        if number > 0:
            return self.inner.local_sums(number, _without_own_spare(block), state_SC[:-2])
        student_CV, max_C, spare_CV = block.logits[0], state_SC[0], block.spares[-1]
        inner_SC = self.inner.local_sums(number, _without_own_spare(block), state_SC)
        label_C = label_logits(student_CV, max_C, self.labels_T, block) * self.temperature
        exp_CV = exp_(torch.sub(student_CV, max_C[:, None], out=spare_CV).mul_(self.temperature))
        return torch.cat([inner_SC, torch.stack([label_C, exp_CV.sum(1)])])

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        if number == 0:
            label_C, sum_C = sums_SC[-2:]
            log_sum_C = sum_C.log()
            # Carried along to the last pass: the student's log of sum of exponentials, at temperature 1, and log Q.
            log_prob_C = outside_is_nan(label_C - log_sum_C, self.labels_T, chunk)
            carried_SC = torch.stack([state_SC[0] * self.temperature + log_sum_C, log_prob_C])
            inner_SC = self.inner.combine(number, state_SC, sums_SC[:-2], chunk)
        else:
            carried_SC = state_SC[-2:]
            inner_SC = self.inner.combine(number, state_SC[:-2], sums_SC, chunk)
        if number + 1 < self.passes:
            return torch.cat([inner_SC, carried_SC])
        (value_C, saved_SC), (lse_C, log_prob_C) = (inner_SC[0], inner_SC[1:]), carried_SC
        weight_C, log_prob_weight_C = self._weights(chunk)
        # where: a weight of 0 hides whatever stands under it.
        total_C = torch.where(weight_C == 0, 0.0, weight_C * value_C)
        total_C += torch.where(log_prob_weight_C == 0, 0.0, log_prob_weight_C * log_prob_C)
        return torch.cat([total_C[None], saved_SC, torch.stack([lse_C, value_C, log_prob_C])])

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        student_CV, lse_C = block.logits[0], saved_SC[-3]
        prob_CV = exp_(torch.mul(student_CV, self.temperature, out=block.spares[-1]).sub_(lse_C[:, None]))
        self.inner.gradient(_without_own_spare(block), saved_SC[:-3])
        weight_C, log_prob_weight_C = self._weights(block)
        add_at_labels(prob_CV.neg_(), self.labels_T, block)
        # The caller divides by the temperature, which the log-probabilities have nothing to do with.
        student_CV.mul_(weight_C[:, None]).addcmul_(prob_CV, (log_prob_weight_C * self.temperature)[:, None])

    def kernel_form(self) -> KernelForm | None:
        form = self.inner.kernel_form()
        if form is None:
            return None
        weights = {"inner_weights_T": self.inner_weights_T, "log_prob_weights_T": self.log_prob_weights_T}
        return replace(form, labels_T=self.labels_T, temperature=self.temperature, **weights)

    def from_parts(self, sums_SPC: Tensor, shift_RPC: Tensor, chunk: Chunk, state_SC: Tensor) -> Tensor:
        inner_SC = self.inner.from_parts(sums_SPC[:-1], shift_RPC, chunk, state_SC)
        label_C = label_logits(chunk.logits[0], state_SC[0], self.labels_T, chunk) * self.temperature
        sum_C = (sums_SPC[-1] * (shift_RPC[0] * self.temperature).exp()).sum(0)
        return torch.cat([inner_SC, torch.stack([label_C, sum_C])])

    def kernel_sums(self, number: int, chunk: Chunk, state_SC: Tensor) -> Tensor:
        return super().kernel_sums(number, chunk, state_SC[:-2])

    def _weights(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        dtype = chunk.logits[0].dtype
        return self.inner_weights_T[chunk.rows].to(dtype), self.log_prob_weights_T[chunk.rows].to(dtype)


class Softcapped(_Around):
    """A row loss of logits y = cap * tanh(x / cap), whose gradient is that by x: 1 - (y / cap)^2 times that by y."""

    def __init__(self, inner: RowLoss, cap: float):
        super().__init__(inner)
        self.cap, self.reported = cap, inner.reported

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        return self.inner.local_sums(number, _without_own_spare(block), state_SC)

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        return self.inner.combine(number, state_SC, sums_SC, chunk)

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        student_CV = block.logits[0]
        # Taken before the logits are gone.
        slope_CV = torch.mul(student_CV, 1.0 / self.cap, out=block.spares[-1]).square_().neg_().add_(1.0)
        self.inner.gradient(_without_own_spare(block), saved_SC)
        student_CV.mul_(slope_CV)

    def kernel_form(self) -> KernelForm | None:
        form = self.inner.kernel_form()
        return None if form is None else replace(form, cap=self.cap)

    def from_parts(self, sums_SPC: Tensor, shift_RPC: Tensor, chunk: Chunk, state_SC: Tensor) -> Tensor:
        return self.inner.from_parts(sums_SPC, shift_RPC, chunk, state_SC)


def _without_own_spare(block: Chunk) -> Chunk:
    return replace(block, spares=block.spares[:-1])
