"""Stage 1: encode every image once into an HDF5 feature cache, and read it.

May import ``models`` and the rooms below it. Start with ``extraction``, then ``cache``.
"""
