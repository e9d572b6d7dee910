"""Helper of the benchmarks: the bytes that this rank has sent, as Open MPI itself counts them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import mpi4py.MPI as MPI

ENABLE = {"OMPI_MCA_pml_monitoring_enable": "1"}
"""The environment in which the ranks must be started for Open MPI to count."""

_VARIABLE = b"pml_monitoring_messages_size"
_CLASS_SIZE = 2  # MPI_T_PVAR_CLASS_SIZE of Open MPI


class SentBytes:
    """Reads Open MPI's counters; with another library, or without `ENABLE`, they stay at 0.

    They hold all messages between ranks, those of collective operations too.
    """

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        paths = [path for path in loaded if Path(path).name.startswith("libmpi.so")]
        if MPI.get_vendor()[0] != "Open MPI" or not paths:
            return
        library = ctypes.CDLL(paths[0])
        library.MPI_T_init_thread(0, ctypes.byref(ctypes.c_int()))
        number, count = ctypes.c_int(), ctypes.c_int()
        if library.MPI_T_pvar_get_index(_VARIABLE, _CLASS_SIZE, ctypes.byref(number)):
            return
        self._session, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        library.MPI_T_pvar_session_create(ctypes.byref(self._session))
        world = ctypes.c_void_p(MPI._handleof(MPI.COMM_WORLD))
        library.MPI_T_pvar_handle_alloc(
            self._session,
            number,
            ctypes.byref(world),
            ctypes.byref(self._handle),
            ctypes.byref(count),
        )
        library.MPI_T_pvar_start(self._session, self._handle)
        self._values = (ctypes.c_size_t * count.value)()
        self._library = library

    def read(self) -> int:
        """Bytes sent to all other ranks since the start."""
        if self._library is None:
            return 0
        self._library.MPI_T_pvar_read(self._session, self._handle, self._values)
        return sum(self._values)
