"""Files on a disk that others share: locks, workshops, atomic placing, digests, checked reading."""
