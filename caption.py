"""Caption pictures: files, folders with their sub-folders, and patterns.

    python caption.py photos/
    python caption.py a.jpg 'holiday/*.png' --beam-size 5 --num-captions 3
    python caption.py photos/ --format csv --output captions.csv

Captions go to standard output, progress and complaints to standard error. Exit codes:
0 all pictures captioned, 1 some could not be read (each is named at the end), 2 the
command was wrong.
"""

from pipeline.commands.caption import main

if __name__ == "__main__":
    main()
