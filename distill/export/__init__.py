"""A trained student as one folder for production, and the proof that it ranks as it did in training."""
