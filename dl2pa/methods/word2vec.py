"""Word2Vec: prototypes from vectors of the class names, so that classes alike in meaning lie close.

P = the class vectors [C, k] of a file (GloVe, word2vec, …), centerd, reduced to d by PCA and scaled to length 1; label
c at prototype c for good; squared cosine loss, f [B, d]. The row "Word2Vec" of the published tables, after the word
vectors of Mikolov et al. (2013), trained as HPN (Mettes et al., NeurIPS 2019). Ours, the source being silent: the PCA,
without weighting or whitening; dynamic assignment on request, which gives up the meaning.
"""

from __future__ import annotations

from dl2pa.methods.prototypical import PrototypeMethod


class Word2Vec(PrototypeMethod):
    """Static prototypes from `method.class_vectors` (`geometry.prototypes_from_vectors`)."""
