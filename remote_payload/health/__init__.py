"""The health job: one streaming pass over a checkpoint, checks over its facts, findings and a verdict."""
