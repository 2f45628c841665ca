"""Stage 1: images through the encoder once, into one HDF5 feature cache, and reading it.

May import ``models`` and the rooms below it. Start with ``extraction``, then ``cache``.
"""
