"""What the stages' loops share: one optimiser step, micro-batches, the schedule, and the session of a run."""
