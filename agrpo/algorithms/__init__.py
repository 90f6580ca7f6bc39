"""The mathematics: pure functions of tensors and floats. Imports torch and the standard library, nothing of agrpo."""
