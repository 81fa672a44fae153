"""What vitfold keeps: bundles, the cache, journals."""
