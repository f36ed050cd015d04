"""Committed tuning records, one folder a target: ``<target>/<kernel>/``, as package data."""
