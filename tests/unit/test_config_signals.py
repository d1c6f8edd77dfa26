"""Score stages and the trainings that read them: what fits together, and one clear error for each mistake."""

from __future__ import annotations

import copy

import pytest
import yaml

from megakd.config import dump, parse
from megakd.config_checks import check_world
from megakd.errors import ConfigError

RECIPE = yaml.safe_load("""
name: small
output: runs/small
student: {model: models/student, micro_batch: 2}
teacher: {model: models/teacher, micro_batch: 16}
reference: {model: models/reference, micro_batch: 2}
data: {train: [train.jsonl], eval: [eval.jsonl]}
stages:
  - {name: answers, kind: generate, model: models/student, n: 2, temperature: 1}
  - {name: others, kind: generate, model: models/student}
  - {name: hidden, kind: score, model: models/teacher, signal: {kind: hidden_states},
     answers: [chosen, rejected, rollout], rollouts: answers}
  - {name: tokens, kind: score, model: models/reference, role: reference, signal: {kind: token_log_probs}}
  - {name: listed, kind: score, model: models/teacher, signal: {kind: top_k, k: 50}, answers: [rollout, chosen],
     rollouts: answers}
  - {name: beside, kind: score, model: models/reference, role: reference, signal: {kind: top_k, at: listed},
     answers: [rollout], rollouts: answers}
  - {name: own, kind: score, model: models/reference, role: reference, signal: {kind: top_k, k: 50},
     answers: [rollout], rollouts: answers}
  - {name: judged, kind: score, model: models/teacher, rollouts: answers}
  - {name: dckd, kind: distill, init: models/student, save_as: dckd, steps: 1, global_batch: 8,
     objective: {kind: dckd}, signals: {teacher: hidden}}
  - {name: dpo, kind: dpo, init: models/student, save_as: dpo, steps: 1, global_batch: 8, objective: {kind: dpo},
     signals: {reference: tokens}}
  - {name: adpa, kind: distill, init: models/student, save_as: adpa, steps: 1, global_batch: 8, rollouts: answers,
     objective: {kind: adpa, top_k: 50}, signals: {teacher: listed, reference: beside}}
  - {name: released, kind: distill, init: models/student, save_as: released, steps: 1, global_batch: 8,
     rollouts: answers, objective: {kind: adpa, top_k: 20, released: true},
     signals: {teacher: hidden, reference: own}}
  - {name: kd, kind: distill, init: models/student, save_as: kd, steps: 1, global_batch: 8,
     objective: {kind: kd, top_k: 50}, signals: {teacher: listed}}
  - {name: pad, kind: distill, init: models/student, save_as: pad, steps: 1, global_batch: 8, rollouts: answers,
     scores: judged, objective: {kind: pad}}
""")


def changed(**settings: object) -> dict:
    """The recipe with settings of stages changed: `stage__setting__setting=value`; None deletes."""
    raw = copy.deepcopy(RECIPE)
    for path, value in settings.items():
        name, *parents, leaf = path.split("__")
        node = next(stage for stage in raw["stages"] if stage["name"] == name)
        for key in parents:
            node = node.setdefault(key, {})
        if value is None:
            del node[leaf]
        else:
            node[leaf] = value
    return raw


def test_what_fits_is_taken_and_survives_a_dump():
    recipe = parse(RECIPE)
    assert parse(yaml.safe_load(dump(recipe))) == recipe
    parse(changed(adpa__signals__reference=None))  # one role from disk, the other beside the student
    parse(changed(tokens__signal__kind="hidden_states", dckd__objective__teacher="reference",
                  dckd__signals={"reference": "tokens"}))


