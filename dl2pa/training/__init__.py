"""Training: entry, step loop, evaluation, checkpoints, stop signals, process group."""
