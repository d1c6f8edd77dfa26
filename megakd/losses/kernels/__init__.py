"""Triton kernels of the per-token losses, which run on CUDA in place of a `RowLoss`'s torch operations.

statistics.py says when. programs.py holds what runs on the device, launch.py how it is started.
"""

from megakd.errors import ModelError

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ModelError(
        f"triton cannot be imported ({error}): the losses on CUDA are its kernels. PyTorch's CUDA builds for Linux "
        "bring the release that they need; pip install it"
    ) from error

from megakd.losses.kernels.launch import (
    bin_gaps,
    bin_masses,
    local_statistics,
    mixture_sums,
    scaled,
    write_gradient,
)

__all__ = ["bin_gaps", "bin_masses", "local_statistics", "mixture_sums", "scaled", "write_gradient"]
