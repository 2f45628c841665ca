"""Pages and figures of a training or an evaluation: report, curves, evaluation page, data check.

May import ``outputs`` and the rooms below it. Start with ``training_report``.
"""
