"""One training loop for every task, and what keeps a run whole: checkpoints, the run folder, its record."""
