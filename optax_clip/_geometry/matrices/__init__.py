"""Matrix functions: the polar factor, capped singular values, the largest one, a power iteration.

The last two axes are the matrix, those before them a batch; real or complex. All is computed in float32,
or float64 for float64 leaves. On a mesh the rows are split over the devices, and each product sums over
what is split, so that no device holds or is sent a whole matrix.
"""

from optax_clip._geometry.matrices.capped import cap_singular_values
from optax_clip._geometry.matrices.largest import largest_singular_value, power_step
from optax_clip._geometry.matrices.polar import msign
from optax_clip._geometry.matrices.split import Method, wave

__all__ = ["Method", "cap_singular_values", "largest_singular_value", "msign", "power_step", "wave"]
