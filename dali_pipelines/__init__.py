"""NVIDIA DALI pipelines that decode and augment images at a cycling resolution.

Usable without hpc_hdb: `classification` builds pipelines, `cyclic` feeds them through the stages of
a schedule, `feed` keeps one fed, `shards` reads and writes packed image folders (without DALI).
"""
