"""How close minerlib comes to its floors, as ratios within one run; see `python -m bench`."""
