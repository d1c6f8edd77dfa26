"""The only package that imports megatron-core: runtime, process groups, models, schedules, optimizer, checkpoints."""
