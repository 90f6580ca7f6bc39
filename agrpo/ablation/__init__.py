"""`agrpo ablate`: a grid of settings under two methods and several seeds, run, measured, compared and drawn."""
