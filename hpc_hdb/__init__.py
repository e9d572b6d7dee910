"""hpc-hdb: hybrid dual-batch and cyclic progressive learning for clusters.

The method is that of Lu, Hong, Liu and Wu, "Hybrid Dual-Batch and Cyclic Progressive Learning
for Efficient Distributed Training" (arXiv 2509.26092).
"""

__version__ = "0.1.0"
