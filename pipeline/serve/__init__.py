"""The local web page that captions dropped images, and its endpoint for scripts.

May import ``reports`` and the rooms below it. Start with ``app``.
"""
