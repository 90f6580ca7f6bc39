"""agrpo: reinforcement learning from human feedback and from verifiable rewards."""

__version__ = "0.1.0"
