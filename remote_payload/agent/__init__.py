"""The part of the payload that needs only the standard library: verbs, the supervisor, bulk streams."""
