"""`agrpo benchmark`: what a step costs here, beside another trainer doing the same work."""
