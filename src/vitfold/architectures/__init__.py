"""Forward passes, written once over `Ops`."""
