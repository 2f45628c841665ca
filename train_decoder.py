"""Stage 2: train the Show-and-Tell LSTM on cached features.

    python train_decoder.py --epochs 50                       # Flickr8k, into runs/decoder
    python train_decoder.py --data photos --run runs/photos   # your own captioned images
    python train_decoder.py --data photos --check             # are they fit to train on?

The run folder holds best.safetensors (the model to use), last.safetensors and resume.safetensors,
config.json, log.jsonl and samples.jsonl (scores and a few captions after every epoch), curves.svg
and curves.png, report.html (for the browser, also during training), and the best checkpoint's
scores and predictions on val. The same command resumes a run that was stopped. Exit codes: 0 done,
2 the command was wrong; with --check 0 training can start, 1 features have to be extracted first,
2 it cannot start.
"""

from pipeline.cli.train import main

if __name__ == "__main__":
    main()
