"""Data pipelines: batches on the device, each a pure function of (seed, epoch, step, global batch size)."""
