"""The client: everything that happens on the user's own machine. Never imports torch."""

__version__ = "0.1.0"
