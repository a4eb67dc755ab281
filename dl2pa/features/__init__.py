"""Feature data sets: one pass of a frozen network over all images, for training on its features."""
