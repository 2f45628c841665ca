"""Features to captions: greedy and beam search, sampling, reranking by consensus and image-text
matching.

May import ``features``, ``models`` and the rooms below them. Start with ``options`` and ``search``.
"""
