"""Distil a fast dual-encoder retriever from a slow image-text cross-encoder."""

import os

# Else the last digits of MKL's products depend on where in memory their numbers happen to lie, and a run that goes on
# would not end with the weights of one that was never stopped. MKL reads it at its first product; no cost was measured.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
