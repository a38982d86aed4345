"""Matrix functions: the polar factor, capped singular values, the largest one, a power iteration.

The last two axes are the matrix, those before them a batch; real or complex. All is computed in float32,
or float64 for float64 leaves. On a mesh the rows are split over the devices, and each product sums over
what is split, so that no device holds or is sent a whole matrix.
"""

from optax_clip._matrices.capped import cap_singular_values as cap_singular_values
from optax_clip._matrices.largest import largest_singular_value as largest_singular_value
from optax_clip._matrices.largest import power_step as power_step
from optax_clip._matrices.polar import msign as msign
from optax_clip._matrices.split import Method as Method
from optax_clip._matrices.split import default_method as default_method

__all__ = [
    "Method",
    "cap_singular_values",
    "default_method",
    "largest_singular_value",
    "msign",
    "power_step",
]
