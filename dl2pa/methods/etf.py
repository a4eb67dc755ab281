"""ETF: a fixed simplex equiangular tight frame as classifier (Yang et al., NeurIPS 2022).

P = √(C/(C−1)) · U (I − 11ᵀ/C), U [d, C] with orthonormal columns drawn at random, d ≥ C: every cosine is −1/(C−1)
(the construction `etf`). Label c at prototype c for good; dot regression loss, ½ mean (f·w̃_y − |w̃_y||f|)² / |f| with
w̃_k = √(γ/n_k) w_k, f [B, d] the features at length 1 (their head's last step; `losses.dot_regression`), evaluated on
the unweighted W. Ours: for d < C, where no such frame exists, the best prototypes known (`auto`).
"""

from __future__ import annotations

from dl2pa.methods.prototypical import PrototypeMethod


class Etf(PrototypeMethod):
    """Static prototypes, dot regression."""
