"""What an artefact contains, and whether it is what it claims to be."""
