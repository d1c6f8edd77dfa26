"""What a linear's three FP8 products take and give, number by number and as digests: by Transformer Engine's module on
CUDA, by the emulation on a CPU.

Inputs, weights and gradients are made of integers alone, so that they are the same everywhere, and what a GPU was given
can be compared where there is none: its digests are in GOLDENS. They are hard ones: of many sizes, a block of zeros,
one far outlier; half way between two FP8 numbers, subnormal in FP8, beyond what delayed scaling expects. Each side is
some whole blocks of 128 and a shorter one.

Legend: T rows (tokens), I inputs and O outputs of the linear; R, C rows and columns of any matrix; P, K rows of a
matrix as a kernel has it in memory and its columns, which are summed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from megatron.core import fp8_utils
from torch import Tensor

from megakd.config import Parallel, Precision
from megakd.mcore import fp8_emulation
from megakd.mcore.fp8_emulation import BLOCKS, E4M3, E5M2, Operand
from megakd.mcore.model import unwrap
from megakd.rollout.sampling import mix64
from tests.mcore.cases import build, world
from tests.mcore.tiny import make_llama

GOLDENS = Path(__file__).parent / "goldens" / "fp8_operands.json"
WRITES = "MEGAKD_FP8_GOLDENS"
"""The environment variable that names the file which the test on a GPU writes its digests to."""
TOKENS, HIDDEN = 192, 160
"""T and O; I is twice O. Multiples of 32, which MXFP8 asks for."""
LARGEST = (47.0, 28.0, 75.0)
"""The inputs' outlier in each micro-batch. 28 is 1.75 times a power of two, as the largest numbers of both formats are:
a tensor's scale becomes a power of two, too, and numbers lie half way. Delayed scaling expects 47 in the last one."""
WEIGHTS = {0: 28.0, 2: 47.0}
"""Micro-batches before which the weight is changed, and its outlier then."""
GRADIENT_EXPONENT = -10
"""Gradients are so many binades smaller."""
PRODUCTS = {"y": ("input", "weight"), "dx": ("gradient", "weight"), "dw": ("gradient", "input")}
"""In the order in which they are made."""
LAYOUTS = {"TN": "y", "NN": "dx", "NT": "dw"}
"""Of Transformer Engine's `general_gemm`: A is read by its rows where the first is T, B where the second is N."""


@dataclass(frozen=True)
class Taken:
    """An operand as its product takes it, float32 on the host."""

    values_RC: Tensor
    """FP8 numbers with their scales undone. [T, I], [O, I] or [T, O], however it lies in memory."""
    inverse: float | None
    """1 / scale of the whole tensor; None where blocks have scales."""


@dataclass
class Records:
    """All micro-batches of one recipe. Names are "micro-batch 1: y" and "micro-batch 1: y, input"."""

    made_by: dict[str, str]
    operands: dict[str, Taken] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)
    """What the module returned, in float32."""
    addends: dict[str, int] = field(default_factory=dict)
    """Of each product: how many numbers are added up before float32 takes over (`allowed`)."""


# ------------------------------------------------------------------------------------------------------------- numbers
def made(seed: int, rows: int, columns: int, largest: float, exponent: int = 0) -> Tensor:
    """bf16 numbers [R, C] of 26 binades below 2, times 2 ^ exponent; the last one is `largest`, also times that."""
    bits = mix64((seed << 32) + torch.arange(1, rows * columns + rows + columns + 1))
    bits_RC, bits_R, bits_C = bits.split((rows * columns, rows, columns))
    bits_RC = bits_RC.view(rows, columns)
    binade_RC = (bits_RC >> 7 & 15) + (bits_R & 7)[:, None] + (bits_C & 3)
    # A bf16 number's bits: sign, 8 of the exponent, 7 of the fraction.
    magnitude_RC = (127 + exponent - binade_RC << 7 | bits_RC & 127).to(torch.int16).view(torch.bfloat16)
    values_RC = torch.where((bits_RC >> 11 & 1).bool(), -magnitude_RC, magnitude_RC)
    values_RC[:128, :128] = 0.0
    values_RC[-1, -1] = largest * 2.0**exponent
    return values_RC


def input_of(micro_batch: int) -> Tensor:
    """[T, I]"""
    return made(3 * micro_batch + 1, TOKENS, 2 * HIDDEN, LARGEST[micro_batch])


def weight_of(micro_batch: int) -> Tensor:
    """[O, I], where it changes."""
    return made(3 * micro_batch + 2, HIDDEN, 2 * HIDDEN, WEIGHTS[micro_batch])


def gradient_of(micro_batch: int) -> Tensor:
    """[T, O]"""
    return made(3 * micro_batch + 3, TOKENS, HIDDEN, LARGEST[micro_batch], GRADIENT_EXPONENT)


# ----------------------------------------------------------------------------------------------------------- recording
def make_model(directory: Path) -> str:
    """A model whose `linear_fc2` has these widths; of its files nothing else matters."""
    return str(make_llama(directory, seed=1, hidden=HIDDEN, layers=1, heads=5, kv_heads=5))


