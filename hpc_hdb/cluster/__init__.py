"""Who talks to whom, and how. Knows nothing of training."""

import os

# Open MPI, once it starts: what waits within it leaves its core to what computes.
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
