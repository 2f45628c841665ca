"""Data input: images from folders and tar shards, captions in any layout, Flickr8k; tokenizers,
the vocabulary, and captions as token ids.

May import ``utils``. Start with ``images`` (file -> square) and ``caption_table`` (file -> table).
"""
