"""Stages 2 and 3: the loop they share, the model and data of each, options, EMA, run folder.

May import ``decoding`` and the rooms below it, but no command, page or report: commands pass those
in as callbacks. Start with ``loop`` (``train``), then ``decoder_stage``.
"""
