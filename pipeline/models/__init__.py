"""The networks (InceptionV3 encoder, LSTM decoder, ensemble, image-text matcher) and the checkpoint
file that stores them.

May import ``utils``, ``datasets`` and ``metrics``. Start with ``decoder`` and ``checkpoint``.
"""
