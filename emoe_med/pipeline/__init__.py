"""Many runs from one file: planned, run side by side, taken up again, compared in one table."""
