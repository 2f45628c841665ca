"""The local web page that captions dropped images.

May import ``reports`` and the rooms below it. Start with ``app``.
"""
