"""Stages 2 and 3: the loop they share, what each stage trains, EMA, validation, the run folder.

May import ``decoding`` and the rooms below it, but no command, page or report: those are handed in
as callbacks. Start with ``loop`` and ``decoder_stage``.
"""
