"""Ranks that were started by mpirun or srun, and talk through an mpi4py communicator."""
