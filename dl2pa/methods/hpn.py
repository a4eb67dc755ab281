"""HPN: hyperspherical prototype networks (Mettes, van der Pol and Snoek, NeurIPS 2019).

Prototypes P [C, d] placed by minimizing the mean over classes of the largest cosine to another (the construction
`hpn`), label c at prototype c for good; squared cosine loss, mean (1 − cos(f, p_y))², f [B, d]. Dynamic assignment is
ours to offer (`method.assignment=dynamic`).
"""

from __future__ import annotations

from dl2pa.methods.prototypical import PrototypeMethod


class Hpn(PrototypeMethod):
    """Static prototypes, squared cosine."""
