"""Side-by-side measurements: ``python -m benchmarks.NAME [--quick] [--json FILE]`` prints a table of ratios.

Machines are noisy and shared: what is compared is measured in turn within one run, and what counts is the ratio.
"""
