"""DL2PA: prototypes fixed, labels assigned to them dynamically (CVPR 2024).

Alternates gradient descent on the backbone under fixed P [C, d] and σ with σ ← argmax_σ Σ_c q_c · P[σ(c)], where q_c is
the direction of class c's mean unit feature since the last matching. Prediction: argmax_c f̂ · P[σ(c)]. Ours beyond
the paper: the exact, order-free statistic, matching by step and after a learned-classifier warm-up, and the choice of
loss, scale and margin.
"""

from __future__ import annotations

from dl2pa.methods.prototypical import PrototypeMethod


class Dl2pa(PrototypeMethod):
    """Prototypes with dynamic assignment."""
