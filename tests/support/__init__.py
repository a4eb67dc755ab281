"""Helpers shared by the tests: runs, commands, servers and a SLURM cluster."""
