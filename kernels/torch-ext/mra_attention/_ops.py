"""The namespace of the custom operators. A build for the kernel hub replaces this file, to get a
namespace of its own.
"""

import torch

NAMESPACE = "mra_attention"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """Return `name` qualified with this package's operator namespace."""
    return f"{NAMESPACE}::{name}"
