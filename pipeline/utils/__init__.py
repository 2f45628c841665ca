"""What every room needs and nothing of captioning: errors and exit codes, terminal output,
progress, atomic and locked files, devices and threads, several processes as one job.

Imports no other room. Start with ``errors`` and ``files``.
"""