@pytest.mark.parametrize(
    ("settings", "field", "rule"),
    [
        # score stages
        ({"judged__rollouts": None}, "stages.judged.rollouts", "has to name an earlier stage of kind 'generate'"),
        ({"judged__answers": ["chosen"]}, "stages.judged.answers", "preferences are always those between rollouts"),
        ({"judged__teacher_answers": "others"}, "stages.judged.teacher_answers", "the stage scores none of these"),
        ({"tokens__rollouts": "answers"}, "stages.tokens.rollouts", "the stage scores none of these answers"),
        ({"tokens__answers": []}, "stages.tokens.answers", "has to name kinds of answers, each once"),
        ({"tokens__answers": ["chosen", "chosen"]}, "stages.tokens.answers", "has to name kinds of answers, each once"),
        ({"hidden__rollouts": None}, "stages.hidden.rollouts", "has to name an earlier stage of kind 'generate'"),
        ({"hidden__likelihood_weight": 0.5}, "stages.hidden.likelihood_weight", "the kind 'score' has no such setting"),
        ({"hidden__signal__k": 5}, "stages.hidden.signal.k", "the kind 'hidden_states' has no such setting"),
        ({"tokens__signal__kind": "logits"}, "stages.tokens.signal.kind", "there is no such kind"),
        ({"listed__signal__k": None}, "stages.listed.signal.k", "exactly one of k and at has to be set"),
        ({"beside__signal__k": 5}, "stages.beside.signal.k", "exactly one of k and at has to be set"),
        ({"beside__signal__at": "hidden"}, "stages.beside.signal.at", "that stage lists no likeliest tokens"),
        ({"beside__signal__at": "own"}, "stages.beside.signal.at", "has to name an earlier stage of kind 'score'"),
        ({"beside__rollouts": "others"}, "stages.beside.signal.at", "it scores the rollouts of 'answers', this stage "),
        ({"beside__answers": ["rollout", "rejected"]}, "stages.beside.signal.at", "it scores rollout, chosen; needed "),
        # trainings
        ({"dckd__signals__reference": "tokens"}, "stages.dckd.signals.reference", "the objective 'dckd' takes no refe"),
        ({"dckd__signals__teacher": "answers"}, "stages.dckd.signals.teacher", "has to name an earlier stage of kind "),
        ({"dckd__signals__teacher": "listed"}, "stages.dckd.signals.teacher", "it holds top_k, of which the objective"),
        ({"dckd__signals__teacher": "judged"}, "stages.dckd.signals.teacher", "it holds preferences, of which the obj"),
        ({"dckd__objective__top_k": 50, "dckd__signals__teacher": "listed"}, "stages.dckd.signals.teacher",
         "it scores rollout, chosen; needed is chosen, rejected"),
        ({"dpo__signals__reference": "beside"}, "stages.dpo.signals.reference", "it holds top_k, of which the objecti"),
        ({"tokens__model": "models/teacher"}, "stages.dpo.signals.reference", "it scores with models/teacher, the ref"),
        ({"adpa__rollouts": "others"}, "stages.adpa.signals.teacher", "it scores the rollouts of 'answers', this stag"),
        ({"adpa__objective__top_k": 51}, "stages.adpa.signals.teacher", "it lists 50 tokens, the objective takes 51"),
        ({"adpa__signals__reference": "own"}, "stages.adpa.signals.reference", "the reference's log-probabilities hav"),
        ({"adpa__signals__teacher": "hidden"}, "stages.adpa.signals.reference", "the reference's log-probabilities ha"),
        ({"adpa__signals__teacher": None}, "stages.adpa.signals.reference", "the reference's log-probabilities have t"),
        ({"released__signals__reference": "beside"}, "stages.released.signals.reference", "it holds no list of its ow"),
        ({"pad__scores": "hidden"}, "stages.pad.scores", "that stage writes hidden_states"),
        # losses on listed tokens
        ({"dckd__objective__released": True}, "stages.dckd.objective.released", "the released code's limits are of lo"),
        ({"kd__objective__divergence": "jsd"}, "stages.kd.objective.top_k", "jsd needs the whole vocabulary"),
        ({"kd__objective__temperature": 2.0}, "stages.kd.objective.temperature", "the rest of the vocabulary, of whic"),
        ({"adpa__objective__reference": False}, "stages.adpa.objective.reference", "on listed tokens the advantage is"),
        ({"released__objective__beta": 0.5}, "stages.released.objective.beta", "the released code has none, and limit"),
        ({"adpa__objective__top_k": 0}, "stages.adpa.objective.top_k", "has to be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(settings, field, rule):
    with pytest.raises(ConfigError) as caught:
        parse(changed(**settings))
    assert caught.value.field == field and caught.value.rule.startswith(rule), str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.fix


def test_a_role_from_disk_fills_no_micro_batches():
    """The teacher's micro-batch of 16 does not divide the batch of 8 groups."""
    check_world(parse(RECIPE), 2)
    with pytest.raises(ConfigError) as caught:
        check_world(parse(changed(dckd__signals=None)), 2)
    assert caught.value.field == "stages.dckd.global_batch"
