"""What a person looks at: contact sheets (``sheet``) and tables of results (``table``)."""
