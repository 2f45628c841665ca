"""Stage 1: run InceptionV3 once over every image and store its 2048 features in HDF5.

    python extract_features.py                                # data/flickr8k, ImageNet weights
    python extract_features.py --download                     # fetch Flickr8k first
    python extract_features.py --data photos --output data/features/photos.h5
    python extract_features.py --weights inception_v3.pth     # where there is no network
    torchrun --nproc-per-node 4 -- extract_features.py        # four processes, a GPU each

After an interruption, run the same command again to resume. Exit codes: 0 all images
encoded, 1 some could not be read (each is named), 2 the command was wrong.
"""

from pipeline.cli.extract import main

if __name__ == "__main__":
    main()
