"""Images and captions in: image files, folders and tar shards; caption files in any layout to one
table; tokenizers, the vocabulary, captions as token ids; Flickr8k itself.

May import ``utils``. Start with ``caption_table`` and ``images``.
"""
