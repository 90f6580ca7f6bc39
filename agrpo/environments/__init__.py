"""Environments that come with the library, and how one is found by its import path."""
