"""Act on gradients: clip by norm in any scope, by value, by singular values; normalise; measure."""
