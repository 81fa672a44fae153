"""One model over many images: what is read, how a part of it is computed, and a job that goes on where it stopped."""
