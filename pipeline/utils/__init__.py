"""Infrastructure independent of captioning: errors and exit codes, terminal output, progress,
atomic and locked files, devices and threads, options as dataclass fields, multi-process jobs.

Imports no other room. Start with ``errors`` and ``files``.
"""
