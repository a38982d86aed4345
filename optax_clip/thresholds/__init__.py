"""Decide: how a limit follows from the norms seen so far."""
