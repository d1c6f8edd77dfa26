"""Tokenizers against transformers: the same ids for whole conversations, whatever the template does."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megakd.data.tokenizers import load_tokenizer, require_same
from megakd.errors import ModelError
from tests.tiny_tokenizer import CHATML, INSTRUCT, PLAIN, STRIPPING, THINKING, write_tokenizer

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Answer in one line."}
CONVERSATIONS = [
    ([user("How many apples are left?")], "There are 12."),
    ([user("x")], "I"),
    ([user("Write a poem."), assistant("The sea,\n  the deep."), user("Again!")], "  Blanks around it \n"),
    ([user("naïve café 日本語 🙂\t\r\n")], "Ünïcödé 🙂🙂 \u200b end"),
    ([user("def f(x):")], "\n    return x + 1\n"),
    ([user("say <|im_end|> and </s>")], "here: <|im_start|> it is"),
    ([user("{{ 7 * 7 }}")], "{% raw %}"),
]
TEMPLATES = {
    "chatml": dict(template=CHATML),
    "chatml_metaspace": dict(template=CHATML, metaspace=True),
    "instruct": dict(template=INSTRUCT, config=NAMED),
    "instruct_metaspace": dict(template=INSTRUCT, metaspace=True, config=NAMED),
    "stripping": dict(template=STRIPPING, config=NAMED, generation={"eos_token_id": [2, 3]}),
    "thinking": dict(template=THINKING),
    "thinking_metaspace": dict(template=THINKING, metaspace=True),
    "plain": dict(template=PLAIN, config=NAMED),
}
MERGING = ("chatml", "chatml_metaspace")  # blanks at the start of an answer follow a line end


@pytest.fixture(scope="module")
def auto_tokenizer():
    """transformers' loader; importing it costs seconds."""
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained


def ids_of_transformers(theirs, messages, generation):
    return theirs.apply_chat_template(messages, add_generation_prompt=generation, tokenize=True, return_dict=False)


def assert_same_ids(ours, theirs, prompt, response):
    """Prompt ids equal, and the closed conversation's equal up to its closing token."""
    tokens, length = ours.encode(prompt, None, close=False)
    assert length == len(tokens)
    assert tokens == ids_of_transformers(theirs, prompt, True)
    whole, whole_length = ours.encode(prompt, response, close=True)
    assert whole_length == length and whole[:length] == tokens
    assert whole[-1] == ours.closing_id
    return whole, ids_of_transformers(theirs, [*prompt, assistant(response)], False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_transformers(name, tmp_path, auto_tokenizer):
    directory = write_tokenizer(tmp_path, **TEMPLATES[name])
    ours, theirs = load_tokenizer(directory), auto_tokenizer(directory)
    assert ours.vocab_size == len(theirs)
    for prompt, response in CONVERSATIONS:
        whole, expected = assert_same_ids(ours, theirs, prompt, response)
        if name == "plain":  # the template writes no end: the end of sequence follows the answer
            assert whole[:-1] == expected[: len(whole) - 1] or response[0].isspace()
        elif name not in MERGING or not response[0].isspace():  # for those that merge see the next test
            assert whole == expected[: len(whole)]
            assert theirs.decode(expected[len(whole) :], skip_special_tokens=True).strip() == ""


def test_a_merge_across_the_border_leaves_the_prompt_as_it_is(tmp_path, auto_tokenizer):
    """Jointly, the header's line end and the answer's become one token; separately the prompt keeps its own."""
    directory = write_tokenizer(tmp_path)
    ours, theirs = load_tokenizer(directory), auto_tokenizer(directory)
    whole, joint = assert_same_ids(ours, theirs, [user("q")], "  the")
    _, length = ours.encode([user("q")], None, close=False)
    assert joint[:length] != whole[:length], "the case must be one where a merge crosses"
    assert whole[length:-1] == theirs.encode("  the", add_special_tokens=False)


@pytest.mark.parametrize("metaspace", [False, True])
def test_what_is_decoded_is_what_was_encoded(metaspace, tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, metaspace=metaspace))
    for prompt, response in CONVERSATIONS[:5]:
        tokens, length = tokenizer.encode(prompt, response, close=True)
        decoded = tokenizer.decode(tokens[length:])
        assert decoded.lstrip(" ") == response.lstrip(" ") if metaspace else decoded == response


@pytest.mark.parametrize(
    ("name", "closing", "stops"),
    [("chatml", "<|im_end|>", {5}), ("instruct", "</s>", {2}), ("stripping", "<|eot|>", {6, 2, 3}),
     ("plain", "</s>", {2})],
)
def test_the_closing_token_is_the_templates(name, closing, stops, tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, **TEMPLATES[name]))
    assert tokenizer.closing_token == closing
    assert set(tokenizer.stop_ids) == stops and tokenizer.stop_ids[0] == tokenizer.closing_id
    opened, length = tokenizer.encode([user("q")], "an answer", close=False)
    closed, _ = tokenizer.encode([user("q")], "an answer", close=True)
    assert not set(opened[length:]) & set(tokenizer.stop_ids)
    assert [token for token in closed[length:] if token in tokenizer.stop_ids] == [tokenizer.closing_id]


