"""All that is measured, as a user runs it: one chain on tiny models and two ranks, against transformers and by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from megakd.data.tokenizers import load_tokenizer
from tests.e2e.test_chain import run, start
from tests.recipes import SIZES, run_in_pool, tiny_recipe, tiny_rows, write_recipe, write_rows, write_tiny_model
from tests.tiny_tokenizer import write_tokenizer

PROMPTS, NEW_TOKENS = 6, 8
LONGER_WINS = """
import json, sys
questions, verdicts = sys.argv[2:]
with open(verdicts, "w") as out:
    for line in open(questions):
        row = json.loads(line)
        a, b = len(row["a"]), len(row["b"])
        # Where both are as long it takes what it reads first.
        print(json.dumps({"id": row["id"], "winner": "a" if a >= b else "b", "why": sys.argv[1]}), file=out)
"""
TASK = """
task: tiny_cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def write_reward_model(directory: Path) -> Path:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
                         vocab_size=SIZES["vocab_size"], max_position_embeddings=256, pad_token_id=3)
    torch.manual_seed(7)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    return write_tokenizer(directory)


def write_questions(folder: Path) -> None:
    two = [{"question_id": 81 + n, "category": ("writing", "math")[n % 2], "turns": [f"How many are {n}?", "And then?"]}
           for n in range(3)]
    write_rows(folder / "question.jsonl", two)
    write_rows(folder / "alpaca.jsonl", [{"instruction": "Say yes."}, {"prompt": [{"role": "user", "content": "No?"}]}])
    write_rows(folder / "arena.jsonl", [{"uid": "ab12", "prompt": "Write a poem."}])


def recipe_of(folder: Path) -> dict[str, Any]:
    raw = tiny_recipe(folder)
    first = raw["student"]["model"]
    final = str(write_tiny_model(folder / "final", seed=5, layers=2))
    raw["teacher"]["model"] = str(write_tiny_model(folder / "teacher", seed=3))
    # The last two held-out rows have no rejected answer.
    rows = [{"prompt": row["prompt"], "reference": row["chosen"], "rejected": row["rejected"]}
            for row in tiny_rows(8, start=100)]
    for row in rows[6:]:
        del row["rejected"]
    write_rows(folder / "eval.jsonl", rows)
    raw["data"]["answer"] = "reference"
    write_questions(folder)
    write_reward_model(folder / "reward")
    drawn = {"start_t1": first, "final_t1": final}
    both = {"models": {"start": first, "final": final}, "max_new_tokens": NEW_TOKENS, "slots": 8}
    raw["stages"] = [
        {"name": "eval", "kind": "eval", **both, "prompts": PROMPTS, "chunk_tokens": 16},
        {"name": "sampled", "kind": "eval", **both, "models": drawn, "chunk_tokens": 16,
         "prompts": PROMPTS, "sampling": {"seeds": [10, 20, 30]}},
        {"name": "alone", "kind": "eval", **both, "models": {"start_alone": first}, "prompts": 2, "teacher": False,
         "sampling": {"seeds": [20]}},
        {"name": "longer", "kind": "win_rate", **both, "prompts": PROMPTS,
         "judge": {"kind": "command", "command": [sys.executable, str(folder / "judge.py"), "length"]}},
        {"name": "rewarded", "kind": "win_rate", **both, "models": {"start_r": first, "final_r": final},
         "judge": {"kind": "reward_model", "model": str(folder / "reward")}},
        {"name": "mt", "kind": "answers", **both, "questions": str(folder / "question.jsonl"), "format": "mt_bench",
         "category_temperatures": {"writing": 0.7}},
        {"name": "alpaca", "kind": "answers", **both, "questions": str(folder / "alpaca.jsonl"),
         "format": "alpaca_eval"},
        {"name": "arena", "kind": "answers", **both, "questions": str(folder / "arena.jsonl"), "format": "arena_hard"},
        {"name": "report", "kind": "report"},
    ]
    return raw


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any], tuple[str, str]]:
    """Folder of the inputs, recipe and what was told by a run whose judge failed, and by the one that went on."""
    folder = tmp_path_factory.mktemp("evaluation")
    raw = recipe_of(folder)
    recipe = write_recipe(folder, raw)
    (folder / "judge.py").write_text("import sys; sys.exit('no credit left')")
    process = start(recipe)
    failed, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    (folder / "judge.py").write_text(LONGER_WINS)
    return folder, raw, (failed, run_in_pool(recipe))


