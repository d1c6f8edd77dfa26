"""The objectives' settings and their defaults. Formulas and the papers' values: docs/methods.md."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megakd.config_base import Section


class ObjectiveSection(Section):
    """What the settings of every objective tell the rest of a recipe."""

    teachers: ClassVar[tuple[str, ...]] = ()
    """Roles that can take part besides the trained one; `roles` are those that do."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles whose models it takes (the objective's `requires.teachers`)."""
        return self.teachers

    @property
    def reads_text(self) -> bool:
        """Whether it takes pre-training text, `data.text`."""
        return False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Settings of the stage that have to name an earlier stage: `rollouts`, `teacher_answers`, `scores`."""
        return ()

    @property
    def scored(self) -> tuple[str, ...]:
        """Kinds of answers that its roles score (the objective's `requires.teacher_kinds`)."""
        return ()

    @property
    def signal_kinds(self) -> tuple[str, ...]:
        """Kinds of signals that a role may be read as from disk; none where it has to run beside the student."""
        return ()


class ListedTokens(ObjectiveSection):
    """Settings of the objectives that may look at the teacher's likeliest tokens alone."""

    kind: str
    top_k: int | None = Field(None, ge=1)
    """The loss on the teacher's so many likeliest tokens and the rest as one bucket; the released code has 50. The
    whole vocabulary when left out."""
    released: bool = False
    """With top_k: also the released code's limits; see docs/methods.md."""

    @property
    def signal_kinds(self) -> tuple[str, ...]:
        return ("hidden_states",) if self.top_k is None else ("hidden_states", "top_k")


class SftObjective(ObjectiveSection):
    """Negative log-likelihood of the chosen answer, or of the teacher's own (SeqKD)."""

    kind: Literal["sft"] = "sft"
    answers: Literal["chosen", "teacher"] = "chosen"
    """`teacher`: the answers of the stage that `teacher_answers` names."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("teacher_answers",) if self.answers == "teacher" else ()


class KdObjective(ListedTokens):
    """Distillation token by token: (1 - weight) * NLL + weight * divergence between teacher and student."""

    teachers: ClassVar[tuple[str, ...]] = ("teacher",)
    kind: Literal["kd"] = "kd"
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "akl"] = "forward_kl"
    weight: float = Field(0.5, ge=0, le=1)
    """1 leaves the likelihood out."""
    answers: Literal["chosen", "teacher"] = "chosen"
    """`teacher`: the answers of the stage that `teacher_answers` names (SeqKD with its teacher's distributions)."""
    on_policy: float = Field(0.0, ge=0, le=1)
    """GKD's lambda: share of the rows whose answer is the student's own, of the stage that `rollouts` names. Those have
    the divergence alone."""
    beta: float = Field(0.5, gt=0, lt=1)
    """jsd: weight of the teacher in the mixture."""
    mu: float = Field(0.5, ge=0, lt=1)
    """akl: teacher mass of the head."""
    temperature: float = Field(1.0, gt=0)

    @property
    def inputs(self) -> tuple[str, ...]:
        teacher = ("teacher_answers",) if self.answers == "teacher" else ()
        return (*teacher, *(("rollouts",) if self.on_policy > 0 else ()))

    @property
    def scored(self) -> tuple[str, ...]:
        given = "teacher_answer" if self.answers == "teacher" else "chosen"
        return (given, "rollout") if self.on_policy > 0 else (given,)


class DpoObjective(ObjectiveSection):
    """Direct preference optimization against the reference role."""

    teachers: ClassVar[tuple[str, ...]] = ("reference",)
    kind: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood added to the loss."""

    @property
    def scored(self) -> tuple[str, ...]:
        return ("chosen", "rejected")

    @property
    def signal_kinds(self) -> tuple[str, ...]:
        return ("hidden_states", "token_log_probs")


class IpoObjective(ObjectiveSection):
    """Identity preference optimization against the reference role."""

    teachers: ClassVar[tuple[str, ...]] = ("reference",)
    kind: Literal["ipo"] = "ipo"
    tau: float = Field(0.1, gt=0)
    mean_log_probs: bool = False
    """Mean log-probabilities a token, as libraries have them, in place of the paper's sums."""
    sft_weight: float = Field(0.0, ge=0)

    @property
    def scored(self) -> tuple[str, ...]:
        return ("chosen", "rejected")

    @property
    def signal_kinds(self) -> tuple[str, ...]:
        return ("hidden_states", "token_log_probs")


class CpoObjective(ObjectiveSection):
    """Contrastive preference optimization: no reference."""

    kind: Literal["cpo"] = "cpo"
    beta: float = Field(0.1, gt=0)
    nll_weight: float = Field(1.0, ge=0)
    """Weight of the chosen answers' negative log-likelihood: a sum over tokens, a mean over pairs, as in the paper."""
    sft_weight: float = Field(0.0, ge=0)


class SimpoObjective(ObjectiveSection):
    """Simple preference optimization: mean log-probabilities, no reference, a margin."""

    kind: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0)
    gamma: float = Field(1.0, ge=0)
    """Margin, not divided by beta."""
    sft_weight: float = Field(0.0, ge=0)


class DckdObjective(ListedTokens):
    """Dual-constrained distillation: SFT on the chosen answer + alpha * KL(teacher || student) on both answers."""

    teachers: ClassVar[tuple[str, ...]] = ("teacher", "reference")
    kind: Literal["dckd"] = "dckd"
    alpha: float = Field(0.2, ge=0)
    sft_weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    teacher: Literal["teacher", "reference"] = "teacher"
    """`reference`: the paper's ablation without the aligned teacher."""

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.teacher,)

    @property
    def scored(self) -> tuple[str, ...]:
        return ("chosen", "rejected")


