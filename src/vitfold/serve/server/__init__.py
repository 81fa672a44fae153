"""Bundles behind HTTP: requests in batches, the Open Inference Protocol, bounds on what a request costs."""
