"""Where a weight may live: closed sets and the projections onto them."""

from optax_clip.sets.balls import norm_ball as norm_ball
from optax_clip.sets.balls import norm_shell as norm_shell
from optax_clip.sets.balls import norm_sphere as norm_sphere
from optax_clip.sets.boxes import box as box
from optax_clip.sets.boxes import init_box as init_box
from optax_clip.sets.boxes import non_negative as non_negative
from optax_clip.sets.constraint import Constraint as Constraint
from optax_clip.sets.constraint import initial as initial
from optax_clip.sets.simplexes import simplex as simplex
from optax_clip.sets.spectral import spectral_ball as spectral_ball

__all__ = [
    "Constraint",
    "box",
    "init_box",
    "initial",
    "non_negative",
    "norm_ball",
    "norm_shell",
    "norm_sphere",
    "simplex",
    "spectral_ball",
]
