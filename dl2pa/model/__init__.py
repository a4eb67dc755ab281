"""The model: embedder and classifier head; saving, loading, serving and exporting it."""
