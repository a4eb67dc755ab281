"""PSC: the parametric softmax classifier, trained with the backbone; the baseline of the published tables.

Two forms: linear, softmax(W f + b), and normalized, softmax(s · cos(f, w_c)); W [C, d], b [C], f [B, d]. The published
rows behave like the normalized form without a scale (s = 1), which cannot fit; s = 14 makes it a strong baseline. With
`margin` the normalized form is CosFace (Wang et al., CVPR 2018). The source does not give the initialization: W is
Gaussian with variance 1/d, b is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dl2pa.methods.learned import LearnedMethod
from dl2pa.methods.options import MethodOptions
from dl2pa.model.head import ClassifierHead


class Psc(LearnedMethod):
    """Learned class vectors [C, d]; `options.normalize` chooses the form."""

    def __init__(self, num_classes: int, dim: int, options: MethodOptions) -> None:
        super().__init__(num_classes, dim, options, scaled=options.normalize)
        self.weight = nn.Parameter(torch.randn(num_classes, dim) / dim**0.5)
        self.bias = None if options.normalize else nn.Parameter(torch.zeros(num_classes))

    def head(self) -> ClassifierHead:
        if self.options.normalize:
            return ClassifierHead(F.normalize(self.weight, dim=1), self.scale())
        return ClassifierHead(self.weight, normalize=False, bias=self.bias)

    def class_vectors(self) -> Tensor:
        return F.normalize(self.weight.detach(), dim=1)
