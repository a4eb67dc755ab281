"""Evaluate a trained model: on further sets of images, out-of-distribution detection, retrieval, and their record."""
