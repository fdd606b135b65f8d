"""How long tests wait for other processes before they call it a failure."""

PATIENCE_S = 900.0
"""Seconds: far beyond what anything takes on a machine that is busy with other work (a load of 10 on 2 cores)."""
