"""Distil a fast dual-encoder retriever from a slow image-text cross-encoder."""
