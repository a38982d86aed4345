"""Act on gradients: clip by norm in any scope, by value, by singular values; normalise; measure."""

from optax_clip.clipping.by_norm import clip_by_global_norm as clip_by_global_norm
from optax_clip.clipping.by_norm import clip_by_norm as clip_by_norm
from optax_clip.clipping.by_norm import clip_tree as clip_tree
from optax_clip.clipping.by_norm import normalize_by_norm as normalize_by_norm
from optax_clip.clipping.by_singular_values import clip_singular_values as clip_singular_values
from optax_clip.clipping.by_value import clip_by_value as clip_by_value
from optax_clip.clipping.measuring import record_norms as record_norms

__all__ = [
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "clip_singular_values",
    "clip_tree",
    "normalize_by_norm",
    "record_norms",
]