class AdpaObjective(ListedTokens):
    """Advantage-based distillation: SFT on the chosen answer - gamma * E[advantage] on the student's own rollouts."""

    teachers: ClassVar[tuple[str, ...]] = ("teacher", "reference")
    kind: Literal["adpa"] = "adpa"
    gamma: float = Field(1.5, ge=0)
    beta: float = Field(1.0, gt=0)
    sft_weight: float = Field(1.0, ge=0)
    reference: bool = True
    """False: the paper's ablation without the reference, whose advantage is the teacher's log-probability."""

    @property
    def roles(self) -> tuple[str, ...]:
        return self.teachers if self.reference else ("teacher",)

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("rollouts",)

    @property
    def scored(self) -> tuple[str, ...]:
        return ("rollout",)


class LanguageModelling(ObjectiveSection):
    """Settings of the objectives whose likelihood term may be on text; each has a `lm_weight` of its own."""

    lm_on: Literal["chosen", "text"] = "chosen"
    """What the likelihood term is on: the chosen answers, or the pre-training text of `data.text`."""

    @property
    def reads_text(self) -> bool:
        return self.lm_on == "text" and self.lm_weight > 0


class DpkdObjective(LanguageModelling):
    """Direct preference distillation: the teacher's answer against the student's, the teacher as reference."""

    teachers: ClassVar[tuple[str, ...]] = ("teacher",)
    kind: Literal["dpkd"] = "dpkd"
    form: Literal["dpkd", "ipo", "cpo", "simpo"] = "dpkd"
    """The loss of a pair of answers; cpo and simpo leave the teacher's log-probabilities out."""
    beta: float = Field(1.0, gt=0)
    """With length_normalize the argument of the sigmoid is small: 1 or more. Without it the released code's 0.1."""
    length_normalize: bool = True
    """dpkd and ipo: mean log-probabilities (paper, eq. 9), or sums (eq. 8). simpo always has means, cpo sums."""
    tau: float = Field(0.1, gt=0)
    """ipo."""
    gamma: float = Field(1.0, ge=0)
    """simpo: margin, not divided by beta."""
    lm_weight: float = Field(0.5, ge=0)
    """The paper's lambda: weight of the negative log-likelihood of `lm_on`."""

    @property
    def roles(self) -> tuple[str, ...]:
        return self.teachers if self.form in ("dpkd", "ipo") else ()

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("rollouts", "teacher_answers")

    @property
    def scored(self) -> tuple[str, ...]:
        return ("teacher_answer", "rollout")

    @property
    def signal_kinds(self) -> tuple[str, ...]:
        return ("hidden_states", "token_log_probs")


