"""A study: every objective against the same supervised start, at equal windows and at equal wall time.

plan.py says what is compared, run.py trains and measures one arm at a time, table.py with intervals.py what it shows.
"""
