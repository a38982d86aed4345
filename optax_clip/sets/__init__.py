"""Where a weight may live: closed sets and the projections onto them."""
