"""The safetensors file format."""
