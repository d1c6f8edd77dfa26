"""`megakd doctor`: what this machine can run, and what is missing for what.

`probe` looks (the only part that touches the machine), `judge` thinks (pure). Imports neither torch nor megatron at the
top, so that it also works where they are broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CPU_TESTS, QUICKSTART, CUDA, FP8 = "CPU tests", "quickstart", "CUDA bf16", "FP8"
CAPABILITIES = (CPU_TESTS, QUICKSTART, CUDA, FP8)
EVERYTHING = CAPABILITIES
ON_GPU = (CUDA, FP8)

# Ranges of setup.py: at least, and below.
PYTHON = ((3, 11), None)
TORCH = ((2, 9), None)
MEGATRON = ((0, 16, 1), (0, 17))
TRANSFORMER_ENGINE = ((2, 9), (2, 12))

BF16_CAPABILITY, FP8_CAPABILITY, MXFP8_CAPABILITY = (8, 0), (8, 9), (10, 0)
QUICKSTART_MEMORY, QUICKSTART_DISK = 6 * 2**30, 8 * 2**30
TEST_MEMORY = 4 * 2**30

_INSTALL = "pip install -e '.[{}]' in the repository"
_REQUIRED = ("numpy", "einops", "psutil", "pydantic", "pyyaml", "jinja2", "safetensors", "tokenizers", "sentencepiece",
             "pyarrow", "tqdm", "rapidfuzz")
_EXTRA = {
    "transformers": ((CPU_TESTS, QUICKSTART), "hf"),
    "gguf": ((QUICKSTART,), "hf"),
    "rouge-score": ((CPU_TESTS, QUICKSTART), "eval"),
    "lm-eval": ((), "lm-eval"),
    "pytest": ((CPU_TESTS,), "dev"),
    "pytest-xdist": ((CPU_TESTS,), "dev"),
    "hypothesis": ((CPU_TESTS,), "dev"),
    "wandb": ((), "wandb"),
}
_TE_PACKAGES = ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13")


@dataclass(frozen=True)
class Check:
    """One finding. `ok` is True (good), False (what `needed_for` names cannot run) or None (absent, but optional)."""

    name: str
    found: str
    ok: bool | None
    needed_for: tuple[str, ...]
    fix: str


@dataclass(frozen=True)
class Device:
    """A CUDA device."""

    name: str
    capability: tuple[int, int]
    free: int
    total: int


@dataclass(frozen=True)
class Torch:
    """What torch says of itself after an import; `error` is why the import failed."""

    error: str | None
    cuda_build: str | None
    devices: tuple[Device, ...]
    device_error: str | None
    nccl: str | None
    gloo: bool


@dataclass(frozen=True)
class Package:
    """An installed distribution, from its metadata alone. `folders` are the first two parts of its files' paths."""

    version: str
    summary: str
    folders: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Machine:
    """All that `judge` knows."""

    python: str
    packages: Mapping[str, Package]
    torch: Torch
    transformer_engine_error: str | None
    cores: int
    free_memory: int | None
    folder: str
    free_disk: int


# -------------------------------------------------------------------------------------------------------------- looking
def probe() -> Machine:
    """Looks at this machine. Imports torch here and Transformer Engine in a process of its own (it may crash)."""
    names = ["torch", "megatron-core", "apex", *_TE_PACKAGES, *_REQUIRED, *_EXTRA]
    packages = {name: package for name in names if (package := _package(name)) is not None}
    engine = any(name in packages for name in _TE_PACKAGES)
    return Machine(
        python=platform.python_version(), packages=packages, torch=_probe_torch(),
        transformer_engine_error=_import_error("transformer_engine.pytorch") if engine else None,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        free_memory=_free_memory(), folder=str(Path.cwd()), free_disk=shutil.disk_usage(Path.cwd()).free,
    )


def _package(name: str) -> Package | None:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    summary = found.metadata["Summary"] or ""  # None where it has none
    folders = frozenset("/".join(file.parts[:2]) for file in found.files or ())
    return Package(found.version, summary, folders)


def _probe_torch() -> Torch:
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a broken install raises anything; the report says which
        return Torch(_one_line(error), None, (), None, None, False)
    devices, device_error = [], None
    try:
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name, capability = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
            devices.append(Device(name, capability, free, total))
    except RuntimeError as error:  # a driver that does not fit
        devices, device_error = [], _one_line(error)
    nccl = None
    if dist.is_available() and dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    gloo = dist.is_available() and dist.is_gloo_available()
    return Torch(None, torch.version.cuda, tuple(devices), device_error, nccl, gloo)


def _import_error(module: str) -> str | None:
    """Why a module cannot be imported, tried in a process of its own; None if it can."""
    try:
        done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "the import did not end in 5 minutes"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the import ended the process with code {done.returncode}"


def _free_memory() -> int | None:
    """Bytes that a new process can take, as the container's limit (cgroup v2) allows; None if psutil is missing."""
    try:
        import psutil
    except ImportError:
        return None
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text().strip()
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ------------------------------------------------------------------------------------------------------------- thinking
def diagnose() -> list[Check]:
    """All checks of this machine."""
    return judge(probe())


