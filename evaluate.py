"""Score a run on a split: BLEU, ROUGE-L, CIDEr-D, and METEOR and SPICE if they are available.

    python evaluate.py runs/decoder
    python evaluate.py runs/decoder --split test --beam-size 5
    python evaluate.py runs/joint --output predictions.json
    python evaluate.py runs/decoder --html decoder.html
    python evaluate.py runs/seed-0 runs/seed-1 runs/seed-2
    python evaluate.py --compare runs/decoder/predictions.json runs/joint/predictions.json

The table goes to standard output; predictions.json (COCO results format) and scores.json
go to the run folder; another split, search, checkpoint or data set appears in the file names
(predictions-test.json, scores-test.json). --html writes the images with their captions, references
and CIDEr-D into one page, worst first. Exit codes: 0 done, 1 some images could not be read and were
left out (each is named), 2 the command was wrong.
"""

from pipeline.cli.evaluate import main

if __name__ == "__main__":
    main()
