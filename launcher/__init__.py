"""Start training processes on this machine or in SLURM jobs."""
