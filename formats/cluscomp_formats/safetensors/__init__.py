"""The safetensors file format: https://github.com/huggingface/safetensors#format.

A file consists of the length of the header (8 bytes, little-endian), the header (a JSON object: name -> dtype, shape, begin and
end in the data) and the data, which the arrays fill without gaps or overlaps.

Models, deltas and work folders are written and read by this package, not by the library safetensors, because of what was found
with its version 0.8.0 (`benchmarks/safetensors_io.py`, 200 MB in arrays of 10 MB):

- The library writes a file from memory, all arrays at once: 200 MB on top of the process, 5 GB for a shard of a large model.
  One array after the other takes 20 MB.
- It maps a file as a whole: 210 MB of address space (200 MB with its `pread` backend). Windows of the file take 67 MB, so that
  a model larger than memory can be read under a limit on address space, and a truncated file is detected in time.
- It writes to a temporary file `.tmp...` of its own beside the target, readable by the owner alone, and renames it: a kill
  leaves a file that nobody can tell from a stranger's. An error of the system comes as text, without its number.
- Its numpy side cannot read bfloat16.
- Its files have the arrays in another order, and the members of `__metadata__` in an order that changes from run to run.
- It accepts a header in which a name occurs twice, and most of its errors do not name the array.
"""