def judge(machine: Machine) -> list[Check]:
    """The checks that follow from what was found. Pure."""
    return [
        _version_check("Python", machine.python, PYTHON, EVERYTHING, "Install Python 3.11 or newer"),
        *_torch_checks(machine), *_megatron_checks(machine), _apex_check(machine),
        _adam_check(machine), *_package_checks(machine),
        *_resource_checks(machine),
    ]


def _torch_checks(machine: Machine) -> list[Check]:
    torch, package = machine.torch, machine.packages.get("torch")
    if package is None or torch.error is not None:
        found = "not installed" if package is None else f"{package.version}, cannot be imported: {torch.error}"
        return [Check("torch", found, False, EVERYTHING, "Install torch: `make venv`, or see https://pytorch.org")]
    build = f"CUDA {torch.cuda_build} build" if torch.cuda_build else "CPU build"
    version = _version_check("torch", package.version, TORCH, EVERYTHING, "pip install --upgrade torch", build)
    checks = [version]
    gpu_build = "Install a CUDA build of torch (https://pytorch.org)"
    if torch.cuda_build is None:
        checks.append(Check("CUDA build of torch", "no", False, ON_GPU, gpu_build))
    if torch.device_error is not None:
        checks.append(Check("CUDA devices", torch.device_error, False, ON_GPU, "Mend the driver; try `nvidia-smi`"))
    elif not torch.devices:
        fix = "Run on a machine with an NVIDIA GPU; try `nvidia-smi`"
        checks.append(Check("CUDA devices", "none", False, ON_GPU, fix))
    for number, device in enumerate(torch.devices):
        checks.append(_device_check(number, device))
    checks.append(Check("NCCL", torch.nccl or "no", torch.nccl is not None, ON_GPU, gpu_build))
    checks.append(Check("gloo", "yes" if torch.gloo else "no", torch.gloo, (CPU_TESTS, QUICKSTART),
                        "Install a torch with torch.distributed and gloo (the Linux and macOS wheels have it)"))
    return checks


def _device_check(number: int, device: Device) -> Check:
    major, minor = device.capability
    formats = [name for name, least in (("bf16", BF16_CAPABILITY), ("FP8", FP8_CAPABILITY), ("MXFP8", MXFP8_CAPABILITY))
               if device.capability >= least]
    found = (f"{device.name}, capability {major}.{minor} ({', '.join(formats) or 'no bf16'}), "
             f"{_gib(device.free)} of {_gib(device.total)} free")
    failing = (FP8,) if device.capability >= BF16_CAPABILITY else ON_GPU
    ok = device.capability >= FP8_CAPABILITY
    fix = "FP8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), bf16 one of 8.0 or more"
    return Check(f"GPU {number}", found, ok, ON_GPU if ok else failing, fix)


def _megatron_checks(machine: Machine) -> list[Check]:
    package = machine.packages.get("megatron-core")
    fix = "pip install 'megatron-core>=0.16.1,<0.17'"
    version = None if package is None else package.version
    checks = [_version_check("megatron-core", version, MEGATRON, EVERYTHING, fix)]
    engines = {name: machine.packages[name] for name in _TE_PACKAGES if name in machine.packages}
    install = _INSTALL.format("gpu") + " (it builds against the CUDA torch that is installed)"
    if not engines:
        return [*checks, Check("Transformer Engine", "not installed", False, ON_GPU, install)]
    found = ", ".join(f"{name} {package.version}" for name, package in engines.items())
    if machine.torch.error is None and machine.torch.cuda_build is None:
        fix = f"A CPU torch cannot load it, and megatron-core does not survive that: pip uninstall {' '.join(engines)}"
        return [*checks, Check("Transformer Engine", f"{found}, beside a CPU torch", False, EVERYTHING, fix)]
    if machine.transformer_engine_error is not None:
        # megatron-core tries to import it too, and goes on without it after an ImportError only.
        caught = machine.transformer_engine_error.startswith(("ImportError", "ModuleNotFoundError"))
        found = f"{found}, cannot be imported: {machine.transformer_engine_error}"
        fix = f"Take it out (pip uninstall {' '.join(engines)}) and build it again: {install}"
        return [*checks, Check("Transformer Engine", found, False, ON_GPU if caught else EVERYTHING, fix)]
    version, note = next(iter(engines.values())).version, "can be imported"
    return [*checks, _version_check("Transformer Engine", version, TRANSFORMER_ENGINE, ON_GPU, install, note)]


