"""Where captions go: tables, text files, image metadata or a gallery page; and resuming.

May import ``captioner``, ``evaluation``, ``training`` and the rooms below. Start with
``caption_folder``.
"""