def test_a_response_that_is_closed_already_is_not_closed_twice(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    once = tokenizer.encode([user("q")], "an answer", close=True)
    assert tokenizer.encode([user("q")], "an answer<|im_end|>", close=True) == once


def test_the_pad_id(tmp_path):
    assert load_tokenizer(write_tokenizer(tmp_path / "a")).pad_id == 5
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>", "lstrip": False}}
    assert load_tokenizer(write_tokenizer(tmp_path / "b", config=config)).pad_id == 3


def test_flags_of_added_tokens_in_the_configuration_hold(tmp_path, auto_tokenizer):
    """In transformers tokenizer_config.json overrules tokenizer.json: here <|im_start|> swallows blanks after it."""
    flags = {"content": "<|im_start|>", "rstrip": True, "lstrip": False, "single_word": False, "normalized": False,
             "special": True}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"4": flags}}
    directory = write_tokenizer(tmp_path, config=config)
    ours, theirs = load_tokenizer(directory), auto_tokenizer(directory)
    prompt = [user("a <|im_start|>   b")]
    plain = load_tokenizer(write_tokenizer(tmp_path / "plain")).encode(prompt, None, close=False)
    assert ours.encode(prompt, None, close=False) != plain
    assert ours.encode(prompt, None, close=False)[0] == ids_of_transformers(theirs, prompt, True)


def test_the_date_in_a_template_stands_still(tmp_path):
    template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template=template))
    assert tokenizer._render([user("q")], generation=True).startswith("26 Jul 2024")


def test_where_the_template_comes_from(tmp_path):
    """The argument goes before the file, the file before the configuration."""
    other = CHATML.replace("helpful", "curt")
    directory = write_tokenizer(tmp_path, template=None, config={"eos_token": "<|im_end|>", "chat_template": other})
    assert load_tokenizer(directory).template == other
    listed = [{"name": "tools", "template": CHATML}, {"name": "default", "template": other}]
    write_tokenizer(tmp_path, template=None, config={"eos_token": "<|im_end|>", "chat_template": listed})
    assert load_tokenizer(directory).template == other
    write_tokenizer(tmp_path, template=CHATML)
    assert load_tokenizer(directory).template == CHATML
    (tmp_path / "mine.jinja").write_text(other)
    assert load_tokenizer(directory, chat_template=tmp_path / "mine.jinja").template == other
    assert load_tokenizer(directory, chat_template=str(tmp_path / "mine.jinja")).template == other
    assert load_tokenizer(directory, chat_template=other).template == other


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(template=None), "no chat template"),
        (dict(template="{% for %}"), "not valid jinja2"),
        (dict(template="hello"), "does not write the user's and the assistant's text"),
        (dict(template=PLAIN, config={}), "without a special token"),
        (dict(template=PLAIN.replace("'\n\n'", "'\n### end'"), config=NAMED), "### end"),
        (dict(config={"eos_token": "<|new|>"}), "'<|new|>'"),
        (dict(config={"added_tokens_decoder": {"9": {"content": "<|eot|>"}}}), "as id 9, but tokenizer.json as id 6"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(kwargs, words, tmp_path):
    with pytest.raises(ModelError) as error:
        load_tokenizer(write_tokenizer(tmp_path, **kwargs))
    assert words in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ModelError, match="no such model directory"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ModelError, match="it holds vocab.json"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="no such chat template file"):
        load_tokenizer(tmp_path, chat_template="absent.jinja")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer_config.json: not readable as JSON"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer.json: not readable as a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_template_that_refuses_a_conversation_says_why(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, **TEMPLATES["instruct"]))
    with pytest.raises(ModelError, match="no system message, please"):
        tokenizer.encode([SYSTEM, user("q")], None, close=False)


# ----------------------------------------------------------------------------------------------- sameness

