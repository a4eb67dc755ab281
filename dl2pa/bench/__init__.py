"""Measurements: each prints what it ran on, with which versions, how often."""
