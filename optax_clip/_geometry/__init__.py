"""What happens to leaves, on either side: it knows of no state, rule, setting or record."""
