"""Files that come with the package; README.md says where they are from."""
