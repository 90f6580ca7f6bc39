"""What a run leaves behind for people and scripts: metrics, samples, the summary and the curves."""
