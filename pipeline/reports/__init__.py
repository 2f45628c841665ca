"""A training or an evaluation to look at: curves, report, evaluation page, data check.

May import ``outputs`` and the rooms below it. Start with ``training_report``.
"""
