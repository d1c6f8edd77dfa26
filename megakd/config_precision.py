"""Which settings of a recipe's precision go together, and with what else they do; and what CUDA graphs need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.config_stages import TrainStage
from megakd.errors import ConfigError

if TYPE_CHECKING:
    from megakd.config import Precision, Recipe

OF_FP8 = ("fp8_recipe", "amax_history", "emulate", "first_last_bf16", "fp8_weights")
"""Settings that say something about FP8 alone."""


def check_precision(recipe: Recipe) -> None:
    """Checks what holds without knowing machine and models. Raises ConfigError."""
    precision = recipe.precision
    if precision.dtype != "fp8":
        if precision.dtype == "fp32" and recipe.device == "cuda":
            _check_context(recipe)
        _refuse_changed(precision, OF_FP8, f"is about FP8, and dtype is {precision.dtype!r}",
                        "Leave it out, or write precision.dtype=fp8")
        return
    if not precision.emulate and recipe.device != "cuda":
        raise ConfigError(
            "precision.dtype", "fp8", "FP8 layers need Transformer Engine and a CUDA device (device is "
            f"{recipe.device!r})", "Write precision: bf16 or fp32, or device: cuda on a machine that has both, or "
            "precision.emulate=true to study FP8's arithmetic on any device",
        )
    if precision.fp8_recipe != "delayed":
        _refuse_changed(precision, ("amax_history",), f"the recipe {precision.fp8_recipe!r} takes its scales from the "
                        "numbers at hand", "Leave it out, or write precision.fp8_recipe=delayed")
    else:
        _check_delayed(recipe)
    if precision.fp8_weights != "none" and precision.emulate:
        raise ConfigError("precision.fp8_weights", precision.fp8_weights,
                          "emulated layers keep bf16 weights and round them in every product", "Write none")
    if precision.fp8_weights == "all" and precision.fp8_recipe == "mxfp8":
        raise ConfigError("precision.fp8_weights", "all", "Transformer Engine 2.11 cannot lay MXFP8 weights into the "
                          "optimizer's buffer (replace_raw_data)", "Write teachers, or another fp8_recipe")


def _refuse_changed(precision: Precision, names: tuple[str, ...], rule: str, fix: str) -> None:
    """Refuses the first of some settings that is not as when left out."""
    for name in names:
        value = getattr(precision, name)
        if value != type(precision).model_fields[name].default:
            raise ConfigError(f"precision.{name}", value, rule, fix)


def _check_context(recipe: Recipe) -> None:
    """Transformer Engine has attention across context ranks in 16 bits alone (`get_attention_backend`)."""
    for stage in recipe.stages:
        if isinstance(stage, TrainStage) and (ranks := recipe.role(stage.trains).parallel.context) > 1:
            raise ConfigError(f"{stage.trains}.parallel.context", ranks, "in fp32 Transformer Engine has no attention "
                              "across context ranks", f"Write precision: bf16, or {stage.trains}.parallel.context=1")


def _check_delayed(recipe: Recipe) -> None:
    precision = recipe.precision
    if precision.first_last_bf16 > 0:
        raise ConfigError("precision.first_last_bf16", precision.first_last_bf16, "delayed scaling takes all layers in "
                          "one FP8 region (megatron-core)", "Write 0, or another fp8_recipe")
    for stage in recipe.stages if precision.emulate else ():
        recompute = recipe.role(stage.trains).recompute if isinstance(stage, TrainStage) else "none"
        if recompute != "none":
            raise ConfigError(f"{stage.trains}.recompute", recompute, "an emulated pass that is made again would find "
                              "scales that delayed scaling has moved on", "Write none, or another fp8_recipe")


def check_graphs(recipe: Recipe) -> None:
    """Checks of `cuda_graphs` and `decode_graphs` what holds without knowing the machine. Raises ConfigError."""
    precision = recipe.precision
    for name in ("student", "teacher", "reference"):
        role = recipe.role(name)
        if role.decode_graphs:
            _check_decode_graphs(recipe, name)
        field = f"{name}.cuda_graphs"
        if not role.cuda_graphs:
            if role.graph_tokens != type(role).model_fields["graph_tokens"].default:
                rule = f"says how rows are filled up for {field}, which is false"
                raise ConfigError(f"{name}.graph_tokens", role.graph_tokens, rule,
                                  f"Leave it out, or write {field}=true")
            continue
        if name == "student":
            raise ConfigError(field, True, "the student is trained; graphs are for models that only run forward",
                              "Write teacher.cuda_graphs or reference.cuda_graphs, or leave it out")
        if recipe.device != "cuda":
            raise ConfigError(field, True, f"device is {recipe.device!r}, which has no CUDA graphs",
                              "Leave it out, or write device: cuda")
        if precision.emulate:
            raise ConfigError(field, True, "emulated FP8 runs the local layers, whose attention asks the host for "
                              "every sequence's length, which nothing recorded can",
                              "Leave it out, or precision.emulate")
        if precision.dtype == "fp32":
            raise ConfigError(field, True, "in fp32 Transformer Engine's attention makes its mask on the host, which "
                              "nothing recorded can", "Leave it out, or write precision: bf16 or fp8")
        if role.parallel.virtual_pipeline > 1:
            rule = (f"{name}.parallel.virtual_pipeline is {role.parallel.virtual_pipeline}: a recording waits for its "
                    "GPU, on which an interleaved pipeline has sends under way")
            raise ConfigError(field, True, rule,
                              f"Leave it out, or write {name}.parallel.virtual_pipeline=1")


def _check_decode_graphs(recipe: Recipe, name: str) -> None:
    field = f"{name}.decode_graphs"
    if recipe.device != "cuda":
        raise ConfigError(field, True, f"device is {recipe.device!r}, which has no CUDA graphs",
                          "Leave it out, or write device: cuda")
    trained = any(isinstance(stage, TrainStage) and stage.trains == name for stage in recipe.stages)
    if trained and recipe.precision.dtype == "fp8" and recipe.precision.fp8_recipe == "delayed":
        raise ConfigError(field, True, "the layers of a model that trains keep histories with delayed scaling, which a "
                          "recorded pass would write and nobody reduce", "Leave it out, or take another fp8_recipe")
