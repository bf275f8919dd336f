"""The parts of a teacher's check-up: sample, statistics, what it is made of, what the figures mean."""
