"""The cluster profiles that come with remote-eval, as package data."""
