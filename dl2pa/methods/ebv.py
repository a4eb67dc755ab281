"""EBV: equiangular basis vectors (Shen, Wang and Wei, CVPR 2023).

Prototypes P [C, d] whose cosines are all small in size, by minimizing Σ_{i≠j} ReLU(|cos_ij| − threshold) (the
construction `ebv`), label c at prototype c for good; loss CE(f̂ Pᵀ / 0.07) with label smoothing 0.1 and soft targets
under mixup and cutmix, f̂ [B, d] the unit features. Ours: thresholds at shapes they did not publish
(`geometry.objectives.ebv_threshold`); margin, learned scale and dynamic assignment on request.
"""

from __future__ import annotations

from dl2pa.methods.prototypical import PrototypeMethod


class Ebv(PrototypeMethod):
    """Static prototypes, cross-entropy over scaled cosines."""
