"""Class prototypes on the unit sphere: constructions, quality certificates and files."""

from dl2pa.constructions import CONSTRUCTIONS
from dl2pa.geometry.bounds import max_cosine_bound
from dl2pa.geometry.certificate import Certificate, certify, nearest_cosines
from dl2pa.geometry.files import load_prototypes, save_prototypes
from dl2pa.geometry.prototypes import Prototypes, build_prototypes
from dl2pa.geometry.vectors import directions_of_seen, principal_directions, prototypes_from_vectors

__all__ = [
    "CONSTRUCTIONS",
    "Certificate",
    "Prototypes",
    "build_prototypes",
    "certify",
    "directions_of_seen",
    "load_prototypes",
    "max_cosine_bound",
    "nearest_cosines",
    "principal_directions",
    "prototypes_from_vectors",
    "save_prototypes",
]
