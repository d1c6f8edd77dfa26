"""Small tokenizers that the tests build themselves, in model directories like Hugging Face's."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot|>")

CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# No generation prompt, blanks around the answer, a system message that moves into the last user turn.
INSTRUCT = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' -%}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + message['content'] + ' ' + eos_token }}
{%- else -%}{{ raise_exception('no system message, please') }}{%- endif -%}{% endfor %}"""

# Strips contents, ends turns with a token that the configuration does not name.
STRIPPING = """{{ bos_token }}{% for message in messages %}{% generation %}{{ '<|im_start|>' + message['role'] -}}
{{ '\n\n' + message['content'] | trim + '<|eot|>' }}{% endgeneration %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"""

# Writes an empty thought in front of the answer.
THINKING = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- message['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Writes nothing after an answer but a line's end.
PLAIN = """{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"""

_CORPUS = [
    "The quick brown fox jumps over the lazy dog, who says no!", "How many apples are left? There are 12.",
    "Write a short poem about the sea.\n\nThe sea is wide,\n  the sea is deep.", "def f(x):\n    return x + 1\n",
    "user assistant system instruction response You are helpful.", "I can't help with that, but I can offer this.",
] * 5


@lru_cache
def _trained(metaspace: bool) -> str:
    """A BPE tokenizer's JSON: of bytes as GPT-2, Llama 3 and Qwen have it, or of words behind blanks as Llama 2."""
    if metaspace:
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                               decoders.Strip(" ", 1, 0)])
        alphabet = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=alphabet, show_progress=False, max_token_length=12)
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=list(SPECIAL), show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    return json.dumps(content)


def write_tokenizer(
    directory: Path, *, template: str | None = CHATML, metaspace: bool = False, config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
) -> Path:
    """Writes a tokenizer's files into a directory.

    Args:
        directory: made where it is not there.
        template: what `chat_template.jinja` says, or None for no such file.
        metaspace: words behind blanks (Llama 2) in place of bytes.
        config: `tokenizer_config.json`; by default the special tokens of ChatML.
        generation: `generation_config.json`, or None for no such file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(_trained(metaspace), encoding="utf-8")
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>"} if config is None else config
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return directory
