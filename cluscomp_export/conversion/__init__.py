"""From a source and options to an artefact."""
