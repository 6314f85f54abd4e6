"""The stages of a run: resolve, preflight, sync, launch, follow, collect, report. `run.advance` drives them."""
