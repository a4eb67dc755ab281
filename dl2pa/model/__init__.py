"""The network of a run: embedder, classifier head, and how both are saved, loaded, served and exported."""