@pytest.fixture(scope="module")
def summary(finished) -> dict[str, dict[str, float]]:
    return json.loads((Path(finished[1]["output"]) / "summary.json").read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_probs(model, tokens: list[int], prompt: int) -> torch.Tensor:
    """[answer tokens, vocabulary], float64."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, prompt - 1 : -1].double().log_softmax(-1)


def test_figures_are_those_of_transformers(finished, summary):
    folder, raw, (output, _) = finished
    assert output.count("2 of 8 held-out rows have no rejected answer: reward accuracy is measured on the others") == 3
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name)
              for name in ("student_start", "final", "teacher", "reference")}
    tokenizer = load_tokenizer(folder / "reference")
    rows = {f"eval.jsonl:{number}": row for number, row in enumerate(lines(folder / "eval.jsonl"), start=1)}
    for label, name in (("start", "student_start"), ("final", "final")):
        kl, nll = [], []
        for row in rows.values():
            messages = [{"role": "user", "content": row["prompt"]}]
            tokens, prompt = tokenizer.encode(messages, row["reference"], close=True)
            teacher, student = (log_probs(models[which], tokens, prompt) for which in ("teacher", name))
            kl += (teacher.exp() * (teacher - student)).sum(-1).tolist()
            nll += (-student.gather(1, torch.tensor(tokens[prompt:])[:, None])[:, 0]).tolist()
        found = summary[label]
        assert found["kl_to_teacher"] == pytest.approx(statistics.fmean(kl), rel=1e-4)
        assert found["nll_chosen"] == pytest.approx(statistics.fmean(nll), rel=1e-5)
        assert found["pairs"] == 6
        # The win rate's answers are the eval's: both are greedy.
        _, *answers = lines(Path(raw["output"]) / "stages" / "longer" / f"answers-{label}.jsonl")
        reverse, advantage = [], []
        for answer in answers:
            row = rows[answer["key"]]
            before, prompt = tokenizer.encode([{"role": "user", "content": row["prompt"]}], None, close=False)
            whole = [*before, *answer["tokens"]]
            student, teacher, reference = (log_probs(models[which], whole, prompt)
                                           for which in (name, "teacher", "reference"))
            assert answer["tokens"] == student.argmax(-1).tolist()
            reverse += (student.exp() * (student - teacher)).sum(-1).tolist()
            advantage += (student.exp() * (teacher - reference)).sum(-1).tolist()
        assert found["reverse_kl"] == pytest.approx(statistics.fmean(reverse), rel=1e-4)
        assert found["expected_advantage"] == pytest.approx(statistics.fmean(advantage), rel=1e-4)
        assert found["answer_tokens"] == found["win_rate_tokens"] == len(reverse) / PROMPTS
        assert found["stopped"] == sum(answer["finish_reason"] == "stop" for answer in answers) / PROMPTS


def test_sampled_figures(finished, summary):
    assert summary["start_t1"]["rouge_l_seed_error"] >= 0 and "rouge_l_seed_error" not in summary["start"]
    assert summary["start_t1"]["references_words_1_30"] == PROMPTS
    assert "kl_to_teacher" not in summary["start_alone"] and "expected_advantage" not in summary["start_alone"]
    assert summary["start_alone"]["nll_chosen"] == pytest.approx(summary["start"]["nll_chosen"])
    # What is drawn for a row depends on the seed and the row alone: the stage with one seed draws the same.
    output = Path(finished[1]["output"])
    manifest = json.loads((output / "stages" / "alone" / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"models.start_alone", "eval.0"}


def test_a_draw_depends_on_seed_and_row_alone(finished, tmp_path):
    """Fewer prompts, one seed and another layout: what is still drawn is the same, and so are all other figures."""
    folder, raw, _ = finished
    other = json.loads(json.dumps(raw))
    other["output"] = str(tmp_path / "other")
    other["student"]["parallel"] = {"tensor": 1}
    other["stages"] = raw["stages"][:3]
    other["stages"][2] = raw["stages"][2] | {"prompts": 1, "sampling": {"seeds": [20]}}
    run_in_pool(write_recipe(tmp_path, other))
    ours, theirs = (json.loads((Path(each["output"]) / "summary.json").read_text()) for each in (raw, other))
    for label in ("start", "final", "start_t1", "final_t1"):
        assert {name: ours[label][name] for name in theirs[label]} == pytest.approx(theirs[label], rel=1e-4, abs=1e-6)
    two, one = (lines(Path(each["output"]) / "stages" / "alone" / "samples.jsonl") for each in (raw, other))
    assert one == two[:1] and two[0]["start_alone"] != two[1]["start_alone"]


def test_win_rate_by_a_command(finished, summary):
    folder, raw, _ = finished
    stage = Path(raw["output"]) / "stages" / "longer"
    judgements = lines(stage / "judgements.jsonl")
    assert len(judgements) == PROMPTS and len(lines(stage / "comparisons.jsonl")) == 2 * PROMPTS
    assert set(lines(stage / "comparisons.jsonl")[0]) == {"id", "prompt", "a", "b"}
    wins = []
    for row in judgements:
        own, other = len(row["answer"]), len(row["other"])
        assert (row["model"], row["against"]) == ("final", "start")
        wins.append(1.0 if own > other else 0.5 if own == other else 0.0)  # the judge's bias cancels over both orders
    assert summary["final"]["win_rate"] == pytest.approx(statistics.fmean(wins))
    assert summary["final"]["win_rate_error"] == pytest.approx(statistics.stdev(wins) / math.sqrt(PROMPTS))
    assert summary["final"]["win_rate_consistent"] == sum(win != 0.5 for win in wins) / PROMPTS
    assert "win_rate" not in summary["start"]
    inputs = json.loads((stage / "manifest.json").read_text())["inputs"]
    assert {"models.start", "models.final", "eval.0", "judge.command.1"} <= set(inputs)


def test_win_rate_by_a_reward_model(finished, summary):
    folder, raw, _ = finished
    reward = LlamaForSequenceClassification.from_pretrained(folder / "reward")
    tokenizer = AutoTokenizer.from_pretrained(folder / "reward")
    judgements = lines(Path(raw["output"]) / "stages" / "rewarded" / "judgements.jsonl")
    assert len(judgements) == 8
    wins = []
    for row in judgements:
        scores = []
        for text in (row["answer"], row["other"]):
            written = tokenizer.apply_chat_template([*row["prompt"], {"role": "assistant", "content": text}],
                                                    tokenize=False)
            ids = tokenizer(written, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(reward(ids).logits.item())
        assert row["rewards"] == pytest.approx(scores, rel=1e-5)
        wins.append(1.0 if scores[0] > scores[1] else 0.5 if scores[0] == scores[1] else 0.0)
    assert summary["final_r"]["win_rate"] == statistics.fmean(wins)


def greedy(model, tokenizer, messages: list[dict]) -> tuple[str, int]:
    """Text and tokens of the greedy answer, without the token that ends it."""
    tokens, prompt = tokenizer.encode(messages, None, close=False)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
        if tokens[-1] in tokenizer.stop_ids:
            return tokenizer.decode(tokens[prompt:-1]), len(tokens) - prompt - 1
    return tokenizer.decode(tokens[prompt:]), NEW_TOKENS


def test_answer_files_of_benchmarks(finished):
    folder, raw, _ = finished
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "final"), load_tokenizer(folder / "final")
    stages = Path(raw["output"]) / "stages"
    answers = lines(stages / "mt" / "model_answer" / "final.jsonl")
    assert [row["question_id"] for row in answers] == [81, 82, 83]
    for row in answers:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} and row["model_id"] == "final"
        [choice] = row["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2
    # Question 82 is of the category that is greedy; its second turn is asked behind the first answer.
    conversation = [{"role": "user", "content": "How many are 1?"}]
    first, _ = greedy(model, tokenizer, conversation)
    conversation += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    assert answers[1]["choices"][0]["turns"] == [first, greedy(model, tokenizer, conversation)[0]]
    assert len({row["answer_id"] for row in answers}) == 3

    outputs = json.loads((stages / "alpaca" / "model_outputs" / "final.json").read_text())
    assert [(row["instruction"], row["generator"]) for row in outputs] == [("Say yes.", "final"), ("No?", "final")]
    assert outputs[1]["output"] == greedy(model, tokenizer, [{"role": "user", "content": "No?"}])[0]

    [row] = lines(stages / "arena" / "model_answer" / "final.jsonl")
    text, tokens = greedy(model, tokenizer, [{"role": "user", "content": "Write a poem."}])
    assert row["question_id"] == "ab12" and row["choices"][0]["turns"] == [{"content": text, "token_len": tokens}]


def test_the_report_shows_them(finished):
    html = (Path(finished[1]["output"]) / "report.html").read_text()
    for text in ("Win rate", "KL from the teacher", "Exact match", "ROUGE-L, references of 1 to 30 words",
                 "model_answer/final.jsonl"):
        assert text in html, text


def test_a_judge_that_fails_is_asked_again_on_the_answers_that_are_there(finished):
    """What was done before stands; the answers are not generated a second time."""
    _, _, (failed, told) = finished
    assert "stages.longer.judge.command = " in failed and "ended with exit code 1 (no credit left)" in failed
    assert told.count("already done") == 3 and told.count("answered by an earlier attempt") == 2


def test_lm_eval_on_a_local_task(finished, tmp_path):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install 'megakd[lm-eval]'")
    folder, raw, _ = finished
    docs = [{"question": f"There are {n}", "choices": [" apples", " cats and dogs"], "answer": n % 2} for n in range(6)]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "tiny.yaml").write_text(TASK.format(file=write_rows(tmp_path / "docs.jsonl", docs)))
    other = json.loads(json.dumps(raw))
    other["output"] = str(tmp_path / "other")
    other["stages"] = [{"name": "lm", "kind": "lm_eval", "models": {"final": str(folder / "final")}, "limit": 5,
                        "tasks": ["tiny_cloze"], "num_fewshot": 0, "include_path": str(tasks)}]
    run(write_recipe(tmp_path, other))
    found = json.loads((tmp_path / "other" / "summary.json").read_text())["final"]
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    right = 0
    for doc in docs[:5]:
        context = tokenizer(doc["question"], add_special_tokens=False)["input_ids"]
        scores = []
        for choice in doc["choices"]:
            tokens = tokenizer(doc["question"] + choice, add_special_tokens=False)["input_ids"]
            picked = log_probs(model, tokens, len(context))
            scores.append(picked.gather(1, torch.tensor(tokens[len(context):])[:, None]).sum().item())
        right += scores.index(max(scores)) == doc["answer"]
    assert found["tiny_cloze/acc"] == pytest.approx(right / 5)
    assert found["tiny_cloze/acc_error"] > 0 or right in (0, 5)
