"""Methods compared where they have forgotten equally much: the grid, the matching, one run, all runs, the table."""
