"""Decide: how a limit follows from the norms seen so far."""

from optax_clip.thresholds.engine import ThresholdRule as ThresholdRule
from optax_clip.thresholds.rules import ema_ratio as ema_ratio
from optax_clip.thresholds.rules import relative_to_params as relative_to_params
from optax_clip.thresholds.rules import running_quantile as running_quantile
from optax_clip.thresholds.rules import zscore as zscore
from optax_clip.thresholds.windows import window_quantile as window_quantile
from optax_clip.thresholds.windows import window_zscore as window_zscore

__all__ = [
    "ThresholdRule",
    "ema_ratio",
    "relative_to_params",
    "running_quantile",
    "window_quantile",
    "window_zscore",
    "zscore",
]
