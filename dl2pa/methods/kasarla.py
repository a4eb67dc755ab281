"""Kasarla: maximum class separation as inductive bias in one matrix (Kasarla et al., NeurIPS 2022).

A fixed matrix behind the network: the regular simplex by their recursion (the construction `kasarla`), d = C−1; loss
CE(ρ · f P, y) with f [B, d] *not* normalized and ρ = 0.1 (ResNets), P [d, C]. Ours: d > C−1 by zero coordinates, which
change no logit; with `method.prototypes` any other prototypes, so that the loss runs at d < C−1 too.
"""

from __future__ import annotations

from dl2pa.methods.prototypical import PrototypeMethod


class Kasarla(PrototypeMethod):
    """Static prototypes, cross-entropy over ρ times the dot products with raw features."""
