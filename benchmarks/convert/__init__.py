"""How fast the converter is, what memory it takes, and whether it survives being killed."""
