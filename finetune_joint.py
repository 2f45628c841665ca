"""Stage 3, optional: train encoder and decoder together, on the images themselves.

    python finetune_joint.py                            # runs/decoder -> runs/joint
    python finetune_joint.py --start runs/photos --data photos --run runs/photos-joint

The result, best.safetensors in the run folder, includes the encoder and is never worse than the run
it started from, by CIDEr-D on val. The same command resumes a run that was stopped. Exit codes:
0 done, 1 some images could not be read (each is named), 2 the command was wrong.
"""

from pipeline.cli.finetune import main

if __name__ == "__main__":
    main()
