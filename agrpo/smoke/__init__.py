"""`agrpo smoke`: a configuration run offline in seconds, with its model scaled down and rows of its data's columns."""
