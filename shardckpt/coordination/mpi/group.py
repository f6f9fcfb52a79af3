"""A torch process group made from MPI's ranks, or from SLURM's variables."""
