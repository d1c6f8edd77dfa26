"""Hugging Face model directories: read, cut for a layout, put together again. Imports no megatron."""
