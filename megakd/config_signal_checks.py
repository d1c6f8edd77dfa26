"""What has to fit together between score stages, the trainings that read their signals, and losses on listed tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megakd.config_signals import MAKER_OF, PreferencesSignal, TopKSignal
from megakd.config_stages import AnyStage, ScoreStage, TrainStage
from megakd.errors import ConfigError

if TYPE_CHECKING:
    from megakd.config import Recipe


def check_names_stage(field: str, value: str | None, kind: str, earlier: Mapping[str, AnyStage]) -> None:
    """Refuses a setting that does not name an earlier stage of a kind."""
    if value not in earlier or earlier[value].kind != kind:
        known = sorted(name for name, stage in earlier.items() if stage.kind == kind)
        raise ConfigError(field, value, f"has to name an earlier stage of kind {kind!r}",
                          f"There are: {', '.join(known) or 'none'}")


def check_score_stage(stage: ScoreStage, earlier: Mapping[str, AnyStage]) -> None:
    """Checks a score stage against the stages before it."""
    field = f"stages.{stage.name}"
    preferences = isinstance(stage.signal, PreferencesSignal)
    if preferences and stage.answers != ScoreStage.model_fields["answers"].default:
        raise ConfigError(f"{field}.answers", stage.answers, "preferences are always those between rollouts",
                          "Leave it out, or choose another signal")
    if not stage.answers or len(set(stage.answers)) < len(stage.answers):
        raise ConfigError(f"{field}.answers", stage.answers, "has to name kinds of answers, each once",
                          "Write e.g. [chosen, rejected]")
    for name in MAKER_OF.values():
        value = getattr(stage, name)
        if name in stage.inputs:
            check_names_stage(f"{field}.{name}", value, "generate", earlier)
        elif value is not None:
            raise ConfigError(f"{field}.{name}", value, "the stage scores none of these answers",
                              "Leave it out, or add their kind to `answers`")
    if isinstance(stage.signal, TopKSignal):
        _check_top_k_signal(stage, stage.signal, earlier)


def _check_top_k_signal(stage: ScoreStage, signal: TopKSignal, earlier: Mapping[str, AnyStage]) -> None:
    field = f"stages.{stage.name}.signal"
    if (signal.k is None) == (signal.at is None):
        raise ConfigError(f"{field}.k", signal.k, "exactly one of k and at has to be set",
                          "Write k: 50, or name another score stage in at")
    if signal.at is None:
        return
    check_names_stage(f"{field}.at", signal.at, "score", earlier)
    other = earlier[signal.at]
    if not isinstance(other.signal, TopKSignal) or other.signal.k is None:
        raise ConfigError(f"{field}.at", signal.at, "that stage lists no likeliest tokens",
                          "Name a score stage with signal: {kind: top_k, k: ...}")
    _check_same_answers(f"{field}.at", stage.answers, stage, other)


def _check_same_answers(
    field: str, wanted: tuple[str, ...], reader: ScoreStage | TrainStage, scored: ScoreStage
) -> None:
    """Refuses a score stage that has not scored the wanted kinds of answers, or has others' of a generated kind."""
    missing = [kind for kind in wanted if kind not in scored.answers]
    if missing:
        raise ConfigError(field, scored.name, f"it scores {', '.join(scored.answers)}; needed is {', '.join(wanted)}",
                          f"Add {', '.join(missing)} to stages.{scored.name}.answers")
    for kind in wanted:
        if kind in MAKER_OF:
            name = MAKER_OF[kind]
            theirs, ours = getattr(scored, name), getattr(reader, name)
            if theirs != ours:
                raise ConfigError(field, scored.name, f"it scores the {name} of {theirs!r}, this stage has {ours!r}",
                                  f"Name the same {name} in both")