def test_require_same_names_the_first_difference(tmp_path):
    base = load_tokenizer(write_tokenizer(tmp_path / "base"))
    require_same(base, load_tokenizer(write_tokenizer(tmp_path / "twin")))
    # A pad token that the template does not write makes no other ids.
    require_same(base, load_tokenizer(write_tokenizer(tmp_path / "pad", config={"eos_token": "<|im_end|>",
                                                                                 "pad_token": "<pad>"})))

    def refused(name, change=lambda content: content, **kwargs):
        directory = write_tokenizer(tmp_path / name, **kwargs)
        file = directory / "tokenizer.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
        other = load_tokenizer(directory)
        assert other.fingerprint != base.fingerprint
        with pytest.raises(ModelError) as error:
            require_same(base, other)
        assert str(tmp_path / "base") in str(error.value) and str(directory) in str(error.value)
        return str(error.value)

    def added(content):
        new = len(content["model"]["vocab"])
        content["added_tokens"].append({**content["added_tokens"][0], "id": new, "content": "<|new|>"})
        return content

    def swapped(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        return content

    def unmerged(content):
        content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
        return content

    size = base.vocab_size
    assert f"vocabulary sizes {size} and {size + 1}" in refused("added", added)
    first = min(base._backend.vocabulary["a"], base._backend.vocabulary["b"])
    assert f"id {first} is 'a' and 'b'" in refused("swapped", swapped)
    assert "merges" in refused("unmerged", unmerged)
    assert "chat templates differ from character" in refused("template", template=CHATML.replace("helpful", "curt"))


def test_special_tokens_that_the_template_writes_are_compared(tmp_path):
    one = load_tokenizer(write_tokenizer(tmp_path / "one", **TEMPLATES["instruct"]))
    config = {**NAMED, "bos_token": "<pad>"}
    other = load_tokenizer(write_tokenizer(tmp_path / "other", template=INSTRUCT, config=config))
    with pytest.raises(ModelError, match="special tokens"):
        require_same(one, other)


def test_the_fingerprint_does_not_depend_on_how_the_file_is_written(tmp_path):
    base = load_tokenizer(write_tokenizer(tmp_path))
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [" ".join(pair) if isinstance(pair, list) else pair.split(" ") for pair in merges]
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["post_processor"] = None
    file.write_text(json.dumps(content, indent=1))
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == base.fingerprint
    prompt = [user("longer than the truncation that the file asks for")]
    assert again.encode(prompt, None, close=False) == base.encode(prompt, None, close=False)


# ----------------------------------------------------------------------------------------------- SentencePiece

@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    library = pytest.importorskip("sentencepiece")
    lines = ["how many apples are left", "there are twelve of them", "write a short poem about the sea"] * 20
    model = io.BytesIO()
    library.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=80, pad_id=3,
                                       model_type="bpe", hard_vocab_limit=False, minloglevel=2)
    return model.getvalue()


def test_a_sentencepiece_model_with_a_given_template(tmp_path, sentencepiece_model):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, chat_template=INSTRUCT)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.stop_ids) == (80, 3, (2,))
    prompt, _ = tokenizer.encode([user("how many apples")], None, close=False)
    tokens, length = tokenizer.encode([user("how many apples")], "there are twelve", close=True)
    assert prompt[0] == 1 and prompt.count(1) == 1, "<s> is the control symbol, not its letters"
    assert tokens[:length] == prompt and tokens[-1] == 2 and tokens.count(2) == 1
    assert tokenizer.decode(tokens[length:]).strip() == "there are twelve"
    opened, _ = tokenizer.encode([user("how many apples")], "there are twelve", close=False)
    assert 2 not in opened
    require_same(tokenizer, load_tokenizer(tmp_path, chat_template=INSTRUCT))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    with pytest.raises(ModelError, match=r"\[PAD\]"):
        load_tokenizer(tmp_path, chat_template=INSTRUCT)


def test_a_damaged_sentencepiece_model_is_refused(tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError, match="tiktoken"):
        load_tokenizer(tmp_path, chat_template=INSTRUCT)


# ----------------------------------------------------------------------------------------------- imports, a real model

def test_loading_imports_neither_transformers_nor_torch(tmp_path):
    write_tokenizer(tmp_path)
    code = ("import sys; from megakd.data.tokenizers import load_tokenizer; load_tokenizer(sys.argv[1]).fingerprint\n"
            "print(sorted({'transformers', 'torch'} & set(sys.modules)))")
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def real_model() -> Path:
    if "MEGAKD_TEST_MODEL" not in os.environ:
        pytest.skip("MEGAKD_TEST_MODEL is not set: no real model's tokenizer to compare")
    return Path(os.environ["MEGAKD_TEST_MODEL"])


def test_a_real_tokenizer_agrees_with_transformers(real_model, auto_tokenizer):
    ours, theirs = load_tokenizer(real_model), auto_tokenizer(real_model)
    conversations = [*CONVERSATIONS, ([SYSTEM, user("One line?")], "Yes.")]
    if "MEGAKD_DATA" in os.environ:
        for file in sorted(Path(os.environ["MEGAKD_DATA"]).glob("pref_*.eval.jsonl.gz")):
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            conversations += [(row["prompt"], row["chosen"]) for row in rows[:: max(1, len(rows) // 25)]]
    for prompt, response in conversations:
        whole, expected = assert_same_ids(ours, theirs, prompt, response)
        if not response[0].isspace():
            assert whole == expected[: len(whole)]
