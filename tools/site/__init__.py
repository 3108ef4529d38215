"""What MkDocs runs while it builds the documentation (`mkdocs.yml`): the pages that are made of the
code, and formulas."""
