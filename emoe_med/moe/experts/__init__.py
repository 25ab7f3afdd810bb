"""One file per kind of expert."""
