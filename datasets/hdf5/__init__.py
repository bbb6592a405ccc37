"""HDF5 files of anybody, read safely."""