def run_linear(directory: str, recipe: str) -> Records:
    """Calls a model's row-parallel linear, on this rank's device, forward and backward in each micro-batch."""
    device = world().device
    engine = device.type == "cuda"
    model = build(directory, Parallel(), Precision(dtype="fp8", fp8_recipe=recipe, emulate=not engine))
    linear = unwrap(model.chunks[0]).decoder.layers[0].mlp.linear_fc2
    records = Records(_made_by() if engine else {"card": "none, emulated", "torch": torch.__version__})
    for number in range(len(LARGEST)):
        if number in WEIGHTS:
            with torch.no_grad():
                linear.weight.copy_(weight_of(number))
            model.weights_changed()
        linear.weight.grad = None
        x = input_of(number).to(device)[:, None].requires_grad_()
        with (_engine if engine else _emulation)(records, f"micro-batch {number + 1}", recipe):
            with fp8_utils.get_fp8_context(model.config):
                y, _ = linear(x)
            y.backward(gradient_of(number).to(device)[:, None])
        if model.amaxes is not None:  # what rolls them on in a training are hooks of the whole block
            model.amaxes.roll("forward")
            model.amaxes.roll("backward")
        for name, values in (("y", y[:, 0]), ("dx", x.grad[:, 0]), ("dw", linear.weight.grad)):
            records.results[f"micro-batch {number + 1}: {name}"] = values.detach().float().cpu()
    return records


def _made_by() -> dict[str, str]:
    import transformer_engine

    return {"card": torch.cuda.get_device_name(), "transformer_engine": str(transformer_engine.__version__),
            "torch": torch.__version__}


@contextmanager
def _emulation(records: Records, micro_batch: str, recipe: str) -> Iterator[None]:
    """Has the emulation's products keep what they take."""
    products, product = iter(PRODUCTS), fp8_emulation.product

    def keeping(one_RK: Operand, other_KC: Tensor, inverse: Tensor) -> Tensor:
        name = next(products)
        one, other = one_RK.values_RC * one_RK.inverse, other_KC * inverse
        matrices = {"y": (one, other.t()), "dx": (one, other), "dw": (one.t(), other)}[name]
        for operand, values_RC, its in zip(PRODUCTS[name], matrices, (one_RK.inverse, inverse), strict=True):
            records.operands[f"{micro_batch}: {name}, {operand}"] = Taken(
                values_RC.contiguous(), None if recipe in BLOCKS else its.item())
        records.addends[f"{micro_batch}: {name}"] = 0
        return product(one_RK, other_KC, inverse)

    with mock.patch.object(fp8_emulation, "product", keeping):
        yield
    assert next(products, None) is None, "the linear made fewer products than three"


@contextmanager
def _engine(records: Records, micro_batch: str, recipe: str) -> Iterator[None]:
    """Has Transformer Engine's products keep what they take."""
    from transformer_engine.pytorch.module import linear

    general_gemm = linear.general_gemm

    def keeping(A: object, B: object, *arguments: object, layout: str = "TN", use_split_accumulator: bool,
                **options: object) -> object:
        name = LAYOUTS[layout]
        one, other = decoded(B, by_rows=layout[1] == "N"), decoded(A, by_rows=layout[0] == "T")
        for operand, taken in zip(PRODUCTS[name], (one, other), strict=True):
            records.operands[f"{micro_batch}: {name}, {operand}"] = taken
        summed = one.values_RC.shape[0 if name == "dw" else 1]
        records.addends[f"{micro_batch}: {name}"] = min(summed, 128) if use_split_accumulator else summed
        return general_gemm(A, B, *arguments, layout=layout, use_split_accumulator=use_split_accumulator, **options)

    with mock.patch.object(linear, "general_gemm", keeping):
        yield
    names = [f"{micro_batch}: {name}" for name in PRODUCTS]
    assert all(name in records.addends for name in names), f"of {names} only {list(records.addends)} were made"


def decoded(tensor: object, *, by_rows: bool) -> Taken:
    """A tensor of Transformer Engine 2.11's as a product reads it, by its rows or by its columns.

    Of tensor/storage: float8_tensor_storage.py (columns are a transposed copy; where products take any layout there is
    none, and both read the rows), float8_blockwise_tensor_storage.py (columns are transposed; shapes of scales in
    `Float8BlockQuantizer.get_scale_shape`), mxfp8_tensor_storage.py (columns lie as rows do, with scales of their own;
    the product alone changes the scales' order).
    """
    numbers = {"kFloat8E4M3": E4M3, "kFloat8E5M2": E5M2}[tensor._fp8_dtype.name]
    if hasattr(tensor, "_transpose"):
        transposed = not by_rows and tensor._transpose is not None and not tensor._transpose_invalid
        data, inverse = tensor._transpose if transposed else tensor._data, tensor._scale_inv.cpu()
        values_PK = _matrix(data, transposed).view(numbers).float() * inverse
        return Taken((values_PK.t() if transposed else values_PK).contiguous(), inverse.item())
    side = "rowwise" if by_rows else "columnwise"
    data, inverse = getattr(tensor, f"_{side}_data"), getattr(tensor, f"_{side}_scale_inv").cpu()
    if hasattr(tensor, "_is_2D_scaled"):
        values_PK = _matrix(data, not by_rows).view(numbers).float()
        rows, columns = values_PK.shape
        inverse_PK = (inverse.repeat_interleave(128, 0) if tensor._is_2D_scaled else inverse.t())[:rows]
        values_PK = values_PK * inverse_PK.repeat_interleave(128, 1)[:, :columns]
        return Taken((values_PK if by_rows else values_PK.t()).contiguous(), None)
    values_RC = _matrix(data, False).view(numbers).float()
    rows, columns = values_RC.shape
    inverse_RC = inverse.view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1 if by_rows else 0)
    return Taken(values_RC * inverse_RC[:rows, :columns], None)


