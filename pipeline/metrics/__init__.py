"""Caption metrics: BLEU, ROUGE-L, CIDEr-D, METEOR and SPICE (both through Java), and their
confidence intervals.

May import ``utils`` and ``datasets``. Start with ``coco``.
"""
