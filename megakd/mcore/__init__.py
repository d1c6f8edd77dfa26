"""The only package that imports megatron-core: runtime, process groups, models, schedules, optimizer, checkpoints."""

import warnings

# What megatron-core says at import and at run time of packages that are not there: `megakd doctor` says it once, in
# full. And names that torch 2.13 has renamed, which the older releases that we support do not know yet.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    ".*is deprecated. Please use .torch.distributed",
    ".*grad attribute of a Tensor that is not a leaf",
    "When using async grad allreduce",
    "full scope is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
