"""Caption images: files, folders with their sub-folders, patterns, and lists of paths.

    python caption.py photos/
    python caption.py a.jpg 'holiday/*.png' --num-captions 3 --diverse
    python caption.py photos/ --output captions.csv           # or .json, .jsonl
    python caption.py photos/ --html captions.html            # a page to look at
    python caption.py photos/ --sidecar                       # photo.jpg -> photo.txt
    python caption.py photos/ --write-metadata                # into the images themselves
    find . -name '*.jpg' -print0 | python caption.py -
    python caption.py --serve                                 # a page to drop images on

Captions go to standard output, progress and errors to standard error. After an interruption the
same command resumes, unless captions go to standard output alone. Exit codes:
0 all images captioned, 1 some could not be read or written (each is named at the end), 2 the
command was wrong.
"""

from pipeline.cli.caption import main

if __name__ == "__main__":
    main()