def _matrix(data: Tensor, transposed: bool) -> Tensor:
    """Bytes on the host, [..., C] or, transposed, [C, ...], as a matrix."""
    return data.cpu().reshape((data.shape[0], -1) if transposed else (-1, data.shape[-1])).contiguous()


# ----------------------------------------------------------------------------------------------------------- comparing
def differences(found: dict[str, Taken], right: dict[str, Taken]) -> list[str]:
    """What is not the same bit for bit, a line for an operand."""
    lines = [f"{name}: only one side has it" for name in sorted(found.keys() ^ right.keys())]
    for name in (name for name in found if name in right):
        mine, theirs = found[name], right[name]
        if mine.values_RC.shape != theirs.values_RC.shape:
            lines.append(f"{name}: {tuple(mine.values_RC.shape)} for {tuple(theirs.values_RC.shape)}")
            continue
        places = (mine.values_RC.view(torch.int32) != theirs.values_RC.view(torch.int32)).nonzero().tolist()
        if places or mine.inverse != theirs.inverse:
            first = ", ".join(f"{mine.values_RC[row, column]:.9g} for {theirs.values_RC[row, column]:.9g} at "
                              f"[{row}, {column}]" for row, column in places[:4])
            scales = "" if mine.inverse == theirs.inverse else f"1 / scale {mine.inverse!r} for {theirs.inverse!r}; "
            lines.append(f"{name}: {scales}{len(places)} of {mine.values_RC.numel()} numbers differ: {first}")
    return lines


def allowed(addends: int) -> float:
    """How far a product may be from the same one in float32, relative to its norm. By reasoning; not yet measured on
    a GPU.

    Both are rounded to bf16 at last: 2^-9 each. Hopper's FP8 products keep 13 bits behind the point of what they add
    up (DeepSeek-V3's report, arXiv 2412.19437, 3.3.2): an addend loses at most 2^-13 of the largest, on average half of
    it. Without a split accumulator (forward under tensorwise and delayed: common/recipe/__init__.py; module/base.py,
    `_2X_ACC_FPROP`) that is so for the whole sum, with one for 128 addends, whose sums are added up in float32. Sums
    that were simulated so on a CPU were 0.2 % apart at most: losses have both signs, and small addends lose less.
    """
    return 2.0**-8 + addends * 2.0**-14


def distances(found: Records, right: Records) -> dict[str, tuple[float, float]]:
    """Each result's distance from the right one, relative to its norm, and what is allowed. Without the last row and
    column: there the outliers are at work, which would be most of the norm."""
    apart = {}
    for name, values in right.results.items():
        mine, theirs = (side[:-1, :-1] for side in (found.results[name], values))
        apart[name] = float((mine - theirs).norm() / theirs.norm()), allowed(found.addends[name])
    return apart


# ------------------------------------------------------------------------------------------------------------- goldens
def digests(operands: dict[str, Taken]) -> dict[str, dict[str, object]]:
    """What goldens keep of each operand: a hash of its float32 bytes, and enough to see what a difference is about."""
    return {name: {
        "sha256": hashlib.sha256(taken.values_RC.numpy().tobytes()).hexdigest(),
        "shape": list(taken.values_RC.shape),
        "largest": taken.values_RC.abs().max().item(),
        "inverse": taken.inverse,
        "last row ends": taken.values_RC[-1, -4:].tolist(),
    } for name, taken in operands.items()}


def digest_differences(found: dict[str, dict[str, object]], right: dict[str, dict[str, object]]) -> list[str]:
    """What differs between two sets of digests, a line for an operand."""
    lines = [f"{name}: only one side has it" for name in sorted(found.keys() ^ right.keys())]
    for name in (name for name in found if name in right):
        off = [f"{what} {value!r} for {right[name][what]!r}" for what, value in found[name].items()
               if value != right[name][what]]
        if off:
            lines.append(f"{name}: {', '.join(off)}")
    return lines


def write_goldens(file: Path, recipe: str, records: Records) -> None:
    """Puts a recipe's digests into a file, beside those of the others that it has."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept[recipe] = {"made by": records.made_by, "operands": digests(records.operands)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def read_goldens(file: Path) -> dict[str, dict]:
    """Recipe -> what `write_goldens` has put there."""
    return json.loads(file.read_text(encoding="utf-8"))
