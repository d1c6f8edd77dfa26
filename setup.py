from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "megakd/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="megakd",
    version=version,
    description="Preference distillation of large teachers into small students on megatron-core",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megakd", "megakd.*"]),
    install_requires=[
        "torch>=2.9",
        "megatron-core>=0.16.1,<0.17",
        # What megatron-core imports without declaring it.
        "einops>=0.8",
        "psutil>=6",
        "numpy>=1.26",
        "pydantic>=2.12,<3",
        "pyyaml>=6",
        "jinja2>=3.1",
        "safetensors>=0.5",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "pyarrow>=15",
        "tqdm>=4.66",
        "rapidfuzz>=3.9",
    ],
    extras_require={
        # Both build against the CUDA torch that is installed; see docs/gpu_status.md.
        "gpu": ["torch>=2.10", "transformer-engine[pytorch]>=2.9,<2.12"],
        # Reading GGUF files and comparing with transformers.
        "hf": ["transformers>=5,<6", "gguf>=0.17", "accelerate>=1.10"],
        "eval": ["rouge-score>=0.1.2"],
        # For stages of kind lm_eval, with the extra hf.
        "lm-eval": ["lm-eval>=0.4.13,<0.5"],
        "wandb": ["wandb>=0.19"],
        # What benchmarks/losses.py compares with; benchmarks/README.md says how to add Liger.
        "bench": ["nvidia-modelopt>=0.47,<0.48", "trl>=1.16,<1.17"],
        # Triton's interpreter runs the losses' kernels in tests on a CPU (3.6 with numpy < 2.4 only). On CUDA it comes
        # with torch, which names the one release that it works with.
        "dev": [
            "pytest>=8", "pytest-xdist>=3.8", "hypothesis>=6.100", "ruff>=0.9",
            "triton>=3.6,<3.10; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["megakd = megakd.cli:main"]},
)
