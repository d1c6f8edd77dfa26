"""The doctor's judgement of made-up machines, and its look at this one."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megakd import doctor
from megakd.doctor import CPU_TESTS, CUDA, FP8, QUICKSTART, Check, Device, Machine, Package, Torch, judge, missing_for

GIB = 2**30
H200 = Device("NVIDIA H200", (9, 0), 130 * GIB, 139 * GIB)
A100 = Device("NVIDIA A100", (8, 0), 70 * GIB, 80 * GIB)
V100 = Device("NVIDIA V100", (7, 0), 30 * GIB, 32 * GIB)
PACKAGES = {name: Package("99.0", "") for name in [*doctor._REQUIRED, *doctor._EXTRA]} | {
    "torch": Package("2.13.0+cpu", ""), "megatron-core": Package("0.16.1", "")}
TE = {"transformer-engine": Package("2.11.0", ""), "transformer-engine-torch": Package("2.11.0", "")}
LAPTOP = Machine("3.11.7", PACKAGES, Torch(None, None, (), None, None, True), None, 2, 20 * GIB, "/here", 50 * GIB)
NODE = dataclasses.replace(LAPTOP, packages={**PACKAGES, **TE, "torch": Package("2.11.0+cu130", "")},
                           torch=Torch(None, "13.0", (H200,), None, "2.28.9", True))


def _blocked(machine: Machine) -> dict[str, set[str]]:
    """Capability -> names of the checks in its way, for those that have any."""
    return {capability: {check.name for check in missing}
            for capability, missing in missing_for(judge(machine)).items() if missing}


def _check(machine: Machine, name: str) -> Check:
    (found,) = [check for check in judge(machine) if check.name == name]
    return found


def _with(machine: Machine, **packages: Package | None) -> Machine:
    merged = {**machine.packages, **{name.replace("_", "-"): package for name, package in packages.items()}}
    return dataclasses.replace(machine, packages={name: package for name, package in merged.items() if package})


def test_a_laptop_runs_the_tests_and_the_quickstart():
    gpu = {"CUDA build of torch", "CUDA devices", "NCCL", "Transformer Engine"}
    assert _blocked(LAPTOP) == {CUDA: gpu, FP8: gpu}


def test_a_gpu_node_runs_everything():
    assert _blocked(NODE) == {}
    assert _check(NODE, "GPU 0").found == "NVIDIA H200, capability 9.0 (bf16, FP8), 130.0 GiB of 139.0 GiB free"


@pytest.mark.parametrize("devices, blocked", [
    ((A100,), {FP8: {"GPU 0"}}),
    ((V100, V100), {CUDA: {"GPU 0", "GPU 1"}, FP8: {"GPU 0", "GPU 1"}}),
    ((V100, H200), {}),
    ((V100, A100), {FP8: {"GPU 0", "GPU 1"}}),
    ((), {CUDA: {"CUDA devices"}, FP8: {"CUDA devices"}}),
])
def test_what_a_gpu_can_do_depends_on_its_age(devices, blocked):
    assert _blocked(dataclasses.replace(NODE, torch=dataclasses.replace(NODE.torch, devices=devices))) == blocked


def test_a_broken_driver_is_told():
    torch = dataclasses.replace(NODE.torch, devices=(), device_error="RuntimeError: driver too old")
    assert _blocked(dataclasses.replace(NODE, torch=torch)) == {CUDA: {"CUDA devices"}, FP8: {"CUDA devices"}}
    assert "driver too old" in doctor.render(judge(dataclasses.replace(NODE, torch=torch)))


def test_transformer_engine_beside_a_cpu_torch_breaks_everything():
    machine = dataclasses.replace(_with(LAPTOP, transformer_engine_cu13=Package("2.11.0", "")),
                                  transformer_engine_error="RuntimeError: no CUDA")
    assert all("Transformer Engine" in names for names in _blocked(machine).values()) and len(_blocked(machine)) == 4
    check = _check(machine, "Transformer Engine")
    assert "beside a CPU torch" in check.found and "pip uninstall transformer-engine-cu13" in check.fix


@pytest.mark.parametrize("error, blocked", [
    ("OSError: libcudnn.so.9: cannot open", {CPU_TESTS, QUICKSTART, CUDA, FP8}),  # megatron-core does not catch it
    ("ImportError: undefined symbol", {CUDA, FP8}),
])
def test_transformer_engine_that_cannot_be_imported(error, blocked):
    machine = dataclasses.replace(NODE, transformer_engine_error=error)
    assert set(_blocked(machine)) == blocked and error in _check(machine, "Transformer Engine").found


@pytest.mark.parametrize("packages, name, blocked", [
    ({"megatron_core": Package("0.17.0", "")}, "megatron-core", {CPU_TESTS, QUICKSTART, CUDA, FP8}),
    ({"megatron_core": Package("0.16.0", "")}, "megatron-core", {CPU_TESTS, QUICKSTART, CUDA, FP8}),
    ({"megatron_core": None}, "megatron-core", {CPU_TESTS, QUICKSTART, CUDA, FP8}),
    ({"transformer_engine": Package("2.12.1", "")}, "Transformer Engine", {CUDA, FP8}),
    ({"torch": Package("2.8.1+cu128", "")}, "torch", {CPU_TESTS, QUICKSTART, CUDA, FP8}),
    ({"torch": None}, "torch", {CPU_TESTS, QUICKSTART, CUDA, FP8}),
    ({"transformers": None}, "transformers", {CPU_TESTS, QUICKSTART}),
    ({"pytest": None}, "pytest", {CPU_TESTS}),
    ({"tqdm": None}, "tqdm", {CPU_TESTS, QUICKSTART, CUDA, FP8}),
    ({"wandb": None}, "wandb", set()),
])
def test_versions_and_packages(packages, name, blocked):
    machine = _with(NODE, **packages)
    assert _blocked(machine) == {capability: {name} for capability in blocked}
    assert _check(machine, name).fix


def test_torch_that_cannot_be_imported():
    torch = Torch("ImportError: libtorch.so", None, (), None, None, False)
    assert _blocked(dataclasses.replace(LAPTOP, torch=torch))[CPU_TESTS] == {"torch"}
    assert "libtorch.so" in _check(dataclasses.replace(LAPTOP, torch=torch), "torch").found


def test_nvidias_apex_and_the_other_one():
    other = Package("0.9.10.dev0", "Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions",
                    frozenset({"apex/lib", "apex/views.py"}))
    check = _check(_with(NODE, apex=other), "apex (NVIDIA)")
    assert check.ok is False and "unrelated" in check.found and "pip uninstall apex" in check.fix
    assert _blocked(_with(NODE, apex=other)) == {}
    for package in (Package("0.1", "PyTorch Extensions written by NVIDIA"),
                    Package("0.1", "", frozenset({"apex/normalization"}))):
        assert _check(_with(NODE, apex=package), "apex (NVIDIA)").ok is True
    assert _check(NODE, "apex (NVIDIA)").ok is None


@pytest.mark.parametrize("machine, found, ok", [
    (LAPTOP, "torch's AdamW: no Transformer Engine and no apex of NVIDIA's", None),
    (NODE, "Transformer Engine's FusedAdam", True),
    (dataclasses.replace(NODE, transformer_engine_error="ImportError: libcudnn"),
     "torch's AdamW: no Transformer Engine and no apex of NVIDIA's", None),
    (_with(LAPTOP, apex=Package("0.1", "", frozenset({"apex/normalization", "apex/optimizers"}))), "apex's FusedAdam",
     True),
    (_with(LAPTOP, apex=Package("0.9", "Pyramid toolkit", frozenset({"apex/lib"}))),
     "torch's AdamW: no Transformer Engine and no apex of NVIDIA's", None),
])
def test_which_adam_trainings_get(machine, found, ok):
    check = _check(machine, "Adam")
    assert (check.found, check.ok, check.needed_for) == (found, ok, ())


def test_memory_and_disk():
    assert _blocked(dataclasses.replace(NODE, free_memory=5 * GIB)) == {QUICKSTART: {"free memory"}}
    both = {CPU_TESTS: {"free memory"}, QUICKSTART: {"free memory"}}
    assert _blocked(dataclasses.replace(NODE, free_memory=GIB)) == both
    assert _blocked(dataclasses.replace(NODE, free_disk=GIB)) == {QUICKSTART: {"free disk"}}
    assert _check(dataclasses.replace(NODE, free_memory=None), "free memory").ok is None
    assert _blocked(dataclasses.replace(NODE, cores=1)) == {}


def test_the_text_says_what_is_missing_for_what():
    text = doctor.render(judge(_with(LAPTOP, transformers=None, apex=Package("0.9", "Pyramid toolkit"))))
    assert re.search(r"no  transformers +not installed  \[needed for CPU tests, quickstart\]", text)
    assert re.search(r" no  CPU tests\n       transformers: not installed. pip install -e '.\[hf\]'", text)
    assert re.search(r" no  FP8\n", text) and re.search(r"apex \(NVIDIA\): pip uninstall apex", text)
    assert re.search(r"yes  FP8\n|yes  FP8$", doctor.render(judge(NODE)))


def test_metadata_is_read_without_importing(tmp_path, monkeypatch):
    info = tmp_path / "apex-0.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9\nSummary: Pyramid toolkit\n")
    (info / "RECORD").write_text("apex/__init__.py,,\napex/lib/libapex.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor._package("apex") == Package("0.9", "Pyramid toolkit", frozenset({"apex/__init__.py", "apex/lib"}))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9\n")
    assert doctor._package("apex").summary == ""
    assert doctor._package("no-such-distribution") is None
    assert doctor._import_error("json") is None
    assert doctor._import_error("no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"


def test_this_machine(capsys):
    doctor.print_doctor()
    text = capsys.readouterr().out
    assert re.search(rf"torch +{re.escape(importlib.metadata.version('torch'))}", text)
    assert re.search(r"ok  gloo +yes", text) and "This machine can run:" in text
    assert doctor.probe().torch.error is None


def test_the_ranges_are_those_of_setup_py():
    text = (Path(doctor.__file__).parents[1] / "setup.py").read_text()
    for name, allowed in (("torch", doctor.TORCH), ("megatron-core", doctor.MEGATRON),
                          (r"transformer-engine\[pytorch\]", doctor.TRANSFORMER_ENGINE)):
        least, below = allowed
        wanted = f">={doctor._dotted(least)}" + (f",<{doctor._dotted(below)}" if below else "")
        assert re.search(f'"{name}{re.escape(wanted)}"', text), name
    install = text[text.index("install_requires") : text.index("extras_require")]
    assert set(re.findall(r'"([a-z0-9-]+)[>=<]', install)) == {"torch", "megatron-core", *doctor._REQUIRED}
    assert 'python_requires=">=3.11"' in text


def test_imports_nothing_heavy():
    code = "import sys, megakd.doctor; print([name for name in ('torch', 'megatron', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parents[1])})
    assert done.stdout == "[]\n"
