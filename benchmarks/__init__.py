"""Measurements against what a user would do instead. Nothing here decides a test."""
