"""Embeddings and predictions of many image files."""
