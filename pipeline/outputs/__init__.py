"""Where captions go: a folder of images captioned to a table, text files, image metadata or a
gallery page, and resuming that.

May import ``captioner``, ``evaluation``, ``training`` and the rooms below. Start with
``caption_folder``.
"""
