"""What every room needs, without captioning: errors and exit codes, terminal output, progress,
atomic and locked files, devices and threads, options as dataclass fields, several processes.

Imports no other room. Start with ``errors`` and ``files``.
"""
