"""NVIDIA DALI pipelines that read, decode and augment images; usable without hpc_hdb."""

from dali_pipelines.classification import (
    MEAN,
    STD,
    affine_matrices,
    evaluation_pipeline,
    training_pipeline,
)

__all__ = ["MEAN", "STD", "affine_matrices", "evaluation_pipeline", "training_pipeline"]
