"""HPN: hyperspherical prototype networks (Mettes, van der Pol and Snoek, NeurIPS 2019).

Prototypes placed by minimising the mean over classes of the largest cosine to another, label c at prototype c for
good, squared cosine loss. Dynamic assignment is ours to offer (`method.assignment=dynamic`).
"""

from __future__ import annotations

from dl2pa.methods.prototypical import PrototypeMethod


class Hpn(PrototypeMethod):
    """Prototypes with static assignment; `PrototypeOptions.dynamic` is off by default."""
