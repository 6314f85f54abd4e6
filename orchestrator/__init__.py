"""The client: everything that happens on the user's own machine. Never imports torch."""
