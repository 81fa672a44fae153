"""A bundle as a function: of images, of batches of tables; and bundles made ready for servers that other people run."""

from vitfold.serve.tables import BatchPredictor

__all__ = ["BatchPredictor"]
