"""What an artefact is, and whether it is what it claims to be."""
