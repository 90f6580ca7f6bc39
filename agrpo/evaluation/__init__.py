"""Held-out measurements: pass rates of policies, pairwise accuracy of reward models."""
