"""From files to sequences: readers, tokenizers, groups of samples, the order of a run, and rollout files.

Nothing here imports torch, transformers or megatron at import time, apart from `dataset` (through `megakd.batch`).
"""
