"""Hyperspherical classifiers with dynamic label-to-prototype assignment: the method and its training service."""

__version__ = "0.1.0"
