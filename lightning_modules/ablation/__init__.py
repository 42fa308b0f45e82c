"""Methods compared where they have forgotten equally much: a grid of runs, their table and their picture."""
