#%Module1.0
## hpc-hdb @VERSION@ for environment-modules, as installed by 'make module'.
proc ModulesHelp { } {
    puts stderr "Hybrid dual-batch and cyclic progressive learning for clusters."
    puts stderr ""
    puts stderr "  hdb doctor     what works here"
    puts stderr "  hdb --help     what there is to type"
    puts stderr ""
    puts stderr "Has a Python, and unless it was left out an MPI of its own: load it without another MPI."
}
module-whatis "Name: hpc-hdb"
module-whatis "Version: @VERSION@"
module-whatis "Description: hybrid dual-batch and cyclic progressive learning for clusters"

conflict hpc-hdb
conflict openmpi mpich mvapich2 impi intel-mpi intel-oneapi-mpi cray-mpich ;# @MPI@

set prefix {@PREFIX@}
setenv HPC_HDB_ROOT $prefix
setenv VIRTUAL_ENV $prefix
prepend-path PATH $prefix/bin