class DpkdTokenObjective(ObjectiveSection):
    """DPKD as its released code has it: (1 - weight) * NLL + weight * a DPO loss of two tokens at each position.

    The teacher's likeliest token is preferred to the student's likeliest, both models being fed the same answer.
    """

    teachers: ClassVar[tuple[str, ...]] = ("teacher",)
    kind: Literal["dpkd_token"] = "dpkd_token"
    beta: float = Field(0.1, gt=0)
    weight: float = Field(0.5, ge=0, le=1)
    answers: Literal["chosen", "teacher"] = "chosen"
    """`teacher`: the answers of the stage that `teacher_answers` names, as released (its pseudo-labels)."""

    @property
    def scored(self) -> tuple[str, ...]:
        return ("teacher_answer",) if self.answers == "teacher" else ("chosen",)

    @property
    def signal_kinds(self) -> tuple[str, ...]:
        return ("hidden_states",)

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("teacher_answers",) if self.answers == "teacher" else ()


class MiniLlmObjective(LanguageModelling):
    """Reverse KL on the student's own answers by policy gradient, with the paper's three devices against its variance.

    Of the stage's `online` answers: `teacher_mix` is the paper's alpha, 0.2; `passes` the released code's 4.
    """

    teachers: ClassVar[tuple[str, ...]] = ("teacher",)
    kind: Literal["minillm"] = "minillm"
    reward_scale: float = Field(0.5, gt=0)
    """Divides the log-ratio of teacher and student that rewards a token. Without effect where returns are whitened."""
    reward_limit: float = Field(100.0, gt=0)
    """Largest reward of a token, of either sign."""
    discount: float = Field(0.95, ge=0, le=1)
    """Of later rewards."""
    length_normalize: bool = True
    """Divides a token's return by the number of tokens from it to the end of its answer."""
    whiten: bool = True
    """Returns have mean 0 and variance 1 over all answers that are drawn together."""
    clip: float = Field(0.2, gt=0)
    """How far the policy may move from the one that drew a token before its gradient is cut, as in PPO."""
    single_step_weight: float = Field(1.0, ge=0)
    """Weight of the exact reverse KL of each next token."""
    lm_weight: float = Field(1.0, ge=0)
    """Weight of the negative log-likelihood of `lm_on`."""

    @property
    def scored(self) -> tuple[str, ...]:
        return ("rollout",)

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("rollouts",)


class PadObjective(ObjectiveSection):
    """Preference-aligned distillation: the teacher's scores of the student's own answers, as preferences over them."""

    kind: Literal["pad"] = "pad"
    loss: Literal["vanilla", "probabilistic"] = "probabilistic"
    divergence: Literal["jsd", "am_gm"] = "jsd"
    """probabilistic: `jsd` as in the paper, `am_gm` as in the released code."""
    beta: float = Field(10.0, gt=0)
    """Both models' scores are multiplied by it. jsd saturates at 10 where rankings disagree: try 2."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("rollouts", "scores")


Objective = Annotated[
    SftObjective | KdObjective | DpoObjective | IpoObjective | CpoObjective | SimpoObjective | DckdObjective
    | AdpaObjective | DpkdObjective | DpkdTokenObjective | MiniLlmObjective | PadObjective,
    Field(discriminator="kind"),
]