# ------------------------------------------------------------------------------------------------------- training
def check_signals(recipe: Recipe, stage: TrainStage, earlier: Mapping[str, AnyStage]) -> None:
    """Checks a training stage's cached signals against its objective and the stages that write them."""
    _check_listed_tokens(stage)
    objective = stage.objective
    for role, name in stage.signals.stages.items():
        field = f"stages.{stage.name}.signals.{role}"
        if role not in objective.roles:
            raise ConfigError(field, name, f"the objective {objective.kind!r} takes no {role}, as it is set",
                              "Leave it out")
        drawn = [kind for kind in objective.scored if kind in MAKER_OF and MAKER_OF[kind] in stage.drawn_online]
        if drawn:
            raise ConfigError(field, name, f"the {role} scores {', '.join(drawn)}, drawn while the stage trains",
                              f"Leave {role} out of signals, or name a generate stage in {MAKER_OF[drawn[0]]}")
        check_names_stage(field, name, "score", earlier)
        scored = earlier[name]
        if scored.signal.kind not in objective.signal_kinds:
            taken = ", ".join(objective.signal_kinds)
            raise ConfigError(field, name, f"it holds {scored.signal.kind}, of which the objective {objective.kind!r} "
                              "as it is set can make nothing",
                              f"Let that stage write {taken}" if taken else f"Leave {role} out of signals")
        _check_same_answers(field, objective.scored, stage, scored)
        model = recipe.teacher_model(stage, role)
        if recipe.path_of_model(scored.model) != recipe.path_of_model(model):
            raise ConfigError(field, name, f"it scores with {scored.model}, the {role} is {model}",
                              f"Name the same model in stages.{name}.model and as the training's {role}")
        if isinstance(scored.signal, TopKSignal):
            _check_list(stage, role, field, scored)


def _check_list(stage: TrainStage, role: str, field: str, scored: ScoreStage) -> None:
    """A cached list of tokens has to be the one that the objective means for this role."""
    objective, signal = stage.objective, scored.signal
    if signal.k is not None and signal.k < objective.top_k:
        raise ConfigError(field, scored.name, f"it lists {signal.k} tokens, the objective takes {objective.top_k}",
                          f"Raise stages.{scored.name}.signal.k or lower stages.{stage.name}.objective.top_k")
    beside = objective.kind == "adpa" and role == "reference" and not objective.released
    if not beside and signal.at is not None:
        raise ConfigError(field, scored.name, "it holds no list of its own, but log-probabilities of another's tokens",
                          "Name a score stage with signal: {kind: top_k, k: ...}")
    if beside and (signal.at is None or signal.at != stage.signals.teacher):
        raise ConfigError(field, scored.name, "the reference's log-probabilities have to be those of the tokens that "
                          f"signals.teacher lists, {stage.signals.teacher!r}",
                          f"Write signal: {{kind: top_k, at: ...}} in stages.{scored.name} with that stage's name")


def _check_listed_tokens(stage: TrainStage) -> None:
    """The settings `top_k` and `released` of an objective beside its others."""
    objective, field = stage.objective, f"stages.{stage.name}.objective"
    if "top_k" not in type(objective).model_fields:
        return
    if objective.top_k is None:
        if objective.released:
            raise ConfigError(f"{field}.released", True, "the released code's limits are of losses on listed tokens",
                              "Write top_k: 50, or leave it out")
        return
    if objective.kind == "kd" and objective.divergence != "forward_kl":
        raise ConfigError(f"{field}.top_k", objective.top_k, f"{objective.divergence} needs the whole vocabulary",
                          "Leave it out, or write divergence: forward_kl")
    if objective.kind in ("kd", "dckd") and objective.temperature != 1:
        raise ConfigError(f"{field}.temperature", objective.temperature, "the rest of the vocabulary, of which only "
                          "the sum is known, has no other temperature than 1", "Leave it or top_k out")
    if objective.kind == "adpa" and not objective.reference:
        raise ConfigError(f"{field}.reference", False, "on listed tokens the advantage is 0 elsewhere, which only a "
                          "difference of two models can be", "Leave it or top_k out")
    if objective.kind == "adpa" and objective.released and objective.beta != 1:
        raise ConfigError(f"{field}.beta", objective.beta, "the released code has none, and limits the advantages to "
                          "[0, 1] as they are", "Leave it out and change gamma")
