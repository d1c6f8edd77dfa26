"""Scores of a reward model: a sequence classifier with one label, run by transformers on one rank.

transformers is imported here alone of the library; it belongs to the extra `hf`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from megakd.data.backends import read_json
from megakd.data.readers import Message
from megakd.errors import ConfigError, ModelError
from megakd.hf.directory import tensor_files


def check_reward_model(field: str, model: str) -> None:
    """Refuses a directory that is no reward model, by its configuration and the names of its tensors.

    Raises:
        ConfigError: no directory.
        ModelError: another kind of model, another number of labels, no safetensors, no chat template.
    """
    directory = Path(model)
    if not directory.is_dir():
        raise ConfigError(field, model, "there is no such directory", "Give a Hugging Face model directory")
    config = read_json(directory / "config.json")
    kinds = config["architectures"] if config.get("architectures") else []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ModelError(f"{directory}: architectures in config.json are {json.dumps(kinds)}, no sequence classifier. "
                         "Give a reward model")
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)  # as transformers does
    if labels != 1:
        raise ModelError(f"{directory}: a classifier of {labels} labels (config.json, id2label); a reward model has 1")
    tensor_files(directory)
    template = read_json(directory / "tokenizer_config.json").get("chat_template")
    if template is None and not (directory / "chat_template.jinja").exists():
        raise ModelError(f"{directory}: it has no chat template, by which it would read a conversation. Write the one "
                         "that it was trained with as chat_template.jinja")


@torch.no_grad()
def reward_scores(directory: str, conversations: Sequence[Sequence[Message]], device: str) -> list[float]:
    """The scores of conversations that end with an assistant's turn, by the model's own tokenizer and chat template.

    One sequence at a time: no padding takes part. float32 on the CPU, the directory's own dtype on CUDA.

    Raises:
        ModelError: a weight is missing, or a conversation is longer than the model's context.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model, found = AutoModelForSequenceClassification.from_pretrained(
        directory, local_files_only=True, use_safetensors=True, dtype=torch.float32 if device == "cpu" else "auto",
        output_loading_info=True,
    )
    if found["missing_keys"]:  # transformers would fill them at random
        raise ModelError(f"{directory}: its files lack {min(found['missing_keys'])}. Give the whole reward model")
    model.eval().to(device)
    limit = getattr(model.config, "max_position_embeddings", None)
    scores = []
    for conversation in conversations:
        tokens = tokenizer.apply_chat_template([dict(turn) for turn in conversation], tokenize=True, return_dict=True,
                                               return_tensors="pt").to(device)
        length = tokens["input_ids"].shape[1]
        if limit is not None and length > limit:
            raise ModelError(f"{directory}: a conversation of {length} tokens, more than its context of {limit}. Lower "
                             "max_new_tokens or data.max_length, or take another reward model")
        scores.append(float(model(**tokens).logits[0, 0]))
    return scores
