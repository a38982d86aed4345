"""Bounded gradients and bounded weights for JAX, as Optax transforms."""

from importlib.metadata import version

from optax_clip.clipping import clip_by_global_norm as clip_by_global_norm
from optax_clip.clipping import clip_by_norm as clip_by_norm
from optax_clip.clipping import clip_by_value as clip_by_value
from optax_clip.clipping import clip_tree as clip_tree
from optax_clip.clipping import normalize_by_norm as normalize_by_norm
from optax_clip.norms import global_norm as global_norm
from optax_clip.norms import tree_norms as tree_norms
from optax_clip.projection import project as project
from optax_clip.projection import project_weights as project_weights
from optax_clip.projection import violation as violation
from optax_clip.projection import where as where
from optax_clip.recording import metrics as metrics
from optax_clip.sets import Constraint as Constraint
from optax_clip.sets import box as box
from optax_clip.sets import non_negative as non_negative
from optax_clip.sets import norm_ball as norm_ball
from optax_clip.sets import norm_sphere as norm_sphere
from optax_clip.thresholds import ThresholdRule as ThresholdRule

__all__ = [
    "Constraint",
    "ThresholdRule",
    "box",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "clip_tree",
    "global_norm",
    "metrics",
    "non_negative",
    "norm_ball",
    "norm_sphere",
    "normalize_by_norm",
    "project",
    "project_weights",
    "tree_norms",
    "violation",
    "where",
]

__version__ = version("optax_clip")
