"""An exported student behind HTTP: search, embeddings and a page to try them."""
