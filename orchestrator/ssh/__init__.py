"""SSH: connections, retries, diagnosis. Everything else talks to a `Transport`."""
