"""Tar shards in object storage: requests, cache of blocks on the node, index."""
