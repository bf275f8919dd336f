"""Recipes: the strict schema of an experiment, how it is loaded, and how its parts are built."""
