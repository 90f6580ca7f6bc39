"""`agrpo doctor`: what this machine has, which backends work on it, and whether a configuration fits."""
