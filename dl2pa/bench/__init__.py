"""Benchmarks of `dl2pa bench` and `dl2pa estimate`; each prints hardware, versions and repetitions."""

LINK_GB_PER_S = 50.0
"""Bandwidth per GPU and direction between nodes: InfiniBand of 400 Gbit/s, one adapter per GPU (NVIDIA's DGX H100 data
sheet)."""
