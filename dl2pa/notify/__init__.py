"""Messages about the end or the stall of a run, sent by its supervisor outside the training processes."""
