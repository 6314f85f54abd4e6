"""What the node runs. Python >= 3.9; standard library, torch and numpy only, and torch only where a job needs it."""
