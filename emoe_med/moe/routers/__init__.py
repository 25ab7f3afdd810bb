"""One file per router."""
