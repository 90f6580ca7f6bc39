"""Procedural tasks: functions that a `python:` source calls and that return rows."""
