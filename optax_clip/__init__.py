"""Bounded gradients and bounded weights for JAX, as Optax transforms."""

from optax_clip.adaptive import *
from optax_clip.choosing import *
from optax_clip.clipping.by_norm import *
from optax_clip.clipping.by_singular_values import *
from optax_clip.clipping.by_value import *
from optax_clip.clipping.measuring import *
from optax_clip.mapping import *
from optax_clip.masks import *
from optax_clip.norms import *
from optax_clip.projection import *
from optax_clip.recording import *
from optax_clip.rescaling import *
from optax_clip.sets.balls import *
from optax_clip.sets.boxes import *
from optax_clip.sets.constraint import *
from optax_clip.sets.simplexes import *
from optax_clip.sets.spectral import *
from optax_clip.skipping import *
from optax_clip.thresholds.engine import *
from optax_clip.thresholds.rules import *
from optax_clip.thresholds.windows import *

__all__ = [
    "Constraint",
    "RecordedState",
    "ThresholdRule",
    "ThresholdTable",
    "adagc",
    "adaptive_grad_clip",
    "autoclip",
    "box",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_update_rms",
    "clip_by_value",
    "clip_singular_values",
    "clip_tree",
    "constrained",
    "ema_ratio",
    "global_norm",
    "gradient_mapping",
    "groups",
    "init_box",
    "initial",
    "mask_outward",
    "metrics",
    "non_negative",
    "norm_ball",
    "norm_shell",
    "norm_sphere",
    "normalize_by_norm",
    "per_layer",
    "project",
    "project_weights",
    "qk_clip",
    "record_norms",
    "relative_to_params",
    "rescale_weights",
    "running_quantile",
    "simplex",
    "skip_spikes",
    "spectral_ball",
    "threshold_table",
    "tree_norms",
    "violation",
    "where",
    "window_quantile",
    "window_zscore",
    "zclip",
    "zscore",
]

__version__ = "0.5.0"