def _apex_check(machine: Machine) -> Check:
    """NVIDIA's apex is optional. PyPI's package of that name is a web toolkit: megatron-core does without it, too."""
    package = machine.packages.get("apex")
    if package is None:
        fix = "only from https://github.com/NVIDIA/apex, never from PyPI"
        return Check("apex (NVIDIA)", "not installed", None, (), fix)
    if "NVIDIA" in package.summary or "apex/normalization" in package.folders:
        return Check("apex (NVIDIA)", package.version, True, (), "")
    found = f"{package.version}, an unrelated package: {package.summary!r}"
    return Check("apex (NVIDIA)", found, False, (), "pip uninstall apex; it has nothing to do with NVIDIA's")


def _adam_check(machine: Machine) -> Check:
    """Which Adam trainings get: megatron-core takes the first that it can import."""
    engine = any(name in machine.packages for name in _TE_PACKAGES) and machine.transformer_engine_error is None
    apex = machine.packages.get("apex")
    if engine:
        return Check("Adam", "Transformer Engine's FusedAdam", True, (), "")
    if apex is not None and "apex/optimizers" in apex.folders:
        return Check("Adam", "apex's FusedAdam", True, (), "")
    fix = "the fused one of Transformer Engine comes with the extra gpu"
    return Check("Adam", "torch's AdamW: no Transformer Engine and no apex of NVIDIA's", None, (), fix)


def _package_checks(machine: Machine) -> list[Check]:
    checks = []
    for name in _REQUIRED:
        package = machine.packages.get(name)
        found = "not installed" if package is None else package.version
        checks.append(Check(name, found, package is not None, EVERYTHING, f"pip install {name}"))
    for name, (needed_for, extra) in _EXTRA.items():
        package = machine.packages.get(name)
        found = "not installed" if package is None else package.version
        ok = True if package is not None else False if needed_for else None
        checks.append(Check(name, found, ok, needed_for, _INSTALL.format(extra)))
    return checks


def _resource_checks(machine: Machine) -> list[Check]:
    checks = [Check("CPU cores", str(machine.cores), True if machine.cores >= 2 else None, (),
                    "Two or more: the quickstart runs two processes")]
    free = machine.free_memory
    if free is None:
        checks.append(Check("free memory", "unknown", None, (), "pip install psutil"))
    else:
        wanted = ((CPU_TESTS, TEST_MEMORY), (QUICKSTART, QUICKSTART_MEMORY))
        short = tuple(name for name, least in wanted if free < least)
        fix = f"The tests take about {_gib(TEST_MEMORY)}, the quickstart about {_gib(QUICKSTART_MEMORY)}"
        checks.append(Check("free memory", _gib(free), not short, short or (CPU_TESTS, QUICKSTART), fix))
    fix = f"The quickstart's models and checkpoints take about {_gib(QUICKSTART_DISK)}"
    checks.append(Check("free disk", f"{_gib(machine.free_disk)} at {machine.folder}",
                        machine.free_disk >= QUICKSTART_DISK, (QUICKSTART,), fix))
    return checks


def _version_check(name: str, version: str | None, allowed: tuple[tuple[int, ...], tuple[int, ...] | None],
                   needed_for: tuple[str, ...], fix: str, note: str = "") -> Check:
    """Whether a version lies in a range (at least, below)."""
    if version is None:
        return Check(name, "not installed", False, needed_for, fix)
    least, below = allowed
    release = re.match(r"\d+(?:\.\d+)*", version)
    number = tuple(map(int, release.group().split("."))) if release else ()
    ok = number >= least and (below is None or number < below)
    wanted = f">={_dotted(least)}" + (f",<{_dotted(below)}" if below is not None else "")
    found = ", ".join(part for part in (version, note, "" if ok else f"outside {wanted}") if part)
    return Check(name, found, ok, needed_for, fix)


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


# -------------------------------------------------------------------------------------------------------------- telling
def missing_for(checks: Sequence[Check]) -> dict[str, list[Check]]:
    """For each capability the checks that stand in its way. One good GPU is enough."""
    usable = {name for check in checks if check.name.startswith("GPU ") for name in ON_GPU
              if check.ok or name not in check.needed_for}
    return {capability: [check for check in checks if check.ok is False and capability in check.needed_for
                         and not (check.name.startswith("GPU ") and capability in usable)]
            for capability in CAPABILITIES}


def render(checks: Sequence[Check]) -> str:
    """The checks, what to do, and what can run, as text."""
    words = {True: "ok", False: "no", None: "-"}
    widest = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        wanted = f"  [needed for {', '.join(check.needed_for)}]" if check.ok is False and check.needed_for else ""
        lines.append(f"{words[check.ok]:>2}  {check.name.ljust(widest)}  {check.found}{wanted}")
    lines += ["", "This machine can run:"]
    for capability, missing in missing_for(checks).items():
        lines.append(f"{'no' if missing else 'yes':>3}  {capability}")
        lines += [f"       {check.name}: {check.found}. {check.fix}" for check in missing]
    optional = [f"     {check.name}: {check.fix}" for check in checks if not check.ok and not check.needed_for]
    return "\n".join([*lines, *(["", "Optional:", *optional] if optional else [])])


def print_doctor() -> None:
    """Prints what `megakd doctor` says."""
    print(render(diagnose()))
