-- hpc-hdb @VERSION@ for Lmod, as installed by 'make module'.
help([[
Hybrid dual-batch and cyclic progressive learning for clusters.

  hdb doctor     what works here
  hdb --help     what there is to type

Has a Python, and unless it was left out an MPI of its own: load it without another MPI.
]])
whatis("Name: hpc-hdb")
whatis("Version: @VERSION@")
whatis("Description: hybrid dual-batch and cyclic progressive learning for clusters")

family("hpc_hdb")
family("mpi") -- @MPI@

local prefix = "@PREFIX@"
setenv("HPC_HDB_ROOT", prefix)
setenv("VIRTUAL_ENV", prefix)
prepend_path("PATH", pathJoin(prefix, "bin"))
