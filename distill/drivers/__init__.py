"""Scoring and embedding beyond one process: a plan of work units on disk, and drivers that have its units done.

A unit is done iff its file is there. So whoever does the units, in whatever order, and however often it is killed, the
same files are there in the end, and starting again does only what is missing.
"""
