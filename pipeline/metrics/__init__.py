"""Scores of captions: BLEU, ROUGE-L, CIDEr-D, METEOR and SPICE through Java, and their
confidence intervals.

May import ``utils`` and ``datasets``. Start with ``coco``.
"""
