"""Options that several commands have, with their advice.

A command takes one as a decorator: ``@options.beam_size``.
"""

from __future__ import annotations

import click

beam_size = click.option(
    "--beam-size",
    type=click.IntRange(min=1),
    default=None,
    help="Hypotheses kept a picture. 1 is quickest, and poorest. Where --consensus or --matching "
    "choose among one decoder's, 5 to 20 do alike; else 3 to 5 is best, and more makes captions "
    "shorter and blander.  [default: 10 where they choose, 20 where several decoders caption "
    "together; else 3]",
    show_default=False,
)

consensus = click.option(
    "--consensus",
    type=click.FloatRange(min=0),
    default=None,
    help="Weight of a caption's agreement with those of similar training pictures; 0: none. It "
    "prefers what people say of such pictures.  [default: 2 where the model has such pictures]",
    show_default=False,
)

matching = click.option(
    "--matching",
    type=click.FloatRange(min=0),
    default=None,
    help="Weight of how well a caption fits the picture; 0: none. Higher, up to 4, makes captions "
    "more various.  [default: 2 where the model has a matcher]",
    show_default=False,
)
