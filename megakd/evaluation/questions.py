"""Questions of MT-Bench, Arena-Hard and AlpacaEval: read, and checked against a model's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megakd.config_evaluation import AnswersStage
from megakd.data.files import Place, describe_names, read_rows, type_name
from megakd.data.readers import Message, parse_row
from megakd.data.tokenizers import Tokenizer
from megakd.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """One question of a benchmark; the model answers its turns one after another."""

    place: Place
    identity: str | int | None
    """Its `question_id` or `uid`; None where the format has none."""
    category: str | None
    before: tuple[Message, ...]
    """What comes before the first turn."""
    turns: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its noise is seeded by: its id, or its line in the file."""
        return f"line:{self.place.line}" if self.identity is None else f"question:{self.identity}"

    def prompt(self, answers: Sequence[str]) -> list[Message]:
        """The conversation up to the turn that comes after `answers`."""
        messages = list(self.before)
        for turn, answer in zip(self.turns, answers, strict=False):
            messages += [Message(role="user", content=turn), Message(role="assistant", content=answer)]
        return [*messages, Message(role="user", content=self.turns[len(answers)])]


def read_questions(stage: AnswersStage) -> list[Question]:
    """The questions of a stage's file.

    A row has `turns` (texts, or objects with `content`), or `prompt` (as preference rows have it), or `instruction`;
    `question_id` or `uid`, where the format wants it; and may have `category` and `system`.

    Raises:
        DataError: a row that cannot be asked, or that the format has no room for; an id that comes twice.
    """
    questions: list[Question] = []
    seen: dict[str, Place] = {}
    for place, row in read_rows(stage.questions):
        present = {name: value for name, value in row.items() if value is not None}
        question = _question(place, present, wants_id=stage.format != "alpaca_eval")
        if question.name in seen:
            raise place.error("question_id", f"{question.identity!r} is that of line {seen[question.name].line}, too",
                              "Give each question its own id")
        if stage.format == "alpaca_eval" and (len(question.turns) > 1 or question.before):
            raise place.error("turns" if "turns" in present else "prompt", "a conversation of several messages; "
                              "AlpacaEval asks one instruction", "Write format: mt_bench, or give single instructions")
        seen[question.name] = place
        questions.append(question)
    return questions


def _question(place: Place, present: dict[str, Any], *, wants_id: bool) -> Question:
    identity = present.get("question_id", present.get("uid"))
    if wants_id and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        found = "missing" if identity is None else f"{type_name(identity)}, neither a string nor a number"
        raise place.error("question_id", f"{found}; the row has {describe_names(present)}",
                          "Add question_id or uid, or write format: alpaca_eval")
    field = next((name for name in ("turns", "prompt", "instruction") if name in present), None)
    if field is None:
        raise place.error("prompt", f"missing; the row has {describe_names(present)}",
                          "Add turns, prompt or instruction")
    category = present.get("category")
    system = {"system": present["system"]} if "system" in present else {}
    if field == "prompt":
        messages = parse_row(place, {"prompt": present["prompt"], **system}, ()).prompt
        turns: list[str] = [messages[-1]["content"]]
    else:
        turns = present["turns"] if field == "turns" else [present["instruction"]]
        turns = [turn["content"] if isinstance(turn, dict) and "content" in turn else turn
                 for turn in (turns if isinstance(turns, list) else [turns])]
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise place.error(field, "not texts, or an empty one", 'Write ["first turn", "second turn"]')
        messages = parse_row(place, {"prompt": turns[0], **system}, ()).prompt
    named = str(category) if category is not None else None
    return Question(place, identity, named, tuple(messages[:-1]), tuple(turns))


def check_questions(stage: AnswersStage, tokenizer: Tokenizer, max_length: int) -> list[Question]:
    """`read_questions`, of which every turn fits, however long the answers before it are.

    Raises:
        ConfigError: a category that no question has.
        DataError: also a conversation that is too long.
    """
    questions = read_questions(stage)
    categories = {question.category for question in questions}
    for category in stage.category_temperatures:
        if category not in categories:
            known = describe_names(sorted(name for name in categories if name is not None))
            raise ConfigError(f"stages.{stage.name}.category_temperatures", category, "no question has this category",
                              f"There are: {known}")
    for question in questions:
        earlier = len(question.turns) - 1
        tokens, _ = tokenizer.encode(question.prompt([""] * earlier), None, close=False)
        most = len(tokens) + earlier * stage.max_new_tokens
        if most >= max_length:
            answers = f", {earlier} answers of {stage.max_new_tokens} among them" if earlier else ""
            problem = f"its last prompt may have {most} tokens{answers}; data.max_length is {max_length}"
            raise question.place.error("turns" if earlier else "prompt", problem,
                                       f"Raise data.max_length above {most}" + (", or lower the stage's max_new_tokens"
                                                                                if earlier else ""))
    return questions
