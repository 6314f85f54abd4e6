"""How an attempt is started and looked for: one small module for each scheduler, behind `base.Scheduler`."""
