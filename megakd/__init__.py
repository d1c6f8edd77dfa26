"""megakd: preference distillation of large teachers into small students, on megatron-core."""

__version__ = "0.1.0"
