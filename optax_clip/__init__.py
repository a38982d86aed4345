"""Bounded gradients and bounded weights for JAX, as Optax transforms."""

from optax_clip._records import RecordedState as RecordedState
from optax_clip.adaptive import adagc as adagc
from optax_clip.adaptive import adaptive_grad_clip as adaptive_grad_clip
from optax_clip.adaptive import autoclip as autoclip
from optax_clip.adaptive import clip_by_update_rms as clip_by_update_rms
from optax_clip.adaptive import zclip as zclip
from optax_clip.choosing import ThresholdTable as ThresholdTable
from optax_clip.choosing import threshold_table as threshold_table
from optax_clip.clipping import clip_by_global_norm as clip_by_global_norm
from optax_clip.clipping import clip_by_norm as clip_by_norm
from optax_clip.clipping import clip_by_value as clip_by_value
from optax_clip.clipping import clip_singular_values as clip_singular_values
from optax_clip.clipping import clip_tree as clip_tree
from optax_clip.clipping import normalize_by_norm as normalize_by_norm
from optax_clip.clipping import record_norms as record_norms
from optax_clip.mapping import constrained as constrained
from optax_clip.mapping import gradient_mapping as gradient_mapping
from optax_clip.masks import mask_outward as mask_outward
from optax_clip.masks import where as where
from optax_clip.norms import global_norm as global_norm
from optax_clip.norms import groups as groups
from optax_clip.norms import per_layer as per_layer
from optax_clip.norms import tree_norms as tree_norms
from optax_clip.projection import project as project
from optax_clip.projection import project_weights as project_weights
from optax_clip.projection import violation as violation
from optax_clip.recording import metrics as metrics
from optax_clip.rescaling import qk_clip as qk_clip
from optax_clip.rescaling import rescale_weights as rescale_weights
from optax_clip.sets import Constraint as Constraint
from optax_clip.sets import box as box
from optax_clip.sets import init_box as init_box
from optax_clip.sets import initial as initial
from optax_clip.sets import non_negative as non_negative
from optax_clip.sets import norm_ball as norm_ball
from optax_clip.sets import norm_shell as norm_shell
from optax_clip.sets import norm_sphere as norm_sphere
from optax_clip.sets import simplex as simplex
from optax_clip.sets import spectral_ball as spectral_ball
from optax_clip.skipping import skip_spikes as skip_spikes
from optax_clip.thresholds import ThresholdRule as ThresholdRule
from optax_clip.thresholds import ema_ratio as ema_ratio
from optax_clip.thresholds import relative_to_params as relative_to_params
from optax_clip.thresholds import running_quantile as running_quantile
from optax_clip.thresholds import window_quantile as window_quantile
from optax_clip.thresholds import window_zscore as window_zscore
from optax_clip.thresholds import zscore as zscore

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

__version__ = "0.3.0"
